"""An independent oracle in float64: the definitions, token by token, in Python loops.

It shares nothing with the package. Values are 0-d float64 tensors, so that autograd differentiates the definitions;
clamps and minima are Python branches, a branch not taken has no gradient, and `detach` is a stop gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Case:
    """The arguments of one loss call, float64 on the CPU. `mask` None = all tokens train."""

    logprob: Tensor
    advantage: Tensor
    cu_seqlens: Tensor
    entropy: Tensor
    old_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    sampling_logprob: Tensor | None = None
    mask: Tensor | None = None
    entropy_threshold: float | None = None
    num_sequences: int | None = None
    num_tokens: int | None = None

    def keywords(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Everything but logprob, advantage, cu_seqlens and entropy, floats cast to `dtype`."""
        names = ("old_logprob", "ref_logprob", "sampling_logprob")
        tensors = {name: getattr(self, name) for name in names}
        return {
            **{name: None if x is None else x.to(dtype) for name, x in tensors.items()},
            "mask": self.mask,
            "entropy_threshold": self.entropy_threshold,
            "num_sequences": self.num_sequences,
            "num_tokens": self.num_tokens,
        }


@dataclass
class Answer:
    loss: float
    grad_logprob: Tensor
    grad_entropy: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


def _clamp(x: Tensor, low: float, high: float) -> Tensor:
    if x < low:
        return torch.tensor(low, dtype=torch.float64)
    return torch.tensor(high, dtype=torch.float64) if x > high else x


def _min(a: Tensor, b: Tensor) -> Tensor:
    return a if a <= b else b


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def oracle(case: Case, config: Any) -> Answer:
    """Loss, gradients with respect to log-prob and entropy, and the reduced metrics of one call."""
    logp = case.logprob.detach().clone().requires_grad_()
    H = case.entropy.detach().clone().requires_grad_()
    bounds = case.cu_seqlens.tolist()
    S, N = len(bounds) - 1, bounds[-1]
    m = [True] * N if case.mask is None else case.mask.tolist()
    S_all = max(S if case.num_sequences is None else case.num_sequences, 1)
    tokens_all = max(sum(m) if case.num_tokens is None else case.num_tokens, 1)
    threshold = case.entropy_threshold
    if threshold is None and config.top_entropy_quantile < 1 and any(m):
        threshold = quantile(case.entropy[torch.tensor(m)].tolist(), 1 - config.top_entropy_quantile)

    loss = 0 * logp[:0].sum() + 0 * H[:0].sum()
    stats = _Statistics()
    for s in range(S):
        rows = [n for n in range(bounds[s], bounds[s + 1]) if m[n]]
        if not rows:
            continue
        A = [float(case.advantage[s] if case.advantage.numel() == S else case.advantage[n]) for n in rows]
        for term in _sequence(rows, A, logp, H, case, config, threshold, stats):
            scale = {
                "grpo": S_all * len(rows),
                "sapo": S_all * len(rows),
                "luspo": S_all,
                "dr_grpo": S_all * (config.max_completion_length or math.nan),
            }.get(config.loss_type, tokens_all)
            loss = loss + term["policy"] / scale + term["kl"] * config.beta / scale
            stats.policy_loss += float(term["policy"].detach()) / scale
        for n in rows:
            loss = loss - config.entropy_coef * H[n] / tokens_all
    loss.backward()
    zeros = torch.zeros(N, dtype=torch.float64)
    return Answer(
        float(loss.detach()),
        zeros if logp.grad is None else logp.grad,
        zeros if H.grad is None else H.grad,
        stats.reduced(case, config),
    )


def _sequence(
    rows: list[int],
    A: list[float],
    logp: Tensor,
    H: Tensor,
    case: Case,
    config: Any,
    threshold: float | None,
    stats: _Statistics,
) -> list[dict[str, Tensor]]:
    """The policy and KL terms of each trained token of one sequence."""
    L = len(rows)
    A_seq = sum(A) / L
    old = [logp[n].detach() if case.old_logprob is None else case.old_logprob[n] for n in rows]
    r = [logp[n] - o for n, o in zip(rows, old, strict=True)]
    if config.importance_sampling_level == "sequence":
        w = [torch.exp(_clamp(torch.stack(r).sum() / L, -20.0, 20.0))] * L
    else:
        w = [torch.exp(_clamp(x, -20.0, 20.0)) for x in r]
    c = _corrections(rows, old, case, config, stats)

    behaviour = case.sampling_logprob if case.sampling_logprob is not None else case.old_logprob
    drift = [0.0 if behaviour is None else float(behaviour[n] - logp[n].detach()) for n in rows]
    drift_mean = sum(0.0 if math.isnan(d) else d for d in drift) / L
    cut = config.off_policy_mask_threshold
    off_policy = cut is not None and A_seq < 0 and drift_mean > cut

    phi = _vespo_phi(r, c, A_seq, config) if config.loss_type == "vespo" else None
    terms = []
    for i, n in enumerate(rows):
        policy = _policy(w[i], A[i], logp[n], phi, config)
        if off_policy or (threshold is not None and float(H[n].detach()) < threshold):
            policy = torch.zeros((), dtype=torch.float64)
        if config.loss_type != "vespo":
            policy = policy * c[i]
        kl = torch.zeros((), dtype=torch.float64)
        if case.ref_logprob is not None:
            kl = _kl(case.ref_logprob[n] - logp[n], config)
            stats.kl.append(float(kl.detach()))
            if config.kl_bias_correction:
                kl = kl * w[i]
        stats.token(float(w[i].detach()), A[i], float(H[n].detach()), config)
        terms.append({"policy": policy, "kl": kl})
    return terms


