"""Processes killed by SIGKILL while they save: what is found afterwards is whole, and the last or the one before it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgrpo.files import atomic_write

NURSERY = """
import json, os, random, signal, sys, time
from pathlib import Path
from fastgrpo.checkpoint import CheckpointStore
from fastgrpo.files import atomic_write

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}
run_dir = Path(sys.argv[1])
journal = run_dir / "journal"

def child(work, nth=0):
    "Forks a child that does `work`, killed by SIGKILL at its nth file operation."
    pid = os.fork()
    if pid:
        return pid
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in EVENTS:
            seen += 1
            if seen == nth:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    work()
    os._exit(0)

def save(store, step, text):
    def write(folder):
        (folder / "model").mkdir()
        for name in ("a", "model/b"):
            (folder / name).write_text(f"{step} {text} " * 2000)
    store.save(step, write)
    os.write(log, f"{step} {text}\\n".encode())  # an open descriptor: not a file operation the hook counts

def check(allowed):
    "A new process finds the last saved or the one that was being saved, whole, and nothing else."
    store = CheckpointStore(run_dir, save_total_limit=2)
    path = store.latest()
    text = (path / "a").read_text()
    assert text == (path / "model/b").read_text()
    step, word = text.split()[:2]
    assert text == f"{step} {word} " * 2000 and path.name == f"step-{int(step):08d}"
    assert (int(step), word) in allowed, (step, word, allowed)
    hidden = [p.name for p in store.folder.iterdir() if p.name.startswith(".")]
    assert not hidden, hidden
    for _, other in store._list():
        store.verify(other)
    return int(step), word

def last():
    line = journal.read_text().splitlines()[-1].split()
    return int(line[0]), line[1]

log = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
"""

EVERY_OPERATION = """
order = [(2, "x"), (3, "x"), (3, "y"), (1, "z")]   # add with pruning, replace, go back
nth = 0
while True:
    nth += 1
    store = CheckpointStore(run_dir, save_total_limit=2)
    for step, text in [(1, "x"), (2, "x")]:
        save(store, step, text)
    pid = child(lambda: [save(CheckpointStore(run_dir, save_total_limit=2), *o) for o in order[1:]], nth)
    status = os.waitpid(pid, 0)[1]
    done = order.index(last())
    if not os.WIFSIGNALED(status):
        assert status == 0 and done == 3
        break
    check(order[done : done + 2])
print(nth)
"""

RANDOM_MOMENTS = """
save(CheckpointStore(run_dir, save_total_limit=2), 1, "x")
kills = 0
for seed in range(25):
    step = check([last(), (last()[0] + 1, "x")])[0]
    def work():
        store = CheckpointStore(run_dir, save_total_limit=2)
        for k in range(step + 1, step + 1000):
            save(store, k, "x")
    pid = child(work)
    while last()[0] <= step:  # however slow the machine, each child saves once or more
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0, 0.05))
    os.kill(pid, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    check([last(), (last()[0] + 1, "x")])
assert last()[0] > 25, last()
print(kills)
"""

ATOMIC_WRITE = """
target = run_dir / "file"
nth = 0
while True:
    nth += 1
    atomic_write(target, "old " * 50000)
    pid = child(lambda: atomic_write(target, "new " * 50000), nth)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert target.read_text() in ({"old " * 50000, "new " * 50000} if killed else {"new " * 50000})
    if not killed:
        break
print(nth)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """In memory where possible: a killed process loses nothing there either, and flushing hundreds of times is free."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def in_nursery(run_dir: Path, scenario: str) -> int:
    """Runs a scenario in a process of its own that forks and kills; returns the number it prints."""
    command = [sys.executable, "-c", NURSERY + scenario, str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_killed_at_every_file_operation(run_dir: Path) -> None:
    assert in_nursery(run_dir, EVERY_OPERATION) > 50


def test_killed_at_random_moments(run_dir: Path) -> None:
    assert in_nursery(run_dir, RANDOM_MOMENTS) == 25


def test_atomic_write_killed_at_every_file_operation(run_dir: Path) -> None:
    assert in_nursery(run_dir, ATOMIC_WRITE) > 2


# -------------------------------------------------------------------------------------------------------- atomic_write


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "ä")
    assert path.read_bytes() == "ä".encode()
    atomic_write(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
