"""Rollouts -> scored rollouts, whatever the reward functions do.

A function that hangs, raises, or returns something unusable fails on the samples concerned: they get NaN, are counted
and leave the step's statistics. Nothing is ever scored 0 for a failure. How calls are made safe is in `calls.py`,
which functions there are in `registry.py`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from fastgrpo.errors import RunError
from fastgrpo.records import Rollout
from fastgrpo.rewards.calls import Call, CallExecutor, CallTimeout, Outcome
from fastgrpo.wording import counted

logger = logging.getLogger("fastgrpo.rewards")

_SIGNAL_HINT = " (its timeout of None lets it run in the main thread, where signals work)"


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function, ready to be called.

    name:    unique in a run; metrics and `Rollout.rewards` carry it.
    fn:      sync or async, see `RewardRunner`.
    weight:  its share of the weighted sum. A function of weight 0 is only logged: its failures fail no sample.
    timeout: seconds per call, not per sample; None = no limit, and a sync function then runs in the calling thread
             (needed by functions that use `signal.alarm`, such as `math_verify.parse` with its default arguments).
    """

    name: str
    fn: Callable[..., Any]
    weight: float = 1.0
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"reward {self.name!r}: weight must be finite, got {self.weight}")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"reward {self.name!r}: timeout must be positive or None, got {self.timeout}")


@dataclass(frozen=True, slots=True)
class RewardReport:
    """What a step's scoring gives beside the rewards.

    metrics: `rewards/{name}/mean` and `/std` (unbiased; over the samples it succeeded on; NaN where undefined),
             `rewards/{name}/failed` (samples), and what the functions gave to `log_metric`, averaged over the calls.
    failures: what went wrong, a line per function and kind.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


class AllRewardsFailed(RunError):
    """No sample of a step has a reward; going on would train on nothing."""


class RewardRunner:
    """Scores rollouts with TRL's kind of reward functions.

    A function is called once per batch, by keyword, with those of these that it accepts (all, if it takes `**kwargs`):

    - `prompts` (strings or chats), `completions` (strings or lists of messages), `completion_ids` (lists of ints),
    - every data-set column as a list, None for rows that lack it (the names in this list win over columns so named),
    - `trainer_state`, whatever the caller of `score` passes,
    - `log_metric(name, value)`: a scalar for the step's metrics,
    - `log_extra(column, values)`: one value per completion for the table of completions.

    It returns one number per completion: a list, tuple, numpy array or tensor of floats, ints or bools; None, NaN and
    infinities mark samples it failed on. Each function gets lists of its own; what it logs counts only if it returns.
    Results do not depend on the timing of threads, as far as the functions themselves do not.
    """

    def __init__(
        self, functions: Sequence[RewardFunction], *, max_abandoned: int = 8, in_threads: bool = False
    ) -> None:
        """max_abandoned: timed-out calls that may still hang in their threads before `score` raises.

        in_threads: `score` will be called from other threads than the main one.
        Raises ValueError without functions, when two share a name, or for one that must run in the main thread.
        """
        if not functions:
            raise ValueError("at least one reward function is needed")
        names = [function.name for function in functions]
        if len(set(names)) < len(names):
            raise ValueError(f"reward functions must have different names, got {names}")
        if in_threads and (endless := [f.name for f in functions if f.timeout is None]):
            raise ValueError(f"overlap_rewards needs a timeout for every reward function, and {endless[0]!r} has none")
        self.functions = tuple(functions)
        self._executor = CallExecutor(max_abandoned)
        self._logged: set[tuple[str, str]] = set()

    def score(
        self, rollouts: Sequence[Rollout], *, trainer_state: Any = None, all_may_fail: bool = False
    ) -> RewardReport:
        """Fill `rewards` and `reward` of every rollout, in place.

        Raises AllRewardsFailed when every sample failed (unless `all_may_fail`: the caller looks at more samples than
        these), and RunError when too many earlier calls still hang.
        """
        if not rollouts:
            return RewardReport()
        logs = [_Log(len(rollouts)) for _ in self.functions]
        calls = [
            Call(function.name, function.fn, _arguments(function.fn, rollouts, trainer_state, log), function.timeout)
            for function, log in zip(self.functions, logs, strict=True)
        ]
        scores: dict[str, list[float]] = {}
        finished: list[_Log] = []
        reasons: list[str] = []
        for call, outcome, log in zip(calls, self._executor.run(calls), logs, strict=True):
            scores[call.name], failures = _read(outcome, rollouts)
            for kind, detail in failures.items():
                self._log_once(call.name, kind, detail, outcome.error)
            reasons += [
                f"{call.name}: {kind}: {detail.splitlines()[0].rstrip(':')}" for kind, detail in failures.items()
            ]
            finished += [log] if outcome.error is None else []
        self._assign(rollouts, scores)
        if not all_may_fail:
            raise_if_all_failed(rollouts, reasons)
        metrics = _mean_of_logged(finished) | reward_statistics(rollouts)
        for column, values in [item for log in finished for item in log.extra.items()]:
            for rollout, value in zip(rollouts, values, strict=True):
                rollout.extra[column] = value
        return RewardReport(metrics, reasons)

    def close(self) -> None:
        """End the background event loop, if there is one. The runner can be used again."""
        self._executor.close()

    def _assign(self, rollouts: Sequence[Rollout], scores: dict[str, list[float]]) -> None:
        weighted = [function for function in self.functions if function.weight != 0.0]
        for i, rollout in enumerate(rollouts):
            rollout.rewards = {name: values[i] for name, values in scores.items()}
            total = sum((function.weight * rollout.rewards[function.name] for function in weighted), 0.0)
            rollout.reward = total if math.isfinite(total) else math.nan

    def _log_once(self, name: str, kind: str, detail: str, error: BaseException | None) -> None:
        if (name, kind) in self._logged:
            return
        self._logged.add((name, kind))
        traceback = error if error is not None and not isinstance(error, CallTimeout) else None
        logger.warning(
            "reward %r failed, %s: %s\nThe samples concerned leave the step; more of this kind are only counted.",
            name,
            kind,
            detail,
            exc_info=traceback,
        )


class _Log:
    """What one call gives to `log_metric` and `log_extra`."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self.metrics: list[tuple[str, float]] = []
        self.extra: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.append((name, float(value)))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != self._num_samples:
            raise ValueError(f"log_extra({column!r}): {len(values)} values for {self._num_samples} completions")
        self.extra[column] = list(values)


