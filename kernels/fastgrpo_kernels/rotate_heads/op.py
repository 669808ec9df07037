"""`rotate_heads`: the public function, its op, and the op's PyTorch path."""

from __future__ import annotations

import torch
from torch import Tensor

from ..add_rms_norm.op import rms_norm
from ..backend import use_triton
from ..checks import check_number, check_tensor


@torch.no_grad()
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
    """Rotary embedding of queries and keys (Su et al. 2021) in the halves layout of Llama; not differentiable.

    q: [T, Hq, d], k: [T, Hkv, d], of one float dtype, d even and <= 256; views are taken as they are, so both may be
    slices of one product. cos, sin: [T, d] of that dtype, of each token's position.
    q_weight, k_weight: [d] of that dtype, or neither: each head is normalised first, as `add_rms_norm` does, with these
    weights and `eps` >= 0 (Qwen3).

    Returns q and k rotated, contiguous, new: x * cos + (-second half, first half) * sin, both products rounded, then
    their sum, as transformers computes it; bitwise without norms. On a GPU: one launch for both, no wait. NaN stays in
    its head. The same inputs give the same bits.
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
