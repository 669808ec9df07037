"""Predicted times of rollouts: a step of decoding over slots, a whole `generate`, and transformers' engine."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from benchmarks.gpu.machine import Machine, Prediction, gemm, in_ms, stream
from benchmarks.gpu.predict_head import sample_tokens
from benchmarks.gpu.predict_update import (
    DECODING,
    JOINED_PRODUCTS,
    LAYERS,
    PRODUCTS,
    matrices,
    parameters,
    passes,
    products,
    shape_of,
)
from benchmarks.gpu.rollout import JOBS
from benchmarks.small_model import Shape
from fastgrpo.rollout.loop.burst import bucket
from fastgrpo.rollout.loop.slots import BURST

SPLIT_BELOW = 512
"""Rows times heads of keys, below which decode_attention splits paths and merges the pieces: its `PROGRAMS`."""

OUTSIDE = 26
"""Kernels of a step outside the layers, counted at PyTorch's dispatcher: embedding, rotary table, last norm, state."""

BURST_HOST, ROW_HOST, ROW_BEGUN = 1.4e-4, 3.5e-7, 7e-6
"""Seconds of the host while the device waits: between two bursts, more for each of their rows, and for a row to begin.
Measured on a core of an AMD EPYC, as TOKEN_LISTED and TOKEN_TEXT: `python -m benchmarks.rollout_host`."""

LAUNCH = 1e-4
"""Seconds besides, of a burst: its first launch, two copies back, the host that wakes; assumed."""

TOKEN_LISTED, TOKEN_TEXT = 1.8e-7, 6e-7
"""Seconds of the host for a token of a completion that has ended: into lists, into text. The device meanwhile decodes,
but for what ends with the last burst."""

CONTINUOUS_ROW, CONTINUOUS_OPERATORS = 8e-6, 1.3
"""Of transformers' continuous batching: the host's Python for a row of a step, and operators of a layer by ours (its
cache is written by operators of its own). It launches every kernel of a step anew; assumed."""


@dataclass(frozen=True)
class Path:
    """Tokens a row attends to: of its prompt, which `n` rows share, and its own."""

    prompt: int
    own: float
    n: int

    def once(self, rows: int) -> float:
        """Of so many rows, every prompt once."""
        return rows * self.own + ceil(rows / self.n) * self.prompt

    def all(self, rows: int) -> float:
        return rows * (self.own + self.prompt)


def kept_bytes(s: Shape) -> int:
    """Of a token's keys and values in bf16."""
    return 2 * 2 * s.layers * s.kv_heads * s.head_dim


def step_seconds(machine: Machine, s: Shape, rows: int, path: Path, fused: bool = True) -> dict[str, float]:
    """One token more for each of so many rows, as a replayed CUDA graph; a prompt's other rows read it from L2."""
    layers = DECODING if fused else LAYERS["eager"]
    kept = kept_bytes(s)
    split = rows * s.kv_heads < SPLIT_BELOW
    return {
        "small kernels": passes(machine, s, rows, layers)[0] + OUTSIDE * machine.node,
        "products": s.layers * sum(gemm(machine, rows, n, k) for n, k in matrices(s, joined=fused)),
        "head": gemm(machine, rows, s.vocabulary, s.width),
        "attention": stream(machine, path.once(rows) * kept, machine.decoding, s.layers * (1 + split))
        + (path.all(rows) - path.once(rows)) * kept / machine.l2,
        "sampling": sample_tokens(machine, rows, s.vocabulary),
    }


def limit_seconds(machine: Machine, s: Shape, rows: int, path: Path) -> float:
    """What the suite holds a step against."""
    weights, flop = 2 * parameters(s) / machine.copy, 2 * rows * parameters(s) / machine.gemm_rate
    return path.once(rows) * kept_bytes(s) / machine.copy + max(weights, flop)


def steady(machine: Machine, p: dict[str, Any], small: bool = False) -> Prediction:
    """A step of a full batch, against what must be read and multiplied."""
    s, job = shape_of(p["model"]), JOBS[small]
    path = Path(job.length, p["length"] - job.length, job.n)
    parts = step_seconds(machine, s, bucket(p["rows"]), path)
    return Prediction(in_ms(parts), 1e3 * limit_seconds(machine, s, p["rows"], path))


def mean_length(p: dict[str, Any]) -> float:
    """Of completions that end after each token with probability 1 / mean, and at the longest."""
    keep = 1 - 1 / p["mean"]
    return float((1 - keep ** p["longest"]) / (1 - keep))


def generate(machine: Machine, p: dict[str, Any], engine: str = "loop") -> Prediction:
    """All samples of all prompts at once, fewer and fewer of them alive; those that ended become text meanwhile."""
    s, rows, keep = shape_of(p["model"]), p["prompts"] * p["n"], 1 - 1 / p["mean"]
    parts = {"prompts": prompt_seconds(machine, s, p["prompts"] * p["length"])}
    for done in range(0, p["longest"], BURST):
        alive = max(1, round(rows * keep**done))
        path = Path(p["length"], done + BURST / 2, p["n"])
        step = step_seconds(machine, s, bucket(alive), path, fused=engine == "loop")
        device = sum(step.values())
        if engine == "transformers":
            step = continuous(machine, s, alive, device)
        else:
            put_off = (TOKEN_LISTED + TOKEN_TEXT) * ended_tokens(p, done - BURST)
            step["host"] = (LAUNCH + BURST_HOST + alive * ROW_HOST) / BURST + max(0.0, put_off / BURST - device)
        for name, seconds in step.items():
            parts[name] = parts.get(name, 0.0) + BURST * seconds
    if engine == "transformers":
        parts["text"] = TOKEN_TEXT * rows * mean_length(p)
    else:
        parts["host"] += rows * ROW_BEGUN
        parts["text"] = (TOKEN_LISTED + TOKEN_TEXT) * ended_tokens(p, done)
    return Prediction(in_ms(parts))


def ended_tokens(p: dict[str, Any], done: int) -> float:
    """Of the completions that end in the burst after so many tokens; in the last burst all do."""
    rows, keep = p["prompts"] * p["n"], 1 - 1 / p["mean"]
    if done < 0:
        return 0.0
    if done + BURST >= p["longest"]:
        return float(rows * keep**done * p["longest"])
    return float(rows * (keep**done - keep ** (done + BURST)) * (done + BURST / 2))


def continuous(machine: Machine, s: Shape, rows: int, device: float) -> dict[str, float]:
    """A step of transformers' engine with the same kernels: launched one by one, then Python for every row."""
    operators = CONTINUOUS_OPERATORS * s.layers * (LAYERS["eager"].kernels[0] + PRODUCTS)
    launches = operators * machine.host / 2  # without autograd an operator costs half
    return {"device": device, "launch gaps": max(0.0, launches - device), "rows' Python": rows * CONTINUOUS_ROW}


def prompt_seconds(machine: Machine, s: Shape, tokens: int) -> float:
    """The prompts' forward, all in one step; their attention is too short to matter."""
    device = products(machine, s, tokens)[0] + passes(machine, s, tokens, DECODING)[0]
    return max(device, s.layers * (DECODING.kernels[0] + JOINED_PRODUCTS) * machine.host)


def against_transformers(machine: Machine, p: dict[str, Any]) -> Prediction:
    """Tokens per second by ours over those of transformers' continuous batching."""
    return Prediction(ratio=generate(machine, p, "transformers").ms / generate(machine, p).ms)
