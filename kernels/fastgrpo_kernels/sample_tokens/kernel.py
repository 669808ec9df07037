# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of `sample_tokens`: the row is read once, and one chunk of it a second time; nothing is sorted.

`chunk_sums` gives every chunk of BLOCK tokens its largest logit and its sum of weights, `draw` looks up the chunk and
then the token. With filters `filter_sums` comes between: every filter is a cut, the lowest logit that is kept, and how
many of the tokens that equal it are kept. The cuts of top-k and top-p are searched among the numbers of the logits'
dtype, in their order, four intervals at a time: 8 reads of the row at most for bf16, 10 for fp16, 16 for fp32; fewer
where a bound of the cut is known. No atomics: same input, same bits. Not measured on a GPU yet.
"""

from __future__ import annotations

import math
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specs import KernelSpec

BLOCK = 4096
"""Tokens of a chunk."""
NUM_WARPS = 8
MIN_CHUNKS = 128
"""Chunks that `draw` and `filter_sums` are compiled for at least: one variant for vocabularies up to 524,288."""

LOWEST = tl.constexpr(-3.4028234663852886e38)  # unlike -inf, a logit of -inf minus it is not NaN
MAX_SIGN = tl.constexpr(0x7FFFFFFF)
BELOW_ONE = tl.constexpr(1.0 - 2.0**-52)


@triton.jit
def _load(p_row, V, start, BLOCK: tl.constexpr):
    """[BLOCK] fp32 logits of a row from column `start`, -inf behind its end."""
    o = start + tl.arange(0, BLOCK)
    return tl.load(p_row + o, mask=o < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _load_chunks(p_peak, p_sum, chunks, scale, CHUNKS: tl.constexpr):
    """[CHUNKS] peaks, the row's peak, and [CHUNKS] float64 sums of exp2((z - peak) * scale)."""
    i_chunk = tl.arange(0, CHUNKS)
    o = tl.program_id(0).to(tl.int64) * chunks + i_chunk
    peaks = tl.load(p_peak + o, mask=i_chunk < chunks, other=LOWEST)
    sums = tl.load(p_sum + o, mask=i_chunk < chunks, other=0.0)
    peak = tl.max(peaks, 0)
    return peaks, peak, sums.to(tl.float64) * tl.exp2((peaks - peak) * scale).to(tl.float64)


@triton.jit(do_not_specialize=["chunks"])
def chunk_sums(p_logits, p_peak, p_sum, stride, V, chunks, scale, BLOCK: tl.constexpr):
    """Largest logit of a chunk, and the sum of exp2((z - it) * scale), NaN with NaN or +inf. Grid: (N * chunks,)."""
    i_row = tl.program_id(0) // chunks
    start = (tl.program_id(0) - i_row * chunks) * BLOCK
    z = _load(p_logits + i_row.to(tl.int64) * stride, V, start, BLOCK)
    peak = tl.maximum(tl.max(z, 0), LOWEST)
    tl.store(p_peak + tl.program_id(0), peak)
    tl.store(p_sum + tl.program_id(0), tl.sum(tl.exp2((z - peak) * scale), 0))


