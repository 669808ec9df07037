"""What the benchmarks' commands share: a mistake is one line and exit code 2, and is found before hours are spent."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from fastgrpo.cli import guarded


def end(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and end the process with its exit code. SIGTERM unwinds it, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    sys.exit(guarded(lambda: main() or 0))


def writable(folder: Path) -> Path:
    """The folder, made if need be. OSError where nothing can be written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
