# mypy: disable-error-code="no-untyped-def"
"""`rotate_heads` in Triton: a program takes one token and a block of its heads of queries, or of keys.

A head is two tiles, its halves, which turn with one another: no shuffle, and 128-bit accesses where half a head is a
multiple of 16 bytes. Products are not fused with sums: what is rounded apart in PyTorch is rounded apart here. Not
measured on a GPU yet.

In the backward a program takes all heads of a token; of a run of tokens if weights want gradients, as `add_rms_norm`'s.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..add_rms_norm.kernel import (
    PER_WARP,
    even_programs,
    norm_gradient,
    run_of_rows,
    scaled,
    sum_parts,
    sum_parts_spec,
)
from ..specs import KernelSpec

MAX_TILE = 1024
"""Elements of each half of the heads that a program takes."""

OPTIONS = {"enable_fp_fusion": False}

PROGRAMS = 1024
"""At most so many share the tokens whose heads have weights that want gradients."""


@triton.jit
def _turned(x, y, cos, sin):
    """x * cos + y * sin, each step rounded to the dtype of cos."""
    dtype: tl.constexpr = cos.dtype
    by_cos = (x * cos.to(tl.float32)).to(dtype).to(tl.float32)
    by_sin = (y * sin.to(tl.float32)).to(dtype).to(tl.float32)
    return (by_cos + by_sin).to(dtype)


@triton.jit
def _rotate(
    p_x, p_weight, p_out, p_cos, p_sin, stride, eps, i_head, HEADS: tl.constexpr, SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The heads i_head of one token, whose queries or keys begin at p_x, and go to p_out. WIDTH >= SIZE / 2.

    What heads share is loaded for each of them, out of L1: as vectors it would have to be laid out again for the tiles,
    through shared memory and barriers.
    """
    HALF: tl.constexpr = SIZE // 2
    o = tl.arange(0, WIDTH)
    inside = (i_head < HEADS)[:, None] & (o < HALF)[None, :]
    o_x = i_head.to(tl.int64)[:, None] * stride + o[None, :]
    shared = i_head[:, None] * 0 + o[None, :]
    x = tl.load(p_x + o_x, mask=inside, other=0.0).to(tl.float32)
    x_2 = tl.load(p_x + o_x + HALF, mask=inside, other=0.0).to(tl.float32)
    cos, sin = tl.load(p_cos + shared, mask=inside, other=0.0), tl.load(p_sin + shared, mask=inside, other=0.0)
    cos_2 = tl.load(p_cos + shared + HALF, mask=inside, other=0.0)
    sin_2 = tl.load(p_sin + shared + HALF, mask=inside, other=0.0)
    if p_weight is not None:
        weight = tl.load(p_weight + shared, mask=inside, other=0.0)
        weight_2 = tl.load(p_weight + shared + HALF, mask=inside, other=0.0)
        scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(x_2 * x_2, 1)) * (1.0 / SIZE) + eps)[:, None]
        x, x_2 = scaled(x, scale, weight).to(tl.float32), scaled(x_2, scale, weight_2).to(tl.float32)
    o_out = i_head[:, None] * SIZE + o[None, :]
    tl.store(p_out + o_out, _turned(x, -x_2, cos, sin), mask=inside)
    tl.store(p_out + o_out + HALF, _turned(x_2, x, cos_2, sin_2), mask=inside)


