"""Starting and ending a server's processes. Needs no vLLM: a shell script stands in for it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgrpo.errors import RunError
from fastgrpo.rollout.vllm.client import ServerClient
from fastgrpo.rollout.vllm.process import ServerProcess


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ServerProcess]:
    """A server that is this shell script."""

    def make(script: str) -> ServerProcess:
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return ServerProcess(["--model", "here"], {"COLOUR": "blue"}, tmp_path / "log")

    return make


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_children_end_with_a_server_and_with_one_that_was_killed(make: Callable[[str], ServerProcess]) -> None:
    server = make("sleep 100 & echo up; wait")
    server.start()
    first = server.pid
    assert first is not None
    wait_for(lambda: "up" in server.log.read_text())
    os.kill(first, signal.SIGKILL)
    server.start()
    second = server.pid
    assert second is not None
    assert alive(second)
    assert not alive(first)
    server.close()
    server.close()
    assert not alive(second)
    assert server.pid is None
    with pytest.raises(RunError, match="have been closed"):
        server.start()


def test_it_is_told_where_to_listen_and_what_it_runs_in(make: Callable[[str], ServerProcess]) -> None:
    server = make('echo "$@ $COLOUR $VLLM_SERVER_DEV_MODE."; cat')
    server.start()
    wait_for(lambda: server.log.read_text().endswith(".\n"))
    expected = f"-m fastgrpo.rollout.vllm.serve --model here --host 127.0.0.1 --port {server.port} blue 1.\n"
    assert server.log.read_text() == expected
    server.close()


def test_a_server_that_ends_or_never_answers_says_why(make: Callable[[str], ServerProcess]) -> None:
    server = make("echo starting; echo 'ValueError: no such model'; echo bye; exit 1")
    client = ServerClient(server.url, 1.0)
    server.start()
    with pytest.raises(RunError, match=r"ended while it started: ValueError: no such model \(all of it: .*log\)$"):
        server.wait(client, 20)
    server = make("cat")
    server.start()
    with pytest.raises(RunError, match="did not come up within 0 s: see "):
        server.wait(ServerClient(server.url, 1.0), 0.3)
    server.close()
