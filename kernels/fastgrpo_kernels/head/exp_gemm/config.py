"""The tiles of the LM head's GEMM, and what it takes: all that a planner asks before any launch, without triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

TILE_N = 128
"""Columns of a tile, whatever the configuration: the width over which S and U are summed."""

PARTS = 4
"""Parts into which the epilogue cuts a tile's columns."""

Mode = Literal["statistics", "exp", "max", "rescue"]
_BIAS_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class TileConfig:
    """Tiles of BM x TILE_N, BK deep, taken by row blocks in groups of GROUP_M; TMA: operands come by descriptors."""

    BM: int
    BK: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    archs: tuple[str, ...]
    TMA: bool = True
    programs_per_sm: int = 1

    @property
    def constexprs(self) -> dict[str, Any]:
        return {"BM": self.BM, "BK": self.BK, "TMA": self.TMA}


_TMA_ARCHS = ("sm_90", "sm_100")
WIDE = TileConfig(BM=256, BK=64, GROUP_M=8, num_warps=8, num_stages=4, archs=_TMA_ARCHS)
TWIN = TileConfig(BM=128, BK=64, GROUP_M=16, num_warps=4, num_stages=3, archs=_TMA_ARCHS, programs_per_sm=2)
NARROW = TileConfig(BM=128, BK=64, GROUP_M=16, num_warps=8, num_stages=3, archs=_TMA_ARCHS)
POINTERS = TileConfig(BM=128, BK=32, GROUP_M=16, num_warps=8, num_stages=4, archs=("sm_80",), TMA=False)
POINTERS_AMD = TileConfig(BM=128, BK=64, GROUP_M=16, num_warps=8, num_stages=2, archs=("gfx942",), TMA=False)
CONFIGS = (WIDE, TWIN, NARROW, POINTERS, POINTERS_AMD)


def num_tiles(vocab_size: int) -> int:
    """Column tiles of a vocabulary: the rows of `sums` and `moments`."""
    return -(-vocab_size // TILE_N)


def config_for(
    capability: tuple[int, int] | None,
    num_rows: int,
    hidden_size: int,
    *,
    bias: bool = False,
    softcap: bool = False,
    flagged: bool = False,
) -> TileConfig:
    """The tiles for a device's compute capability, None for AMD. An estimate: no GPU has timed the choice.

    WIDE moves the fewest bytes from L2 for its arithmetic, what limits these GEMMs on sm_90; TWIN's two programs an SM
    hide one's epilogue behind the other's products, which pays where rows are short or few. With a bias or a
    softcap both spill registers in some variants. sm_8x and sm_12x have too little shared memory, or no TMA, for these.
    """
    if capability is None:
        return POINTERS_AMD
    if capability[0] not in (9, 10):
        return POINTERS
    if bias or softcap or flagged:
        return NARROW
    return WIDE if num_rows > TWIN.BM and hidden_size >= 512 else TWIN


def supports(hidden: Tensor, weight: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> bool:
    """Whether the operands suit: one half dtype, columns side by side, rows that begin at multiples of 16 bytes."""
    operands = (hidden, weight, *(low_rank or ()))
    return hidden.dtype in (torch.bfloat16, torch.float16) and all(
        x.ndim == 2
        and x.dtype == hidden.dtype
        and x.shape[1] > 0
        and x.stride(1) == 1
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        for x in operands
    )


def check(
    hidden: Tensor,
    weight: Tensor,
    shift: Tensor,
    sums: Tensor,
    moments: Tensor,
    mode: str,
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    out: Tensor | None,
    flags: Tensor | None,
) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
    if not supports(hidden, weight, low_rank):
        raise ValueError("hidden, weight, low_rank: expected bf16 or fp16 with rows at multiples of 16 bytes")
    (C, D), V = hidden.shape, weight.shape[0]
    if weight.shape[1] != D or V == 0:
        raise ValueError(f"weight: expected shape [V, {D}] with V > 0, got {list(weight.shape)}")
    if mode != "rescue" and (out is not None) != (mode == "exp"):
        raise ValueError(f"out: mode {mode!r} {'needs' if mode == 'exp' else 'takes no'} out")
    if (flags is not None) != (mode in ("max", "rescue")):
        raise ValueError(f"flags: mode {mode!r} {'needs' if flags is None else 'takes no'} flags")
    if out is not None and hidden.dtype != torch.bfloat16:
        raise ValueError(f"hidden: expected bfloat16 where E is written, got {hidden.dtype}")
    vectors: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype | None]] = {
        "shift": (shift, (C,), torch.float32),
        "sums": (sums, (num_tiles(V), C), torch.float32),
        "moments": (moments, (num_tiles(V), C), torch.float32),
        "bias": (bias, (V,), None),
        "flags": (flags, (C,), torch.int32),
    }
    for name, (x, shape, dtype) in vectors.items():
        if x is None:
            continue
        if x.shape != shape or not x.is_contiguous() or x.dtype not in ((dtype,) if dtype else _BIAS_DTYPES):
            raise ValueError(
                f"{name}: expected {dtype or 'half or float'} {list(shape)}, contiguous, got {x.dtype} {list(x.shape)}"
            )
    if low_rank is not None:
        r = low_rank[0].shape[1]
        if r % 8 or low_rank[0].shape != (C, r) or low_rank[1].shape != (V, r):
            raise ValueError(
                f"low_rank: expected [{C}, r] and [{V}, r] with r % 8 == 0, got {[list(x.shape) for x in low_rank]}"
            )
    if out is not None and not (
        out.shape == (C, V)
        and out.dtype == torch.bfloat16
        and out.stride(1) == 1
        and out.stride(0) % 64 == 0
        and out.data_ptr() % 16 == 0
    ):
        raise ValueError(
            f"out: expected bfloat16 [{C}, {V}], rows apart by a multiple of 64 elements, at multiples of "
            f"16 bytes, got {out.dtype} {list(out.shape)} with strides {out.stride()}"
        )
