"""`linear_logprob`: checks, the autograd.Function that recomputes the logits in the backward, the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_target, check_tensor, compute_dtype
from ..projection import ChunkedHead, chunk_rows, even_chunks
from ..token_logprob.op import live_rows
from ..vocabulary import LogitHead, logit_gradient_, logit_statistics


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under the LM head, and the entropy, for any loss built on them.

    hidden: [N, D] float. weight: [V, D] float. bias: [V] float or None. target: [N] int64 in [0, V) (checked on the
    CPU only). The logits are `softcap(logit_scale * (hidden @ weight.T + bias)) / temperature`.
    chunk_size: rows whose logits exist at a time; by default as many as fit a 64 MiB buffer.

    Returns `logprob` [N] and `entropy` [N] in nats, fp32 (float64 if an input is), both differentiable with respect to
    hidden, weight and bias. The backward computes the logits again: 4 GEMMs in all, 3 with a frozen weight. Rows whose
    upstream gradients are 0 are left out of it, and a row of NaN among them changes nothing.
    Errors: TypeError or ValueError naming the argument.
    """
    check_linear(hidden, weight, bias, chunk_size)
    check_target(target, hidden.shape[0], weight.shape[0], hidden.device)
    head = LogitHead(logit_scale, softcap, temperature)
    return recomputed_logprob(hidden, weight, bias, target, head, chunk_size)


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_size: int | None) -> None:
    """The checks that the ops on an LM head share; errors as in checks.py."""
    check_tensor("hidden", hidden, (None, None), "[N, D]")
    check_tensor("weight", weight, (None, hidden.shape[1]), "[V, D]", device=hidden.device)
    if weight.shape[0] == 0:
        raise ValueError("weight: expected shape [V, D] with V >= 1, got V = 0")
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), "[V]", device=hidden.device)
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1):
        raise ValueError(f"chunk_size: expected an int >= 1 or None, got {chunk_size!r}")


def recomputed_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: LogitHead, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` after its checks."""
    logprob, entropy = _LinearLogprob.apply(hidden, weight, bias, target, head, chunk_size)
    return logprob, entropy


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        head: LogitHead,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        chunks = even_chunks(hidden.shape[0], chunk_rows(weight, compute_dtype(hidden, weight, bias), chunk_size))
        chunked = ChunkedHead(hidden, weight, bias, head, chunks)
        logprob, entropy, logsumexp = (hidden.new_empty(hidden.shape[0], dtype=chunked.dtype) for _ in range(3))
        for rows in chunks:
            x = chunked.logits(rows)
            logprob[rows], entropy[rows], logsumexp[rows] = logit_statistics(x, target[rows], head)
        ctx.save_for_backward(hidden, weight, bias, target, logsumexp, entropy)
        ctx.head, ctx.chunk_size = head, chunk_size
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, logsumexp, entropy = ctx.saved_tensors
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(entropy)
        live = live_rows(grad_logprob, grad_entropy)
        chunks = even_chunks(live.numel(), chunk_rows(weight, entropy.dtype, ctx.chunk_size))
        chunked = ChunkedHead(hidden, weight, bias, ctx.head, chunks, ctx.needs_input_grad[:3])
        for chunk in chunks:
            rows = live[chunk]
            upstream_entropy = None if grad_entropy is None else grad_entropy[rows]
            grad_logits = logit_gradient_(
                chunked.logits(rows),
                target[rows],
                logsumexp[rows],
                entropy[rows],
                grad_logprob[rows],
                upstream_entropy,
                ctx.head,
            )
            chunked.accumulate(rows, grad_logits)
        grads = zip(chunked.gradients, (hidden, weight, bias), strict=True)
        return *(None if grad is None else grad.to(like.dtype) for grad, like in grads), None, None, None
