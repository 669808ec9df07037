# mypy: disable-error-code="no-untyped-def"
"""The fused LM head's passes over hidden states and over rows of logits; one program a row, no atomics.

A row's logits are `z = input_scale * y`, or `ceiling * tanh(input_scale * y)` with a softcap. Its exponentials
`E = exp(z - c)` need a shift c near its log-sum-exp, and before the row has been read there is only a guess g of the
target's log-prob: c = z_y - g. With `S = sum E`, `U = sum E * (z - c)` and `gap = z_y - c`, the log-prob is
`gap - log S`, the entropy `log S - U / S` and dlogp/dz_j `-(E_j - [j = y] S) / S`. What is stored is the gradient row
`R_j = (E_j - [j = y] S) * (1 - tanh^2)`: the factor -1/S belongs to the row and is applied to a [C, D] matrix later.
R has 0 in place of NaN: S is NaN then, and so is the factor, unless the row has no upstream gradient and gets 0.
Nothing here multiplies matrices or knows about losses.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...specs import KernelSpec
from ...token_logprob.kernel import LOG_ZERO, _rows, _tanh

LOWEST_GUESS = tl.constexpr(-80.0)
LEAST_SUM = tl.constexpr(1e-20)
LARGEST_SUM = tl.constexpr(1e20)

Guess = tuple[Tensor | None, Tensor | None]
"""Log-probs of the targets under the policy that started the update and under the rollout engine, [N] float each. The
first one given is the guess; of it, what is NaN or outside [-80, 0] counts as 0."""


@triton.jit
def shift_by_guess(z_y, guess):
    """c = z_y - guess; 0 for a z_y of -inf, which says nothing about the rest of the row."""
    guess = tl.where((guess >= LOWEST_GUESS) & (guess <= 0.0), guess, 0.0)
    return tl.where(z_y == float("-inf"), 0.0, z_y - guess)


@triton.jit
def out_of_range(total, moment):
    """Whether the sums S, U of a row come from a shift too far off; sums that are NaN come from the data."""
    unbounded = (total == total) & ~(tl.abs(moment) < float("inf"))
    return (total < LEAST_SUM) | (total > LARGEST_SUM) | unbounded


@triton.jit
def not_nan(x):
    """0 in place of NaN: a NaN in a gradient row would reach the weight's gradient even with a factor of 0."""
    return tl.where(x == x, x, 0.0)


@triton.jit
def _dot(p_a, p_b, size, BLOCK: tl.constexpr):
    """Dot product in fp32 of two vectors of `size`."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        o = start + tl.arange(0, BLOCK)
        a = tl.load(p_a + o, mask=o < size, other=0.0).to(tl.float32)
        total += a * tl.load(p_b + o, mask=o < size, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize_on_alignment=["p_target", "p_bias", "p_guess", "p_z", "p_c"])
def target_logit_kernel(
    p_hidden,
    p_weight,
    p_target,
    p_bias,
    p_low_hidden,
    p_low_weight,
    p_guess,
    p_z,
    p_c,
    hidden_stride,
    weight_stride,
    low_hidden_stride,
    low_weight_stride,
    D,
    V,
    rank,
    input_scale,
    ceiling,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """z_y and c of row `program_id(0)`; pointers to what there is none of are None."""
    i_row = tl.program_id(0).to(tl.int64)
    y = tl.load(p_target + i_row).to(tl.int64)
    inside = (y >= 0) & (y < V)
    size = tl.where(inside, D, 0)  # for a wrong target nothing is read
    z = _dot(p_hidden + i_row * hidden_stride, p_weight + y * weight_stride, size, BLOCK)
    if p_low_hidden is not None:
        p_low = p_low_hidden + i_row * low_hidden_stride
        z += _dot(p_low, p_low_weight + y * low_weight_stride, tl.where(inside, rank, 0), RANK_BLOCK)
    if p_bias is not None:
        z += tl.load(p_bias + y, mask=inside, other=0.0).to(tl.float32)
    z *= input_scale
    if SOFTCAP:
        z = _tanh(z) * ceiling
    z = tl.where(inside, z, float("nan"))
    guess = 0.0
    if p_guess is not None:
        guess = tl.load(p_guess + i_row)
    tl.store(p_z + i_row, z)
    tl.store(p_c + i_row, shift_by_guess(z, guess))


@triton.jit
def _exponentials(p_row, p_out, o, mask, c, input_scale, ceiling, SOFTCAP: tl.constexpr):
    """Stores R of the columns `o` but for the target's own share; E and E * (z - c), 0 where masked."""
    z = tl.load(p_row + o, mask=mask, other=0.0) * input_scale
    if SOFTCAP:
        tanh = _tanh(z)
        z = tanh * ceiling
    shifted = tl.where(mask, z - c, float("-inf"))
    e = tl.exp(shifted)
    gradient = e
    if SOFTCAP:
        gradient = e * (1.0 - tanh * tanh)
    tl.store(p_out + o, not_nan(gradient).to(p_out.dtype.element_ty), mask=mask)
    return e, e * tl.maximum(shifted, LOG_ZERO)


