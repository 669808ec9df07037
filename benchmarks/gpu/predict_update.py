"""Predicted times of the update: the layers' products and passes, attention, the head, the optimizer, the host.

The workloads are the suite's own, packed by the trainer's packing: tokens, lengths and micro-batches are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.machine import (
    Machine,
    Prediction,
    causal_pairs,
    cross_pairs,
    flash,
    gemm,
    in_ms,
    stream,
)
from benchmarks.gpu.predict_head import DW_TRAFFIC, head_seconds, peer
from benchmarks.gpu.update import GROWTH, MFU_BUDGET
from benchmarks.gpu.update_cases import Workload, gsm8k, long_prompts, rollouts, shapes
from benchmarks.small_model import Shape
from fastgrpo.config import GRPOConfig
from fastgrpo.packing import pack
from fastgrpo.records import Rollout, Work
from fastgrpo_kernels import PackedLayout


@dataclass(frozen=True)
class Layers:
    """How a layer's passes are computed: bytes of a token by width, MLP, heads (of queries and keys together), and
    kernels, forward and backward; products and attention not counted."""

    forward: tuple[int, int, int]
    backward: tuple[int, int, int]
    kernels: tuple[int, int]


LAYERS = {
    # Counted at PyTorch's dispatcher: tests/test_predictions.py. transformers' Qwen2 in bf16.
    "eager": Layers((84, 10, 20), (213, 18, 36), (30, 59)),
    # Ours, counted likewise: add_rms_norm twice, rotate_heads, swiglu, and the residual behind the MLP.
    "fused": Layers((18, 6, 4), (20, 10, 7), (5, 8)),
    # Of ideal fusion: every tensor that a product reads or writes, once more; norms, RoPE and SwiGLU in a kernel each.
    "torch_compile": Layers((12, 6, 4), (24, 12, 4), (5, 8)),
    "liger": Layers((20, 6, 4), (46, 10, 6), (8, 20)),  # residuals and sums of gradients stay PyTorch's
}
DECODING = Layers((16, 6, 4), (0, 0, 0), (4, 0))
"""Of rollouts: add_rms_norm twice, rotate_heads, swiglu."""

PRODUCTS, JOINED_PRODUCTS = 7, 4
"""Of a layer: queries, keys, values, output, gate, up, down; those of one input as one."""

ACCUMULATE, STEP = 10, 50
"""Bytes of a parameter: its bf16 gradient into the fp32 sum, in each micro-batch; zeros, norm, clipping, AdamW and the
copy to bf16, once. By `fastgrpo.optim`."""

PACK_FIRST = 0.005
"""Seconds until the first micro-batch is packed, 82,000 tokens of 512 rollouts on a CPU core of 2026."""

BACKWARD_BYTES = 26
"""Of a query's number in flash attention's backward, besides its blocks: sums of dq in fp32, zeros before and rounding
after; gradients of keys and values for each head of queries, then added up."""

MERGE_GRADIENTS = 6
"""Bytes of a shared query's number: two gradients added."""


def matrices(s: Shape, joined: bool = False) -> list[tuple[int, int]]:
    """[out, in] of a layer's weights. joined: those of one input as one."""
    q, k, D, F = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.width, s.feed_forward
    if joined:
        return [(q + 2 * k, D), (D, q), (2 * F, D), (D, F)]
    return [(q, D), (k, D), (k, D), (D, q), (F, D), (F, D), (D, F)]


def parameters(s: Shape) -> int:
    """Of Qwen2 with a tied head, but for norms and biases."""
    return s.layers * sum(n * k for n, k in matrices(s)) + s.vocabulary * s.width


def work_of(s: Shape) -> Work:
    """As `fastgrpo.policy.work` finds it in the model."""
    attention = ((None, 4.0 * s.layers * s.heads * s.head_dim),)
    return Work(2.0 * (parameters(s) - s.vocabulary * s.width), 2.0 * s.vocabulary * s.width, attention)


def products(machine: Machine, s: Shape, T: int) -> tuple[float, float]:
    """Seconds of all layers' matrix products for T tokens, forward and backward."""
    forward = sum(gemm(machine, T, n, k) for n, k in matrices(s))
    backward = sum(gemm(machine, T, k, n) + gemm(machine, n, k, T) for n, k in matrices(s))
    return s.layers * forward, s.layers * backward


def passes(machine: Machine, s: Shape, T: int, layers: Layers) -> tuple[float, float]:
    """Seconds of all else in the layers, but attention."""
    sizes = (s.width, s.feed_forward, (s.heads + s.kv_heads) * s.head_dim)
    found = []
    for each, kernels in zip((layers.forward, layers.backward), layers.kernels, strict=True):
        moved = T * sum(a * b for a, b in zip(each, sizes, strict=True))
        found.append(s.layers * stream(machine, moved, machine.eager, kernels))
    return found[0], found[1]


