"""Where a loss becomes numbers: value, gradient with respect to log-prob and entropy, metrics. PyTorch's path.

`grpo_loss` and every schedule of `linear_grpo_loss` come here, or to the same maths in `kernel.py`; the gradients are
written out, not taken by autograd, so that they are known in the forward pass. `reference.py` is the differentiable
form they are tested against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..segments import segment_ids, segment_sum
from .config import CLIPPED, LossConfig
from .inputs import LossInputs
from .output import Metrics
from .reference import LOG_RATIO_CLAMP, LOG_WEIGHT_MIN, by_sign


@dataclass(frozen=True)
class Evaluation:
    """loss: 0-d float64. grad_logprob: [N]. grad_entropy: 0-d, of each trained token; None without an entropy bonus."""

    loss: Tensor
    grad_logprob: Tensor
    grad_entropy: Tensor | None
    metrics: Metrics


class Sequences:
    """Sums over the trained tokens of each sequence, and back to the tokens. Rows that do not train must hold 0."""

    def __init__(self, inputs: LossInputs) -> None:
        self.cu_seqlens, self.trained, self.dtype = inputs.cu_seqlens, inputs.trained, inputs.advantage.dtype

    @cached_property
    def ids(self) -> Tensor:
        return segment_ids(self.cu_seqlens, self.trained.numel())

    @cached_property
    def lengths(self) -> Tensor:
        """[S], trained tokens of each."""
        return segment_sum(self.trained, self.cu_seqlens).to(self.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """[N] -> [S]."""
        return segment_sum(values, self.cu_seqlens).to(self.dtype)

    def mean(self, values: Tensor) -> Tensor:
        """[N] -> [S], 0 for a sequence without trained tokens."""
        return self.sum(values) / self.lengths.clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """[S] -> [N], 0 in rows that do not train."""
        return torch.where(self.trained, values[self.ids], 0)


@torch.no_grad()
def evaluate(logprob: Tensor, entropy: Tensor | None, inputs: LossInputs, config: LossConfig) -> Evaluation:
    """The loss of these tokens, its gradients, and its metrics.

    logprob, entropy: [N] in the inputs' dtype; whatever rows that do not train hold has no effect, and their gradient
    is exactly 0. A sum over sequences: calls on different sequences (tokens, unless `config.needs_sequences`) add up to
    the call on all of them.
    """
    sequences = Sequences(inputs)
    logp = torch.where(inputs.trained, logprob, 0)
    log_ratio = logp - (logp if inputs.old is None else inputs.old)  # on-policy 0, but NaN stays NaN
    ratio = _Ratio(log_ratio, sequences, config)
    correction, reported = _sampling_correction(logp, inputs, sequences, config)
    keep = _kept(logp, entropy, inputs, sequences, config)

    policy, by_logp, by_ratio = _policy_term(logp, log_ratio, ratio.value, correction, inputs, sequences, config)
    weight = torch.where(keep, inputs.weight, 0)
    if correction is not None and config.loss_type != "vespo":
        weight = weight * correction
    policy_loss = (weight * policy).sum(dtype=torch.float64)
    loss, by_logp, by_ratio = policy_loss, weight * by_logp, weight * by_ratio

    metrics: Metrics = {"policy_loss": policy_loss}
    if inputs.ref is not None:
        kl, kl_slope = _kl(logp, inputs.ref, config)
        _add_mean(metrics, "kl", kl, inputs.trained)
        if config.beta > 0:
            weight = config.beta * inputs.weight
            factor = ratio.value if config.kl_bias_correction else torch.ones_like(kl)
            loss = loss + (weight * factor * kl).sum(dtype=torch.float64)
            by_logp = by_logp + weight * factor * kl_slope
            if config.kl_bias_correction:
                by_ratio = by_ratio + weight * kl
    grad_entropy = None
    if entropy is not None:
        entropy = torch.where(inputs.trained, entropy, 0)
        _add_mean(metrics, "entropy", entropy, inputs.trained)
        if config.entropy_coef != 0:
            loss = loss - inputs.entropy_weight * entropy.sum(dtype=torch.float64)
            grad_entropy = -inputs.entropy_weight
    _add_clip_metrics(metrics, ratio.value, inputs, config)
    if inputs.sampling is not None:
        assert correction is not None
        _add_sampling_metrics(metrics, logp, correction, reported, inputs, sequences, config)
    return Evaluation(loss, by_logp + ratio.pull(by_ratio), grad_entropy, metrics)


class _Ratio:
    """The importance ratio w, `value` [N] at either level, and the way from dL/dw back to dL/dlogp."""

    def __init__(self, log_ratio: Tensor, sequences: Sequences, config: LossConfig) -> None:
        self._sequences = sequences
        self._pooled = config.importance_sampling_level == "sequence"
        exponent = sequences.mean(log_ratio) if self._pooled else log_ratio
        own = exponent.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
        self._slope = torch.where(exponent.abs() > LOG_RATIO_CLAMP, 0, own)
        self.value = sequences.spread(own) if self._pooled else own

    def pull(self, grad: Tensor) -> Tensor:
        """[N] dL/dw of every token -> [N] dL/dlogp."""
        if not self._pooled:
            return grad * self._slope
        sequences = self._sequences
        return sequences.spread(sequences.mean(grad) * self._slope)


def _policy_term(
    logp: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    correction: Tensor | None,
    inputs: LossInputs,
    sequences: Sequences,
    config: LossConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """[N] each: the per-token loss, its derivative by logp directly, and by the ratio."""
    advantage, zero = inputs.advantage, torch.zeros_like(logp)
    if config.loss_type in CLIPPED:
        low, high = config.clip_range
        unclipped = (ratio if config.delta is None else ratio.clamp(max=config.delta)) * advantage
        clipped = ratio.clamp(low, high) * advantage
        uncapped = ratio <= (math.inf if config.delta is None else config.delta)
        open_ = torch.where(unclipped <= clipped, uncapped, (ratio >= low) & (ratio <= high))
        return -torch.minimum(unclipped, clipped), zero, -advantage * open_
    if config.loss_type == "sapo":
        tau = by_sign(advantage > 0, config.sapo_temperature_pos, config.sapo_temperature_neg, logp)
        gate = torch.sigmoid(tau * (ratio - 1))
        return -(4 / tau) * gate * advantage, zero, -4 * gate * (1 - gate) * advantage
    if config.loss_type == "cispo":
        factor = -ratio.clamp(max=config.clip_range[1]) * advantage
    elif config.loss_type == "vespo":
        factor = -_vespo_weight(log_ratio, correction, inputs, sequences, config) * advantage
    else:
        factor = -advantage
    return factor * logp, factor, zero


def _vespo_weight(
    log_ratio: Tensor, correction: Tensor | None, inputs: LossInputs, sequences: Sequences, config: LossConfig
) -> Tensor:
    """[N], phi of each token's sequence, from the product of its ratios and of its sampling corrections."""
    log_weight = sequences.sum(log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP))
    if correction is not None:
        log_correction = correction.log().clamp(LOG_WEIGHT_MIN, LOG_RATIO_CLAMP)
        log_weight = log_weight + sequences.sum(torch.where(inputs.trained, log_correction, 0))
    log_weight = log_weight.clamp(LOG_WEIGHT_MIN, LOG_RATIO_CLAMP)
    positive = sequences.mean(inputs.advantage) >= 0
    k = by_sign(positive, config.vespo_k_pos, config.vespo_k_neg, log_weight)
    lam = by_sign(positive, config.vespo_lambda_pos, config.vespo_lambda_neg, log_weight)
    return sequences.spread((lam + k * log_weight - lam * log_weight.exp()).exp())


