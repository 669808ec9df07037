"""A vLLM server on this machine, started and stopped by us."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastgrpo.errors import RunError
from fastgrpo.rollout.vllm.client import ServerClient

_GRACE_SECONDS = 5.0


# What torchrun tells each of several training processes: a server is no part of their group.
_LAUNCHERS = frozenset(
    {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"}
    | {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"}
)


class ServerProcess:
    """One server process with all its children, in a process group of its own.

    arguments:   of vLLM's server, the model among them; the address is added here.
    environment: variables beside this process's own, e.g. CUDA_VISIBLE_DEVICES.
    log:         file that takes its output, appended to.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._arguments = list(arguments)
        inherited = {k: v for k, v in os.environ.items() if k not in _LAUNCHERS and not k.startswith("TORCHELASTIC_")}
        self._environment = {**inherited, **environment, "VLLM_SERVER_DEV_MODE": "1"}
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start it, or start it again; what was left of the last one is killed first. Raises RunError once closed."""
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        command = [sys.executable, "-m", "fastgrpo.rollout.vllm.serve", *self._arguments, *address]
        with self._lock, self.log.open("ab") as output:
            if self._closed:
                raise RunError("the vLLM servers have been closed")
            self._end()
            self._process = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, client: ServerClient, timeout: float) -> None:
        """Return once it answers. Raises RunError when it ends or `timeout` seconds pass before that."""
        deadline = time.monotonic() + timeout
        while not client.healthy():
            if self._process is None or self._process.poll() is not None:
                raise RunError(f"a vLLM server ended while it started: {self._last_error()} (all of it: {self.log})")
            if time.monotonic() > deadline:
                raise RunError(f"a vLLM server did not come up within {timeout:.0f} s: see {self.log}")
            time.sleep(0.2)

    @property
    def pid(self) -> int | None:
        """Its process, also the group of all its children; None before the first start."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """End it and all its children, for good; returns when they are gone."""
        with self._lock:
            self._closed = True
            self._end()

    def _end(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        # Its children outlive a leader that was killed, and hold the memory that the next server needs.
        deadline = time.monotonic() + _GRACE_SECONDS
        while self._signal(signal.SIGKILL) and time.monotonic() < deadline:
            self._process.poll()
            time.sleep(0.05)
        self._process.wait()
        self._process = None

    def _signal(self, number: signal.Signals) -> bool:
        """To the whole group; returns whether there is anybody left in it."""
        assert self._process is not None
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _last_error(self) -> str:
        """The last line of its log that names an error, else the last line."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        named = [line for line in lines if "Error" in line or "error:" in line]
        return (named or lines or ["it wrote nothing"])[-1][-300:]


def free_port() -> int:
    """A TCP port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