@triton.jit
def _rank(x, SHIFT: tl.constexpr):
    """int64 that orders fp32 numbers as their values do; of two neighbours in the logits' dtype, neighbours."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & MAX_SIGN)) >> SHIFT).to(tl.int64)


@triton.jit
def _of_rank(rank, SHIFT: tl.constexpr):
    """The fp32 number of a rank; -0 has one of its own, and equals 0."""
    bits = rank.to(tl.int32) << SHIFT
    bits = tl.where(bits < 0, bits | ((1 << SHIFT) - 1), bits)
    return (bits ^ ((bits >> 31) & MAX_SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def _search(p_row, V, low, high, limit, peak, scale, WEIGHTED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest number above which there is less than `limit`, and how much: of weights, or of tokens.

    low, high: ranks; above the first there is `limit` or more, above the second less. What is found is a logit, unless
    sums that should be equal were rounded apart.
    """
    found = tl.full((), 0.0, tl.float64)
    while high - low > 1:
        rank_1 = low + tl.maximum((high - low) // 4, 1)
        rank_2 = low + tl.maximum((high - low) // 2, 1)
        rank_3 = low + tl.maximum((high - low) * 3 // 4, 1)
        z_1, z_2, z_3 = _of_rank(rank_1, SHIFT), _of_rank(rank_2, SHIFT), _of_rank(rank_3, SHIFT)
        a_1 = tl.zeros([BLOCK], tl.float32)
        a_2 = tl.zeros([BLOCK], tl.float32)
        a_3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            z = _load(p_row, V, start, BLOCK)
            w = tl.exp2((z - peak) * scale) if WEIGHTED else tl.full([BLOCK], 1.0, tl.float32)
            a_1 += tl.where(z > z_1, w, 0.0)
            a_2 += tl.where(z > z_2, w, 0.0)
            a_3 += tl.where(z > z_3, w, 0.0)
        above_1 = tl.sum(a_1.to(tl.float64), 0)
        above_2 = tl.sum(a_2.to(tl.float64), 0)
        above_3 = tl.sum(a_3.to(tl.float64), 0)
        if above_1 < limit:
            high = rank_1
            found = above_1
        elif above_2 < limit:
            low = rank_1
            high = rank_2
            found = above_2
        elif above_3 < limit:
            low = rank_2
            high = rank_3
            found = above_3
        else:
            low = rank_3
    return _of_rank(high, SHIFT), found


@triton.jit
def _total_from(p_row, V, cut, peak, scale, BLOCK: tl.constexpr):
    """The float64 sum of the weights of logits that are `cut` at least."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z = _load(p_row, V, start, BLOCK)
        sums += tl.where(z >= cut, tl.exp2((z - peak) * scale), 0.0)
    return tl.sum(sums.to(tl.float64), 0)


@triton.jit
def _cut(
    p_row, V, peak, total, scale, top_k, top_p, drop,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The lowest logit that the filters keep, and how many of its equals they keep, the first ones."""
    cut = tl.full((), float("-inf"), tl.float32)
    ties = V
    low = _rank(cut, SHIFT) - 1
    if TOP_K:
        high = _rank(peak, SHIFT)
        cut, _ = _search(p_row, V, low, high, top_k.to(tl.float64), peak, scale, False, SHIFT, BLOCK)
        low = _rank(cut, SHIFT) - 1
        if TOP_P:
            total = _total_from(p_row, V, cut, peak, scale, BLOCK)
    if TOP_P:
        # Tokens less likely than half of (1 - top_p) / V do not have a share of 1 - top_p together: the cut is above.
        least = tl.log2((0.5 * (1.0 - top_p) * total / V).to(tl.float32))
        low = tl.maximum(low, _rank(peak + tl.maximum(least, -150.0) / scale, SHIFT) - 1)
        limit = top_p * total
        cut, above = _search(p_row, V, low, _rank(peak, SHIFT), limit, peak, scale, True, SHIFT, BLOCK)
        room = tl.ceil((limit - above) / tl.exp2((cut - peak) * scale).to(tl.float64))
        ties = tl.where(room < V, room, V).to(tl.int32)
    least_kept = (peak.to(tl.float64) + drop).to(tl.float32)
    ties = tl.where(least_kept > cut, V, ties)
    return tl.maximum(cut, least_kept), ties


@triton.jit(do_not_specialize=["chunks", "top_k"])
def filter_sums(
    p_logits, p_peak, p_sum, p_kept, p_cut, p_ties, stride, V, chunks, scale, top_k,
    top_p: tl.float64, drop: tl.float64,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of what the filters keep, their cut, and of each chunk how many of its equals it may keep. Grid: (N,).

    drop: how far below the likeliest logit min-p keeps tokens, -inf without.
    """
    dtype: tl.constexpr = p_logits.dtype.element_ty
    # Low bits of an fp32 number that are 0 where it came from the dtype.
    SHIFT: tl.constexpr = 16 if dtype == tl.bfloat16 else 13 if dtype == tl.float16 else 0
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * stride
    _, peak, by_chunk = _load_chunks(p_peak, p_sum, chunks, scale, CHUNKS)
    total = tl.sum(by_chunk, 0)
    cut, ties = _cut(p_row, V, peak, total, scale, top_k, top_p, drop, TOP_K, TOP_P, SHIFT, BLOCK)
    tl.store(p_cut + i_row, cut)
    for i_chunk in range(chunks):
        z = _load(p_row, V, i_chunk * BLOCK, BLOCK)
        peak_here = tl.load(p_peak + i_row * chunks + i_chunk)
        kept = tl.sum(tl.where(z > cut, tl.exp2((z - peak_here) * scale), 0.0), 0)
        equal = tl.minimum(tl.sum((z == cut).to(tl.int32), 0), ties)
        kept += tl.where(equal > 0, equal.to(tl.float32) * tl.exp2((cut - peak_here) * scale), 0.0)
        tl.store(p_kept + i_row * chunks + i_chunk, tl.where(total > 0, kept, float("nan")))  # no cut keeps a NaN
        tl.store(p_ties + i_row * chunks + i_chunk, ties)
        ties -= equal


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["p_uniform"])
def draw(
    p_logits, p_uniform, p_peak, p_sum, p_cut, p_ties, p_token, p_logprob, stride, V, chunks, scale,
    temperature: tl.float64,
    GREEDY: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Token and log-prob of row `program_id(0)`; `p_cut` and `p_ties` are None without filters. Grid: (N,).

    The share of the chunk that lies below the target is looked up in the chunk's own running sum, so what is found has
    a weight above 0 however the two sums of the chunk are rounded.
    """
    FILTERED: tl.constexpr = p_cut is not None
    i_row = tl.program_id(0).to(tl.int64)
    peaks, peak, sums = _load_chunks(p_peak, p_sum, chunks, scale, CHUNKS)
    i_chunks = tl.arange(0, CHUNKS)
    total = tl.sum(sums, 0)
    p_row = p_logits + i_row * stride
    uniform = tl.load(p_uniform + i_row)
    uniform = tl.minimum(tl.where(uniform >= 0, uniform, 0.0), BELOW_ONE)
    if GREEDY:
        i_chunk = tl.min(tl.where(peaks == peak, i_chunks, CHUNKS), 0)
    else:
        up_to = tl.cumsum(sums, 0)
        last = tl.max(tl.where(sums > 0, i_chunks, 0), 0)
        i_chunk = tl.minimum(tl.min(tl.where((up_to > uniform * total) & (sums > 0), i_chunks, CHUNKS), 0), last)
    i_chunk = tl.minimum(i_chunk, chunks - 1)
    z = _load(p_row, V, i_chunk * BLOCK, BLOCK)
    o = tl.arange(0, BLOCK)
    if GREEDY:
        i_token = tl.min(tl.where(z == peak, o, BLOCK - 1), 0)
        logprob = tl.full((), 0.0, tl.float64)
    else:
        here = i_chunks == i_chunk
        before = tl.sum(tl.where(i_chunks < i_chunk, sums, 0.0), 0)
        share = (uniform * total - before) / tl.sum(tl.where(here, sums, 0.0), 0)
        share = tl.minimum(tl.maximum(share, 0.0), BELOW_ONE)
        peak_here = tl.sum(tl.where(here, peaks, 0.0), 0)
        w = tl.exp2((z - peak_here) * scale)
        if FILTERED:
            cut = tl.load(p_cut + i_row)
            equal = z == cut
            in_time = tl.cumsum(equal.to(tl.int32), 0) <= tl.load(p_ties + i_row * chunks + i_chunk)
            w = tl.where((z > cut) | (equal & in_time), w, 0.0)
        up_to = tl.cumsum(w.to(tl.float64), 0)
        target = share * tl.sum(tl.where(o == BLOCK - 1, up_to, 0.0), 0)
        last = tl.max(tl.where(w > 0, o, 0), 0)
        i_token = tl.minimum(tl.min(tl.where((up_to > target) & (w > 0), o, BLOCK), 0), last)
        z_token = tl.sum(tl.where(o == i_token, z, 0.0), 0)
        logprob = (z_token - peak).to(tl.float64) / temperature - tl.log(total)
    sound = total > 0  # neither NaN nor 0
    token = tl.where(sound, i_chunk * BLOCK + i_token, 0)
    tl.store(p_token + i_row, token.to(tl.int64))
    tl.store(p_logprob + i_row, tl.where(sound, logprob, float("nan")).to(tl.float32))


def _chunk_slots(vocab_size: int) -> int:
    return max(MIN_CHUNKS, triton.next_power_of_2(triton.cdiv(vocab_size, BLOCK)))


def sample(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor]:
    """[N, V] fp16, bf16 or fp32, [N] float64 -> [N] int64, [N] fp32; two launches, three with filters."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    uniform = uniform.contiguous()
    (N, V), stride, device = logits.shape, logits.stride(0), logits.device
    chunks, slots = triton.cdiv(V, BLOCK), _chunk_slots(V)
    token = torch.empty(N, dtype=torch.int64, device=device)
    logprob, cut = (torch.empty(N, dtype=torch.float32, device=device) for _ in range(2))
    peak, sums, kept = (torch.empty(N, chunks, dtype=torch.float32, device=device) for _ in range(3))
    ties = torch.empty(N, chunks, dtype=torch.int32, device=device)
    if N == 0:
        return token, logprob
    greedy = temperature == 0
    # In fp32: neither inf, which times 0 is NaN, nor 0, which times -inf is.
    scale = 1.0 if greedy else min(max(math.log2(math.e) / temperature, 1e-37), 3e38)
    by_k, by_p = 0 < top_k < V, top_p < 1
    filtered = not greedy and (by_k or by_p or min_p > 0)
    with torch.cuda.device_of(logits):
        chunk_sums[(N * chunks,)](logits, peak, sums, stride, V, chunks, scale, BLOCK=BLOCK, num_warps=NUM_WARPS)
        if filtered:
            drop = temperature * math.log(min_p) if min_p > 0 else -math.inf
            filter_sums[(N,)](
                logits, peak, sums, kept, cut, ties, stride, V, chunks, scale, top_k if by_k else 0, float(top_p), drop,
                TOP_K=by_k, TOP_P=by_p, CHUNKS=slots, BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
        draw[(N,)](
            logits, uniform, peak, kept if filtered else sums, cut if filtered else None, ties if filtered else None,
            token, logprob, stride, V, chunks, scale, float(temperature),
            GREEDY=greedy, CHUNKS=slots, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return token, logprob


def _spec(
    name: str, kernel: object, dtype: str, aligned: bool, more: dict[str, str], **constexprs: object
) -> KernelSpec:
    hint = ":16" if aligned else ""
    common = {
        "p_logits": f"*{dtype}{hint}",
        "p_peak": "*fp32:16",
        "p_sum": "*fp32:16",
        "chunks": "i32",
        "scale": "fp32",
    }
    return KernelSpec(
        name=f"{name}_{dtype}{'' if aligned else '_unaligned'}",
        kernel=kernel,
        signature={**common, "stride": f"i32{hint}", "V": f"i32{hint}", **more},
        constexprs={**constexprs, "BLOCK": BLOCK},
        num_warps=NUM_WARPS,
        wide=aligned and kernel is not draw,  # which reads one chunk
    )


def _specs() -> list[KernelSpec]:
    """Every variant, of rows that are multiples of 16 logits long and apart, and of others. fp16 is as bf16."""
    specs = []
    to_filter = {"p_kept": "*fp32:16", "p_cut": "*fp32:16", "p_ties": "*i32:16", "top_k": "i32"}
    to_filter |= {"top_p": "fp64", "drop": "fp64"}
    to_draw = {"p_uniform": "*fp64", "p_token": "*i64:16", "p_logprob": "*fp32:16", "temperature": "fp64"}
    filters = {"p_cut": "*fp32:16", "p_ties": "*i32:16"}
    none = {"p_cut": None, "p_ties": None}
    slots = {"CHUNKS": MIN_CHUNKS}
    for dtype, aligned in product(("bf16", "fp32"), (True, False)):
        specs.append(_spec("chunk_sums", chunk_sums, dtype, aligned, {}))
        for by_k, by_p in product((False, True), (False, True)):
            name = f"filter_sums{'_top_k' if by_k else ''}{'_top_p' if by_p else ''}"
            specs.append(_spec(name, filter_sums, dtype, aligned, to_filter, TOP_K=by_k, TOP_P=by_p, **slots))
        specs.append(_spec("draw", draw, dtype, aligned, to_draw, GREEDY=False, **slots, **none))
        specs.append(_spec("draw_greedy", draw, dtype, aligned, to_draw, GREEDY=True, **slots, **none))
        specs.append(_spec("draw_filtered", draw, dtype, aligned, {**to_draw, **filters}, GREEDY=False, **slots))
    return specs


KERNELS = _specs()