@triton.jit
def _exponential_pass(
    p_row, p_out, V, c, input_scale, ceiling, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """A row's S and U; stores its R but for the target's own share. Each group of columns lies in one thread."""
    o_tile = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    total = tl.zeros([BLOCK // GROUP], tl.float32)
    moment = tl.zeros([BLOCK // GROUP], tl.float32)
    whole = V // GROUP * GROUP  # a mask that changes at multiples of GROUP only keeps the accesses wide
    for start in range(0, whole, BLOCK):
        o = start + o_tile
        e, weighted = _exponentials(p_row, p_out, o, o < whole, c, input_scale, ceiling, SOFTCAP)
        total += tl.sum(e, 1)
        moment += tl.sum(weighted, 1)
    o = whole + tl.arange(0, GROUP)
    e, weighted = _exponentials(p_row, p_out, o, o < V, c, input_scale, ceiling, SOFTCAP)
    return tl.sum(total, 0) + tl.sum(e, 0), tl.sum(moment, 0) + tl.sum(weighted, 0)


@triton.jit
def _largest(p_row, V, input_scale, ceiling, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """max z of a row without NaN; the softcap, which never falls, waits until the end."""
    o_tile = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    largest = tl.full([BLOCK // GROUP], float("-inf"), tl.float32)
    whole = V // GROUP * GROUP
    for start in range(0, whole, BLOCK):
        o = start + o_tile
        x = tl.load(p_row + o, mask=o < whole, other=0.0) * input_scale
        largest = tl.maximum(largest, tl.max(tl.where(o < whole, x, float("-inf")), 1))
    o = whole + tl.arange(0, GROUP)
    x = tl.load(p_row + o, mask=o < V, other=0.0) * input_scale
    z = tl.maximum(tl.max(largest, 0), tl.max(tl.where(o < V, x, float("-inf")), 0))
    if SOFTCAP:
        z = _tanh(z) * ceiling
    return z


@triton.jit(
    do_not_specialize=["row_units", "out_units", "V"],
    do_not_specialize_on_alignment=["p_target", "p_c", "p_z", "p_guess", "p_logprob", "p_entropy", "p_row_sum"],
)
def single_read_kernel(
    p_logits,
    p_target,
    p_c,
    p_z,
    p_guess,
    p_out,
    p_logprob,
    p_entropy,
    p_row_sum,
    row_units,
    out_units,
    V,
    input_scale,
    ceiling,
    FROM_GUESS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row `program_id(0)`, read once, or three times where its shift turns out too far off.

    Rows are `row_units * ROW_UNIT` and `out_units * OUT_UNIT` elements apart, which shows them to begin at 16 bytes.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * row_units * ROW_UNIT
    p_out_row = p_out + i_row * out_units * OUT_UNIT
    y = tl.load(p_target + i_row).to(tl.int64)
    inside = (y >= 0) & (y < V)
    if p_z is None:
        z_y = tl.load(p_row + y, mask=inside, other=float("nan")) * input_scale
        if SOFTCAP:
            z_y = _tanh(z_y) * ceiling
    else:
        z_y = tl.load(p_z + i_row)
    if FROM_GUESS:
        guess = 0.0
        if p_guess is not None:
            guess = tl.load(p_guess + i_row)
        c = shift_by_guess(z_y, guess)
    else:
        given = tl.load(p_c + i_row)
        c = tl.where(tl.abs(given) < float("inf"), given, shift_by_guess(z_y, 0.0))

    total, moment = _exponential_pass(p_row, p_out_row, V, c, input_scale, ceiling, SOFTCAP, GROUP, BLOCK)
    if out_of_range(total, moment):
        c = _largest(p_row, V, input_scale, ceiling, SOFTCAP, GROUP, BLOCK)
        total, moment = _exponential_pass(p_row, p_out_row, V, c, input_scale, ceiling, SOFTCAP, GROUP, BLOCK)

    gap = z_y - c
    log_sum = tl.log(total)
    tl.store(p_c + i_row, c)
    tl.store(p_logprob + i_row, gap - log_sum)
    tl.store(p_entropy + i_row, log_sum - moment / total)
    tl.store(p_row_sum + i_row, total)
    at_target = tl.exp(gap) - total
    if SOFTCAP:
        tanh = z_y / ceiling
        at_target *= 1.0 - tanh * tanh
    tl.debug_barrier()  # whichever warp stored the target's column has done so before it is overwritten
    tl.store(p_out_row + y, not_nan(at_target).to(p_out.dtype.element_ty), mask=inside)


def target_logit(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    input_scale: float,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    ceiling: float | None = None,
    guess: Guess = (None, None),
) -> tuple[Tensor, Tensor]:
    """The target's logit z_y and the shift c = z_y - guess of each row, [N] fp32 each.

    hidden [N, D], weight [V, D], bias [V], low_rank (u [N, r], B [V, r]), of any float dtypes but float64; the logits
    before input_scale are `hidden @ weight.T + u @ B.T + bias`, summed in fp32. target [N] int64: outside [0, V), z_y
    and c are NaN. A guess too far off is for the caller to find in the sums of exponentials.
    """
    hidden, weight = _rows(hidden), _rows(weight)
    low_hidden, low_weight = (None, None) if low_rank is None else (_rows(low_rank[0]), _rows(low_rank[1]))
    N, D = hidden.shape
    z, c = (torch.empty(N, dtype=torch.float32, device=hidden.device) for _ in range(2))
    if N:
        with torch.cuda.device_of(hidden):
            target_logit_kernel[(N,)](
                hidden,
                weight,
                target.contiguous(),
                None if bias is None else bias.contiguous(),
                low_hidden,
                low_weight,
                _first_given(guess),
                z,
                c,
                hidden.stride(0),
                weight.stride(0),
                0 if low_hidden is None else low_hidden.stride(0),
                0 if low_weight is None else low_weight.stride(0),
                D,
                weight.shape[0],
                0 if low_hidden is None else low_hidden.shape[1],
                input_scale,
                0.0 if ceiling is None else ceiling,
                SOFTCAP=ceiling is not None,
                **DOT_TILING,
            )
    return z, c


def single_read(
    logits: Tensor,
    target: Tensor,
    c: Tensor,
    z_y: Tensor | None,
    out: Tensor,
    *,
    input_scale: float,
    logprob: Tensor,
    entropy: Tensor,
    row_sum: Tensor,
    ceiling: float | None = None,
    guess: Guess | None = None,
) -> None:
    """Gradient rows R, log-prob, entropy and row sum S from logits that are there.

    logits [R, V] fp32, before input_scale, rows a multiple of 4 elements apart. target [R] int64. out [R, V] bf16 or
    fp32, rows a multiple of 8 elements apart, no memory shared with logits; what lies between its rows stays.
    c [R] fp32, contiguous: the shifts, z_y where not finite; with a `guess` (None for one not given), z_y - guess and
    not read. Where S is not within [1e-20, 1e20], the row is done again with its maximum, which c then holds.
    z_y [R] fp32, or None to take it from the logits. logprob, entropy, row_sum: [R] fp32, contiguous, written. A row
    with a NaN is NaN in these three, and has no NaN in out.
    Errors: ValueError for rows of logits or out that are too close.
    """
    R, V = logits.shape
    units = [_row_units("logits", logits, ROW_TILING["ROW_UNIT"]), _row_units("out", out, ROW_TILING["OUT_UNIT"])]
    if R:
        with torch.cuda.device_of(logits):
            single_read_kernel[(R,)](
                logits,
                target.contiguous(),
                c,
                None if z_y is None else z_y.contiguous(),
                None if guess is None else _first_given(guess),
                out,
                logprob,
                entropy,
                row_sum,
                *units,
                V,
                input_scale,
                0.0 if ceiling is None else ceiling,
                FROM_GUESS=guess is not None,
                SOFTCAP=ceiling is not None,
                **_row_tiling(out.dtype == torch.float32, ceiling is not None),
            )


DOT_TILING = {"BLOCK": 1024, "RANK_BLOCK": 128, "num_warps": 2}
ROW_TILING = {"ROW_UNIT": 4, "OUT_UNIT": 8, "GROUP": 8, "BLOCK": 4096, "num_warps": 8}
WIDE_SOFTCAP_TILING = {**ROW_TILING, "BLOCK": 2048}  # longer tiles spill registers in Triton 3.6


def _row_tiling(wide: bool, softcap: bool) -> dict[str, int]:
    """For gradient rows in fp32 (wide) or bf16."""
    return WIDE_SOFTCAP_TILING if wide and softcap else ROW_TILING


def _first_given(guess: Guess) -> Tensor | None:
    """The guess that counts, fp32 with elements side by side."""
    old, sampling = guess
    given = sampling if old is None else old
    return None if given is None else given.to(torch.float32).contiguous()


def _row_units(name: str, rows: Tensor, unit: int) -> int:
    """How many `unit`s of elements rows lie apart; with one row, no matter."""
    stride = rows.stride(0) if rows.shape[0] > 1 else 0
    if stride % unit or (rows.shape[1] > 1 and rows.stride(1) != 1):
        raise ValueError(
            f"{name}: expected columns side by side and rows a multiple of {unit} elements apart, got strides "
            f"{tuple(rows.stride())}"
        )
    return stride // unit


def _spec(name: str, kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], wide: bool) -> KernelSpec:
    warps = constexprs.pop("num_warps")
    return KernelSpec(name=name, kernel=kernel, signature=signature, constexprs=constexprs, num_warps=warps, wide=wide)


def _specs() -> list[KernelSpec]:
    """Every variant of the pass over logits; of the target's logit the least and the most. fp16 is as bf16."""
    number, pointer = "fp32", "*fp32"
    specs = []
    for dtype in ("bf16", "fp32"):
        matrix = f"*{dtype}:16"
        signature = {"p_hidden": matrix, "p_weight": matrix, "p_target": "*i64", "p_z": pointer, "p_c": pointer}
        signature |= dict.fromkeys((f"{x}_stride" for x in ("hidden", "weight", "low_hidden", "low_weight")), "i32:16")
        signature |= dict.fromkeys(("D", "V", "rank"), "i32:16") | {"input_scale": number, "ceiling": number}
        optional = {"p_bias": f"*{dtype}", "p_low_hidden": matrix, "p_low_weight": matrix, "p_guess": pointer}
        least, most = {**dict.fromkeys(optional), "SOFTCAP": False}, {"SOFTCAP": True}
        # Beside a low rank or a softcap the loop over D, fully unrolled or not, is no longer the listing's main one.
        specs.append(_spec(f"target_logit_{dtype}", target_logit_kernel, signature, least | DOT_TILING, True))
        everything = f"target_logit_{dtype}_everything"
        specs.append(_spec(everything, target_logit_kernel, signature | optional, most | DOT_TILING, False))
        odd = {name: type_.partition(":")[0] for name, type_ in (signature | optional).items()}
        specs.append(_spec(f"{everything}_odd", target_logit_kernel, odd, most | DOT_TILING, False))
        for softcap, from_guess in product((False, True), repeat=2):
            given, absent = ("p_guess", "p_z") if from_guess else ("p_z", "p_guess")
            signature = {"p_logits": "*fp32:16", "p_target": "*i64", "p_out": matrix}
            signature |= dict.fromkeys((given, "p_c", "p_logprob", "p_entropy", "p_row_sum"), pointer)
            signature |= dict.fromkeys(("row_units", "out_units", "V"), "i32")
            signature |= {"input_scale": number, "ceiling": number}
            variant = {"FROM_GUESS": from_guess, "SOFTCAP": softcap, absent: None}
            name = f"single_read_{dtype}{'_softcap' if softcap else ''}{'_guess' if from_guess else ''}"
            tiling = _row_tiling(dtype == "fp32", softcap)
            specs.append(_spec(name, single_read_kernel, signature, variant | tiling, True))
    return specs


KERNELS = _specs()