def _policy(w: Tensor, A: float, logp: Tensor, phi: float | None, config: Any) -> Tensor:
    name = config.loss_type
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    if name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        capped = w if config.delta is None or w <= config.delta else torch.tensor(config.delta, dtype=torch.float64)
        return -_min(capped * A, _clamp(w, 1 - config.epsilon, 1 + high) * A)
    if name == "cispo":
        return -min(float(w.detach()), config.epsilon_high) * A * logp
    if name == "sapo":
        tau = config.sapo_temperature_pos if A > 0 else config.sapo_temperature_neg
        return -(4 / tau) * torch.sigmoid(tau * (w - 1)) * A
    if name == "vespo":
        assert phi is not None
        return -phi * A * logp
    return -A * logp


def _vespo_phi(r: list[Tensor], c: list[float], A_seq: float, config: Any) -> float:
    low = math.log(1e-8)
    log_w = sum(min(max(float(x.detach()), -20.0), 20.0) for x in r)
    log_w += sum(min(max(math.log(x) if x > 0 else -math.inf, low), 20.0) for x in c)
    log_w = min(max(log_w, low), 20.0)
    k, lam = config.vespo_k_neg, config.vespo_lambda_neg
    if A_seq >= 0:
        k, lam = config.vespo_k_pos, config.vespo_lambda_pos
    return math.exp(lam + k * log_w - lam * math.exp(log_w))


def _kl(d: Tensor, config: Any) -> Tensor:
    if config.kl_estimator == "k1":
        return -d
    if config.kl_estimator == "k2":
        return d * d / 2
    return torch.exp(_clamp(d, -20.0, 20.0)) - d - 1


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


def _corrections(rows: list[int], old: list[Tensor], case: Case, config: Any, stats: _Statistics) -> list[float]:
    """The sampling correction of each token, recorded in the statistics on the way."""
    if case.sampling_logprob is None:
        return [1.0] * len(rows)
    gap = [float(o) - float(case.sampling_logprob[n]) for n, o in zip(rows, old, strict=True)]
    reported = [g for g in gap if not math.isnan(g)]
    stats.gaps += [abs(g) for g in reported]
    mode = config.sampling_correction
    if mode == "none":
        stats.ratios += [_exp(min(max(g, -20.0), 20.0)) for g in reported]
        return [1.0] * len(rows)
    low = 0.0 if config.sampling_clip_min is None else config.sampling_clip_min

    def bounded(c: float) -> float:
        inside = low <= c <= config.sampling_clip_max
        if mode.endswith("mask"):
            return c if inside else 0.0
        return min(max(c, low), config.sampling_clip_max)

    if mode.startswith("sequence"):
        stats.ratios.append(bounded(_exp(sum(reported))))
        return [stats.ratios[-1]] * len(rows)
    stats.ratios += [bounded(_exp(g)) for g in reported]
    return [1.0 if math.isnan(g) else bounded(_exp(g)) for g in gap]


class _Statistics:
    def __init__(self) -> None:
        self.policy_loss = 0.0
        self.low: list[float] = []
        self.high: list[float] = []
        self.kl: list[float] = []
        self.entropy: list[float] = []
        self.gaps: list[float] = []
        self.ratios: list[float] = []

    def token(self, w: float, A: float, H: float, config: Any) -> None:
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        cispo = config.loss_type == "cispo"
        self.low.append(float(not cispo and w < 1 - config.epsilon and A < 0))
        self.high.append(float(w > (high if cispo else 1 + high) and A > 0))
        self.entropy.append(H)

    def reduced(self, case: Case, config: Any) -> dict[str, float]:
        def mean(values: list[float]) -> float:
            return sum(values) / len(values) if values else math.nan

        region = [max(a, b) for a, b in zip(self.low, self.high, strict=True)]
        result = {
            "policy_loss": self.policy_loss,
            "entropy": mean(self.entropy),
            "clip_ratio/low_mean": mean(self.low),
            "clip_ratio/high_mean": mean(self.high),
            "clip_ratio/region_mean": mean(region),
        }
        if case.ref_logprob is not None:
            result["kl"] = mean(self.kl)
        if case.sampling_logprob is not None:
            result["sampling/sampling_logp_difference/mean"] = mean(self.gaps)
            result["sampling/sampling_logp_difference/max"] = max(self.gaps, default=math.nan)
            result["sampling/importance_sampling_ratio/min"] = min(self.ratios, default=math.nan)
            result["sampling/importance_sampling_ratio/mean"] = mean(self.ratios)
            result["sampling/importance_sampling_ratio/max"] = max(self.ratios, default=math.nan)
        return result