@triton.jit
def rotate_heads_kernel(
    p_q, p_k, p_cos, p_sin, p_q_weight, p_k_weight, p_q_out, p_k_out,
    stride_q, stride_qh, stride_k, stride_kh, stride_cos, stride_sin, eps,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """q [T, QUERIES, SIZE], k [T, KEYS, SIZE] -> the same, contiguous. Both weights [SIZE] or None.

    BLOCK heads a program, WIDTH >= SIZE / 2, powers of two. Grid: (T * (cdiv(QUERIES, BLOCK) + cdiv(KEYS, BLOCK)),).
    """
    Q_BLOCKS: tl.constexpr = (QUERIES + BLOCK - 1) // BLOCK
    K_BLOCKS: tl.constexpr = (KEYS + BLOCK - 1) // BLOCK
    i_row = (tl.program_id(0) // (Q_BLOCKS + K_BLOCKS)).to(tl.int64)
    i_block = tl.program_id(0) % (Q_BLOCKS + K_BLOCKS)
    p_cos += i_row * stride_cos
    p_sin += i_row * stride_sin
    if i_block < Q_BLOCKS:
        i_head = i_block * BLOCK + tl.arange(0, BLOCK)
        p_q += i_row * stride_q
        p_q_out += i_row * (QUERIES * SIZE)
        _rotate(p_q, p_q_weight, p_q_out, p_cos, p_sin, stride_qh, eps, i_head, QUERIES, SIZE, WIDTH)
    else:
        i_head = (i_block - Q_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        p_k += i_row * stride_k
        p_k_out += i_row * (KEYS * SIZE)
        _rotate(p_k, p_k_weight, p_k_out, p_cos, p_sin, stride_kh, eps, i_head, KEYS, SIZE, WIDTH)


def tiling(queries: int, keys: int, size: int) -> dict[str, int]:
    width = triton.next_power_of_2(size // 2)
    block = min(triton.next_power_of_2(max(queries, keys)), MAX_TILE // width)
    return {"BLOCK": block, "WIDTH": width, "num_warps": max(1, block * width // PER_WARP)}


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """As the op; fp16, bf16 or fp32. One launch."""
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    (rows, queries, size), keys = q.shape, k.shape[1]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    chosen = tiling(queries, keys, size)
    programs = rows * sum(triton.cdiv(heads, chosen["BLOCK"]) for heads in (queries, keys))
    if programs:
        weights = (None if w is None else w.contiguous() for w in (q_weight, k_weight))
        with torch.cuda.device_of(q):
            rotate_heads_kernel[(programs,)](
                q, k, cos, sin, *weights, q_out, k_out,
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0), sin.stride(0), eps,
                QUERIES=queries, KEYS=keys, SIZE=size, **chosen, **OPTIONS,
            )  # fmt: skip
    return q_out, k_out


@triton.jit
def _rotate_back(
    p_grad, p_x, p_weight, p_cos, p_sin, p_out, p_parts, stride_grad, stride_gh, stride_x, stride_angle, eps,
    first, stop, HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Queries, or keys, of the tokens from first to stop, BLOCK heads at a time; p_parts [SIZE]: of their weight."""
    HALF: tl.constexpr = SIZE // 2
    dtype: tl.constexpr = p_out.dtype.element_ty
    o = tl.arange(0, WIDTH)
    half = o < HALF
    sums = tl.zeros([BLOCK, WIDTH], tl.float32)
    sums_2 = tl.zeros([BLOCK, WIDTH], tl.float32)
    for i in range(stop - first):
        i_row = first + i  # 64 bits in the interpreter, too
        cos = tl.load(p_cos + i_row * stride_angle + o, mask=half, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(p_sin + i_row * stride_angle + o, mask=half, other=0.0).to(tl.float32)[None, :]
        cos_2 = tl.load(p_cos + i_row * stride_angle + o + HALF, mask=half, other=0.0).to(tl.float32)[None, :]
        sin_2 = tl.load(p_sin + i_row * stride_angle + o + HALF, mask=half, other=0.0).to(tl.float32)[None, :]
        for start in range(0, HEADS, BLOCK):
            i_head = start + tl.arange(0, BLOCK)
            inside = (i_head < HEADS)[:, None] & half[None, :]
            o_grad = i_row * stride_grad + i_head[:, None] * stride_gh + o[None, :]
            grad = tl.load(p_grad + o_grad, mask=inside, other=0.0).to(tl.float32)
            grad_2 = tl.load(p_grad + o_grad + HALF, mask=inside, other=0.0).to(tl.float32)
            found = grad * cos + grad_2 * sin_2
            found_2 = grad_2 * cos_2 - grad * sin
            if p_weight is not None:
                o_x = i_row * stride_x + i_head[:, None] * SIZE + o[None, :]
                x = tl.load(p_x + o_x, mask=inside, other=0.0).to(tl.float32)
                x_2 = tl.load(p_x + o_x + HALF, mask=inside, other=0.0).to(tl.float32)
                scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(x_2 * x_2, 1)) * (1.0 / SIZE) + eps)
                # Heads that are not there would be NaN without eps.
                scale = tl.where(i_head < HEADS, scale, 0.0)[:, None]
                if p_parts is not None:
                    sums += found * (x * scale).to(dtype).to(tl.float32)
                    sums_2 += found_2 * (x_2 * scale).to(dtype).to(tl.float32)
                # Loaded here, out of a cache, it needs no registers before: no spill.
                found *= tl.load(p_weight + o, mask=half, other=0.0).to(tl.float32)[None, :]
                found_2 *= tl.load(p_weight + o + HALF, mask=half, other=0.0).to(tl.float32)[None, :]
                product = (tl.sum(found * x, 1) + tl.sum(found_2 * x_2, 1))[:, None]
                found = norm_gradient(x * scale, found, scale, product, SIZE)
                found_2 = norm_gradient(x_2 * scale, found_2, scale, product, SIZE)
            o_out = (i_row * HEADS + i_head[:, None]) * SIZE + o[None, :]
            tl.store(p_out + o_out, found.to(dtype), mask=inside)
            tl.store(p_out + o_out + HALF, found_2.to(dtype), mask=inside)
    if p_parts is not None:
        tl.store(p_parts + o, tl.sum(sums, 0), mask=half)
        tl.store(p_parts + o + HALF, tl.sum(sums_2, 0), mask=half)


@triton.jit(do_not_specialize=["rows"])
def rotate_heads_backward_kernel(
    p_grad_q, p_grad_k, p_cos, p_sin, p_q, p_k, p_q_weight, p_k_weight, p_q_out, p_k_out, p_parts,
    stride_gq, stride_gqh, stride_gk, stride_gkh, stride_angle, stride_q, stride_k, eps, rows,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of rotated q [rows, QUERIES, SIZE] and k [rows, KEYS, SIZE] -> of q and k, contiguous.

    p_q to p_k_weight: all None, or what is normalised before it turns, heads side by side. p_parts: None, or
    [programs, 2, SIZE] fp32, each program's sums for both weights. BLOCK heads at a time, WIDTH >= SIZE / 2, powers of
    two. Grid: any number; each program takes a run of tokens.
    """
    first, stop = run_of_rows(rows)
    p_k_parts = p_parts
    if p_parts is not None:
        p_parts += tl.program_id(0).to(tl.int64) * (2 * SIZE)
        p_k_parts = p_parts + SIZE
    _rotate_back(
        p_grad_q, p_q, p_q_weight, p_cos, p_sin, p_q_out, p_parts, stride_gq, stride_gqh, stride_q,
        stride_angle, eps, first, stop, QUERIES, SIZE, WIDTH, BLOCK,
    )  # fmt: skip
    _rotate_back(
        p_grad_k, p_k, p_k_weight, p_cos, p_sin, p_k_out, p_k_parts, stride_gk, stride_gkh, stride_k,
        stride_angle, eps, first, stop, KEYS, SIZE, WIDTH, BLOCK,
    )  # fmt: skip


def backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, q: Tensor | None, k: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, by_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the backward's op; fp16, bf16 or fp32. One launch, two by_weight."""
    grad_q, grad_k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad_q, grad_k, cos, sin))
    if cos.stride(0) != sin.stride(0):
        cos, sin = cos.contiguous(), sin.contiguous()
    q, k = (x if x is None or x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q, k))
    (rows, queries, size), keys = grad_q.shape, grad_k.shape[1]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (grad_q, grad_k))
    if not rows * (queries + keys):
        return q_out, k_out, cos.new_zeros((2, size) if by_weight else 0)
    grid = even_programs(rows, PROGRAMS) if by_weight else rows
    parts = torch.empty(grid, 2 * size, dtype=torch.float32, device=cos.device) if by_weight else None
    weights = (None if w is None else w.contiguous() for w in (q_weight, k_weight))
    strides = (0 if x is None else x.stride(0) for x in (q, k))
    with torch.cuda.device_of(cos):
        rotate_heads_backward_kernel[(grid,)](
            grad_q, grad_k, cos, sin, q, k, *weights, q_out, k_out, parts,
            *grad_q.stride()[:2], *grad_k.stride()[:2], cos.stride(0), *strides, eps, rows,
            QUERIES=queries, KEYS=keys, SIZE=size, **tiling(queries, keys, size),
        )  # fmt: skip
    return q_out, k_out, cos.new_empty(0) if parts is None else sum_parts(parts, cos.dtype).view(2, size)


def _spec(dtype: str, queries: int, keys: int, size: int, norm: bool) -> KernelSpec:
    weights = ("p_q_weight", "p_k_weight")
    tensors = ("p_q", "p_k", "p_cos", "p_sin", "p_q_out", "p_k_out", *(weights if norm else ()))
    strides = ("stride_q", "stride_qh", "stride_k", "stride_kh", "stride_cos", "stride_sin")
    chosen = tiling(queries, keys, size)
    num_warps = chosen.pop("num_warps")
    return KernelSpec(
        name=f"rotate_heads_{dtype}_{queries}_{keys}x{size}{'_norm' if norm else ''}",
        kernel=rotate_heads_kernel,
        signature={
            **dict.fromkeys(tensors, f"*{dtype}:16"),
            **dict.fromkeys(strides, "i32:16"),
            "eps": "fp32",
        },
        constexprs={
            "QUERIES": queries, "KEYS": keys, "SIZE": size, **chosen, **({} if norm else dict.fromkeys(weights)),
        },
        num_warps=num_warps,
        options=OPTIONS,
        wide=True,
    )  # fmt: skip


def _backward_spec(dtype: str, queries: int, keys: int, size: int, norm: bool) -> KernelSpec:
    """Norms with weights that want gradients."""
    normed = ("p_q", "p_k", "p_q_weight", "p_k_weight")
    tensors = ("p_grad_q", "p_grad_k", "p_cos", "p_sin", "p_q_out", "p_k_out", *(normed if norm else ()))
    strides = ("gq", "gqh", "gk", "gkh", "angle", "q", "k")
    chosen = tiling(queries, keys, size)
    num_warps = chosen.pop("num_warps")
    return KernelSpec(
        name=f"rotate_heads_backward_{dtype}_{queries}_{keys}x{size}{'_norm' if norm else ''}",
        kernel=rotate_heads_backward_kernel,
        signature={
            **dict.fromkeys(tensors, f"*{dtype}:16"),
            **({"p_parts": "*fp32:16"} if norm else {}),
            **dict.fromkeys((f"stride_{name}" for name in strides), "i32:16"),
            "eps": "fp32",
            "rows": "i32",
        },
        constexprs={
            "QUERIES": queries,
            "KEYS": keys,
            "SIZE": size,
            **chosen,
            **({} if norm else dict.fromkeys((*normed, "p_parts"))),
        },
        num_warps=num_warps,
        wide=True,
    )


PLAIN = ((14, 2, 64), (12, 2, 128), (28, 4, 128), (32, 8, 128), (8, 4, 256), (32, 32, 80))
"""Heads and their size of Qwen2.5-0.5B, 1.5B and 7B, Llama-3-8B, Gemma-2-2B, and one that is no power of two."""
NORMED = ((16, 8, 128), (32, 8, 128))
"""Qwen3-0.6B and 1.7B, 4B and 8B."""
_PLAIN = [*product(("bf16",), PLAIN), *product(("fp32",), (PLAIN[0], *PLAIN[3:]))]
_NORMED = [*product(("bf16",), NORMED), ("fp32", NORMED[0])]

KERNELS = [
    *(_spec(dtype, *heads, False) for dtype, heads in _PLAIN),
    *(_spec(dtype, *heads, True) for dtype, heads in _NORMED),
    *(_backward_spec(dtype, *heads, False) for dtype, heads in _PLAIN),
    *(_backward_spec(dtype, *heads, True) for dtype, heads in _NORMED),
    *(sum_parts_spec(dtype, 2 * size) for dtype, size in product(("bf16", "fp32"), sorted({x[2] for x in NORMED}))),
]
