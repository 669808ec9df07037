# mypy: disable-error-code="no-untyped-def"
"""`add_rms_norm` in Triton: one program a row, which stays in registers between the sum of its squares and its norm.

All loads are issued before the first number is needed, the weight's too: with the rows of a decoding step, latency is
all the time there is. Rows longer than a program holds are read twice. Not measured on a GPU yet.
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

KERNELS = [_spec(*variant) for variant in product(("bf16", "fp32"), SIZES, (True, False))]