def _kl(logp: Tensor, ref: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """[N] each: the KL estimate and its derivative by logp."""
    d = ref - logp
    if config.kl_estimator == "k1":
        return -d, torch.ones_like(d)
    if config.kl_estimator == "k2":
        return d.square() / 2, -d
    exponential = d.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    return exponential - d - 1, 1 - torch.where(d.abs() > LOG_RATIO_CLAMP, 0, exponential)


def _sampling_correction(
    logp: Tensor, inputs: LossInputs, sequences: Sequences, config: LossConfig
) -> tuple[Tensor | None, Tensor]:
    """[N] correction c (None without sampling log-probs, 1 without a correction), [N] tokens the engine reported."""
    if inputs.sampling is None:
        return None, inputs.trained
    reported = inputs.trained & ~inputs.sampling.isnan()
    log_weight = torch.where(reported, (logp if inputs.old is None else inputs.old) - inputs.sampling, 0)
    mode = config.sampling_correction
    if mode == "none":
        return torch.ones_like(logp), reported
    weight = (sequences.sum(log_weight) if mode.startswith("sequence") else log_weight).exp()
    low, high = config.sampling_clip_min or 0.0, config.sampling_clip_max
    if mode.endswith("truncate"):
        weight = weight.clamp(low, high)
    else:
        weight = torch.where((weight >= low) & (weight <= high), weight, 0)
    return (sequences.spread(weight) if mode.startswith("sequence") else torch.where(reported, weight, 1)), reported


def _kept(logp: Tensor, entropy: Tensor | None, inputs: LossInputs, sequences: Sequences, config: LossConfig) -> Tensor:
    """[N] bool: trained tokens that keep their policy term under the off-policy and the top-entropy mask."""
    keep = inputs.trained
    if config.off_policy_mask_threshold is not None:
        behaviour = inputs.sampling if inputs.sampling is not None else inputs.old
        drift = torch.zeros_like(logp) if behaviour is None else (behaviour - logp)
        drift = torch.where(keep & ~drift.isnan(), drift, 0)
        stale = sequences.mean(drift) > config.off_policy_mask_threshold
        keep = keep & ~(stale & (sequences.mean(inputs.advantage) < 0))[sequences.ids]
    if inputs.entropy_threshold is not None:
        assert entropy is not None
        keep = keep & (entropy >= inputs.entropy_threshold)
    return keep


def _add_mean(metrics: Metrics, name: str, values: Tensor, counted: Tensor) -> None:
    metrics[f"{name}/sum"] = torch.where(counted, values, 0).sum(dtype=torch.float64)
    metrics[f"{name}/count"] = counted.sum(dtype=torch.float64)


def _add_clip_metrics(metrics: Metrics, ratio: Tensor, inputs: LossInputs, config: LossConfig) -> None:
    low, high = config.clip_range
    below = (ratio < low) & (inputs.advantage < 0)
    above = (ratio > high) & (inputs.advantage > 0)
    for name, clipped in (("low", below), ("high", above), ("region", below | above)):
        _add_mean(metrics, f"clip_ratio/{name}_mean", clipped, inputs.trained)


def _add_sampling_metrics(
    metrics: Metrics,
    logp: Tensor,
    correction: Tensor,
    reported: Tensor,
    inputs: LossInputs,
    sequences: Sequences,
    config: LossConfig,
) -> None:
    assert inputs.sampling is not None
    log_weight = (logp if inputs.old is None else inputs.old) - inputs.sampling
    name = "sampling/sampling_logp_difference"
    _add_mean(metrics, f"{name}/mean", log_weight.abs(), reported)
    metrics[f"{name}/max"] = _extreme(log_weight.abs(), reported, "max")
    if config.sampling_correction == "none":
        correction = log_weight.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    if config.sampling_correction.startswith("sequence"):
        reported = sequences.lengths > 0
        correction = sequences.mean(correction)
    name = "sampling/importance_sampling_ratio"
    _add_mean(metrics, f"{name}/mean", correction, reported)
    for extreme in ("min", "max"):
        metrics[f"{name}/{extreme}"] = _extreme(correction, reported, extreme)


def _extreme(values: Tensor, counted: Tensor, which: str) -> Tensor:
    """0-d float64 minimum or maximum of the counted values, +inf or -inf when there is none."""
    empty = math.inf if which == "min" else -math.inf
    padded = torch.cat([torch.where(counted, values, empty).double(), values.new_full((1,), empty).double()])
    return padded.amin() if which == "min" else padded.amax()
