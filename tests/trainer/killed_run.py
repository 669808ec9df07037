"""Runs that kill themselves with SIGKILL at a chosen moment, for test_kills.py.

`python killed_run.py` reads requests from its standard input, a JSON list `[moment, count, config, log]` a line. For
each it forks a process that runs `fastgrpo train config` and ends, as by `kill -9`, at the `count`th such moment:
nothing is flushed, no handler runs. It answers with the process's id, and with its exit code when it has ended. The
fork saves the imports, nothing else: each run is a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

count = 0


def reward(completions: list[str], **_: Any) -> list[float]:
    """The share of digits, and noise from every global generator: a resume must put them all back."""
    noise = random.random() + np.random.random() + torch.rand(()).item()  # noqa: NPY002
    shares = [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
    return [share + 0.1 * noise * (i % 3) for i, share in enumerate(shares)]


def dying(function: Callable[..., Any], at: int, *, before: bool) -> Callable[..., Any]:
    """`function`, but its `at`th call is the process's last act (or is never made, if `before`)."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        global count
        count += 1
        if before and count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def endless(*_: Any) -> None:
    """Stands for an optimizer step that takes for ever; a mark on the output says that it has begun."""
    print("asleep", flush=True)
    while True:
        time.sleep(0.05)


def full_disk(path: Path, *_: Any) -> None:
    """Stands for writing to a disk that fills up half-way."""
    path.write_bytes(b"x" * 10)
    with open("/dev/full", "wb", buffering=0) as device:
        device.write(b"x")


def run(moment: str, at: int, config: str) -> int:
    from fastgrpo import checkpoint, snapshot, trainer
    from fastgrpo.cli import main
    from fastgrpo.optim import Optimizer
    from fastgrpo.recorder import Recorder
    from fastgrpo.rewards import RewardRunner

    places: dict[str, tuple[Any, str, bool]] = {
        "reward": (RewardRunner, "score", False),
        "optimizer": (Optimizer, "step", False),
        "line": (Recorder, "step_line", False),
        "save-begins": (trainer, "write_snapshot", True),
        "save-half": (snapshot, "save_tensors", False),
        "save-written": (trainer, "write_snapshot", False),
        "save-unpublished": (checkpoint.CheckpointStore, "_publish", True),
        "save-published": (checkpoint.CheckpointStore, "_publish", False),
    }
    if moment in places:
        owner, name, before = places[moment]
        setattr(owner, name, dying(getattr(owner, name), at, before=before))
    elif moment == "endless-step":
        Optimizer.step = endless  # type: ignore[method-assign, assignment]
    elif moment == "full-disk":
        snapshot.save_tensors = full_disk  # type: ignore[assignment]
    elif moment != "never":
        raise ValueError(moment)
    return main(["train", config])


def serve() -> None:
    import datasets  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        moment, at, config, log = json.loads(line)
        pid = os.fork()
        if pid == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = run(moment, at, config)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.modules["killed_run"] = sys.modules["__main__"]
    serve()
