"""The runner against reward functions that behave badly."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import signal
import threading

import numpy as np
import pytest
import torch

from fastgrpo.records import Prompt, Rollout
from fastgrpo.rewards import AllRewardsFailed, RewardFunction, RewardRunner

NAN = float("nan")


def make_rollouts(n=4, columns=None, chat=False):
    rollouts = []
    for i in range(n):
        content = [{"role": "user", "content": f"q{i}"}] if chat else f"q{i}"
        row = columns[i] if columns else {"answer": f"a{i}"}
        prompt = Prompt(index=i, content=content, token_ids=[1], columns=row)
        rollouts.append(Rollout(prompt, i, [10 + i] * (i + 1), torch.zeros(i + 1), True, text=f"a{i}"))
    return rollouts


def good(completions, **_):
    return [float(i) for i in range(len(completions))]


@pytest.fixture
def release():
    """Hung functions wait for this, so that their threads end with the test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def run():
    runners = []

    def start(*functions, **options):
        runners.append(RewardRunner(list(functions), **options))
        return runners[-1]

    yield start
    for runner in runners:
        runner.close()


def score(runner, rollouts=None, **kwargs):
    rollouts = make_rollouts() if rollouts is None else rollouts
    report = runner.score(rollouts, **kwargs)
    return [r.reward for r in rollouts], report


# --- what functions are called with ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_arguments_are_trls(run, chat):
    seen = {}

    def fn(prompts, completions, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    rollouts = make_rollouts(2, [{"answer": "x", "only_first": 1}, {"answer": "y", "only_second": 2}], chat)
    state = object()
    run(RewardFunction("fn", fn)).score(rollouts, trainer_state=state)
    assert seen.pop("trainer_state") is state
    assert callable(seen.pop("log_metric"))
    assert callable(seen.pop("log_extra"))
    assert seen == {
        "prompts": [r.prompt.content for r in rollouts],
        "completions": [[{"role": "assistant", "content": f"a{i}"}] if chat else f"a{i}" for i in range(2)],
        "completion_ids": [[10], [11, 11]],
        "answer": ["x", "y"],
        "only_first": [1, None],
        "only_second": [None, 2],
    }


def test_without_kwargs_a_function_gets_only_what_it_accepts(run):
    def fn(completions, *, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    assert score(run(RewardFunction("fn", fn)))[0] == [1.0] * 4


def test_what_is_bound_to_a_function_wins_over_a_column(run):
    def fn(completions, answer, **_):
        return [float(answer)] * len(completions)

    assert score(run(RewardFunction("fn", functools.partial(fn, answer=7))))[0] == [7.0] * 4


def test_a_function_cannot_damage_what_the_others_see(run):
    def vandal(completions, completion_ids, answer, **_):
        completion_ids[0].append(99)
        completions.clear()
        answer.clear()
        return [0.0] * 4

    def fn(completions, completion_ids, answer):
        assert completions == answer == ["a0", "a1", "a2", "a3"]
        return [float(len(ids)) for ids in completion_ids]

    rollouts = make_rollouts()
    assert score(run(RewardFunction("vandal", vandal), RewardFunction("fn", fn)), rollouts)[0] == [1, 2, 3, 4]
    assert rollouts[0].token_ids == [10]


def test_no_rollouts(run):
    report = run(RewardFunction("good", good)).score([])
    assert report.metrics == {}


# --- what they may return -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 1.0, 2.0, 3.0],
        (0, 1, 2, 3),
        np.arange(4, dtype=np.float32),
        np.arange(4),
        torch.arange(4, dtype=torch.bfloat16),
        [torch.tensor(0.0), np.float64(1), np.int32(2), torch.tensor(3)],
    ],
)
def test_kinds_of_lists(run, values):
    rewards, report = score(run(RewardFunction("fn", lambda **_: values)))
    assert rewards == [0.0, 1.0, 2.0, 3.0]
    assert all(type(r) is float for r in rewards)
    assert report.metrics["rewards/fn/failed"] == 0


def test_bools(run):
    values = [True, False, np.bool_(True), torch.tensor(False)]
    assert score(run(RewardFunction("fn", lambda **_: values)))[0] == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("bad", [None, NAN, math.inf, -math.inf, "1.0", [1.0], 10**400, object(), torch.ones(2), 1j])
