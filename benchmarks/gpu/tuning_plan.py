"""The tuning plan: what could be tried, ordered by the share of time it is predicted to save, and what would refute it.

Each candidate is a case of the suite as it is, beside the same case with one number of the model changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from benchmarks.gpu import predict_head, predict_rollout, predict_update
from benchmarks.gpu.machine import H200, Machine, exp_gemm, stream
from benchmarks.gpu.predict_rollout import Path
from benchmarks.gpu.predict_update import layouts, shape_of, workload
from fastgrpo_kernels import PackedLayout
from fastgrpo_kernels.head.exp_gemm.config import WIDE
from fastgrpo_kernels.head.plan import ROW_TILE, even_windows

_SMALL, _LARGE = "qwen2.5-0.5b", "qwen2.5-1.5b"


@dataclass(frozen=True)
class Candidate:
    """What is tried, in which case, its predicted seconds before and after, and what would refute them."""

    name: str
    case: str
    before: float
    after: float
    refuted: str

    @property
    def saved(self) -> float:
        """The share of the time."""
        return 1 - self.after / self.before


def candidates() -> list[Candidate]:
    """The largest share first."""
    return sorted([*_update(), *_decoding(), *_head()], key=lambda c: c.saved, reverse=True)


def _changed(name: str, case: str, time: Callable[[Machine], float], refuted: str, **numbers: Any) -> Candidate:
    """A case on a machine of which some numbers are others."""
    return Candidate(name, case, time(H200), time(replace(H200, **numbers)), refuted)


def _update() -> Iterator[Candidate]:
    for model, lengths, prompts in ((_SMALL, "prompt1024", 16), (_LARGE, "gsm8k", 16)):
        s, work, case = shape_of(model), workload(lengths, prompts, False), f"update, {model}, {lengths}"

        def step(machine: Machine = H200, body: str = "fused", budget: int = 0, s: Any = s, work: Any = work) -> float:
            return sum(predict_update.step_seconds(machine, s, layouts(s, work, budget=budget), body).values())

        refuted = "a trace whose elementwise kernels take less than 70 % of the predicted time (L2 would serve them)"
        yield Candidate("layers fused (the default)", case, step(body="eager"), step(), refuted)
        yield Candidate("layers compiled: `torch_compile`", case, step(), step(body="torch_compile"), refuted)
        refuted = "gradient sums below half of their prediction; or memory runs out"
        yield Candidate("micro-batches of 32k tokens in place of 16k", case, step(), step(budget=32768), refuted)
        refuted = "FlashAttention-3 less than 1.2 x as fast as torch's kernels on `attention`'s rows"
        faster = tuple(1.5 * rate for rate in H200.attention)
        yield _changed("FlashAttention-3, where it is installed", case, step, refuted, attention=faster)
    s, few = shape_of(_SMALL), PackedLayout([128], [[112] * 8])
    parts = predict_update.micro_batch(H200, s, few, "fused", 0.0)
    case, refuted = f"micro-batch of 1k tokens, {_SMALL}", "no idle device in a trace of 1k tokens"
    whole = sum(parts.values())
    yield Candidate(
        "no launch gaps: larger micro-batches, or graphs", case, whole, whole - parts["launch gaps"], refuted
    )


def _rotations(s: Any, rows: int) -> float:
    """Seconds of a layer's rotate_heads."""
    return stream(H200, 4 * rows * (s.heads + s.kv_heads) * s.head_dim, H200.eager)


def _decoding() -> Iterator[Candidate]:
    for model, rows, path in ((_SMALL, 512, Path(128, 256, 16)), (_LARGE, 1024, Path(128, 512, 16))):
        s, case = shape_of(model), f"decoding, {model}, {rows} rows"

        def step(machine: Machine = H200, fused: bool = True, s: Any = s, rows: int = rows, path: Path = path) -> float:
            return sum(predict_rollout.step_seconds(machine, s, rows, path, fused).values())

        refuted = "small kernels that follow one another in less than 1 us each in a graph's trace"
        yield Candidate("layers in 4 products and 4 kernels (the default)", case, step(fused=False), step(), refuted)
        refuted = "rotate_heads below 1.5 us in a graph's trace"
        after = step() - s.layers * _rotations(s, rows)
        yield Candidate("rotate queries and keys inside decode_attention", case, step(), after, refuted)
        refuted = "no kernel that starts before the one ahead of it has ended, in a trace"
        sooner = {"node": H200.node / 2}
        yield _changed("launches that overlap the kernel before (PDL)", case, step, refuted, **sooner)
        refuted = "no configuration of the stage `sweep` above 80 % of the copy's bandwidth"
        yield _changed("decode_attention at 85 % of a copy: block, warps, stages", case, step, refuted, decoding=0.85)


def _head() -> Iterator[Candidate]:
    N, D, V = 32768, 896, 151936
    case = f"head, D={D}, trainable"

    def head(m: Machine, D: int = D, V: int = V, trainable: bool = True, schedule: str | None = None) -> float:
        return sum(predict_head.head_seconds(m, N, D, V, trainable, schedule)[0].values())

    refuted = "exp_gemm at D = 896 above 90 % of cuBLAS as it is"
    yield _changed("the epilogue behind the next tile's products", case, head, refuted, epilogue=0)
    refuted = "a tile configuration of `passes` at D = 4096 above 92 % of cuBLAS: L2 is no limit"
    yield _changed("operands shared by two blocks of a cluster: L2 no limit", case, head, refuted, l2=16e12)
    one, two, ours = (head(H200, 4096, 128256, True, x) for x in ("single_read", "two_read", "epilogue"))
    case, refuted = "head, D=4096, trainable", "the schedule `epilogue` faster than `single_read` in `head`'s rows"
    yield Candidate("one read of the logits, not our GEMM (the default)", case, ours, one, refuted)
    yield Candidate(
        "one read of the logits, not two (the default)", case, two, one, "`two_read` within 1 % of `single_read`"
    )
    parts, _ = predict_head.head_seconds(H200, N, 4096, 128256, True)
    chunks = len(even_windows(N, predict_head.plan(N, 4096, 128256, True, None).chunk_rows, ROW_TILE))
    after = sum(parts.values()) - parts["dW traffic"] / (chunks - 1) * (chunks - ceil(chunks / 2))
    refuted = "chunks of 6 GiB no faster than of 3 GiB: cuBLAS hides the traffic"
    yield Candidate("chunks twice as large (3 GiB more)", case, sum(parts.values()), after, refuted)
    D, V, case = 2048, 151936, "head, D=2048, frozen"
    before, made = head(H200, D, V, False), predict_head.plan(N, D, V, False, None)
    whole = made.chunk_rows // WIDE.BM * WIDE.BM
    windows = (even_windows(N, rows, tile) for rows, tile in ((made.chunk_rows, ROW_TILE), (whole, WIDE.BM)))
    now, then = (sum(exp_gemm(H200, w.stop - w.start, V, D) for w in found) for found in windows)
    refuted = "no step in the time of exp_gemm between 1,536 and 1,664 rows"
    yield Candidate("windows of whole 256-row tiles", case, before, before - now + then, refuted)


def plan_rows() -> list[list[str]]:
    """The table's cells, its header first."""
    rows = [["try", "where", "ms now", "ms then", "saved", "refuted by"]]
    rows += [
        [c.name, c.case, f"{1e3 * c.before:.4g}", f"{1e3 * c.after:.4g}", f"{c.saved:.1%}", c.refuted]
        for c in candidates()
    ]
    return rows
