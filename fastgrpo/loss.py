"""Hidden states + PackedBatch -> loss and metrics: a thin call of the fused op."""

from __future__ import annotations

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