def test_one_bad_value_fails_one_sample(run, bad):
    rollouts = make_rollouts()
    rewards, report = score(run(RewardFunction("fn", lambda **_: [1.0, bad, 0.0, 5.0])), rollouts)
    assert [rewards[0], rewards[2], rewards[3]] == [1.0, 0.0, 5.0]
    assert math.isnan(rewards[1])
    assert math.isnan(rollouts[1].rewards["fn"])
    assert rollouts[1].failed
    assert report.metrics["rewards/fn/failed"] == 1
    assert report.metrics["rewards/fn/mean"] == pytest.approx(2.0)
    assert report.metrics["rewards/fn/std"] == pytest.approx(np.std([1.0, 0.0, 5.0], ddof=1))


@pytest.mark.parametrize(
    ("value", "kind"),
    [([1.0] * 3, "wrong length"), ([], "wrong length"), (torch.ones(5), "wrong length")]
    + [(value, "not a list") for value in (None, 1.0, "1234", {"a": 1}, torch.tensor(1.0), iter([1.0] * 4))],
)
def test_an_unusable_result_fails_the_whole_call(run, caplog, value, kind):
    rollouts = make_rollouts()
    with pytest.raises(AllRewardsFailed, match=f"fn: {kind}"):
        run(RewardFunction("fn", lambda **_: value)).score(rollouts)
    assert all(r.failed for r in rollouts)
    assert f"'fn' failed, {kind}" in caplog.text


# --- weights and metrics --------------------------------------------------------------------------------------------


def test_weighted_sum_and_failures_of_one_function(run):
    rollouts = make_rollouts()
    runner = run(RewardFunction("good", good, 2.0), RewardFunction("half", lambda **_: [1, None, 1, NAN], -0.5))
    rewards, report = score(runner, rollouts)
    assert rewards[0] == -0.5
    assert rewards[2] == 3.5
    assert math.isnan(rewards[1])
    assert math.isnan(rewards[3])
    assert rollouts[1].rewards["good"] == 1.0
    assert report.metrics["rewards/good/failed"] == 0
    assert report.metrics["rewards/good/mean"] == 1.5
    assert report.metrics["rewards/half/failed"] == 2
    assert report.metrics["rewards/half/std"] == 0.0


def test_failures_of_a_function_of_weight_0_cost_no_sample(run):
    runner = run(RewardFunction("good", good), RewardFunction("watch", lambda **_: [None] * 4, weight=0.0))
    rewards, report = score(runner)
    assert rewards == [0.0, 1.0, 2.0, 3.0]
    assert report.metrics["rewards/watch/failed"] == 4
    assert math.isnan(report.metrics["rewards/watch/mean"])


def test_log_metric_is_averaged_over_calls_in_the_order_of_the_functions(run):
    async def slow_first(log_metric, **_):
        await asyncio.sleep(0.05)
        log_metric("shared", 1.0)
        log_metric("first", torch.tensor(2.0))
        return [0.0] * 4

    def second(log_metric, **_):
        log_metric("shared", 4)
        log_metric("second", 3.0)
        return [0.0] * 4

    _, report = score(run(RewardFunction("slow_first", slow_first, timeout=30), RewardFunction("second", second)))
    logged = [(k, v) for k, v in report.metrics.items() if not k.startswith("rewards/")]
    assert logged == [("shared", 2.5), ("first", 2.0), ("second", 3.0)]


def test_what_a_failed_call_logged_does_not_count(run):
    def fails(log_metric, log_extra, **_):
        log_metric("m", 1.0)
        log_extra("column", [0] * 4)
        raise ValueError

    rollouts = make_rollouts()
    _, report = score(run(RewardFunction("good", good), RewardFunction("fails", fails, weight=0.0)), rollouts)
    assert "m" not in report.metrics
    assert all(r.extra == {} for r in rollouts)


def test_log_extra(run, caplog):
    def fn(log_extra, **_):
        log_extra("parsed", ["w", "x", "y", "z"])
        return [0.0] * 4

    def wrong(log_extra, **_):
        log_extra("parsed", ["w"])
        return [0.0] * 4

    rollouts = make_rollouts()
    score(run(RewardFunction("fn", fn), RewardFunction("wrong", wrong, weight=0.0)), rollouts)
    assert [r.extra for r in rollouts] == [{"parsed": c} for c in "wxyz"]
    assert "1 values for 4 completions" in caplog.text


