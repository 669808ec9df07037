# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the LM head's GEMM whose epilogue takes the exponential and sums it: logits stay in registers.

    x = input_scale * (h @ W.T + bias + u @ B.T),  z = ceiling * tanh(x) with a softcap, else z = x
    t = z - c,  E = exp(t),  S = sum_j E,  U = sum_j E * t

for a shift c of each row; S and U over the TILE_N columns of a tile, E (times 1 - tanh(x)^2 with a softcap) in bf16.
Programs are persistent and walk the tiles in groups of row blocks, so that W is read from memory once a group and h
stays in L2. Operands come through tensor descriptors: TMA where there is one, pointers elsewhere. Each sum is one
program's, in one order: same input, same bits. What to make of the sums is settled elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...specs import KernelSpec
from .config import CONFIGS, NARROW, PARTS, TILE_N, TWIN, WIDE, Mode, TileConfig, check, config_for, num_tiles, supports
from .tile import BN, LN2, LOG2E, logits, product, store_tile

__all__ = ["KERNELS", "exp_gemm", "num_tiles", "supports"]

FLAG_BLOCK = tl.constexpr(2048)


@triton.jit(
    do_not_specialize=["C"],
    do_not_specialize_on_alignment=["p_bias", "p_shift", "p_sums", "p_moments"],
)
def exp_gemm_all(
    hidden,
    weight,
    u,
    b,
    out,
    p_bias,
    p_shift,
    p_sums,
    p_moments,
    C,
    V,
    D,
    R,
    stride_h,
    stride_w,
    stride_out,
    input_scale,
    ceiling,
    SOFTCAP: tl.constexpr,
    EDGE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):
    """Every tile: S and U, and E where `out` is not None. The first five arguments but `out` are descriptors, too."""
    num_m = tl.cdiv(C, BM)
    num_n = tl.cdiv(V, BN)
    tl.assume(D > 0)
    for i_tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=TMA):
        width = GROUP_M * num_n
        first = i_tile // width * GROUP_M
        size = tl.minimum(num_m - first, GROUP_M)
        i_m = first + i_tile % width % size
        i_n = i_tile % width // size
        o_m, o_n = i_m * BM, i_n * BN
        acc = product(hidden, weight, u, b, o_m, o_n, C, V, D, R, stride_h, stride_w, BM, BK, TMA)
        live = o_m + tl.arange(0, BM) < C
        store_tile(
            acc, out, p_bias, p_shift, p_sums, p_moments, o_m, o_n, live,
            C, V, stride_out, input_scale, ceiling, SOFTCAP, EDGE, TMA,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["C"],
    do_not_specialize_on_alignment=["p_bias", "p_shift", "p_sums", "p_moments", "p_flags"],
)
def exp_gemm_flagged(
    hidden,
    weight,
    u,
    b,
    out,
    p_bias,
    p_shift,
    p_sums,
    p_moments,
    p_flags,
    C,
    V,
    D,
    R,
    stride_h,
    stride_w,
    stride_out,
    input_scale,
    ceiling,
    SOFTCAP: tl.constexpr,
    EDGE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    MAX: tl.constexpr,
):
    """Rows with a flag only: S and U, and E where `out` is not None; or the maximum of z in the place of S alone."""
    flagged = tl.zeros([FLAG_BLOCK], tl.int32)
    for start in range(0, C, FLAG_BLOCK):
        o = start + tl.arange(0, FLAG_BLOCK)
        flagged |= (tl.load(p_flags + o, mask=o < C, other=0) != 0).to(tl.int32)
    # Nearly always there is none: one look at all flags, then no loop over row blocks, each with a load to wait for.
    num_m = tl.where(tl.max(flagged, 0) != 0, tl.cdiv(C, BM), 0)
    for i_m in range(num_m):
        o_row = i_m * BM + tl.arange(0, BM)
        live = tl.load(p_flags + o_row, mask=o_row < C, other=0) != 0
        num_n = tl.where(tl.max(live.to(tl.int32), 0) != 0, tl.cdiv(V, BN), 0)
        for i_n in range(tl.program_id(0), num_n, tl.num_programs(0)):
            o_m, o_n = i_m * BM, i_n * BN
            acc = product(hidden, weight, u, b, o_m, o_n, C, V, D, R, stride_h, stride_w, BM, BK, TMA)
            if MAX:
                z, _ = logits(acc, p_bias, o_n, V, input_scale, ceiling, SOFTCAP, EDGE)
                tl.store(p_sums + tl.cast(i_n, tl.int64) * C + o_row, tl.max(z, 1) * LN2, mask=live)
            else:
                store_tile(
                    acc, out, p_bias, p_shift, p_sums, p_moments, o_m, o_n, live,
                    C, V, stride_out, input_scale, ceiling, SOFTCAP, EDGE, False,
                )  # fmt: skip


