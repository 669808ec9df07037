# mypy: disable-error-code="no-untyped-def"
"""What the kernels do with one tile: the products, and an epilogue that takes exponentials and stores their sums."""

from __future__ import annotations

import triton
import triton.language as tl

from . import config

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOG_ZERO = tl.constexpr(-1e4)  # its exponential is 0: 0 * LOG_ZERO is 0 where 0 * -inf is NaN
BN = tl.constexpr(config.TILE_N)
PARTS = tl.constexpr(config.PARTS)


@triton.jit
def _add_product(acc, p_a, p_b, o_a, o_b, K, stride_a, stride_b, BK: tl.constexpr):
    """acc + a @ b.T for the rows o_a of a and o_b of b, from pointers."""
    o_k = tl.arange(0, BK)
    p_a += o_a[:, None].to(tl.int64) * stride_a + o_k[None, :]
    p_b += o_b[:, None].to(tl.int64) * stride_b + o_k[None, :]
    for k in range(0, K, BK):
        live = (o_k < K - k)[None, :]
        b_a = tl.load(p_a + k, mask=live, other=0.0)
        b_b = tl.load(p_b + k, mask=live, other=0.0)
        acc = tl.dot(b_a, b_b.T, acc)
    return acc


@triton.jit
def product(
    hidden,
    weight,
    u,
    b,
    o_m,
    o_n,
    C,
    V,
    D,
    R,
    stride_h,
    stride_w,
    BM: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BM, BN] fp32 of h @ W.T + u @ B.T; rows past C and columns past V hold anything, of their own row or column."""
    acc = tl.zeros([BM, BN], tl.float32)
    if TMA:  # descriptors read 0 past their edges
        for k in range(0, D, BK):
            acc = tl.dot(hidden.load([o_m, k]), weight.load([o_n, k]).T, acc)
        if u is not None:
            for k in range(0, R, BK):
                acc = tl.dot(u.load([o_m, k]), b.load([o_n, k]).T, acc)
    else:
        o_row = tl.minimum(o_m + tl.arange(0, BM), C - 1)
        o_col = tl.minimum(o_n + tl.arange(0, BN), V - 1)
        acc = _add_product(acc, hidden, weight, o_row, o_col, D, stride_h, stride_w, BK)
        if u is not None:
            acc = _add_product(acc, u, b, o_row, o_col, R, R, R, BK)
    return acc


@triton.jit
def _halves(tile):
    """[M, N] -> its left and its right [M, N / 2]."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tile.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit
def logits(acc, p_bias, o_n, V, input_scale, ceiling, SOFTCAP: tl.constexpr, EDGE: tl.constexpr):
    """z in units of ln 2 (input_scale without, ceiling with a softcap came multiplied by log2 e), and dz/dx / ceiling.

    Columns past V are -inf. The second result is 1 without a softcap.
    """
    N: tl.constexpr = acc.shape[1]
    o_col = o_n + tl.arange(0, N)
    if p_bias is not None:
        acc += tl.load(p_bias + o_col, mask=o_col < V, other=0.0).to(tl.float32)[None, :]
    z = acc * input_scale
    slope = 1.0
    if SOFTCAP:
        r = 1.0 / (1.0 + tl.exp2(z * (-2.0 * LOG2E)))  # tanh is 2r - 1, right to 2e-7
        z = 2.0 * ceiling * r - ceiling
        slope = 4.0 * r * (1.0 - r)
    if EDGE:
        z = tl.where(o_col[None, :] < V, z, float("-inf"))
    return z, slope


@triton.jit
def _exponential(acc, shift2, p_bias, o_n, V, input_scale, ceiling, SOFTCAP: tl.constexpr, EDGE: tl.constexpr):
    """E * dz/dx / ceiling in bf16, sum E, sum E * t / ln 2, of some columns of a tile, the first of them o_n."""
    z, slope = logits(acc, p_bias, o_n, V, input_scale, ceiling, SOFTCAP, EDGE)
    t = z - shift2[:, None]
    e = tl.exp2(t)
    moment = tl.sum(e * tl.maximum(t, LOG_ZERO, propagate_nan=tl.PropagateNan.ALL), 1)
    return (e * slope).to(tl.bfloat16), tl.sum(e, 1), moment


@triton.jit
def store_tile(
    acc,
    out,
    p_bias,
    p_shift,
    p_sums,
    p_moments,
    o_m,
    o_n,
    live,
    C,
    V,
    stride_out,
    input_scale,
    ceiling,
    SOFTCAP: tl.constexpr,
    EDGE: tl.constexpr,
    TMA: tl.constexpr,
):
    """S and U, and E where `out` is not None, of the tile's rows that are live (with TMA: E of all)."""
    BM: tl.constexpr = acc.shape[0]
    o_row = o_m + tl.arange(0, BM)
    shift = tl.load(p_shift + o_row, mask=live, other=0.0)
    shift2 = shift * LOG2E
    s = tl.zeros([BM], tl.float32)
    moment = tl.zeros([BM], tl.float32)
    # Part by part: fewer registers, and little shared memory for a store to go through.
    for i_part in tl.static_range(PARTS):
        o_part = o_n + i_part * (BN // PARTS)
        part = _halves(_halves(acc)[i_part // 2])[i_part % 2]
        e, part_s, part_moment = _exponential(part, shift2, p_bias, o_part, V, input_scale, ceiling, SOFTCAP, EDGE)
        s += part_s
        moment += part_moment
        if out is not None:
            if TMA:
                out.store([o_m, o_part], e)
            else:
                o_col = o_part + tl.arange(0, BN // PARTS)
                p_part = out + o_row[:, None].to(tl.int64) * stride_out + o_col[None, :]
                tl.store(p_part, e, mask=live[:, None] & (o_col < V)[None, :])
    moment *= LN2
    # What shift2 lost to rounding would be an error of log S, 2e-6 for a shift of 40. E in bf16 can bear it. A product,
    # because `s - lost * s` would be NaN for an infinite S where nothing was lost, and NaN rows are not rescued.
    lost = tl.fma(shift, LOG2E, -shift2) * LN2
    o_sum = tl.cast(o_n // BN, tl.int64) * C + o_row
    tl.store(p_sums + o_sum, s * (1.0 - lost), mask=live)
    tl.store(p_moments + o_sum, moment - lost * (moment + s), mask=live)