@pytest.mark.parametrize(("n", "std_defined"), [(1, False), (2, True)])
def test_std_needs_two_samples(run, n, std_defined):
    _, report = score(run(RewardFunction("good", good)), make_rollouts(n))
    assert math.isnan(report.metrics["rewards/good/std"]) is not std_defined


# --- exceptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 30])
def test_logged_once_per_function_and_kind_with_the_traceback(run, caplog, timeout):
    def the_culprit(**_):
        raise KeyError("boom")

    def other(**_):
        return [None] * 4

    runner = run(
        RewardFunction("good", good),
        RewardFunction("fails", the_culprit, 0.0, timeout),
        RewardFunction("other", other, 0.0, timeout),
    )
    with caplog.at_level(logging.WARNING, logger="fastgrpo.rewards"):
        for _ in range(3):
            score(runner)
    records = [r for r in caplog.records if r.name == "fastgrpo.rewards"]
    assert len(records) == 2
    assert caplog.text.count("in the_culprit") == 1
    assert caplog.text.count("Traceback (most recent call last)") == 1
    assert "'other' failed, None" in caplog.text


def test_a_missing_column_says_which(run):
    def fn(completions, solution):
        return [0.0] * len(completions)

    with pytest.raises(AllRewardsFailed, match=r"fn: .*'solution' \(the data set's columns: answer"):
        run(RewardFunction("fn", fn)).score(make_rollouts())


def test_all_failed_names_every_function(run):
    def fails(**_):
        raise ValueError("boom\nsecond line")

    rollouts = make_rollouts()
    with pytest.raises(AllRewardsFailed) as caught:
        run(RewardFunction("fails", fails), RewardFunction("none", lambda **_: [None] * 4)).score(rollouts)
    message = str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    assert "4 samples" in message
    assert "fails: exception ValueError: boom" in message
    assert "none: None" in message
    assert "\n" not in message


def test_one_valid_sample_is_enough(run):
    rewards, _ = score(run(RewardFunction("fn", lambda **_: [None, None, 7.0, None])))
    assert rewards[2] == 7.0


def test_where_all_hung_stands_in_the_one_line(run, release):
    with pytest.raises(AllRewardsFailed, match=r"hung: timeout: no result after 0.1 s; it is at .*:\d+, in wait\)$"):
        run(RewardFunction("hung", lambda **_: release.wait(), timeout=0.1)).score(make_rollouts())


# --- time-outs (how calls are given up is in test_rewards_calls.py) ---------------------------------------------------


def test_a_hung_function_costs_its_own_samples_only(run, release, caplog):
    def hung(**_):
        release.wait()

    rollouts = make_rollouts()
    runner = run(RewardFunction("good", good), RewardFunction("hung", hung, 0.0, timeout=0.1))
    rewards, report = score(runner, rollouts)
    assert rewards == [0.0, 1.0, 2.0, 3.0]
    assert report.metrics["rewards/hung/failed"] == 4
    assert all(math.isnan(r.rewards["hung"]) for r in rollouts)
    assert "'hung' failed, timeout: no result after 0.1 s" in caplog.text
    assert "release.wait()" in caplog.text


def test_a_late_result_changes_nothing(run, release):
    def late(log_metric, **_):
        release.wait()
        log_metric("late", 1.0)
        return [9.0] * 4

    rollouts = make_rollouts()
    runner = run(RewardFunction("good", good), RewardFunction("late", late, 0.0, timeout=0.1))
    report = runner.score(rollouts)
    release.set()
    for thread in threading.enumerate():
        if thread.name == "reward-late":
            thread.join(10)
    assert [r.reward for r in rollouts] == [0.0, 1.0, 2.0, 3.0]
    assert "late" not in report.metrics


def test_signals_in_a_worker_thread_get_a_hint(run, caplog):
    def fn(**_):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    score(run(RewardFunction("good", good), RewardFunction("fn", fn, 0.0, timeout=30)))
    assert "timeout of None" in caplog.text


# --- construction ---------------------------------------------------------------------------------------------------


def test_names_must_differ_and_there_must_be_one():
    with pytest.raises(ValueError, match="different names"):
        RewardRunner([RewardFunction("a", good), RewardFunction("a", good)])
    with pytest.raises(ValueError, match="at least one"):
        RewardRunner([])


@pytest.mark.parametrize("options", [{"weight": NAN}, {"weight": math.inf}, {"timeout": 0}, {"timeout": -1}])
def test_impossible_functions(options):
    with pytest.raises(ValueError, match="'a'"):
        RewardFunction("a", good, **options)