def attention(machine: Machine, heads: int, size: int, layout: PackedLayout) -> tuple[float, float]:
    """Seconds of one layer's attention, forward and backward; shared prompts: two calls and their merge."""
    ranges = layout.attention
    own = causal_pairs(ranges.cu_self.diff().tolist())
    extra = stream(machine, BACKWARD_BYTES * layout.num_tokens * heads * size, machine.eager, kernels=3)
    forward, backward = (flash(machine, own, heads, size, backward=back) for back in (False, True))
    backward += extra
    if ranges.num_queries:
        bounds = zip(ranges.cu_query.diff().tolist(), ranges.cu_key.diff().tolist(), strict=True)
        shared, numbers = sum(cross_pairs(q, k) for q, k in bounds), ranges.num_queries * heads * size
        forward += flash(machine, shared, heads, size, backward=False)
        forward += stream(machine, machine.merge * numbers, machine.passes, kernels=1)
        backward += flash(machine, shared, heads, size, backward=True)
        backward += stream(machine, (BACKWARD_BYTES + MERGE_GRADIENTS) * numbers, machine.eager, kernels=7)
    return forward, backward


def body_seconds(
    machine: Machine, s: Shape, layout: PackedLayout, body: str = "fused", recomputed: float = 0.0
) -> dict[str, float]:
    """Forward and backward of the layers for a micro-batch. recomputed: the share of the forward done once more."""
    T, again = layout.num_tokens, 1 + recomputed
    kinds = {"products": products(machine, s, T), "layer passes": passes(machine, s, T, LAYERS[body])}
    one = attention(machine, s.heads, s.head_dim, layout)
    kinds["attention"] = (s.layers * one[0], s.layers * one[1])
    return {name: again * forward + backward for name, (forward, backward) in kinds.items()}


def host_seconds(machine: Machine, s: Shape, body: str, recomputed: float = 0.0) -> float:
    """The host's time for a micro-batch: operators of the layers, forward and back, and a hook per parameter."""
    forward, backward = LAYERS[body].kernels
    operators = (1 + recomputed) * (forward + PRODUCTS + 8) + backward + 2 * PRODUCTS + 8 + 2 * 12
    return s.layers * operators * machine.host


def micro_batch(machine: Machine, s: Shape, layout: PackedLayout, body: str, recomputed: float) -> dict[str, float]:
    """All of a micro-batch, up to its gradients in the sum."""
    parts = body_seconds(machine, s, layout, body, recomputed)
    head, _ = head_seconds(machine, layout.num_completion_tokens, s.width, s.vocabulary, trainable=True)
    parts["head"] = sum(head.values())
    # The embedding's own dense gradient: zeros, then added to the head's.
    moved = ACCUMULATE * parameters(s) + DW_TRAFFIC * s.vocabulary * s.width
    parts["gradient sums"] = stream(machine, moved, machine.eager, kernels=24 * s.layers)
    parts["launch gaps"] = max(0.0, host_seconds(machine, s, body, recomputed) - sum(parts.values()))
    return parts


def step_seconds(
    machine: Machine,
    s: Shape,
    layouts: list[PackedLayout],
    body: str = "fused",
    recomputed: float = 0.0,
    optimizer: float = STEP,
) -> dict[str, float]:
    """`Updater.step`, packing and optimizer included. optimizer: bytes of a parameter that it moves."""
    total: dict[str, float] = {}
    for layout in layouts:
        for name, seconds in micro_batch(machine, s, layout, body, recomputed).items():
            total[name] = total.get(name, 0.0) + seconds
    total["optimizer"] = stream(machine, optimizer * parameters(s), machine.eager, kernels=20)
    total["packing"] = PACK_FIRST * sum(x.num_tokens for x in layouts) / 82_000
    return total


def _bench(small: bool) -> Bench:
    return Bench("predictions", Path(), torch.device("cuda"), small)


@cache
def shape_of(name: str) -> Shape:
    return next(s for small in (False, True) for s in shapes(_bench(small)) if s.name == name)


@cache
def workload(lengths: str, prompts: int, small: bool) -> Workload:
    """The suite's, by the name that its rows give."""
    return {"gsm8k": gsm8k, "prompt1024": long_prompts}[lengths](_bench(small), prompts)


@cache
def layouts(s: Shape, work: Workload, dead: int = 0, share: bool = True, budget: int = 0) -> list[PackedLayout]:
    """The micro-batches that the updater makes of the rollouts, those without an advantage left out."""
    chosen: list[Rollout] = [r for r in rollouts(s, work, dead) if r.advantage]
    budget = budget or GRPOConfig().max_tokens_per_microbatch
    return [b.layout for b in pack(chosen, max_tokens=budget, share=share, work=work_of(s))]


