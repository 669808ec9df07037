"""`grpo_loss`: checks, evaluation, the autograd.Function that hands out gradients known in the forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_tensor, compute_dtype
from ..group_advantages.op import GroupRewards
from .coefficients import Evaluation, evaluate
from .config import LossConfig
from .inputs import LossArguments, LossInputs
from .output import LossOutput

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
    inputs = arguments.prepare(num_rows, compute_dtype(logprob))
    loss, result = differentiable_loss(logprob, entropy, inputs, config)
    return LossOutput(loss, logprob.detach(), None if entropy is None else entropy.detach(), result.metrics)


def differentiable_loss(
    logprob: Tensor, entropy: Tensor | None, inputs: LossInputs, config: LossConfig
) -> tuple[Tensor, Evaluation]:
    """The evaluated loss, attached to autograd through log-prob and entropy."""
    dtype = inputs.advantage.dtype
    result = evaluate(
        logprob.detach().to(dtype), None if entropy is None else entropy.detach().to(dtype), inputs, config
    )
    grad_entropy = None
    if result.grad_entropy is not None:
        grad_entropy = torch.where(inputs.trained, result.grad_entropy, 0)
    return with_gradients(result.loss.to(dtype), (logprob, entropy), (result.grad_logprob, grad_entropy)), result


def with_gradients(loss: Tensor, inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]) -> Tensor:
    """`loss` [] as a differentiable function of `inputs` whose gradients, None for none, are known already."""
    return _KnownGradients.apply(loss, *inputs, *gradients)


class _KnownGradients(torch.autograd.Function):
    """The backward scales by the upstream gradient into new tensors: what is saved serves any number of backwards."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *inputs_and_gradients: Tensor | None) -> Tensor:
        count = len(inputs_and_gradients) // 2
        ctx.dtypes = [None if x is None else x.dtype for x in inputs_and_gradients[:count]]
        ctx.save_for_backward(*inputs_and_gradients[count:])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        scaled = [
            (gradient * upstream).to(dtype) if gradient is not None and needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs_input_grad[1:], strict=False)
        ]
        return None, *scaled, *(None for _ in gradients)
