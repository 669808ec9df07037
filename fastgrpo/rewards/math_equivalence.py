"""The `math` reward: is the completion's answer mathematically the gold one?

The checking itself (math-verify) is in `math_worker.py` and happens in processes of their own, because sympy can take
forever on a short expression and only a killed process stops that.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fastgrpo.rewards.builtin import Completion, completion_text

logger = logging.getLogger("fastgrpo.rewards")


class MathEquivalence:
    r"""1.0 where the completion's answer equals the gold one mathematically (math-verify), else 0.0.

    Gold: the `answer` column, or `solution` for rows without one; a number, LaTeX, a text with `\boxed{}`, or GSM8K's
    worked solution ending in `#### 1,000`. Completion: the last `\boxed{}`, failing that the line after the last
    "####", failing that what math-verify finds (LaTeX, then the last number).

    A sample fails (None) when its gold answer is missing or cannot be parsed, or when its check takes longer than
    `sample_timeout` seconds, crashes or is not done `call_timeout` seconds after the call began. A completion that
    cannot be parsed scores 0.0. A check may use 4 GiB of memory.

    The processes start on the first call, serve all later ones, and end with this object or the program.
    """

    __name__ = "math"

    def __init__(
        self, *, sample_timeout: float = 5.0, call_timeout: float | None = None, num_workers: int | None = None
    ) -> None:
        """sample_timeout: seconds for the check of one sample.

        call_timeout: seconds for all samples of a call; those done by then keep their scores. None = no limit.
        num_workers: processes; default: this rank's share of the cores, at most 8.

        Raises ImportError without the `math` extra, ValueError for a non-positive option.
        """
        missing = [name for name in ("math_verify", "pebble") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(f"the math reward needs {' and '.join(missing)}: pip install fastgrpo[math]")
        if not sample_timeout > 0:
            raise ValueError(f"math: sample_timeout must be positive, got {sample_timeout}")
        if call_timeout is not None and not call_timeout > 0:
            raise ValueError(f"math: call_timeout must be positive or None, got {call_timeout}")
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"math: num_workers must be at least 1, got {num_workers}")
        self.sample_timeout = sample_timeout
        self.call_timeout = math.inf if call_timeout is None else call_timeout
        self.num_workers = num_workers or _default_workers()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._finalizer: Callable[[], Any] | None = None
        self._reported: set[str] = set()

    def __call__(
        self,
        completions: Sequence[Completion],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """A score per completion; see the class. Raises ValueError when the data has neither gold column."""
        if answer is None and solution is None:
            raise ValueError("the math reward needs a data-set column 'answer' or 'solution'")
        nothing = [None] * len(completions)
        golds = [a if a is not None else s for a, s in zip(answer or nothing, solution or nothing, strict=True)]
        texts = [completion_text(completion) for completion in completions]
        known = [i for i, gold in enumerate(golds) if gold is not None]
        outcomes = self._check([(str(golds[i]), texts[i]) for i in known])
        scores: list[float | None] = [None] * len(completions)
        for i, (score, reason) in zip(known, outcomes, strict=True):
            scores[i] = score
            if reason and reason not in self._reported:
                self._reported.add(reason)
                logger.warning(
                    "math reward, %s (reported once). Gold: %.200r; completion ends: %r",
                    reason,
                    golds[i],
                    texts[i][-200:],
                )
        return scores

    def close(self) -> None:
        """End the processes, hung or not. The next call starts new ones."""
        if self._finalizer is not None:
            self._finalizer()
        self._connection = self._finalizer = None

    def _check(self, pairs: list[tuple[str, str]]) -> list[tuple[float | None, str]]:
        with self._lock:
            connection = self._connection or self._start()
            try:
                connection.send((pairs, self.sample_timeout, self.call_timeout))
                return connection.recv()
            except (EOFError, OSError) as error:
                self.close()
                raise RuntimeError(
                    "the process that checks mathematics died; the next step starts a new one"
                ) from error

    def _start(self) -> Connection:
        connection, theirs = Pipe()
        # -P: the script's folder must not shadow top-level modules.
        script = Path(__file__).with_name("math_worker.py")
        command = [sys.executable, "-P", str(script), str(theirs.fileno()), str(self.num_workers)]
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self._connection = connection
        self._finalizer = weakref.finalize(self, _end, process, connection, os.getpid())
        return connection


math_equivalence = MathEquivalence
"""The `math` reward under the name of its kind: a factory that takes the reward's options, as the other built-ins."""


def _default_workers() -> int:
    return max(1, min(8, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _end(process: subprocess.Popen[bytes], connection: Connection, owner: int) -> None:
    connection.close()
    if os.getpid() != owner:  # a fork of the trainer holds a copy of this object, the processes are not its own
        return
    if process.returncode is None:  # not waited for, so its number still is its group's
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
