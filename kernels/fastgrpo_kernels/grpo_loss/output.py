"""`LossOutput`, and how its metrics combine across chunks, micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

Metrics = dict[str, Tensor]

_CLIP = tuple(f"clip_ratio/{name}_mean/{part}" for name in ("low", "high", "region") for part in ("sum", "count"))
_GAP, _RATIO = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
METRICS = (
    "policy_loss",
    *("kl/sum", "kl/count", "entropy/sum", "entropy/count"),
    *_CLIP,
    *(f"{_GAP}/mean/sum", f"{_GAP}/mean/count", f"{_GAP}/max"),
    *(f"{_RATIO}/mean/sum", f"{_RATIO}/mean/count", f"{_RATIO}/min", f"{_RATIO}/max"),
)
"""What a loss measures, in the order in which an op returns it as one vector."""


def empty_metric(name: str) -> float:
    """The value of a metric over nothing."""
    return {"min": float("inf"), "max": float("-inf")}.get(name.rpartition("/")[2], 0.0)


def as_vector(metrics: Metrics, device: torch.device) -> Tensor:
    """[len(METRICS)] float64, empty where there is no metric of that name."""
    absent = {name: torch.full((), empty_metric(name), dtype=torch.float64, device=device) for name in METRICS}
    return torch.stack([(absent | metrics)[name] for name in METRICS])


def as_metrics(vector: Tensor, *, entropy: bool, ref: bool, sampling: bool) -> Metrics:
    """The metrics that make sense for a call with or without these tensors, as views of the vector."""
    absent = [name for name, given in (("entropy/", entropy), ("kl/", ref), ("sampling/", sampling)) if not given]
    values = zip(METRICS, vector.unbind(0), strict=True)
    return {name: value for name, value in values if not name.startswith(tuple(absent))}


@dataclass(eq=False)  # tensors do not compare as one value
class LossOutput:
    """What a loss op returns.

    loss:     0-d, differentiable; fp32 (float64 for float64 inputs).
    logprob:  [N], detached; 0 in rows that a linear op left out because they do not train.
    entropy:  [N], detached; None when `grpo_loss` was not given one; 0 in rows left out.
    metrics:  0-d float64 tensors on the loss's device, sums over trained tokens and counts, never means:
        `<name>/sum` and `<name>/count` make the mean `<name>`; names ending in `/min` and `/max` combine by minimum and
        maximum, every other name by addition. `policy_loss` is the policy term with its denominators inside.
    """

    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None
    metrics: Metrics

    @staticmethod
    def combine(outputs: Sequence[LossOutput | Mapping[str, Tensor]]) -> Metrics:
        """The metrics of several outputs as if they were one call's, still 0-d tensors; no host sync.

        A name that an output lacks is taken to be empty there. Outputs without tokens are welcome.
        Errors: TypeError for anything but a list of LossOutput or of their `metrics`.
        """
        if isinstance(outputs, LossOutput | Mapping) or not isinstance(outputs, Iterable):
            raise TypeError(f"outputs: expected a list of LossOutput or of their metrics, got {type(outputs).__name__}")
        parts = [_metrics_of(i, output) for i, output in enumerate(outputs)]
        names = list(dict.fromkeys(name for part in parts for name in part))
        return {name: _combine_one(name, [part[name] for part in parts if name in part]) for name in names}

    @staticmethod
    def reduce(outputs: Sequence[LossOutput | Mapping[str, Tensor]]) -> dict[str, float]:
        """The means of several outputs (micro-batches, ranks) as floats, in one transfer to the host.

        `policy_loss`: sum of the policy terms, hence the update's when the denominators were the update's.
        `kl` (with a reference), `entropy` (when known): means over trained tokens.
        `clip_ratio/low_mean|high_mean|region_mean`: share of trained tokens whose ratio is below the clip range with a
        negative advantage, above it with a positive one, or either; types that do not clip report the same region.
        `sampling/sampling_logp_difference/mean|max` (with sampling log-probs): |old - sampling| over reported tokens.
        `sampling/importance_sampling_ratio/min|mean|max`: the correction applied, over tokens, or over sequences
        for the sequence modes; without a correction the tokens' exp(old - sampling).
        A mean, minimum or maximum over nothing is NaN.
        """
        combined = LossOutput.combine(outputs)
        if not combined:
            return {}
        values = dict(zip(combined, torch.stack(list(combined.values())).tolist(), strict=True))
        reduced = {}
        for name, value in values.items():
            if name.endswith("/sum"):
                count = values[name.removesuffix("sum") + "count"]
                reduced[name.removesuffix("/sum")] = value / count if count else float("nan")
            elif name.endswith(("/min", "/max")):
                reduced[name] = float("nan") if value == empty_metric(name) else value
            elif not name.endswith("/count"):
                reduced[name] = value
        return reduced


# DDP with static_graph, FSDP2, vmap and others look for tensors in what a module or function returns.
register_dataclass(LossOutput)


def _metrics_of(i: int, output: LossOutput | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    metrics = output.metrics if isinstance(output, LossOutput) else output
    if not isinstance(metrics, Mapping) or not all(isinstance(x, Tensor) for x in metrics.values()):
        raise TypeError(f"outputs[{i}]: expected a LossOutput or a dict of 0-d tensors, got {type(output).__name__}")
    return metrics


def _combine_one(name: str, values: list[Tensor]) -> Tensor:
    stacked = torch.stack(values)
    if name.endswith("/min"):
        return stacked.amin()
    if name.endswith("/max"):
        return stacked.amax()
    return stacked.sum()