def _case(p: dict[str, Any], small: bool) -> tuple[Shape, Workload]:
    return shape_of(p["model"]), workload(p["lengths"], p["prompts"], small)


def ours(machine: Machine, p: dict[str, Any], small: bool = False, body: str = "fused") -> Prediction:
    """Rows `update` and `body` of this trainer, and `checkpointing`."""
    s, work = _case(p, small)
    body, every = p.get("body", body), p.get("every")
    budget = MFU_BUDGET if "body" in p else 0 if every is None else 2 * MFU_BUDGET
    made = layouts(s, work, p.get("dead", 0), budget=budget)
    again = -(-s.layers // every) / s.layers if every else 0.0
    return Prediction(in_ms(step_seconds(machine, s, made, body, again)))


def trl(machine: Machine, p: dict[str, Any], small: bool = False) -> Prediction:
    """TRL's loss and backward: every sequence padded to the longest prompt and completion, attention over a mask."""
    s, work = _case(p, small)
    layers = {"transformers": "eager"}.get(p["layers"], p["layers"])
    longest = max(max(g) for x in layouts(s, work) for g in x.completion_lengths)
    length, rows = work.prompt[1] + longest, min(work.count, 2 * work.n)
    T = rows * length
    scored, batches = rows * longest, work.count / rows
    pairs = 14 * rows * length**2 * s.heads * s.head_dim
    head = peer(machine, "trl", {"N": scored, "D": s.width, "V": s.vocabulary}).ms / 1e3
    parts = {
        "products": sum(products(machine, s, T)),
        "layer passes": sum(passes(machine, s, T, LAYERS[layers])),
        "attention": s.layers * pairs / machine.masked,
        "head": head,
        "gradient sums": stream(machine, 6 * parameters(s), machine.eager, 12 * s.layers),
    }
    parts["launch gaps"] = max(0.0, host_seconds(machine, s, layers) - sum(parts.values()))
    return Prediction(in_ms({name: batches * seconds for name, seconds in parts.items()}))


def against_trl(machine: Machine, p: dict[str, Any], small: bool = False, body: str = "fused") -> Prediction:
    """TRL's time over ours, in the faster of its forms."""
    best = min(trl(machine, {**p, "layers": layers}, small).ms for layers in ("transformers", "liger"))
    return Prediction(ratio=best / ours(machine, p, small, body).ms)


def dead_groups(machine: Machine, p: dict[str, Any], small: bool = False, body: str = "fused") -> Prediction:
    alive, half = (ours(machine, {**p, "dead": dead}, small, body).ms for dead in (0, p["prompts"] // 2))
    return Prediction(ratio=alive / half)


def sharing(machine: Machine, p: dict[str, Any], small: bool = False, body: str = "fused") -> tuple[Prediction, float]:
    """The layers with prompts shared, the ratio of their time with prompts repeated, and that of the tokens."""
    s, work = _case(p, small)
    times, tokens = [], []
    for share in (True, False):
        made = layouts(s, work, share=share)
        tokens.append(sum(x.num_tokens for x in made))
        parts: dict[str, float] = {}
        for x in made:
            one = body_seconds(machine, s, x, body)
            one["launch gaps"] = max(0.0, host_seconds(machine, s, body) - sum(one.values()))
            parts = {name: parts.get(name, 0.0) + seconds for name, seconds in one.items()}
        times.append(Prediction(in_ms(parts)))
    return Prediction(times[0].parts, ratio=times[1].ms / times[0].ms), tokens[1] / tokens[0]


def mfu(machine: Machine, p: dict[str, Any], small: bool = False) -> Prediction:
    """6 x parameters FLOPs of each computed token, by the peak, with the layers of `body`."""
    s, work = _case(p, small)
    step = ours(machine, p, small)
    tokens = sum(x.num_tokens for x in layouts(s, work, budget=MFU_BUDGET))
    return Prediction(step.parts, ratio=6 * parameters(s) * tokens / (step.ms / 1e3) / machine.peak)


def growth(machine: Machine, p: dict[str, Any], small: bool = False) -> Prediction:
    """The step without its optimizer for so many tokens; without a number, the extremes' time per token compared."""
    s, (prompt, completion, groups) = shape_of(p["model"]), GROWTH[small]
    if "tokens" not in p:
        sizes = [p["budget"] << i for i in (0, 4)]
        first, last = (growth(machine, {**p, "tokens": size}, small).ms / size for size in sizes)
        return Prediction(ratio=max(first, last) / min(first, last))
    full = PackedLayout([prompt] * groups, [[completion] * 8] * groups)
    norm = 4  # bytes of a parameter
    return Prediction(in_ms(step_seconds(machine, s, [full] * (p["tokens"] // full.num_tokens), optimizer=norm)))
