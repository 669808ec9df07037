# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of `decode_attention`: the keys and values of a path are read once per head of theirs.

`attend_path` takes one row and one head of keys, or a piece of its path when there are too few rows to fill a GPU; all
the queries of that head are one tile. The new token comes from its own tensors, starts the running softmax of the first
piece, and is written to the pool by it: nothing is read that this launch writes. `merge_pieces` joins the pieces by
their log-sum-exp. No atomics: same input, same bits. Not measured on a GPU yet.
"""

from __future__ import annotations

import math
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specs import KernelSpec

NUM_WARPS = 4
PROGRAMS = 512
"""Programs that fill a GPU: about four for each of an H100's 132 multiprocessors."""
PIECE = 256
"""Tokens that a piece of a path has at least; fewer are not worth a program and the merge."""
MAX_PIECES = 64

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _scores(s, scale, softcap):
    """Products of queries and keys -> scores in units of log2."""
    s = s * scale
    if softcap is not None:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    return s * LOG2E


@triton.jit(do_not_specialize=["pieces", "window", "stride_where"], do_not_specialize_on_alignment=["p_where"])
def attend_path(
    p_q, p_k, p_v, p_keys, p_values, p_where, p_out, p_lse,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_where, pieces, window, scale, softcap,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, one head of keys, one piece of the path. Grid: (B * HEADS * pieces,).

    M >= REPEAT queries of the head and D >= SIZE, powers of two; window and softcap None or numbers. Whole paths: p_out
    [B, HEADS * REPEAT, SIZE], p_lse None. Pieces: p_out [B, HEADS * REPEAT, pieces, SIZE] in fp32, p_lse [B, HEADS *
    REPEAT, pieces], log2 of the sums of exponentials.
    """
    dtype: tl.constexpr = p_keys.dtype.element_ty
    i_piece = tl.program_id(0) % pieces
    i_head = tl.program_id(0) // pieces % HEADS
    i_row = (tl.program_id(0) // pieces // HEADS).to(tl.int64)
    o_m, o_d = tl.arange(0, M), tl.arange(0, D)
    in_d = o_d < SIZE
    in_q = (o_m < REPEAT)[:, None] & in_d[None, :]
    i_query = i_head * REPEAT + o_m
    q = tl.load(p_q + i_row * stride_q + i_query[:, None] * stride_qh + o_d[None, :], mask=in_q, other=0.0)
    p_where += i_row
    prompt_start, prompt_length = tl.load(p_where), tl.load(p_where + stride_where)
    start, length = tl.load(p_where + 2 * stride_where), tl.load(p_where + 3 * stride_where)
    kept = prompt_length + length
    low = tl.zeros_like(kept) if window is None else tl.maximum(kept + 1 - window, 0)
    piece = tl.cdiv(tl.cdiv(kept - low, pieces), BLOCK) * BLOCK
    begin = low + i_piece * piece
    end = tl.minimum(begin + piece, kept)

    # The new token: the first piece's softmax begins with it.
    k_new = tl.load(p_k + i_row * stride_k + i_head * stride_kh + o_d, mask=in_d, other=0.0)
    v_new = tl.load(p_v + i_row * stride_v + i_head * stride_vh + o_d, mask=in_d, other=0.0)
    o_new = (start + length) * (HEADS * SIZE) + i_head * SIZE + o_d
    first = i_piece == 0
    to_write = o_d < tl.where(first, SIZE, 0)
    tl.store(p_keys + o_new, k_new, mask=to_write)
    tl.store(p_values + o_new, v_new, mask=to_write)
    s_new = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1)
    top = tl.where(first, _scores(s_new, scale, softcap), float("-inf"))
    total = tl.where(first, tl.full([M], 1.0, tl.float32), 0.0)
    acc = tl.where(first, tl.zeros([M, D], tl.float32) + v_new.to(tl.float32)[None, :], 0.0)

    p_k_head, p_v_head = p_keys + i_head * SIZE, p_values + i_head * SIZE
    for t in range(begin, end, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        place = tl.where(o_t < prompt_length, prompt_start, start - prompt_length) + o_t
        seen = o_t < end
        o_kv = place[:, None] * (HEADS * SIZE) + o_d[None, :]
        in_kv = seen[:, None] & in_d[None, :]
        k = tl.load(p_k_head + o_kv, mask=in_kv, other=0.0)
        s = _scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap)
        s = tl.where(seen[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(p_v_head + o_kv, mask=in_kv, other=0.0)
        acc = tl.dot(p.to(dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher

    empty = total == 0  # a piece that begins behind the path
    out = acc / tl.where(empty, 1.0, total)[:, None]
    if p_lse is not None:
        o_part = (i_row * (HEADS * REPEAT) + i_query) * pieces + i_piece
        tl.store(p_out + o_part[:, None] * SIZE + o_d[None, :], out, mask=in_q)
        lse = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(p_lse + o_part, lse, mask=o_m < REPEAT)
    else:
        o_out = (i_row * (HEADS * REPEAT) + i_query) * SIZE
        tl.store(p_out + o_out[:, None] + o_d[None, :], out.to(dtype), mask=in_q)


@triton.jit(do_not_specialize=["pieces"])
def merge_pieces(p_part, p_lse, p_out, pieces, SIZE: tl.constexpr, PIECES: tl.constexpr, D: tl.constexpr):
    """One query: out [SIZE] from its pieces. PIECES >= pieces, a power of two. Grid: (B * Hq,)."""
    i_query = tl.program_id(0).to(tl.int64)
    o_p, o_d = tl.arange(0, PIECES), tl.arange(0, D)
    lse = tl.load(p_lse + i_query * pieces + o_p, mask=o_p < pieces, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    inside = (o_p < pieces)[:, None] & (o_d < SIZE)[None, :]
    part = tl.load(p_part + (i_query * pieces + o_p)[:, None] * SIZE + o_d[None, :], mask=inside, other=0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(p_out + i_query * SIZE + o_d, out.to(p_out.dtype.element_ty), mask=o_d < SIZE)


def pieces_of(rows: int, heads: int, longest: int) -> int:
    """Pieces of a path, a power of two: enough programs for a GPU, none with less than PIECE tokens."""
    wanted = min(triton.cdiv(PROGRAMS, max(1, rows * heads)), triton.cdiv(longest, PIECE), MAX_PIECES)
    return triton.next_power_of_2(wanted) if wanted > 1 else 1


def config_of(size: int, half: bool) -> tuple[int, int]:
    """Tokens of a step, and steps that are loaded ahead: 64 KiB in flight a program at most (an MI300 has no more)."""
    return (64 if size <= 128 else 32, 3) if half else (16, 2)


def attend(
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
    """As the op; fp16, bf16 or fp32. One launch, two where paths are split."""
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    (rows, queries, size), heads = q.shape, k.shape[1]
    out = torch.empty(rows, queries, size, dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    pieces = pieces_of(rows, heads, longest if window is None else min(longest, window))
    part, lse = out, None
    if pieces > 1:
        part = torch.empty(rows, queries, pieces, size, dtype=torch.float32, device=q.device)
        lse = torch.empty(rows, queries, pieces, dtype=torch.float32, device=q.device)
    width = max(16, triton.next_power_of_2(size))
    block, stages = config_of(size, q.element_size() == 2)
    where = where if where.stride(1) == 1 else where.contiguous()
    with torch.cuda.device_of(q):
        attend_path[(rows * heads * pieces,)](
            q, k, v, keys, values, where, part, lse,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), where.stride(0),
            pieces, window, float(scale), None if softcap is None else float(softcap),
            HEADS=heads, REPEAT=queries // heads, SIZE=size, M=max(16, triton.next_power_of_2(queries // heads)),
            D=width, BLOCK=block, num_warps=NUM_WARPS, num_stages=stages,
        )  # fmt: skip
        if lse is not None:
            merge_pieces[(rows * queries,)](
                part, lse, out, pieces, SIZE=size, PIECES=MAX_PIECES, D=width, num_warps=NUM_WARPS
            )
    return out


def _spec(dtype: str, heads: int, repeat: int, size: int, split: bool, window: bool, softcap: bool) -> KernelSpec:
    strides = ("stride_q", "stride_qh", "stride_k", "stride_kh", "stride_v", "stride_vh")
    out = "*fp32:16" if split else f"*{dtype}:16"
    signature = dict.fromkeys(("p_q", "p_k", "p_v", "p_keys", "p_values"), f"*{dtype}:16")
    signature |= dict.fromkeys(strides, "i32:16") | {"p_where": "*i64", "stride_where": "i32"}
    signature |= {"p_out": out, "pieces": "i32", "scale": "fp32"}
    optional = {"p_lse": ("*fp32:16", split), "window": ("i32", window), "softcap": ("fp32", softcap)}
    signature |= {name: kind for name, (kind, on) in optional.items() if on}
    block, stages = config_of(size, dtype != "fp32")
    constexprs: dict[str, int | None] = {
        "HEADS": heads, "REPEAT": repeat, "SIZE": size, "M": max(16, triton.next_power_of_2(repeat)),
        "D": max(16, triton.next_power_of_2(size)), "BLOCK": block,
    }  # fmt: skip
    constexprs |= {name: None for name, (_, on) in optional.items() if not on}
    kind = "".join(f"_{n}" for n, on in (("split", split), ("window", window), ("softcap", softcap)) if on)
    return KernelSpec(
        name=f"attend_path_{dtype}_{heads}x{repeat}x{size}{kind}",
        kernel=attend_path,
        signature=signature,
        constexprs=constexprs,
        num_warps=NUM_WARPS,
        num_stages=stages,
        wide=True,
    )


def _specs() -> list[KernelSpec]:
    """Heads of Qwen2.5-0.5B, Llama-3-8B, Gemma-2 (capped, windows) and an odd size. fp16 is as bf16."""
    specs = []
    for split in (False, True):
        specs += [_spec("bf16", 2, 7, 64, split, False, False), _spec("bf16", 8, 4, 128, split, False, False)]
        specs += [_spec("bf16", 4, 2, 256, split, *options) for options in product((False, True), repeat=2)]
        specs += [_spec("bf16", 32, 1, 80, split, True, False), _spec("fp32", 8, 2, 128, split, False, False)]
        specs.append(_spec("fp32", 4, 2, 256, split, True, True))
    for dtype, size in product(("bf16", "fp32"), (64, 80, 128, 256)):
        specs.append(
            KernelSpec(
                name=f"merge_pieces_{dtype}_{size}",
                kernel=merge_pieces,
                signature={"p_part": "*fp32:16", "p_lse": "*fp32:16", "p_out": f"*{dtype}:16", "pieces": "i32"},
                constexprs={"SIZE": size, "PIECES": MAX_PIECES, "D": triton.next_power_of_2(size)},
                wide=True,
            )
        )
    return specs


KERNELS = _specs()
