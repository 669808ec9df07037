"""Requests that are handed out, given back when a server dies, and counted until all are done."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from fastgrpo.errors import RunError

Result = TypeVar("Result")


class RequestQueue(Generic[Result]):
    """Numbered requests, each answered exactly once whatever becomes of the servers.

    count:        requests, numbered from 0.
    max_attempts: a request that was there when servers failed this often ends the lot: it may be what kills them.
    """

    def __init__(self, count: int, max_attempts: int) -> None:
        self._waiting = deque(range(count))
        self._results: dict[int, Result] = {}
        self._incidents: list[set[Hashable]] = [set() for _ in range(count)]
        self._max_attempts = max_attempts
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def take(self) -> int | None:
        """The next request; waits while all that are left are with others. None when there is nothing more to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._over())
            return None if self._over() else self._waiting.popleft()

    def answer(self, number: int, result: Result) -> None:
        """The request's answer."""
        with self._changed:
            self._results[number] = result
            self._changed.notify_all()

    def give_back(self, number: int, incident: Hashable, cause: Exception) -> bool:
        """The request got no answer: it is the next to be handed out again. Returns False when all is over anyway.

        incident: what happened to the server; however many of its threads run into it, it counts once.
        """
        with self._changed:
            self._incidents[number].add(incident)
            if len(self._incidents[number]) >= self._max_attempts:
                self._fail(RunError(f"a request to the vLLM servers failed {self._max_attempts} times, last: {cause}"))
            self._waiting.appendleft(number)
            self._changed.notify_all()
            return not self._over()

    def fail(self, error: BaseException) -> None:
        """Give everything up; the first error given counts."""
        with self._changed:
            self._fail(error)
            self._changed.notify_all()

    def answers(self, timeout: float | None) -> Iterator[tuple[int, Result]]:
        """Every request with its answer, as they come.

        Raises the error of `fail`, or RunError when `timeout` seconds have passed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        given = 0
        while given < len(self._incidents):
            for number in self._wait(given, timeout, deadline):
                yield number, self._results[number]
                given += 1

    def _wait(self, given: int, timeout: float | None, deadline: float | None) -> list[int]:
        """The requests answered after the first `given`, at least one."""
        with self._changed:
            while self._error is None and len(self._results) == given:
                left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
                if left <= 0:
                    done, count = len(self._results), len(self._incidents)
                    self._fail(
                        RunError(f"rollouts took more than {timeout:.0f} s: {done} of {count} prompts were done")
                    )
                else:
                    self._changed.wait(left)  # in slices: a signal must get its turn
            if self._error is not None:
                raise self._error
            return list(self._results)[given:]

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error

    def _over(self) -> bool:
        return self._error is not None or len(self._results) == len(self._incidents)
