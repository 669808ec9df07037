"""`decode_attention`: the public function, its op, and the op's PyTorch path."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import use_triton
from ..checks import check_int, check_number, check_tensor, compute_dtype


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    where: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    longest: int | None = None,
) -> Tensor:
    """Attention of one new token of each of B sequences to all before it, which a pool keeps; not differentiable.

    q: [B, Hq, d], k and v: [B, Hkv, d], of the new tokens, of one float dtype, Hq a multiple of Hkv, d <= 256; views
    are taken as they are. keys, values: [P, Hkv, d], contiguous: places for P tokens; k and v are WRITTEN there.
    where: [4, B] int64: of each row its prompt's first place and length, its own first place and length. A row sees its
    prompt's places, which any number of rows may share, then its own, then its new token, which goes to the place
    behind those. Lengths of 0 are fine. Places are checked on the CPU only.
    scale: > 0, multiplies the scores, d^-0.5 by default. window: a row sees the last `window` tokens, the new one
    included. softcap: scores become `softcap * tanh(scores / softcap)`.
    longest: an upper bound of both lengths together, P by default: how many programs of a GPU a row is worth.

    Returns [B, Hq, d], contiguous, of q's dtype, computed in fp32 (float64 for float64). The same inputs give the same
    bits. On a GPU: no wait, and launches that depend on shapes and `longest` alone, so it can be captured in a CUDA
    graph; long paths of few rows are split among programs and merged by log-sum-exp (flash decoding, Dao et al. 2023).
    Errors: TypeError or ValueError naming the argument.
    """
    check_tensor("q", q, (None, None, None), "[B, Hq, d]")
    rows, heads, size = q.shape
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, (rows, None, size), "[B, Hkv, d]", q.dtype, q.device)
    kept = k.shape[1]
    if v.shape[1] != kept or kept == 0 or heads == 0 or heads % kept:
        raise ValueError(f"q: expected a positive multiple of Hkv heads, got {heads}; k has {kept}, v {v.shape[1]}")
    if not 0 < size <= 256:
        raise ValueError(f"q: expected a head size of 1 to 256, got {size}")
    for name, x in (("keys", keys), ("values", values)):
        check_tensor(name, x, (None, kept, size), "[P, Hkv, d]", q.dtype, q.device)
        if not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, which is written to, got strides {x.stride()}")
    if keys.shape[0] != values.shape[0]:
        raise ValueError(f"values: expected as many places as keys, {keys.shape[0]}, got {values.shape[0]}")
    check_tensor("where", where, (4, rows), "[4, B]", torch.int64, q.device)
    if scale is not None:
        check_number("scale", scale, 0, open_low=True)
    check_int("window", window, 1)
    if softcap is not None:
        check_number("softcap", softcap, 0, open_low=True)
    check_int("longest", longest, 0)
    with torch.no_grad():
        return _decode_attention(
            q, k, v, keys, values, where, size**-0.5 if scale is None else float(scale), window, softcap,
            keys.shape[0] if longest is None else longest,
        )  # fmt: skip


@torch.library.custom_op("fastgrpo::decode_attention", mutates_args=("keys", "values"))
def _decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    where: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    longest: int,
) -> Tensor:
    """out [B, Hq, d]; the new tokens are written to the pools."""
    if q.device.type == "cpu":
        _check_places(keys.shape[0], where)
    if use_triton(q):
        from . import kernel

        return kernel.attend(q, k, v, keys, values, where, scale, window, softcap, longest)
    return _by_rows(q, k, v, keys, values, where, scale, window, softcap)


@_decode_attention.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def _check_places(places: int, where: Tensor) -> None:
    prompt_start, prompt_length, start, length = where
    for first, count, new in ((prompt_start, prompt_length, 0), (start, length, 1)):
        if bool(((first < 0) | (count < 0) | (first + count + new > places)).any()):
            raise ValueError(f"where: expected places within the pool's {places}")


def _by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    where: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """A row at a time, so that memory stays that of the longest path. For the CPU and float64: it reads the places."""
    prompt_start, prompt_length, start, length = where
    new = start + length
    keys.index_copy_(0, new, k)
    values.index_copy_(0, new, v)
    rows, heads, size = q.shape
    dtype = compute_dtype(q)
    out = q.new_empty(rows, heads, size)
    bounds = torch.stack([prompt_start, prompt_length, start, length + 1], 1).tolist()
    for b, (first, prompt, own, kept) in enumerate(bounds):
        hidden = 0 if window is None else max(0, prompt + kept - window)
        cut = min(hidden, prompt)
        parts = (slice(first + cut, first + prompt), slice(own + hidden - cut, own + kept))
        seen_keys, seen_values = (torch.cat([x[p] for p in parts]).to(dtype) for x in (keys, values))
        scores = torch.einsum("hrd,thd->hrt", q[b].to(dtype).view(k.shape[1], -1, size), seen_keys).mul_(scale)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        out[b] = torch.einsum("hrt,thd->hrd", scores.softmax(-1), seen_values).reshape(heads, size)
    return out
