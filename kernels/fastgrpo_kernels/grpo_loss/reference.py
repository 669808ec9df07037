"""The policy losses in plain differentiable PyTorch: the maths to read first, and what the written-out gradients match.

Masked rows are taken out first; from there on every line is a line of the definitions. No chunks, no NaN handling
beyond what the definitions say, and no care for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..segments import segment_ids
from .config import CLIPPED, LossConfig

LOG_RATIO_CLAMP = 20.0
"""Log-ratios are clamped to +-20 where they are exponentiated."""

LOG_WEIGHT_MIN = math.log(1e-8)
"""Lower clamp of VESPO's log weights."""


def grpo_loss_reference(
    logprob: Tensor,
    advantage: Tensor,
    cu_seqlens: Tensor,
    config: LossConfig,
    entropy: Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    sampling_logprob: Tensor | None = None,
    mask: Tensor | None = None,
    entropy_threshold: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    """0-d loss. Log-probs and entropy [N] of one float dtype, advantage [S] or [N], mask [N] bool."""
    num_seq, sequence = cu_seqlens.numel() - 1, segment_ids(cu_seqlens, logprob.numel())
    advantage = advantage[sequence] if advantage.numel() == num_seq else advantage
    rows = slice(None) if mask is None else mask
    logp, A, sequence = logprob[rows], advantage[rows], sequence[rows]
    H, old, ref, samp = (None if x is None else x[rows] for x in (entropy, old_logprob, ref_logprob, sampling_logprob))
    old = logp.detach() if old is None else old

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(num_seq).index_add(0, sequence, x)

    length = total(torch.ones_like(logp)).clamp(min=1)
    A_seq = (total(A) / length)[sequence]
    r = logp - old
    c = _correction(old, samp, config, total, sequence)
    exponent = (total(r) / length)[sequence] if config.importance_sampling_level == "sequence" else r
    w = exponent.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()

    if config.loss_type == "vespo":
        log_c = c.log().clamp(LOG_WEIGHT_MIN, LOG_RATIO_CLAMP)
        log_w = total(r.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)) + total(log_c)
        loss = _vespo(log_w.clamp(LOG_WEIGHT_MIN, LOG_RATIO_CLAMP)[sequence], A, A_seq, logp, config)
    else:
        loss = _per_token(w, A, logp, config)
    if config.off_policy_mask_threshold is not None:
        drift = torch.nan_to_num((old if samp is None else samp) - logp.detach(), nan=0.0)
        stale = (total(drift) / length)[sequence] > config.off_policy_mask_threshold
        loss = torch.where(stale & (A_seq < 0), 0, loss)
    if H is not None and entropy_threshold is None and config.top_entropy_quantile < 1:
        entropy_threshold = entropy_quantile(H.detach(), sequence >= 0, 1 - config.top_entropy_quantile)
    if H is not None and entropy_threshold is not None:
        loss = torch.where(H.detach() >= entropy_threshold, loss, 0)
    if config.loss_type != "vespo":
        loss = loss * c
    if config.beta > 0:
        assert ref is not None
        kl = _kl(ref - logp, config)
        loss = loss + config.beta * (kl * w if config.kl_bias_correction else kl)

    S = torch.as_tensor(num_seq if num_sequences is None else num_sequences).clamp(min=1)
    tokens = torch.as_tensor(logp.numel() if num_tokens is None else num_tokens).clamp(min=1)
    result = _aggregate(loss, length[sequence], S, tokens, config)
    if config.entropy_coef != 0:
        assert H is not None
        result = result - config.entropy_coef * H.sum() / tokens
    return result


def entropy_quantile(entropy: Tensor, trained: Tensor, q: float) -> Tensor:
    """0-d quantile, interpolated linearly, of the trained tokens' entropies; +inf when there is none. No host sync."""
    infinity = entropy.new_full((1,), math.inf)
    ordered = torch.cat([torch.where(trained, entropy, math.inf), infinity]).sort().values
    last = (trained.sum() - 1).clamp(min=0)
    position = q * last.double()
    below = position.floor().long()
    around = ordered.gather(0, torch.stack([below, torch.minimum(below + 1, last)]))
    between = torch.lerp(around[0], around[1], (position - below).to(ordered.dtype))
    return torch.where(trained.any(), between, infinity[0])  # between two infinities is NaN


def by_sign(positive: Tensor, if_positive: float, otherwise: float, like: Tensor) -> Tensor:
    """One of two numbers, in the dtype of `like` (torch.where would make two Python floats float32)."""
    return torch.where(positive, like.new_tensor(if_positive), like.new_tensor(otherwise))


def _per_token(w: Tensor, A: Tensor, logp: Tensor, config: LossConfig) -> Tensor:
    low, high = config.clip_range
    if config.loss_type in CLIPPED:
        capped = w if config.delta is None else w.clamp(max=config.delta)
        return -torch.minimum(capped * A, w.clamp(low, high) * A)
    if config.loss_type == "cispo":
        return -w.clamp(max=high).detach() * A * logp
    if config.loss_type == "sapo":
        tau = by_sign(A > 0, config.sapo_temperature_pos, config.sapo_temperature_neg, A)
        return -(4 / tau) * torch.sigmoid(tau * (w - 1)) * A
    return -A * logp


def _vespo(log_w: Tensor, A: Tensor, A_seq: Tensor, logp: Tensor, config: LossConfig) -> Tensor:
    k = by_sign(A_seq >= 0, config.vespo_k_pos, config.vespo_k_neg, A)
    lam = by_sign(A_seq >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg, A)
    phi = (lam + k * log_w - lam * log_w.exp()).exp()
    return -phi.detach() * A * logp


def _correction(
    old: Tensor, samp: Tensor | None, config: LossConfig, total: Callable[[Tensor], Tensor], sequence: Tensor
) -> Tensor:
    mode = config.sampling_correction
    if mode == "none" or samp is None:
        return torch.ones_like(old)
    log_c = torch.where(samp.isnan(), 0, old.detach() - samp)
    c = (total(log_c)[sequence] if mode.startswith("sequence") else log_c).exp()
    low, high = config.sampling_clip_min or 0.0, config.sampling_clip_max
    c = c.clamp(low, high) if mode.endswith("truncate") else torch.where((c >= low) & (c <= high), c, 0)
    return c if mode.startswith("sequence") else torch.where(samp.isnan(), 1, c)


def _kl(d: Tensor, config: LossConfig) -> Tensor:
    if config.kl_estimator == "k1":
        return -d
    if config.kl_estimator == "k2":
        return d.square() / 2
    return d.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp() - d - 1


def _aggregate(loss: Tensor, length: Tensor, S: Tensor, tokens: Tensor, config: LossConfig) -> Tensor:
    if config.loss_type in ("grpo", "sapo"):
        return (loss / length).sum() / S
    if config.loss_type == "luspo":
        return loss.sum() / S
    if config.loss_type == "dr_grpo":
        assert config.max_completion_length is not None
        return loss.sum() / (S * config.max_completion_length)
    return loss.sum() / tokens
