"""`grpo_loss`: the public function, and its op, which finds loss and gradients in the forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_tensor, compute_dtype
from ..gradients import scale_gradient
from ..group_advantages.op import GroupRewards
from .arguments import LossArguments, LossOperands
from .config import LossConfig
from .output import METRICS, LossOutput, as_metrics
from .windows import coefficients

DEFAULT_CONFIG = LossConfig()


def grpo_loss(
    logprob: Tensor,
    advantage: Tensor | GroupRewards,
    cu_seqlens: Tensor,
    *,
    entropy: Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    sampling_logprob: Tensor | None = None,
    mask: Tensor | None = None,
    entropy_threshold: float | Tensor | None = None,
    config: LossConfig = DEFAULT_CONFIG,
    num_sequences: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
) -> LossOutput:
    """The policy loss of N packed completion tokens in S sequences, from their log-probabilities.

    logprob:    [N] float under the current policy; differentiable.
    advantage:  [S] per sequence, [N] per token ([S] when S = N), or GroupRewards to be normalised here. Constant.
    cu_seqlens: [S+1] int32; sequence s owns rows cu_seqlens[s]:cu_seqlens[s+1]. May be empty.
    entropy:    [N] float in nats; differentiable; needed by an entropy bonus or a top-entropy mask.
    old_logprob, ref_logprob, sampling_logprob: [N] float under the policy that started the update (None = on-policy),
        the reference (needed with beta > 0), the rollout engine (NaN = not reported: no correction from that token; in
        the sequence modes it adds nothing to its sequence's weight). Constants.
    mask:       [N] bool, tokens that train; None = all. What the others hold, NaN included, has no effect whatever.
    entropy_threshold: number or 0-d tensor; policy terms of tokens below it are dropped. Without it, a
        `top_entropy_quantile` < 1 takes the quantile of this call's trained tokens.
    num_sequences, num_tokens: denominators of the whole update batch, int or 0-d tensor; by default this call's own, S
        (less failed samples of GroupRewards) and the number of trained tokens.

    Returns a LossOutput; computed in fp32, or float64 for a float64 logprob. Splitting a batch by sequences, with the
    denominators and the threshold of the whole, gives losses and gradients that add up to the whole's.
    Errors: TypeError or ValueError naming the argument, before any work.
    """
    check_tensor("logprob", logprob, (None,), "[N]")
    num_rows, device = logprob.numel(), logprob.device
    if entropy is not None:
        check_tensor("entropy", entropy, (num_rows,), "[N]", device=device)
    arguments = LossArguments(
        advantage,
        cu_seqlens,
        old_logprob,
        ref_logprob,
        sampling_logprob,
        mask,
        entropy_threshold,
        config,
        num_sequences,
        num_tokens,
    )
    arguments.check(num_rows, device)
    if entropy is None and arguments.needs_entropy():
        raise ValueError("entropy: expected a tensor with an entropy bonus or a top-entropy mask, got None")
    loss, metrics, _, _ = _grpo_loss(logprob, entropy, *arguments.operands())
    return LossOutput(
        loss,
        logprob.detach(),
        None if entropy is None else entropy.detach(),
        as_metrics(
            metrics, entropy=entropy is not None, ref=ref_logprob is not None, sampling=sampling_logprob is not None
        ),
    )


@torch.library.custom_op("fastgrpo::grpo_loss", mutates_args=())
def _grpo_loss(
    logprob: Tensor,
    entropy: Tensor | None,
    advantage: Tensor,
    group_index: Tensor | None,
    cu_seqlens: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    sampling: Tensor | None,
    mask: Tensor | None,
    entropy_threshold: Tensor | None,
    num_sequences: Tensor | None,
    num_tokens: Tensor | None,
    config: str,
    baseline: str,
    scale: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss 0-d, `METRICS`, dL/dlogp [N], dL/dH [N] (empty without an entropy bonus)."""
    operands = LossOperands(
        advantage, group_index, cu_seqlens, old, ref, sampling, mask,
        entropy_threshold, num_sequences, num_tokens, config, baseline, scale,
    )  # fmt: skip
    num_rows, dtype = logprob.numel(), compute_dtype(logprob)
    operands.check_values(num_rows)
    operands = operands.with_denominators(num_rows)
    logprob = logprob.to(dtype)
    entropy = None if entropy is None else entropy.to(dtype)
    operands = operands.with_threshold(entropy)
    grad_logprob = torch.empty_like(logprob, memory_format=torch.contiguous_format)
    grad_entropy = torch.empty_like(grad_logprob) if operands.config.entropy_coef != 0 else grad_logprob.new_empty(0)
    part = coefficients(operands, num_rows, logprob)
    part.rows(0, num_rows, logprob, entropy, grad_logprob, grad_entropy if grad_entropy.numel() == num_rows else None)
    loss, metrics = part.finish()
    return loss.to(dtype), metrics, grad_logprob, grad_entropy


@_grpo_loss.register_fake
def _(logprob: Tensor, entropy: Tensor | None, *operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, bonus = compute_dtype(logprob), LossOperands(*operands).config.entropy_coef != 0
    return (
        logprob.new_empty((), dtype=dtype),
        logprob.new_empty(len(METRICS), dtype=torch.float64),
        logprob.new_empty(logprob.numel(), dtype=dtype),
        logprob.new_empty(logprob.numel() if bonus else 0, dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprob, entropy = inputs[:2]
    _, metrics, grad_logprob, grad_entropy = output
    ctx.mark_non_differentiable(metrics, grad_logprob, grad_entropy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_logprob, grad_entropy)
    ctx.dtypes = (logprob.dtype, None if entropy is None else entropy.dtype)
    ctx.bonus = LossOperands(*inputs[2:]).config.entropy_coef != 0


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad_logprob, grad_entropy = ctx.saved_tensors
    for_logprob = for_entropy = None
    if upstream is not None and ctx.needs_input_grad[0]:
        for_logprob = scale_gradient(grad_logprob, upstream, ctx.dtypes[0])
    if upstream is not None and ctx.bonus and ctx.needs_input_grad[1]:
        for_entropy = scale_gradient(grad_entropy, upstream, ctx.dtypes[1])
    return for_logprob, for_entropy, *[None] * 13


_grpo_loss.register_autograd(_backward, setup_context=_save)
