"""Calls that hang, block or exit."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from fastgrpo.records import Prompt, Rollout
from fastgrpo.rewards import OverlappedScoring, RewardFunction, RewardRunner
from fastgrpo.rewards.calls import Call, CallExecutor, CallTimeout


@pytest.fixture
def release():
    """Hung functions wait for this, so that their threads end with the test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def executor():
    executor = CallExecutor(max_abandoned=3)
    yield executor
    executor.close()


def run(executor, *functions, timeout=30.0):
    """Functions, or (function, its own timeout), without arguments."""
    pairs = [f if isinstance(f, tuple) else (f, timeout) for f in functions]
    return executor.run([Call(getattr(f, "__name__", "object"), f, {}, t) for f, t in pairs])


def one():
    return 1


async def two():
    await asyncio.sleep(0)
    return 2


async def hung_async():
    await asyncio.sleep(3600)


def test_outcomes_stand_in_the_order_of_the_calls(executor):
    assert [o.value for o in run(executor, two, one, two, one)] == [2, 1, 2, 1]
    assert [o.value for o in run(executor, two, one, timeout=None)] == [2, 1]


def test_arguments(executor):
    assert executor.run([Call("dict", dict, {"a": 1}, t) for t in (None, 30.0)])[1].value == {"a": 1}


class LibraryTimeout(BaseException):
    """Some libraries derive theirs from BaseException."""


@pytest.mark.parametrize(
    ("kind", "is_async", "timeout"),
    [
        (kind, is_async, timeout)
        for kind in (ValueError, TimeoutError, SystemExit, LibraryTimeout, asyncio.CancelledError)
        for is_async, timeout in ((True, None), (True, 30.0), (False, 30.0), (False, None))
        if is_async or timeout or issubclass(kind, Exception)  # the rest goes through: next test
    ],
)
def test_exceptions_are_outcomes(executor, kind, is_async, timeout):
    def raises():
        raise kind

    async def raises_async():
        raise kind

    outcomes = run(executor, raises_async if is_async else raises, one, two, timeout=timeout)
    assert type(outcomes[0].error).__name__ == kind.__name__
    assert [o.value for o in outcomes[1:]] == [1, 2]
    assert [o.value for o in run(executor, two, one)] == [2, 1]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, LibraryTimeout])
