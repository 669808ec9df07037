"""`rotate_heads`: the public function, its op, that of its backward, and their PyTorch path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..add_rms_norm.op import rms_norm, rms_norm_gradients
from ..backend import use_triton
from ..checks import check_number, check_tensor, compute_dtype
from ..vocabulary import row_blocks


def rotate_heads(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries and keys (Su et al. 2021) in the halves layout of Llama; differentiable once.

    q: [T, Hq, d], k: [T, Hkv, d], of one float dtype, d even and <= 256; views are taken as they are, so both may be
    slices of one product. cos, sin: [T, d] of that dtype, of each token's position.
    q_weight, k_weight: [d] of that dtype, or neither: each head is normalised first, as `add_rms_norm` does, with these
    weights and `eps` >= 0 (Qwen3).

    Returns q and k rotated, contiguous, new: x * cos + (-second half, first half) * sin, both products rounded, then
    their sum, as transformers computes it; bitwise without norms. On a GPU: one launch for both, no wait. NaN stays in
    its head. The same inputs give the same bits.
    Gradients: of q, k and the weights, in fp32 until they are rounded; cos and sin are constants. One launch, two where
    the weights want one. Kept for them: cos and sin; with norms q and k as they are and the weights, too.
    Errors: TypeError or ValueError naming the argument.
    """
    check_tensor("q", q, (None, None, None), "[T, Hq, d]")
    rows, _, size = q.shape
    if not 0 < size <= 256 or size % 2:
        raise ValueError(f"q: expected an even head size of 2 to 256, got {size}")
    check_tensor("k", k, (rows, None, size), "[T, Hkv, d]", q.dtype, q.device)
    for name, x in (("cos", cos), ("sin", sin)):
        check_tensor(name, x, (rows, size), "[T, d]", q.dtype, q.device)
    given = {"q_weight": q_weight, "k_weight": k_weight, "eps": eps}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) in (1, 2):
        raise ValueError(f"{missing[0]}: expected q_weight, k_weight and eps together or none of them, got None")
    if not missing:
        check_tensor("q_weight", q_weight, (size,), "[d]", q.dtype, q.device)
        check_tensor("k_weight", k_weight, (size,), "[d]", q.dtype, q.device)
        check_number("eps", eps, 0)
    return _rotate_heads(q, k, cos, sin, q_weight, k_weight, 0.0 if eps is None else float(eps))


@torch.library.custom_op("fastgrpo::rotate_heads", mutates_args=())
def _rotate_heads(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if use_triton(q):
        from . import kernel

        return kernel.rotate(q, k, cos, sin, q_weight, k_weight, eps)
    return _rotated(q, cos, sin, q_weight, eps), _rotated(k, cos, sin, k_weight, eps)


@_rotate_heads.register_fake
def _(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The steps and roundings of transformers' `apply_rotary_pos_emb`."""
    x = x.contiguous() if weight is None else rms_norm(x.contiguous(), weight, eps)
    first, second = x.chunk(2, -1)
    return (x * cos[:, None]).add_(torch.cat((-second, first), -1).mul_(sin[:, None]))


@torch.library.custom_op("fastgrpo::rotate_heads_backward", mutates_args=())
def _rotate_heads_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    by_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, of k, and of both weights, [2, d], [0] if not by_weight. q to k_weight: all or none."""
    if use_triton(cos):
        from . import kernel

        return kernel.backward(grad_q, grad_k, cos, sin, q, k, q_weight, k_weight, eps, by_weight)
    by_q, q_sums = _turned_back(grad_q, cos, sin, q, q_weight, eps, by_weight)
    by_k, k_sums = _turned_back(grad_k, cos, sin, k, k_weight, eps, by_weight)
    return by_q, by_k, torch.stack((q_sums, k_sums)).to(cos.dtype) if by_weight else cos.new_empty(0)


@_rotate_heads_backward.register_fake
def _(grad_q: Tensor, grad_k: Tensor, cos: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    by_weights = cos.new_empty((2, cos.shape[1]) if rest[-1] else (0,))
    return grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape), by_weights


def _turned_back(
    upstream: Tensor, cos: Tensor, sin: Tensor, x: Tensor | None, weight: Tensor | None, eps: float, by_weight: bool
) -> tuple[Tensor, Tensor]:
    """Of the queries or the keys: their gradient, and that of their weight, which is not rounded yet."""
    rows, heads, size = upstream.shape
    dtype = compute_dtype(cos)
    gradient = upstream.new_empty(upstream.shape)
    sums = cos.new_zeros(size if by_weight else 0, dtype=dtype)
    for block in row_blocks(rows, heads * size):
        slope, c, s = (y.contiguous().to(dtype) for y in (upstream[block], cos[block, None], sin[block, None]))
        first, second = (slope * s).chunk(2, -1)
        slope = slope * c + torch.cat((second, -first), -1)
        if x is not None and weight is not None:
            flat, by_heads = rms_norm_gradients(
                x[block].reshape(-1, size), weight, slope.view(-1, size), eps, by_weight
            )
            slope = flat.view(slope.shape)
            sums += by_heads
        gradient[block] = slope
    return gradient, sums


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, cos, sin, *weights, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.shapes = q.shape, k.shape
    ctx.save_for_backward(cos, sin, *((None,) * 4 if weights[0] is None else (q, k, *weights)))


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, needs, used = ctx.saved_tensors, ctx.needs_input_grad, [g is not None for g in upstream]
    given = (saved[0].new_zeros(shape) if g is None else g for g, shape in zip(upstream, ctx.shapes, strict=True))
    *by_heads, by_weights = _rotate_heads_backward(*given, *saved, ctx.eps, needs[4] or needs[5])
    of_heads = (by_heads[i] if used[i] and needs[i] else None for i in range(2))
    of_weights = (by_weights[i] if used[i] and needs[4 + i] else None for i in range(2))
    return *of_heads, None, None, *of_weights, None


_rotate_heads.register_autograd(_backward, setup_context=_save)
