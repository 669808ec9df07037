"""SIGTERM and Ctrl-C as requests to stop: the first is answered at the next safe point, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequested(BaseException):
    """Raised at a safe point after a signal asked the run to stop.

    A BaseException: reward functions and engines that catch Exception do not swallow it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopSignals:
    """While active, SIGINT and SIGTERM raise `StopRequested` inside `interruptible()` or at its next entrance.

    After the first signal the default handlers are back, so that a second one ends the process at once. Outside the
    main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self._requested: int | None = None
        self._interruptible = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._on_signal) for s in _STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._previous = {}

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A stretch that may be cut anywhere, because what it does is done again after a resume."""
        self.check()
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def check(self) -> None:
        """Raise `StopRequested` if a signal has come."""
        if self._requested is not None:
            raise StopRequested(self._requested)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._requested = signum
        for s in _STOPPING:
            signal.signal(s, signal.SIG_DFL)
        if self._interruptible:
            self._interruptible = False
            raise StopRequested(signum)
