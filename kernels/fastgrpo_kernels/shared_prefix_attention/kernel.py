# mypy: disable-error-code="no-untyped-def"
"""The merge of two attention parts in Triton: a program takes some heads of some rows. Not measured on a GPU yet."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specs import KernelSpec

ELEMENTS = 2048
NUM_WARPS = 4


@triton.jit
def merge_parts_kernel(
    p_out, p_lse, p_other, p_other_lse, stride_lse, stride_other_lse, N, H,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out, other [N, H, SIZE]; lse, other_lse [H, N], strides (stride, 1). WIDTH >= SIZE, a power of two.

    Grid: (cdiv(N * H, ROWS),): ROWS heads of neighbouring rows.
    """
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < N * H  # less than 2^31: there is no memory for more
    i_row, i_head = i // H, i % H
    p_lse += i_head * stride_lse + i_row
    lse = tl.load(p_lse, mask=inside, other=0.0)
    other_lse = tl.load(p_other_lse + i_head * stride_other_lse + i_row, mask=inside, other=0.0)
    other_lse = tl.where(other_lse == float("inf"), float("-inf"), other_lse)
    share = tl.sigmoid(other_lse - lse)
    o = tl.arange(0, WIDTH)
    mask = inside[:, None] & (o < SIZE)[None, :]
    offset = i[:, None] * SIZE + o[None, :]
    out = tl.load(p_out + offset, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(p_other + offset, mask=mask, other=0.0).to(tl.float32)
    # As torch.lerp: from the nearer end.
    step = other - out
    merged = tl.where((share < 0.5)[:, None], out + share[:, None] * step, other - (1.0 - share)[:, None] * step)
    tl.store(p_out + offset, merged.to(p_out.dtype.element_ty), mask=mask)
    apart = other_lse - lse  # not maximum and minimum, which lose a NaN
    tl.store(p_lse, tl.where(apart > 0, other_lse, lse) + tl.log(1.0 + tl.exp(-tl.abs(apart))), mask=inside)


def merge_parts(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """As `merge_`, for contiguous out and other and fp32 log-sum-exps whose rows are each contiguous. One launch."""
    num_rows, heads, size = out.shape
    width = triton.next_power_of_2(size)
    rows = max(1, ELEMENTS // width)
    if out.numel():
        with torch.cuda.device_of(out):
            merge_parts_kernel[(triton.cdiv(num_rows * heads, rows),)](
                out, lse, other, other_lse, lse.stride(0), other_lse.stride(0), num_rows, heads,
                SIZE=size, WIDTH=width, ROWS=rows, num_warps=NUM_WARPS,
            )  # fmt: skip


def takes(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> bool:
    """Are the tensors as `merge_parts` wants them? Packages differ in how they lay a log-sum-exp out."""
    fp32 = lse.dtype == other_lse.dtype == torch.float32
    return fp32 and out.is_contiguous() and other.is_contiguous() and lse.stride(1) == other_lse.stride(1) == 1


def _spec(size: int) -> KernelSpec:
    width = triton.next_power_of_2(size)
    return KernelSpec(
        name=f"merge_parts_bf16_{size}",
        kernel=merge_parts_kernel,
        signature={
            **dict.fromkeys(("p_out", "p_other"), "*bf16:16"),
            **dict.fromkeys(("p_lse", "p_other_lse"), "*fp32"),
            **dict.fromkeys(("stride_lse", "stride_other_lse", "N", "H"), "i32"),
        },
        constexprs={"SIZE": size, "WIDTH": width, "ROWS": max(1, ELEMENTS // width)},
        num_warps=NUM_WARPS,
        wide=True,
    )


KERNELS = [_spec(size) for size in (64, 80, 128, 256)]
