"""Hidden states or values + PackedBatch -> loss and metrics. The policy's is a thin call of the fused op."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.records import Denominators, LMHead, PackedBatch
from fastgrpo_kernels import LossConfig, LossOutput, linear_grpo_loss


def policy_loss(
    hidden: Tensor,
    head: LMHead,
    batch: PackedBatch,
    *,
    config: LossConfig,
    temperature: float,
    whole: Denominators,
    entropy_threshold: float | Tensor | None = None,
) -> LossOutput:
    """The batch's share of the update's loss; shares add up to the loss of the whole update batch.

    hidden: [N, D], the states that predict the batch's scored tokens; differentiable.
    """
    return linear_grpo_loss(
        hidden,
        head.weight,
        batch.target,
        batch.advantage,
        batch.cu_seqlens,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        temperature=temperature,
        old_logprob=batch.old_logprob,
        ref_logprob=batch.ref_logprob,
        sampling_logprob=batch.sampling_logprob,
        entropy_threshold=entropy_threshold,
        config=config,
        num_sequences=whole.num_sequences,
        num_tokens=whole.num_tokens,
    )


def value_loss(
    values: Tensor, batch: PackedBatch, *, cliprange: float | None, whole: Denominators
) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch's share of the critic's loss, and metrics as `LossOutput` has them; shares add up as the policy's do.

    `0.5 * max((V - R)^2, (clip(V, V_old - cliprange, V_old + cliprange) - R)^2)`, the mean over all tokens that train
    (PPO2 of OpenAI's baselines; Ziegler et al., arXiv 1909.08593). R is the return, V_old the value before the update.

    values: [N] of the batch's scored tokens; differentiable. cliprange: None = not clipped.
    Raises ValueError for a batch without old values or returns.
    """
    if batch.values is None or batch.returns is None:
        raise ValueError("the critic's loss needs its values before the update and the returns, and the batch has none")
    errors = (values - batch.returns).square()
    clipped = errors
    if cliprange is not None:
        near = values.clamp(batch.values - cliprange, batch.values + cliprange)
        clipped = (near - batch.returns).square()
    loss = 0.5 * torch.maximum(errors, clipped).sum() / max(whole.num_tokens, 1)
    metrics = {
        "value_loss": loss.detach().double(),
        "value_clip_ratio/sum": (clipped > errors).sum().double(),
        "value_clip_ratio/count": torch.full((), values.numel(), dtype=torch.float64, device=values.device),
    }
    return loss, metrics
