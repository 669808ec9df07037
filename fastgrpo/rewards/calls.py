"""Calls of user code that may hang, raise or exit, made so that the run survives them.

Done here: per-call timeouts, abandoning what does not come back, one event loop for the async functions. Not done
here: what a returned value means (`runner.py`). A Python thread cannot be killed: a hung call keeps its daemon
thread, which blocks neither the run nor the exit of the process, and `CallExecutor` refuses to go on when many pile up.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from fastgrpo.errors import RunError

LOOP_GRACE = 1.0
"""Seconds beyond its timeout after which an async call whose event loop does not answer is given up."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one function: `fn(**kwargs)`, given up after `timeout` seconds (None = never)."""

    name: str
    fn: Callable[..., Any]
    kwargs: dict[str, Any]
    timeout: float | None

    @property
    def is_async(self) -> bool:
        """`fn` is a coroutine function, or an object whose `__call__` is one."""
        return inspect.iscoroutinefunction(self.fn) or inspect.iscoroutinefunction(getattr(self.fn, "__call__", None))  # noqa: B004


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call: `value`, or the `error` it raised; `CallTimeout` is the error of one that was given up."""

    value: Any = None
    error: BaseException | None = None


class CallTimeout(Exception):
    """The call was given up. The message says after how long and, where known, the line that hangs."""


class CallExecutor:
    """Makes the calls of a step.

    Async functions start first and run concurrently on one event loop in a daemon thread, which lives on from step to
    step (so clients bound to a loop stay usable). Sync functions meanwhile run one after another, in order: two of
    them never race for the global random state. With a timeout a sync function runs in a daemon thread of its own;
    without one it runs in the calling thread, where `signal.alarm` works, and only its `Exception`s are survived.
    """

    def __init__(self, max_abandoned: int = 8) -> None:
        self.max_abandoned = max_abandoned
        self._abandoned: list[tuple[str, threading.Thread]] = []
        self._loop: _LoopThread | None = None
        self._starting = threading.Lock()  # groups may be scored from several threads

    def run(self, calls: list[Call]) -> list[Outcome]:
        """The outcomes, in the order of `calls`.

        Raises RuntimeError when `max_abandoned` earlier calls still hang, and KeyboardInterrupt at once.
        """
        self._refuse_if_too_many_hang()
        started = {i: self._start_async(call) for i, call in enumerate(calls) if call.is_async}
        try:
            outcomes = {i: self._run_sync(call) for i, call in enumerate(calls) if not call.is_async}
            outcomes.update({i: self._collect_async(calls[i], *started[i]) for i in started})
        finally:
            for future, _ in started.values():
                future.cancel()
        return [outcomes[i] for i in range(len(calls))]

    def close(self) -> None:
        """Stop the event loop's thread. Hung threads are left alone. The executor can be used again."""
        if self._loop is not None:
            self._loop.stop()
            self._loop = None

    def _refuse_if_too_many_hang(self) -> None:
        self._abandoned = [(name, thread) for name, thread in self._abandoned if thread.is_alive()]
        if len(self._abandoned) >= self.max_abandoned:
            names = ", ".join(sorted({name for name, _ in self._abandoned}))
            raise RunError(
                f"{len(self._abandoned)} reward calls that timed out are still running (reward functions: {names}). "
                "Give their blocking operations a timeout of their own, or fix the hang."
            )

    def _run_sync(self, call: Call) -> Outcome:
        if call.timeout is None:
            # Ctrl-C and the like arrive in the main thread, as exceptions that are no Exception.
            return _outcome_of(call, survived=Exception)
        box: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        device = cuda_device()

        def target() -> None:
            set_cuda_device(device)
            # Scorers call sys.exit, and libraries derive their own time-outs from BaseException.
            box.put(_outcome_of(call, survived=BaseException))

        thread = threading.Thread(target=target, name=f"reward-{call.name}", daemon=True)
        thread.start()
        try:
            outcome = box.get(timeout=call.timeout)
        except queue.Empty:
            self._abandoned.append((call.name, thread))
            return Outcome(error=CallTimeout(f"no result after {call.timeout:g} s{_where(thread)}"))
        return outcome

    def _start_async(self, call: Call) -> tuple[Future[Outcome], float | None]:
        deadline = None if call.timeout is None else time.monotonic() + call.timeout + LOOP_GRACE
        with self._starting:
            if self._loop is None:
                self._loop = _LoopThread()
            return asyncio.run_coroutine_threadsafe(_await_call(call), self._loop.loop), deadline

    def _collect_async(self, call: Call, future: Future[Outcome], deadline: float | None) -> Outcome:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            return future.result(remaining)
        except CancelledError as error:
            return Outcome(error=error)
        except TimeoutError:
            return self._abandon_async(call)

    def _abandon_async(self, call: Call) -> Outcome:
        reason = "it ignored its cancellation"
        if self._loop is not None and not self._loop.responds():
            reason = f"the event loop is blocked (blocking code inside async def?){_where(self._loop.thread)}"
            self._abandoned.append((call.name, self._loop.thread))
            self._loop.loop.call_soon_threadsafe(self._loop.loop.stop)  # should it ever be free again
            self._loop = None
        return Outcome(error=CallTimeout(f"no result after {call.timeout:g} s: {reason}"))


