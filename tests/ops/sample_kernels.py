"""Small Triton kernels with nothing wrong: what the interpreter's repair and the table of kernels are tested with."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgrpo_kernels.specs import KernelSpec


@triton.jit
def matmul(p_a, p_b, p_out, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out (BM, BN) fp32 = a (BM, K) @ b (BN, K)^T, K divisible by BK."""
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    b_sum = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        b_a = tl.load(p_a + o_m[:, None] * K + k + o_k[None, :])
        b_b = tl.load(p_b + o_n[:, None] * K + k + o_k[None, :])
        b_sum = tl.dot(b_a, tl.trans(b_b), b_sum)
    tl.store(p_out + o_m[:, None] * BN + o_n[None, :], b_sum)


@triton.jit
def cast(p_x, p_out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[:n] = x[:n], in out's dtype."""
    for start in range(0, n, BLOCK):
        o_x = start + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + o_x, mask=o_x < n, other=0)
        tl.store(p_out + o_x, b_x.to(p_out.dtype.element_ty), mask=o_x < n)


@triton.jit
def double_uncast(p_x, p_out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out = x + x in x's own dtype: what our kernels never do with bfloat16."""
    o_x = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x)
    tl.store(p_out + o_x, b_x + b_x)


@triton.jit
def cumulate_uncast(p_x, p_out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same of a scan: out = cumsum(x). `tl.cumsum` itself casts to float32 in some releases of Triton."""
    o_x = tl.arange(0, BLOCK)
    tl.store(p_out + o_x, tl.associative_scan(tl.load(p_x + o_x), 0, tl.standard._sum_combine))


KERNELS = [
    KernelSpec(
        name="matmul",
        kernel=matmul,
        signature={"p_a": "*bf16:16", "p_b": "*bf16:16", "p_out": "*fp32:16", "K": "i32:16"},
        constexprs={"BM": 64, "BN": 64, "BK": 64},
        wide=True,
    ),
    KernelSpec(
        name="cast",
        kernel=cast,
        signature={"p_x": "*fp32:16", "p_out": "*bf16:16", "n": "i32:16"},
        constexprs={"BLOCK": 4096},
        wide=True,
    ),
]
