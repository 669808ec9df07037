"""The progress display: right on any terminal or none, and never a reason for a run to end."""

from __future__ import annotations

import io
import logging
import math
import os
import pty
import struct
import subprocess
import sys

import pytest
import torch

from fastgrpo.tracking import Progress


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


def test_plain_lines_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with Progress(80, first_step=10) as progress:
        for step in range(11, 81):
            clock.now += 1.0
            metrics = {"reward": step / 100, "entropy": 0.42, "completions/mean_length": 4.9}
            metrics |= {"perf/tokens_per_second": 12345.0} if step % 2 else {}
            progress.update(step, metrics | ({"eval/accuracy": 0.75} if step == 13 else {}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 11/80  reward 0.11  entropy 0.42  length 4.9  12.3k tok/s  eta 1:09"
    assert lines[1].startswith("step 13/80  reward 0.13  eval 0.75  entropy")  # evaluations show at once
    assert [line.split()[1] for line in lines[2:5]] == ["18/80", "23/80", "28/80"]
    assert lines[-1] == "step 80/80  reward 0.8  eval 0.75  entropy 0.42  length 4.9  12.3k tok/s"


def test_plain_lines_with_missing_and_broken_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(3, plain_interval=0.0)
    progress.update(1, {})
    progress.update(2, {"reward": None, "loss": math.nan, "kl": math.inf, "entropy": torch.tensor(0.5)})
    progress.message("a [bold]message[/bold]")
    progress.update(3, {"loss": 1e-7})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/3  eta ")
    assert lines[1].startswith("step 2/3  reward nan  loss nan  entropy 0.5  kl nan  eta ")
    assert lines[2:] == ["a [bold]message[/bold]", "step 3/3  reward nan  loss 1e-7  entropy 0.5  kl nan"]


def test_the_pace_counts_steps_and_not_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    progress = Progress(5, plain_interval=0.0)
    progress.update(0, {"eval/accuracy": 0.5})
    for step in (1, 2):
        clock.now += 10.0
        progress.update(step, {})
        progress.update(step, {"eval/accuracy": 0.5})
    etas = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert etas == ["?", "0:40", "0:40", "0:30", "0:30"]


def test_disabled_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, enabled=False) as progress:
        progress.update(1, {"reward": 1.0})
        progress.message("hello")
        progress.update(2, {"reward": 1.0})
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    progress = Progress(3)
    for step in (1, 2, 3):
        progress.update(step, {"reward": 1.0})


LIVE = """
import logging, math, sys, time
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
before = logging.root.handlers[0].stream
from fastgrpo.tracking import Progress
with Progress(40, first_step=0) as progress:
    for step in range(1, 41):
        progress.update(step, {"reward": math.nan if step == 3 else step / 40, "loss": None, "entropy": 0.25,
                               "perf/tokens_per_second": 12345.0})
        if step in (10, 20):
            logging.getLogger("someone").info(f"LOG{step} " + "x" * 10)
            progress.message(f"MESSAGE{step}")
            print(f"PRINT{step}")
        time.sleep(0.02)
assert logging.root.handlers[0].stream is before is sys.stderr
logging.getLogger("someone").info("LOG-AFTER")
"""


def on_a_terminal(code: str, columns: int) -> list[str]:
    """The screen lines a small terminal emulator is left with after `code` ran in a pseudo-terminal."""
    import fcntl
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", "COLUMNS": str(columns)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=child, stdout=child, stderr=child, env=environment
    ) as process:
        os.close(child)
        received = b""
        while True:
            try:
                chunk = os.read(parent, 65536)
            except OSError:  # Linux reports the terminal's end as EIO
                break
            if not chunk:
                break
            received += chunk
    os.close(parent)
    assert process.returncode == 0, received.decode()
    return emulate(received.decode(), columns)


def emulate(received: str, columns: int) -> list[str]:
    """What the control sequences rich uses leave on a screen that is tall enough never to scroll."""
    import re

    screen: list[list[str]] = [[]]
    row = column = 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]", received):
        if token.startswith("\x1b"):
            count = int(token[2:-1] or 1) if token[2:-1].isdigit() or not token[2:-1] else 0
            if token[-1] == "A":
                row -= count
            elif token[-1] == "K":
                screen[row] = [] if token[2:-1] == "2" else screen[row][:column]
            else:
                assert token[-1] in "mhl", f"unknown control sequence {token!r}"
        elif token == "\r":
            column = 0
        elif token == "\n":
            row += 1
        else:
            if column == columns:
                row, column = row + 1, 0
            while len(screen) <= row:
                screen.append([])
            line = screen[row]
            line.extend(" " * (column + 1 - len(line)))
            line[column] = token
            column += 1
        while len(screen) <= row:
            screen.append([])
    return [text for line in screen if (text := "".join(line).rstrip())]


@pytest.mark.parametrize("columns", [110, 60, 30])
def test_the_live_bar_is_not_garbled(columns: int) -> None:
    lines = on_a_terminal(LIVE, columns)
    expected = [f"{kind}{step}" for step in (10, 20) for kind in ("LOG", "MESSAGE", "PRINT")]
    assert [line.split()[0] for line in lines[:6]] == expected, lines
    assert lines[6].startswith("step 40/40"), lines
    assert lines[7].startswith("reward 1"), lines
    assert lines[8:] == ["LOG-AFTER"]
    assert all(len(line) <= columns for line in lines)
    if columns == 110:
        assert "reward 1 (avg 0.762 ▁▂▂▃▄▄▅▅▆▇▇█)" in lines[7]
        assert "loss nan" in lines[7]
        assert "12.3k tok/s" in lines[7]


def test_handlers_get_their_stream_back_after_an_error() -> None:
    code = (
        "import logging, sys\nfrom fastgrpo.tracking import Progress\nhandler = logging.StreamHandler(sys.stdout)\n"
        "logging.getLogger('a.b').addHandler(handler)\nstream = handler.stream\n"
        "try:\n    with Progress(3):\n        assert handler.stream is not stream\n        raise KeyboardInterrupt\n"
        "except KeyboardInterrupt:\n    print('restored', handler.stream is stream is sys.stdout)\n"
    )
    assert on_a_terminal(code, 80)[-1] == "restored True"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    before = logging.root.handlers[:]
    with Progress(1) as progress:
        progress.update(1, {"reward": 0.5})
    assert capsys.readouterr().out == "step 1/1  reward 0.5\n"
    assert logging.root.handlers == before
