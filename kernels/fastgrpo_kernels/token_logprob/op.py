"""`token_logprob`: the public function, its op, and the op of its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import use_triton
from ..checks import check_target, check_target_values, check_tensor, compute_dtype
from ..gradients import live_rows
from ..vocabulary import LogitHead, logit_gradient_, logit_statistics, row_blocks


def token_logprob(
    logits: Tensor, target: Tensor, *, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and the entropy of the distribution it comes from.

    logits: [N, V] float. target: [N] int64 in [0, V) (values are checked on the CPU only; on a GPU a wrong one makes
    its log-prob NaN).
    temperature: > 0, divides the logits after `softcap(x) = softcap * tanh(x / softcap)`.

    Returns `logprob` [N] and `entropy` [N] in nats, fp32 (float64 for float64 logits), both differentiable. Logits of
    -inf are allowed where they rule a token out. Beside the gradient of the logits, which has their dtype, a few MiB
    are used (on a GPU 8 bytes a row, and a copy of logits whose columns do not lie side by side). A row whose upstream
    gradients are both 0 gets a zero gradient whatever it holds, NaN included.
    Errors: TypeError or ValueError naming the argument.
    """
    check_tensor("logits", logits, (None, None), "[N, V]")
    check_target(target, logits.shape[0], logits.device)
    LogitHead(softcap=softcap, temperature=temperature)
    logprob, entropy, _, _ = _token_logprob(logits, target, softcap, temperature)
    return logprob, entropy


@torch.library.custom_op("fastgrpo::token_logprob", mutates_args=())
def _token_logprob(
    logits: Tensor, target: Tensor, softcap: float | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, and two vectors whose sum is the log-sum-exp, each [N]."""
    check_target_values(target, logits.shape[1])
    head = LogitHead(softcap=softcap, temperature=temperature)
    if use_triton(logits):
        from . import kernel

        return kernel.forward(logits, target, head)
    dtype = compute_dtype(logits)
    logprob, entropy, peak, log_sum = (logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(4))
    for rows in row_blocks(*logits.shape):
        x = logits[rows].to(dtype) * head.input_scale
        logprob[rows], entropy[rows], peak[rows], log_sum[rows] = logit_statistics(x, target[rows], head)
    return logprob, entropy, peak, log_sum


@_token_logprob.register_fake
def _(logits: Tensor, target: Tensor, softcap: float | None, temperature: float) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(logits.shape[0], dtype=compute_dtype(logits)) for _ in range(4))


@torch.library.custom_op("fastgrpo::token_logprob_backward", mutates_args=())
def _token_logprob_backward(
    logits: Tensor,
    target: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """The gradient of the logits, in their dtype."""
    head = LogitHead(softcap=softcap, temperature=temperature)
    if grad_logprob is None:
        grad_logprob = torch.zeros_like(entropy)
    if use_triton(logits):
        from . import kernel

        return kernel.backward(logits, target, peak, log_sum, entropy, grad_logprob, grad_entropy, head)
    grad = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    live = live_rows(grad_logprob, grad_entropy)
    for block in row_blocks(live.numel(), logits.shape[1]):
        rows = live[block]
        x = logits[rows].to(entropy.dtype) * head.input_scale
        slope = None if grad_entropy is None else grad_entropy[rows]
        logit_gradient_(x, target[rows], peak[rows], log_sum[rows], entropy[rows], grad_logprob[rows], slope, head)
        grad[rows] = x.mul_(head.slope).to(grad.dtype)
    return grad


@_token_logprob_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, *ctx.options = inputs
    _, entropy, peak, log_sum = output
    ctx.mark_non_differentiable(peak, log_sum)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, peak, log_sum, entropy)


def _backward(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if grad_logprob is None and grad_entropy is None:
        return None, None, None, None
    grad = _token_logprob_backward(*ctx.saved_tensors, grad_logprob, grad_entropy, *ctx.options)
    return grad, None, None, None


_token_logprob.register_autograd(_backward, setup_context=_save)