def test_what_a_signal_handler_raises_goes_through_a_call_in_the_main_thread(executor, kind):
    def handler(*_):
        raise kind

    def fn():
        signal.raise_signal(signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(kind):
            run(executor, fn, timeout=None)
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_a_hung_sync_call_is_given_up_and_shown(executor, release):
    def hung():
        release.wait()

    outcomes = run(executor, (hung, 0.1), one)
    assert isinstance(outcomes[0].error, CallTimeout)
    assert re.match(r"no result after 0.1 s; it is at .*threading.py:\d+, in wait:\n", str(outcomes[0].error))
    assert "release.wait()" in str(outcomes[0].error)
    assert outcomes[1].value == 1


def test_a_hung_async_call_is_cancelled(executor):
    cancelled = threading.Event()

    async def hung():
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    outcomes = run(executor, (hung, 0.1), two)
    assert isinstance(outcomes[0].error, CallTimeout)
    assert cancelled.is_set()
    assert outcomes[1].value == 2


def test_an_async_call_that_swallows_its_cancellation_times_out(executor):
    async def returns_anyway():
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return 1

    assert isinstance(run(executor, (returns_anyway, 0.1))[0].error, CallTimeout)


def test_an_async_call_that_goes_on_after_its_cancellation_times_out(executor, monkeypatch):
    monkeypatch.setattr("fastgrpo.rewards.calls.LOOP_GRACE", 0.2)
    end = []

    async def goes_on():
        while not end:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    outcomes = run(executor, (goes_on, 0.1), two)
    assert "ignored its cancellation" in str(outcomes[0].error)
    assert outcomes[1].value == 2
    end.append(True)


def test_a_call_is_late_even_if_nobody_waited_for_it_yet(executor):
    """While a sync function runs, an async one passes its limit and returns: still a timeout, as it would be alone."""

    async def late():
        try:
            await asyncio.sleep(0.3)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return 1

    outcomes = run(executor, (late, 0.05), lambda: time.sleep(0.6))
    assert isinstance(outcomes[0].error, CallTimeout)


def test_after_blocking_code_in_an_async_call_there_is_a_new_loop(executor, release, monkeypatch):
    monkeypatch.setattr("fastgrpo.rewards.calls.LOOP_GRACE", 0.3)

    async def blocks():
        release.wait()

    message = str(run(executor, (blocks, 0.1))[0].error)
    assert "the event loop is blocked" in message
    assert "release.wait()" in message
    assert run(executor, two)[0].value == 2


def test_async_calls_run_concurrently_on_a_loop_that_lives_on(executor):
    """Each waits for the other, so one after the other they would never finish."""
    loops = []
    events = []

    def make(mine, theirs):
        async def fn():
            loops.append(asyncio.get_running_loop())
            events[-1][mine].set()
            await events[-1][theirs].wait()
            return mine

        return fn

    for _ in range(2):
        events.append([asyncio.Event(), asyncio.Event()])
        assert [o.value for o in run(executor, make(0, 1), make(1, 0), timeout=20)] == [0, 1]
    assert len(set(map(id, loops))) == 1


def test_sync_calls_run_one_after_another(executor):
    active = []

    def alone():
        active.append(1)
        time.sleep(0.02)
        return len(active), active.pop()

    assert [o.value for o in run(executor, alone, alone, alone)] == [(1, 1)] * 3


def test_callable_objects_may_be_async(executor):
    class Judge:
        async def __call__(self):
            return 3

    assert run(executor, Judge())[0].value == 3


def test_too_many_hung_calls_stop_the_run(executor, release):
    def hung():
        release.wait()

    run(executor, *[(hung, 0.02)] * 3)
    with pytest.raises(RuntimeError, match=r"3 reward calls that timed out are still running.*: hung\)"):
        run(executor, one)
    release.set()
    for thread in threading.enumerate():
        if thread.name == "reward-hung":
            thread.join(10)
    assert run(executor, one)[0].value == 1


def test_without_a_timeout_a_sync_call_runs_in_the_calling_thread(executor):
    """`signal.alarm` works there only, and math_verify uses it by default."""

    def fn():
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        return threading.current_thread()

    assert run(executor, fn, timeout=None)[0].value is threading.main_thread()
    assert isinstance(run(executor, fn)[0].error, ValueError)


@pytest.mark.parametrize("kind", ["sync", "async", "in the calling thread"])
def test_ctrl_c_interrupts_the_wait(executor, release, kind):
    main = threading.main_thread().ident

    def hung():
        time.sleep(0.1)
        signal.pthread_kill(main, signal.SIGINT)
        release.wait(60)

    async def hung_async():
        await asyncio.sleep(0.1)
        signal.pthread_kill(main, signal.SIGINT)
        await asyncio.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        run(executor, hung_async if kind == "async" else hung, timeout=None if "calling" in kind else 60)


def test_nothing_hung_keeps_the_process_alive():
    """A sync call, a blocked loop and `asyncio.to_thread`, whose threads the standard library joins at exit."""
    script = textwrap.dedent(
        """
        import asyncio, time
        from fastgrpo.rewards.calls import Call, CallExecutor

        def hung(): time.sleep(3600)
        async def blocks(): time.sleep(3600)
        async def in_thread(): await asyncio.to_thread(time.sleep, 3600)

        outcomes = CallExecutor().run([Call(f.__name__, f, {}, 0.3) for f in (in_thread, blocks, hung)])
        print(*[type(o.error).__name__ for o in outcomes])
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["CallTimeout"] * 3
    assert done.stderr == ""


def test_to_thread_reuses_its_threads(executor):
    async def fn():
        return {await asyncio.to_thread(threading.get_ident) for _ in range(50)}

    assert len(run(executor, fn)[0].value) <= 2


def test_to_thread_hands_back_exceptions_and_runs_side_by_side(executor):
    barrier = threading.Barrier(4)

    async def fn():
        await asyncio.gather(*[asyncio.to_thread(barrier.wait, 20) for _ in range(4)])
        await asyncio.to_thread(int, "x")

    assert isinstance(run(executor, fn)[0].error, ValueError)


def test_close_ends_the_loop_and_allows_another(executor):
    run(executor, two)
    executor.close()
    assert not [t for t in threading.enumerate() if t.name == "reward-loop"]
    assert run(executor, two)[0].value == 2


def test_the_cuda_device_follows_into_the_threads(executor, monkeypatch):
    """CUDA's current device is per thread; a fake stands in for it where there is no GPU."""
    current = threading.local()
    current.device = 3
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "device", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))

    async def on_loop():
        return torch.cuda.current_device(), await asyncio.to_thread(torch.cuda.current_device)

    assert [o.value for o in run(executor, lambda: torch.cuda.current_device(), on_loop)] == [3, (3, 3)]

    def asked(completions, **_):
        return [float(torch.cuda.current_device()) for _ in completions]

    scoring = OverlappedScoring(RewardRunner([RewardFunction("asked", asked, timeout=5.0)]), None)
    rollout = Rollout(Prompt(0, "", [1]), 0, [1], torch.zeros(1), finished=True)
    scoring.add([rollout])
    scoring.finish()
    assert rollout.reward == 3
