# mypy: disable-error-code="no-untyped-def"
"""What is left per row when a GEMM has written exponentials: sums over its vocabulary tiles, target columns, factors.

The maths and its names are those of `head/rows/kernel.py`. [T, C] holds a partial result of each of T vocabulary tiles
for each of C rows; a program takes BLOCK_C rows and adds their partial sums in an order that depends on T alone. No
atomics: same input, same bits.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...specs import KernelSpec
from ..rows.kernel import not_nan, out_of_range

ROW_VECTORS = ["p_z", "p_c", "p_target", "p_logprob", "p_entropy", "p_row_sum", "p_flags"]


@triton.jit(
    do_not_specialize=["sums_stride", "moments_stride", "T", "C", "V"], do_not_specialize_on_alignment=ROW_VECTORS
)
def settle_kernel(
    p_sums,
    p_moments,
    p_z,
    p_c,
    p_target,
    p_out,
    p_logprob,
    p_entropy,
    p_row_sum,
    p_flags,
    sums_stride,
    moments_stride,
    out_stride,
    T,
    C,
    V,
    ceiling,
    SOFTCAP: tl.constexpr,
    ONLY_FLAGGED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows BLOCK_C * program_id(0) and on; with ONLY_FLAGGED, those of them that are flagged."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    todo = i_row < C
    stop = T
    if ONLY_FLAGGED:
        todo &= tl.load(p_flags + i_row, mask=todo, other=0) != 0
        stop = tl.where(tl.max(todo.to(tl.int32), 0) > 0, T, 0)
    b_total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    b_moment = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, stop, BLOCK_T):
        i_tile = (start + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
        mask = (i_tile < T) & todo[None, :]
        b_total += tl.load(p_sums + i_tile * sums_stride + i_row[None, :], mask=mask, other=0.0)
        b_moment += tl.load(p_moments + i_tile * moments_stride + i_row[None, :], mask=mask, other=0.0)
    total = tl.sum(b_total, 0)
    moment = tl.sum(b_moment, 0)

    z_y = tl.load(p_z + i_row, mask=todo, other=0.0)
    gap = z_y - tl.load(p_c + i_row, mask=todo, other=0.0)
    log_sum = tl.log(total)
    tl.store(p_logprob + i_row, gap - log_sum, mask=todo)
    tl.store(p_entropy + i_row, log_sum - moment / total, mask=todo)
    tl.store(p_row_sum + i_row, total, mask=todo)
    settled = todo
    if not ONLY_FLAGGED:
        flagged = out_of_range(total, moment)
        tl.store(p_flags + i_row, flagged.to(tl.int32), mask=todo)
        settled = todo & ~flagged
    if p_out is not None:
        y = tl.load(p_target + i_row, mask=settled, other=-1).to(tl.int64)
        at_target = tl.exp(gap) - total
        if SOFTCAP:
            tanh = z_y / ceiling
            at_target *= 1.0 - tanh * tanh
        mask = settled & (y >= 0) & (y < V)
        tl.store(p_out + i_row * out_stride + y, not_nan(at_target).to(p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride", "T", "C"], do_not_specialize_on_alignment=["p_flags", "p_c"])
def reshift_kernel(p_maxima, p_flags, p_c, stride, T, C, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """c = the largest of a row's T maxima, for the flagged among rows BLOCK_C * program_id(0) and on."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    todo = i_row < C
    todo &= tl.load(p_flags + i_row, mask=todo, other=0) != 0
    stop = tl.where(tl.max(todo.to(tl.int32), 0) > 0, T, 0)
    b_largest = tl.full([BLOCK_T, BLOCK_C], float("-inf"), tl.float32)
    for start in range(0, stop, BLOCK_T):
        i_tile = (start + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
        mask = (i_tile < T) & todo[None, :]
        maxima = tl.load(p_maxima + i_tile * stride + i_row[None, :], mask=mask, other=float("-inf"))
        b_largest = tl.maximum(b_largest, maxima)
    tl.store(p_c + i_row, tl.max(b_largest, 0), mask=todo)


@triton.jit(do_not_specialize=["C"], do_not_specialize_on_alignment=["p_grad_logprob", "p_row_sum", "p_factor"])
def row_factor_kernel(p_grad_logprob, p_row_sum, p_factor, slope, C, BLOCK: tl.constexpr):
    """-(d / S) * slope, and 0 where d is 0."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i_row < C
    grad = tl.load(p_grad_logprob + i_row, mask=mask, other=0.0)
    total = tl.load(p_row_sum + i_row, mask=mask, other=1.0)
    tl.store(p_factor + i_row, tl.where(grad == 0, 0.0, -(grad / total) * slope), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["p_factor"])
def scale_rows_kernel(p_x, p_factor, p_out, x_stride, out_stride, D, BLOCK: tl.constexpr):
    """Row `program_id(0)` of x times its factor; where that is 0, 0 without a look at x."""
    i_row = tl.program_id(0).to(tl.int64)
    factor = tl.load(p_factor + i_row)
    stop = tl.where(factor != 0, D, 0)
    for start in range(0, D, BLOCK):
        o = start + tl.arange(0, BLOCK)
        x = tl.load(p_x + i_row * x_stride + o, mask=o < stop, other=0.0).to(tl.float32)
        scaled = tl.where(o < stop, x * factor, 0.0)
        tl.store(p_out + i_row * out_stride + o, scaled.to(p_out.dtype.element_ty), mask=o < D)


def settle(
    sums: Tensor,
    moments: Tensor,
    z_y: Tensor,
    c: Tensor,
    target: Tensor,
    *,
    logprob: Tensor,
    entropy: Tensor,
    row_sum: Tensor,
    flags: Tensor,
    out: Tensor | None = None,
    ceiling: float | None = None,
    only_flagged: bool = False,
) -> None:
    """Log-prob, entropy and row sum of C rows from what each vocabulary tile summed up; completes their gradient rows.

    sums, moments [T, C] fp32: S and U of each tile. z_y, c [C] fp32, target [C] int64. Written: logprob, entropy,
    row_sum [C] fp32; flags [C] int32, 1 for a row that needs another shift: S outside [1e-20, 1e20] or U not finite,
    but not for a NaN; out [C, V] (a view with any row stride, bf16 or fp32) at each row's target, where the row is not
    flagged and the target in [0, V). only_flagged: does so for flagged rows alone, out included, and leaves the flags.
    All [C] vectors and the columns of all matrices lie side by side.
    """
    T, C = sums.shape
    if C:
        with torch.cuda.device_of(sums):
            settle_kernel[(triton.cdiv(C, TILING["BLOCK_C"]),)](
                sums,
                moments,
                z_y,
                c,
                target,
                out,
                logprob,
                entropy,
                row_sum,
                flags,
                sums.stride(0),
                moments.stride(0),
                0 if out is None else out.stride(0),
                T,
                C,
                0 if out is None else out.shape[1],
                0.0 if ceiling is None else ceiling,
                SOFTCAP=ceiling is not None,
                ONLY_FLAGGED=only_flagged,
                **TILING,
            )


def reshift(maxima: Tensor, flags: Tensor, c: Tensor) -> None:
    """c [C] fp32 = the largest of maxima [T, C] fp32, the largest z of each tile, where flags [C] int32 are set."""
    T, C = maxima.shape
    if C:
        with torch.cuda.device_of(maxima):
            reshift_kernel[(triton.cdiv(C, TILING["BLOCK_C"]),)](maxima, flags, c, maxima.stride(0), T, C, **TILING)


def row_factor(grad_logprob: Tensor, row_sum: Tensor, slope: float) -> Tensor:
    """What turns gradient rows R into gradients of the logits before scaling: -(d / S) * slope, 0 where d is 0.

    grad_logprob [C] fp32 d, row_sum [C] fp32 S -> [C] fp32. slope: dz/dy without the softcap's own derivative.
    """
    factor = torch.empty(grad_logprob.shape, dtype=torch.float32, device=grad_logprob.device)
    C = factor.numel()
    if C:
        with torch.cuda.device_of(factor):
            row_factor_kernel[(triton.cdiv(C, FACTOR_BLOCK),)](
                grad_logprob.contiguous(), row_sum.contiguous(), factor, slope, C, FACTOR_BLOCK
            )
    return factor


def scale_rows(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = x * factor, rounded once: x, out [C, D] of any float dtypes but float64, factor [C] fp32 contiguous.

    Rows may lie anywhere, columns side by side; out may be x. A factor of 0 gives 0 whatever x holds, NaN included.
    """
    C, D = x.shape
    if x.numel():
        with torch.cuda.device_of(x):
            scale_rows_kernel[(C,)](x, factor, out, x.stride(0), out.stride(0), D, **SCALE_TILING)


TILING = {"BLOCK_T": 64, "BLOCK_C": 32, "num_warps": 4}
SCALE_TILING = {"BLOCK": 1024, "num_warps": 2}
FACTOR_BLOCK = 256


def _specs() -> list[KernelSpec]:
    """Every variant; fp16 is as bf16."""
    blocks = {k: v for k, v in TILING.items() if k != "num_warps"}
    specs = []
    for softcap, only_flagged, out in product((False, True), (False, True), (None, "bf16", "fp32")):
        signature = {"p_sums": "*fp32:16", "p_moments": "*fp32:16", "p_target": "*i64", "p_flags": "*i32"}
        signature |= dict.fromkeys(("p_z", "p_c", "p_logprob", "p_entropy", "p_row_sum"), "*fp32")
        signature |= dict.fromkeys(("sums_stride", "moments_stride", "T", "C", "V"), "i32")
        signature |= {"out_stride": "i32:16", "ceiling": "fp32", **({"p_out": f"*{out}:16"} if out else {})}
        constexprs = {
            "SOFTCAP": softcap,
            "ONLY_FLAGGED": only_flagged,
            **blocks,
            **({} if out else {"p_out": None}),
        }
        name = f"settle{'_softcap' if softcap else ''}{'_flagged' if only_flagged else ''}{f'_{out}' if out else ''}"
        specs.append(KernelSpec(name=name, kernel=settle_kernel, signature=signature, constexprs=constexprs))
    signature = {"p_maxima": "*fp32:16", "p_flags": "*i32", "p_c": "*fp32"}
    signature |= dict.fromkeys(("stride", "T", "C"), "i32")
    specs.append(KernelSpec(name="reshift", kernel=reshift_kernel, signature=signature, constexprs=blocks))
    signature = dict.fromkeys(("p_grad_logprob", "p_row_sum", "p_factor"), "*fp32") | {"slope": "fp32", "C": "i32"}
    constexprs = {"BLOCK": FACTOR_BLOCK}
    specs.append(KernelSpec(name="row_factor", kernel=row_factor_kernel, signature=signature, constexprs=constexprs))
    for x, out in product(("fp32", "bf16"), repeat=2):
        signature = {"p_x": f"*{x}:16", "p_factor": "*fp32", "p_out": f"*{out}:16"}
        specs.append(
            KernelSpec(
                name=f"scale_rows_{x}_{out}",
                kernel=scale_rows_kernel,
                signature=signature | dict.fromkeys(("x_stride", "out_stride", "D"), "i32:16"),
                constexprs={"BLOCK": SCALE_TILING["BLOCK"]},
                num_warps=SCALE_TILING["num_warps"],
                wide=True,
            )
        )
    return specs


KERNELS = _specs()
