"""`token_logprob`: checks, the autograd.Function, the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import use_triton
from ..checks import check_target, check_tensor, compute_dtype
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
    check_target(target, logits.shape[0], logits.shape[1], logits.device)
    head = LogitHead(softcap=softcap, temperature=temperature)
    function = _TritonTokenLogprob if use_triton(logits) else _TokenLogprob
    logprob, entropy = function.apply(logits, target, head)
    return logprob, entropy


class _TritonTokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, head: LogitHead) -> tuple[Tensor, Tensor]:
        from . import kernel

        logprob, entropy, peak, log_sum = kernel.forward(logits, target, head)
        ctx.save_for_backward(logits, target, peak, log_sum, entropy)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        from . import kernel

        logits, target, peak, log_sum, entropy = ctx.saved_tensors
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(entropy)
        grad = kernel.backward(logits, target, peak, log_sum, entropy, grad_logprob, grad_entropy, ctx.head)
        return grad, None, None


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, head: LogitHead) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(logits)
        logprob, entropy, logsumexp = (logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(3))
        for rows in row_blocks(*logits.shape):
            x = logits[rows].to(dtype) * head.input_scale
            logprob[rows], entropy[rows], logsumexp[rows] = logit_statistics(x, target[rows], head)
        ctx.save_for_backward(logits, target, logsumexp, entropy)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        logits, target, logsumexp, entropy = ctx.saved_tensors
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(entropy)
        grad = torch.zeros_like(logits)
        live = live_rows(grad_logprob, grad_entropy)
        for block in row_blocks(live.numel(), logits.shape[1]):
            rows = live[block]
            x = logits[rows].to(entropy.dtype) * ctx.head.input_scale
            upstream_entropy = None if grad_entropy is None else grad_entropy[rows]
            logit_gradient_(
                x, target[rows], logsumexp[rows], entropy[rows], grad_logprob[rows], upstream_entropy, ctx.head
            )
            grad[rows] = x.mul_(ctx.head.slope).to(grad.dtype)
        return grad, None, None


def live_rows(grad_logprob: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """int64 indices of the rows with a nonzero upstream gradient: the only ones that a backward needs to look at."""
    live = grad_logprob != 0
    if grad_entropy is not None:
        live |= grad_entropy != 0
    return live.nonzero()[:, 0]
