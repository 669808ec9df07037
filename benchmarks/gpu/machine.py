"""What a GPU does in a second, and what a matrix product, a pass over memory and an attention kernel so take.

All that the predictions know of the hardware. `H200` holds two measured figures; every other number is an assumption
with its reason beside it, and a measurement that misses a prediction says which one to correct. Times in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil


@dataclass(frozen=True)
class Machine:
    """A GPU, and what kernels reach on it. Seconds, bytes, FLOPs.

    gemm_rate: FLOP/s that long products tend to. peak: FLOP/s by the maker. copy: bytes/s of a copy, read + write.
    sms, clock: multiprocessors, Hz. l2: bytes/s from the second-level cache into shared memory.
    node: what a kernel costs besides its work: launch from a CUDA graph or a filled queue, ramp up and down.
    host: of the host, for an operator in eager PyTorch, autograd included.
    passes, eager, decoding: shares of the copy's bandwidth that our row kernels, PyTorch's elementwise kernels and
        decode_attention reach.
    attention: FLOP/s forward and backward of flash attention on full blocks, head size 128. masked: of attention that
        takes any mask.
    merge: bytes of a shared query's number while the outputs of two attention calls become one.
    epilogue: instructions a logit of the exponential in our GEMM.
    """

    name: str
    gemm_rate: float
    copy: float
    peak: float
    sms: int
    clock: float
    l2: float
    node: float
    host: float
    passes: float
    eager: float
    decoding: float
    attention: tuple[float, float]
    masked: float
    merge: int
    epilogue: int


H200 = Machine(
    name="H200",
    gemm_rate=795e12,  # 8192^3 in bf16 was measured at 770 to 800; with TILE_RAMP that shape comes out at 783
    copy=4.3e12,  # measured
    peak=989e12,  # dense bf16
    sms=132,
    clock=1.755e9,
    l2=8e12,  # assumed: 10.4 by width and clock; a 256 x 128 tile so comes to 85 % of cuBLAS
    node=2e-6,  # assumed: graph nodes follow one another in 1 to 1.5 us, an empty kernel takes about 1 us
    host=6e-6,  # assumed: 5 to 8 us under transformers' modules and autograd
    passes=0.88,  # assumed: between 0.85, which is required, and some 0.92 of the best streaming kernels
    eager=0.85,  # assumed: broadcasts, strided reads, short tails
    decoding=0.7,  # assumed: reads of scattered keys and values, 64 tokens a step
    attention=(330e12, 250e12),  # assumed: FlashAttention-2 on Hopper, as published for long causal sequences
    masked=130e12,  # assumed: torch's memory-efficient attention, all queries with all keys
    merge=6,  # both outputs read, one written; 30 in PyTorch's operators
    epilogue=10,  # counted: 1,300 instructions for 128 logits a thread, in sm_90's code of 256 x 128 tiles
)

TILE_RAMP = 128
"""A product's tile costs as much as this many more of its inner dimension: filling the pipeline, writing the tile."""

TILE_WIDTHS, SPLIT = (128, 192, 256), 1024
"""Columns of cuBLAS's tiles of 128 rows, of which it takes those that fill the GPU best; and what it cuts long inner
dimensions into."""

ATTENTION_BLOCK, SMALL_HEADS = 128, 0.65
"""Queries and keys of a block of flash attention; its rate at a head size of 64, of that at 128."""


@dataclass(frozen=True)
class Prediction:
    """parts: milliseconds by what they are spent on. limit: ms that the row's time is held against.

    ratio: of a row that compares two times; None = ms over limit. peak_bytes: as `Bench.peak_bytes` counts them.
    """

    parts: dict[str, float] = field(default_factory=dict)
    limit: float | None = None
    ratio: float | None = None
    peak_bytes: int | None = None

    @property
    def ms(self) -> float:
        return sum(self.parts.values())

    @property
    def compared(self) -> float | None:
        """The predicted ratio, None where the row has none."""
        return self.ms / self.limit if self.ratio is None and self.limit else self.ratio

    @property
    def largest(self) -> str:
        """The part that takes longest; empty where there is none."""
        return max(self.parts, key=lambda name: self.parts[name], default="")


def in_ms(seconds: dict[str, float]) -> dict[str, float]:
    """Parts without those that cost nothing."""
    return {name: 1e3 * value for name, value in seconds.items() if value}


def gemm(machine: Machine, m: int, n: int, k: int, out_bytes: int = 2) -> float:
    """[m, k] @ [k, n] of half numbers by cuBLAS: products or bytes, whichever takes longer, in whole waves of tiles."""
    splits = max(1, k // SPLIT)
    waves = [ceil(m / 128) * ceil(n / width) * splits / machine.sms for width in TILE_WIDTHS]
    rate = machine.gemm_rate * k / (k + TILE_RAMP) * max(w / ceil(w) for w in waves)
    moved = 2 * (m * k + k * n) + out_bytes * m * n
    return machine.node + max(2 * m * n * k / rate, moved / (machine.passes * machine.copy))


def exp_gemm(machine: Machine, m: int, n: int, k: int, block: tuple[int, int] = (256, 128), programs: int = 1) -> float:
    """Our GEMM with the exponential in its epilogue: persistent programs, each with whole tiles of `block`.

    A tile's products come as fast as the tensor cores or as L2 brings operands; its epilogue waits for them, unless
    another program on the multiprocessor fills the time.
    """
    BM, BN = block
    rate = min(machine.gemm_rate, machine.l2 * BM * BN / (BM + BN)) / machine.sms
    products = 2 * BM * BN * (k + TILE_RAMP) / rate
    epilogue = machine.epilogue * BM * BN / 128 / machine.clock
    tile = max(products, epilogue) if programs > 1 else products + epilogue
    return machine.node + ceil(ceil(m / BM) * ceil(n / BN) / machine.sms) * tile


def stream(machine: Machine, moved: float, share: float = 0.0, kernels: int = 1) -> float:
    """`kernels` passes that move so many bytes together, at a share of the copy's bandwidth: our row kernels' if 0."""
    return kernels * machine.node + moved / ((share or machine.passes) * machine.copy)


def causal_pairs(lengths: Sequence[int]) -> float:
    """Queries with keys that flash attention computes for causal sequences: whole blocks on the diagonal."""
    return float(sum((n := ceil(x / ATTENTION_BLOCK)) * (n + 1) // 2 for x in lengths) * ATTENTION_BLOCK**2)


def cross_pairs(queries: int, keys: int) -> float:
    """The same of all queries with all keys."""
    return float(ceil(queries / ATTENTION_BLOCK) * ceil(keys / ATTENTION_BLOCK) * ATTENTION_BLOCK**2)


def flash(machine: Machine, pairs: float, heads: int, size: int, *, backward: bool) -> float:
    """One flash-attention call: 4 FLOPs a pair, head and number forward, 10 backward."""
    rate, flop = (machine.attention[1], 10) if backward else (machine.attention[0], 4)
    return machine.node + flop * pairs * heads * size / (rate * min(1.0, SMALL_HEADS * size / 64))
