# mypy: disable-error-code="no-untyped-def"
"""`add_rms_norm` in Triton: one program a row, which stays in registers between the sum of its squares and its norm.

All loads are issued before the first number is needed, the weight's too: with the rows of a decoding step, latency is
all the time there is. Rows longer than a program holds are read twice. Not measured on a GPU yet.

In the backward a program takes a run of rows if the weight wants a gradient, whose sum over them it keeps; a second
kernel adds up those of all programs. Their number depends on shapes alone, so that any GPU adds in the same order.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specs import KernelSpec

MAX_BLOCK = 8192
PER_WARP = 512
"""Elements: 16 a thread on NVIDIA, and 8 on AMD, whose warps are twice as wide, are whole 128-bit accesses."""

SUM_TILE = {"STEP": 64, "BLOCK": 32}


@triton.jit
def _sum_of(p_x, p_residual, p_sum, o_d, in_d):
    """x + residual in the tensors' dtype, as fp32; kept where there is a residual."""
    total = tl.load(p_x + o_d, mask=in_d, other=0.0).to(tl.float32)
    if p_residual is not None:
        dtype: tl.constexpr = p_x.dtype.element_ty
        kept = (total + tl.load(p_residual + o_d, mask=in_d, other=0.0).to(tl.float32)).to(dtype)
        if p_sum is not None:
            tl.store(p_sum + o_d, kept, mask=in_d)
        total = kept.to(tl.float32)
    return total


@triton.jit
def scaled(x, scale, weight):
    """x * scale, then * weight, each rounded to the weight's dtype."""
    rounded = (x * scale).to(weight.dtype)
    return (rounded.to(tl.float32) * weight.to(tl.float32)).to(weight.dtype)


@triton.jit
def add_rms_norm_kernel(
    p_x, p_residual, p_weight, p_normed, p_sum, stride_x, stride_residual, eps, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x, residual [T, D], weight [D] -> normed, sum [T, D], contiguous. Grid: (T,).

    p_residual and p_sum: None both or neither. BLOCK: a power of two; what is less than D takes the row in steps.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_x += i_row * stride_x
    p_normed += i_row * D
    if p_residual is not None:
        p_residual += i_row * stride_residual
        p_sum += i_row * D
    o = tl.arange(0, BLOCK)
    # Times 1 / D, as the mean of PyTorch's own GPU kernels.
    if BLOCK >= D:
        weight = tl.load(p_weight + o, mask=o < D, other=0.0)
        total = _sum_of(p_x, p_residual, p_sum, o, o < D)
        scale = tl.rsqrt(tl.sum(total * total, 0) * (1.0 / D) + eps)
        tl.store(p_normed + o, scaled(total, scale, weight), mask=o < D)
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, D, BLOCK):
            total = _sum_of(p_x, p_residual, p_sum, start + o, start + o < D)
            squares += total * total
        scale = tl.rsqrt(tl.sum(squares, 0) * (1.0 / D) + eps)
        for start in range(0, D, BLOCK):
            # Added up once more: other threads may have written what this one would read.
            total = _sum_of(p_x, p_residual, None, start + o, start + o < D)
            weight = tl.load(p_weight + start + o, mask=start + o < D, other=0.0)
            tl.store(p_normed + start + o, scaled(total, scale, weight), mask=start + o < D)