def _outcome_of(call: Call, survived: type[BaseException]) -> Outcome:
    try:
        return Outcome(call.fn(**call.kwargs))
    except survived as error:
        return Outcome(error=error)


async def _await_call(call: Call) -> Outcome:
    """Everything but our own cancellation becomes an outcome: SystemExit from a task would end the loop's thread."""
    try:
        async with asyncio.timeout(call.timeout) as scope:
            outcome = Outcome(await call.fn(**call.kwargs))
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        outcome = Outcome(error=error)
    if scope.expired():
        return Outcome(error=CallTimeout(f"no result after {call.timeout:g} s"))
    return outcome


class _LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(_DaemonExecutor())
        self.thread = threading.Thread(target=self._run, args=(cuda_device(),), name="reward-loop", daemon=True)
        self.thread.start()

    def _run(self, device: int | None) -> None:
        set_cuda_device(device)
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def responds(self) -> bool:
        """The loop runs a callback within `LOOP_GRACE` seconds."""
        answered = threading.Event()
        self.loop.call_soon_threadsafe(answered.set)
        return answered.wait(LOOP_GRACE)

    def stop(self) -> None:
        """Cancel what still runs and end the thread; a thread that does not end is left to the process's exit."""
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop)
        self.thread.join(LOOP_GRACE)
        if not self.thread.is_alive():
            self.loop.close()

    async def _stop(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=LOOP_GRACE / 2) if tasks else None
        self.loop.stop()


class _DaemonExecutor(ThreadPoolExecutor):
    """`asyncio.to_thread` in daemon threads: the standard pool's threads are joined at exit, so a hung request inside
    one would keep the process alive. asyncio accepts only a ThreadPoolExecutor."""

    def __init__(self, max_threads: int = 32) -> None:
        super().__init__(max_workers=1)
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._unstarted = max_threads

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.put((future, lambda: fn(*args, **kwargs)))
        if not self._idle.acquire(blocking=False) and self._unstarted > 0:
            self._unstarted -= 1
            threading.Thread(target=self._work, args=(cuda_device(),), name="reward-to-thread", daemon=True).start()
        return future

    def _work(self, device: int | None) -> None:
        set_cuda_device(device)
        while True:
            future, task = self._tasks.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(task())
                except BaseException as error:
                    future.set_exception(error)
            del future, task
            self._idle.release()


def _where(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return ""
    stack = traceback.extract_stack(frame)[-8:]
    place = f"{stack[-1].filename}:{stack[-1].lineno}, in {stack[-1].name}"
    return f"; it is at {place}:\n" + "".join(traceback.format_list(stack)).rstrip()


def cuda_device() -> int | None:
    """The current device is per thread in CUDA: without this a reward on rank 3 would work on GPU 0."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def set_cuda_device(device: int | None) -> None:
    """Let this thread work on the GPU that `cuda_device` gave in another one."""
    if device is not None:
        torch.cuda.set_device(device)