def _arguments(fn: Callable[..., Any], rollouts: Sequence[Rollout], trainer_state: Any, log: _Log) -> dict[str, Any]:
    names = dict.fromkeys(name for rollout in rollouts for name in rollout.prompt.columns)
    arguments: dict[str, Any] = {name: [rollout.prompt.columns.get(name) for rollout in rollouts] for name in names}
    arguments |= {
        "prompts": [rollout.prompt.content for rollout in rollouts],
        "completions": [rollout.completion for rollout in rollouts],
        "completion_ids": [list(rollout.token_ids) for rollout in rollouts],
        "trainer_state": trainer_state,
        "log_metric": log.log_metric,
        "log_extra": log.log_extra,
    }
    bound = fn.keywords if isinstance(fn, functools.partial) else {}  # what is bound wins over a column so named
    arguments = {name: value for name, value in arguments.items() if name not in bound}
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have no signature
        return arguments
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in arguments.items() if name in accepted}


def _read(outcome: Outcome, rollouts: Sequence[Rollout]) -> tuple[list[float], dict[str, str]]:
    """A call's outcome -> a float per sample, NaN for failed ones; and for each kind of failure a description."""
    num_samples = len(rollouts)
    nothing = [math.nan] * num_samples
    error = outcome.error
    if isinstance(error, CallTimeout):
        return nothing, {"timeout": str(error)}
    if error is not None:
        # math_verify words it differently and chains the original.
        hint = _SIGNAL_HINT if "signal" in str(error) and "thread" in str(error) else ""
        if isinstance(error, TypeError) and "required positional argument" in str(error):
            columns = dict.fromkeys(name for rollout in rollouts for name in rollout.prompt.columns)
            hint = f" (the data set's columns: {', '.join(columns) or 'none'} beside the prompt)"
        return nothing, {f"exception {type(error).__name__}": f"{error}{hint}" or "(no message)"}
    values = outcome.value.tolist() if hasattr(outcome.value, "tolist") else outcome.value
    if not isinstance(values, (list, tuple)):
        return nothing, {"not a list": f"it returned {type(outcome.value).__name__}"}
    if len(values) != num_samples:
        returned = f"it returned {counted(len(values), 'value')} for {counted(num_samples, 'completion')}"
        return nothing, {"wrong length": returned}
    scores: list[float] = []
    failures: dict[str, str] = {}
    for i, value in enumerate(values):
        score, kind = _number(value)
        scores.append(score)
        if kind is not None:
            failures.setdefault(kind, f"it returned {value!r:.80} for completion {i}")
    return scores, failures