def tiling(size: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(size), MAX_BLOCK)
    return {"BLOCK": block, "num_warps": max(1, block // PER_WARP)}


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the op; fp16, bf16 or fp32. One launch. Without a residual the sum is x."""
    x = x if x.stride(1) == 1 else x.contiguous()
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    rows, size = x.shape
    if rows:
        with torch.cuda.device_of(x):
            add_rms_norm_kernel[(rows,)](
                x, residual, weight.contiguous(), normed, None if residual is None else total,
                x.stride(0), 0 if residual is None else residual.stride(0), eps, D=size, **tiling(size),
            )  # fmt: skip
    return normed, total


@triton.jit
def _loaded(p_x, o_d, in_d):
    return tl.load(p_x + o_d, mask=in_d, other=0.0).to(tl.float32)


@triton.jit
def norm_gradient(normed, slope, scale, product, SIZE: tl.constexpr):
    """The gradient of x, fp32, of normed = x * scale. slope: the gradient of normed. product: the sum of slope * x."""
    return (slope - normed * (product * scale * (1.0 / SIZE))) * scale


@triton.jit
def run_of_rows(rows):
    """The first row of this program, and where its rows end; 64 bits."""
    run = tl.cdiv(rows, tl.num_programs(0))
    first = tl.program_id(0).to(tl.int64) * run
    return first, tl.minimum(first + run, rows)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    p_x, p_weight, p_grad, p_grad_x, p_out, p_parts, stride_x, stride_grad, stride_grad_x, eps, rows,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, grad, grad_x [rows, D], weight [D] -> out [rows, D], contiguous: the gradient of x, plus grad_x if given.

    p_parts: None, or [programs, D] fp32, each program's sum of grad * round(normed). Grid: any number; each
    program takes a run of rows. BLOCK: a power of two; what is less than D takes each row in steps, the sums in memory.
    """
    dtype: tl.constexpr = p_out.dtype.element_ty
    first, stop = run_of_rows(rows)
    o = tl.arange(0, BLOCK)
    if p_parts is not None:
        p_parts += tl.program_id(0).to(tl.int64) * D
    if BLOCK >= D:
        weight = _loaded(p_weight, o, o < D)
        sums = tl.zeros([BLOCK], tl.float32)
        for i in range(stop - first):
            i_row = first + i  # 64 bits in the interpreter, too
            x = _loaded(p_x + i_row * stride_x, o, o < D)
            grad = _loaded(p_grad + i_row * stride_grad, o, o < D)
            slope = grad * weight
            scale = tl.rsqrt(tl.sum(x * x, 0) * (1.0 / D) + eps)
            found = norm_gradient(x * scale, slope, scale, tl.sum(slope * x, 0), D)
            if p_grad_x is not None:
                found += _loaded(p_grad_x + i_row * stride_grad_x, o, o < D)
            tl.store(p_out + i_row * D + o, found.to(dtype), mask=o < D)
            if p_parts is not None:
                sums += grad * (x * scale).to(dtype).to(tl.float32)
        if p_parts is not None:
            tl.store(p_parts + o, sums, mask=o < D)
    else:
        for i in range(stop - first):
            i_row = first + i  # 64 bits in the interpreter, too
            squares = tl.zeros([BLOCK], tl.float32)
            products = tl.zeros([BLOCK], tl.float32)
            for start in range(0, D, BLOCK):
                x = _loaded(p_x + i_row * stride_x, start + o, start + o < D)
                grad = _loaded(p_grad + i_row * stride_grad, start + o, start + o < D)
                squares += x * x
                products += grad * _loaded(p_weight, start + o, start + o < D) * x
            scale = tl.rsqrt(tl.sum(squares, 0) * (1.0 / D) + eps)
            product = tl.sum(products, 0)
            for start in range(0, D, BLOCK):
                in_d = start + o < D
                x = _loaded(p_x + i_row * stride_x, start + o, in_d)
                grad = _loaded(p_grad + i_row * stride_grad, start + o, in_d)
                found = norm_gradient(x * scale, grad * _loaded(p_weight, start + o, in_d), scale, product, D)
                if p_grad_x is not None:
                    found += _loaded(p_grad_x + i_row * stride_grad_x, start + o, in_d)
                tl.store(p_out + i_row * D + start + o, found.to(dtype), mask=in_d)
                if p_parts is not None:
                    sums = tl.where(i_row == first, 0.0, _loaded(p_parts, start + o, in_d))
                    sums += grad * (x * scale).to(dtype).to(tl.float32)
                    tl.store(p_parts + start + o, sums, mask=in_d)
            tl.debug_barrier()  # what the next row adds to may have been written by other threads


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(p_parts, p_out, parts, D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """[parts, D] fp32 -> out [D], their sum. STEP rows and BLOCK columns at a time. Grid: (cdiv(D, BLOCK),)."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_part = tl.arange(0, STEP)
    sums = tl.zeros([STEP, BLOCK], tl.float32)
    for start in range(0, parts, STEP):
        o_part = (start + i_part).to(tl.int64)[:, None] * D + o[None, :]
        sums += tl.load(p_parts + o_part, mask=(start + i_part < parts)[:, None] & (o < D)[None, :], other=0.0)
    tl.store(p_out + o, tl.sum(sums, 0).to(p_out.dtype.element_ty), mask=o < D)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, D] fp32 -> [D] of a dtype: the sum over P, rounded once. One launch."""
    out = torch.empty(parts.shape[1], dtype=dtype, device=parts.device)
    with torch.cuda.device_of(parts):
        sum_parts_kernel[(triton.cdiv(len(out), SUM_TILE["BLOCK"]),)](parts, out, len(parts), D=len(out), **SUM_TILE)
    return out


def backward(
    x: Tensor, weight: Tensor, grad: Tensor, grad_x: Tensor | None, eps: float, by_weight: bool
) -> tuple[Tensor, Tensor]:
    """As the backward's op; fp16, bf16 or fp32. One launch, two by_weight."""
    x, grad = (y if y.stride(1) == 1 else y.contiguous() for y in (x, grad))
    grad_x = grad_x if grad_x is None or grad_x.stride(1) == 1 else grad_x.contiguous()
    rows, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not rows:
        return out, weight.new_zeros(size if by_weight else 0)
    chosen = tiling(size)
    grid = even_programs(rows, programs(chosen["BLOCK"])) if by_weight else rows
    parts = torch.empty(grid, size, dtype=torch.float32, device=x.device) if by_weight else None
    with torch.cuda.device_of(x):
        rms_norm_backward_kernel[(grid,)](
            x, weight.contiguous(), grad, grad_x, out, parts, x.stride(0), grad.stride(0),
            0 if grad_x is None else grad_x.stride(0), eps, rows, D=size, **chosen,
        )  # fmt: skip
    return out, weight.new_empty(0) if parts is None else sum_parts(parts, weight.dtype)


def programs(block: int) -> int:
    """At most so many share the rows: some 2 million numbers at a time, and partial sums that are few beside them."""
    return max(256, min(1024, (1 << 21) // block))


def even_programs(rows: int, most: int) -> int:
    """At most so many, none of which is without rows."""
    return triton.cdiv(rows, triton.cdiv(rows, most))


def _spec(dtype: str, size: int, residual: bool) -> KernelSpec:
    tensors = ("p_x", "p_weight", "p_normed", *(("p_residual", "p_sum") if residual else ()))
    chosen = tiling(size)
    return KernelSpec(
        name=f"add_rms_norm_{dtype}_{size}{'' if residual else '_no_residual'}",
        kernel=add_rms_norm_kernel,
        signature={
            **dict.fromkeys(tensors, f"*{dtype}:16"),
            **dict.fromkeys(("stride_x", "stride_residual"), "i32:16"),
            "eps": "fp32",
        },
        constexprs={
            "D": size,
            "BLOCK": chosen["BLOCK"],
            **({} if residual else {"p_residual": None, "p_sum": None}),
        },
        num_warps=chosen["num_warps"],
        wide=True,
    )


SIZES = (896, 1024, 1536, 2560, 3584, 4096, 5120, 8192, 16384)
"""Qwen2.5-0.5B, Qwen3-0.6B, 1.5B, Qwen3-4B, 7B, Llama-3-8B, 14B, Llama-3-70B, and one that is read twice."""
_LISTED = [*product(("bf16",), SIZES), *product(("fp32",), (896, 4096, 16384))]


def _backward_spec(dtype: str, size: int) -> KernelSpec:
    """With both that may be None."""
    tensors = ("p_x", "p_weight", "p_grad", "p_grad_x", "p_out")
    chosen = tiling(size)
    return KernelSpec(
        name=f"rms_norm_backward_{dtype}_{size}",
        kernel=rms_norm_backward_kernel,
        signature={
            **dict.fromkeys(tensors, f"*{dtype}:16"),
            "p_parts": "*fp32:16",
            **dict.fromkeys(("stride_x", "stride_grad", "stride_grad_x"), "i32:16"),
            "eps": "fp32",
            "rows": "i32",
        },
        constexprs={"D": size, "BLOCK": chosen["BLOCK"]},
        num_warps=chosen["num_warps"],
        wide=True,
    )


def sum_parts_spec(dtype: str, size: int) -> KernelSpec:
    return KernelSpec(
        name=f"sum_parts_{dtype}_{size}",
        kernel=sum_parts_kernel,
        signature={"p_parts": "*fp32:16", "p_out": f"*{dtype}:16", "parts": "i32"},
        constexprs={"D": size, **SUM_TILE},
        wide=True,
    )


KERNELS = [
    *(_spec(*variant, residual) for variant, residual in product(_LISTED, (True, False))),
    *(_backward_spec(*variant) for variant in _LISTED),
    *(sum_parts_spec(*variant) for variant in _LISTED),
]