def exp_gemm(
    hidden: Tensor,
    weight: Tensor,
    shift: Tensor,
    sums: Tensor,
    moments: Tensor,
    *,
    mode: Mode,
    input_scale: float,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    ceiling: float | None = None,
    out: Tensor | None = None,
    flags: Tensor | None = None,
    config: TileConfig | None = None,
) -> None:
    """S, U and E of this module's docstring, for all rows or for those with a flag.

    hidden: [C, D], weight: [V, D], low_rank: ([C, r], [V, r]) with r % 8 == 0 or None; bf16 (fp16 in modes that write
        no E), as `supports` wants them. bias: [V] of any float dtype but float64, or None. shift: [C] fp32.
    sums, moments: [num_tiles(V), C] fp32, contiguous, overwritten. A later pass adds them up over the tiles.
    mode: "statistics" writes S and U, "exp" E too; "rescue" writes S and U, with `out` E too, of rows with a flag, and
        what belongs to others stays; "max" writes the maximum of z of rows with a flag into sums, and nothing else.
    ceiling: what tanh is multiplied by, None without a softcap. t = z - shift should stay below 88 for E to be finite.
    out: [C, V] bf16 for E, rows apart by a multiple of 64 elements and beginning at multiples of 128 bytes.
    flags: [C] int32, contiguous, nonzero where a row is meant; "max" and "rescue" only, and needed there.
    config: tiles other than `config_for` gives, to measure them.
    Memory: none, but copies of low-rank factors whose rows are apart, where there is no TMA. No host sync.
    Errors: ValueError for anything else than this. A NaN stays in its row.
    """
    check(hidden, weight, shift, sums, moments, mode, bias, low_rank, out, flags)
    (C, D), V = hidden.shape, weight.shape[0]
    if C == 0:
        return
    flagged, device = flags is not None, hidden.device
    if (_capability(device) or (0, 0))[0] == 10 and None not in (bias, ceiling, out):
        raise ValueError("bias: not with a softcap on sm_100, where triton 3.9 cannot compile it")
    if config is None:
        needs = {"bias": bias is not None, "softcap": ceiling is not None, "flagged": flagged}
        config = config_for(_capability(device), C, D, **needs)
    u, b = low_rank or (None, None)
    if not config.TMA and u is not None and b is not None:
        u, b = u.contiguous(), b.contiguous()
    pairs = ((hidden, config.BM), (weight, TILE_N), (u, config.BM), (b, TILE_N))
    operands = [x if x is None or not config.TMA else _describe(x, [rows, config.BK]) for x, rows in pairs]
    target: Any = out
    if out is not None and config.TMA and not flagged:
        target = _describe(out, [config.BM, TILE_N // PARTS])
    rank, stride_out = 0 if u is None else u.shape[1], 0 if out is None else out.stride(0)
    numbers = (C, V, D, rank, hidden.stride(0), weight.stride(0), stride_out)
    log2e = float(LOG2E.value)
    scales = (input_scale * log2e, 0.0) if ceiling is None else (input_scale, ceiling * log2e)
    options: dict[str, Any] = {"SOFTCAP": ceiling is not None, "EDGE": V % TILE_N != 0, **config.constexprs}
    options |= {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    programs = _num_programs(device, config)
    with torch.cuda.device_of(hidden):
        if flagged:
            grid = (min(programs, num_tiles(V)),)
            options["MAX"] = mode == "max"
            exp_gemm_flagged[grid](*operands, target, bias, shift, sums, moments, flags, *numbers, *scales, **options)
        else:
            grid = (min(programs, num_tiles(V) * triton.cdiv(C, config.BM)),)
            options["GROUP_M"] = config.GROUP_M
            exp_gemm_all[grid](*operands, target, bias, shift, sums, moments, *numbers, *scales, **options)


def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda":  # interpreted: as on the GPU that these tiles were made for
        return 9, 0
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


def _num_programs(device: torch.device, config: TileConfig) -> int:
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * config.programs_per_sm


def _describe(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def _spec(
    config: TileConfig,
    *,
    softcap: bool = False,
    edge: bool = False,
    bias: bool = False,
    low_rank: bool = False,
    out: bool = True,
    flagged: bool = False,
    max_only: bool = False,
) -> KernelSpec:
    """A variant; with `edge` at a vocabulary that only divides by 1."""
    half, number = "*bf16:16", "i32:16"
    operand, column, target = half, half, half
    if config.TMA:
        operand, column = (f"tensordesc<bf16[{rows},{config.BK}]>" for rows in (config.BM, TILE_N))
        target = half if flagged else f"tensordesc<bf16[{config.BM},{TILE_N // PARTS}]>"
    signature = {"hidden": operand, "weight": column, "C": "i32", "V": "i32" if edge else number, "D": number}
    signature |= dict.fromkeys(("p_shift", "p_sums", "p_moments"), "*fp32")
    signature |= dict.fromkeys(("R", "stride_h", "stride_w", "stride_out"), number)
    signature |= dict.fromkeys(("input_scale", "ceiling"), "fp32")
    optional = {"u": (low_rank, operand), "b": (low_rank, column), "out": (out, target), "p_bias": (bias, "*bf16")}
    constexprs: dict[str, Any] = {"SOFTCAP": softcap, "EDGE": edge, **config.constexprs}
    if flagged:
        signature["p_flags"] = "*i32"
        constexprs["MAX"] = max_only
    else:
        constexprs["GROUP_M"] = config.GROUP_M
    name = f"exp_gemm_{'flagged' if flagged else 'all'}_{config.BM}x{config.BK}_{config.num_warps}"
    name += "" if config.TMA else "_pointers"
    named = {"softcap": softcap, "edge": edge, "bias": bias, "low_rank": low_rank, "no_out": not out, "max": max_only}
    return KernelSpec(
        name="_".join([name, *(word for word, on in named.items() if on)]),
        kernel=exp_gemm_flagged if flagged else exp_gemm_all,
        signature=signature | {name: type_ for name, (on, type_) in optional.items() if on},
        constexprs=constexprs | {name: None for name, (on, _) in optional.items() if not on},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        options={"enable_fp_fusion": True},
        wide=not (edge or bias or flagged),
        archs=("sm_90",) if config is NARROW and softcap and bias and out and not flagged else config.archs,
    )


def _specs() -> Iterator[KernelSpec]:
    """Each option alone and all at once; those between need no more registers than all. fp16 is as bf16."""
    everything = {"softcap": True, "edge": True, "bias": True, "low_rank": True}
    for config in CONFIGS:
        plain = config is WIDE or config is TWIN  # see `config_for`
        for out in (True, False):
            if config is not NARROW:
                yield _spec(config, out=out)
                yield _spec(config, edge=True, out=out)
                yield _spec(config, edge=True, low_rank=True, out=out)
            if plain:
                continue
            yield _spec(config, bias=True, out=out)
            yield _spec(config, softcap=True, out=out)
            yield _spec(config, softcap=True, edge=True, low_rank=True, out=out)
            yield _spec(config, **everything, out=out)
            for options in ({}, everything):
                yield _spec(config, **options, out=out, flagged=True)
                if not out:
                    yield _spec(config, **options, out=out, flagged=True, max_only=True)


KERNELS = list(_specs())