def _number(value: Any) -> tuple[float, str | None]:
    """A returned value -> (float, None), or (NaN, the kind of failure)."""
    if value is None:
        return math.nan, "None"
    if getattr(value, "ndim", None) == 0:
        value = value.item()  # numpy scalar or 0-d tensor
    if not isinstance(value, Real):
        return math.nan, "not a number"
    try:
        score = float(value)
    except OverflowError:
        return math.nan, "infinity"
    if math.isfinite(score):
        return score, None
    return math.nan, "NaN" if math.isnan(score) else "infinity"


def raise_if_all_failed(rollouts: Sequence[Rollout], failures: Sequence[str]) -> None:
    """Raises AllRewardsFailed, saying how the functions failed, when no rollout has a reward."""
    if all(rollout.failed for rollout in rollouts):
        raise AllRewardsFailed(f"none of this step's {len(rollouts)} samples has a reward ({'; '.join(failures)})")


def merged(reports: Sequence[RewardReport], sizes: Sequence[int] | None = None) -> RewardReport:
    """The reports on parts of a batch as one: what was logged, averaged over the parts; the statistics left out.

    sizes: samples of each part, which is its weight; default: all weigh the same.
    """
    names = dict.fromkeys(name for report in reports for name in report.metrics if not name.startswith("rewards/"))
    parts = list(zip(reports, [1] * len(reports) if sizes is None else sizes, strict=True))
    metrics = {}
    for name in names:
        logged = [(report.metrics[name], size) for report, size in parts if name in report.metrics]
        metrics[name] = statistics.fmean([value for value, _ in logged], [size for _, size in logged])
    return RewardReport(metrics, list(dict.fromkeys(line for report in reports for line in report.failures)))


def reward_statistics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`rewards/{name}/mean|std|failed` of every function over scored rollouts; see `RewardReport`."""
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for rollout in rollouts for name in rollout.rewards):
        metrics |= _statistics(name, [rollout.rewards[name] for rollout in rollouts])
    return metrics


def _statistics(name: str, scores: list[float]) -> dict[str, float]:
    valid = [score for score in scores if not math.isnan(score)]
    mean = math.fsum(valid) / len(valid) if valid else math.nan
    squares = math.fsum((score - mean) ** 2 for score in valid)
    return {
        f"rewards/{name}/mean": mean,
        f"rewards/{name}/std": math.sqrt(squares / (len(valid) - 1)) if len(valid) > 1 else math.nan,
        f"rewards/{name}/failed": float(len(scores) - len(valid)),
    }


def _mean_of_logged(logs: list[_Log]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for log in logs:
        for name, value in log.metrics:
            values.setdefault(name, []).append(value)
    return {name: sum(logged) / len(logged) for name, logged in values.items()}
