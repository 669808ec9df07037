"""Predicted times of the LM head: every schedule, the peers' heads, passes over logits, tiles, the small ops."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.machine import Machine, Prediction, exp_gemm, gemm, in_ms, stream
from fastgrpo_kernels.head.exp_gemm.config import CONFIGS, TILE_N
from fastgrpo_kernels.head.plan import ROW_TILE, HeadPlan, HeadProblem, even_windows, head_bytes, plan_head

DW_TRAFFIC = 8
"""Bytes of an element of the weight's gradient that a chunk reads and writes, fp32, besides its products."""

HOST_OP = 5
"""Operators that the host runs for one of an op's own: checks, views, allocations, autograd."""

PEERS = {
    # GEMMs of [N, D, V], their rate, bytes a logit, rows of a chunk that adds to dW (0: one product). By their code.
    "trl": (4, 1.0, 6, 4096),  # bf16 logits, recomputed; a pass forward, a pass back
    "liger": (4, 0.4, 90, 4096),  # eager, half of the GEMMs in fp32
    "cce": (5, 0.7, 0, 0),  # own GEMMs: forward, logits again for each of two gradients
    "torch": (3, 1.0, 24, 4096),
    "naive": (3, 1.0, 60, 0),  # fp32 copies of all logits
    "torch_compile": (3, 1.0, 22, 0),  # softmax and its backward fused, over fp32 logits
}


def problem(N: int, D: int, V: int, trainable: bool) -> HeadProblem:
    """Of a token-level loss on the GPU."""
    return HeadProblem(N, D, V, torch.bfloat16, trainable, True, False, "token", True, D % 8 == 0)


def plan(N: int, D: int, V: int, trainable: bool, schedule: str | None) -> HeadPlan:
    """What the op plans for it."""
    return plan_head(problem(N, D, V, trainable), None, None, schedule or "", watched=False)


def head_seconds(
    machine: Machine, N: int, D: int, V: int, trainable: bool, schedule: str | None = None
) -> tuple[dict[str, float], float]:
    """Loss and gradients of the fused head: seconds by part, and of the same plan's GEMMs by cuBLAS alone."""
    made = plan(N, D, V, trainable, schedule)
    chunks = [w.stop - w.start for w in even_windows(N, made.chunk_rows, ROW_TILE)]
    parts = dict.fromkeys(("logits", "passes", "dH", "dW", "dW traffic", "vectors", "host"), 0.0)
    limit = 0.0
    for i, rows in enumerate(chunks):
        ours, cublas = _logits(machine, made, rows, D, V)
        grad_hidden = gemm(machine, rows, D, V, out_bytes=4)
        grad_weight = gemm(machine, V, D, rows, out_bytes=4) if trainable else 0.0
        traffic = DW_TRAFFIC * V * D / (machine.passes * machine.copy) if trainable and i else 0.0
        parts["logits"] += ours
        parts["passes"] += _passes(machine, made.method, rows, V)
        parts["dH"], parts["dW"] = parts["dH"] + grad_hidden, parts["dW"] + grad_weight
        parts["dW traffic"] += traffic
        limit += cublas + grad_hidden + grad_weight + traffic
        if made.schedule == "recomputed":
            parts["recomputed"] = parts.get("recomputed", 0.0) + ours + _statistics(machine, made.method, rows, V)
    # Factors times h and dH, then each gradient times the upstream one, from fp32 to bf16.
    parts["vectors"] = stream(machine, N * D * (4 + 8 + 6) + trainable * 6 * V * D, kernels=3 * len(chunks) + 2)
    device = sum(parts.values())
    parts["host"] = max(0.0, HOST_OP * (10 * len(made.windows) + 10) * machine.host - device)
    return parts, limit


def _logits(machine: Machine, made: HeadPlan, rows: int, D: int, V: int) -> tuple[float, float]:
    """A chunk's first product: ours, and cuBLAS's with the same results."""
    if made.method == "epilogue":
        return exp_gemm(machine, rows, V, D), gemm(machine, rows, V, D)
    step = made.logit_rows or rows
    parts = [min(step, rows - a) for a in range(0, rows, step)]
    time = sum(gemm(machine, part, V, D, out_bytes=4) for part in parts)
    return time, time


def _passes(machine: Machine, method: str, rows: int, V: int) -> float:
    """From logits to gradient rows: bytes a logit."""
    if method == "epilogue":  # sums and moments of tiles, written and read; the rescue's two looks at the flags
        return stream(machine, 16 * rows * V / TILE_N, kernels=6)
    return stream(machine, (6 if method == "single_read" else 10) * rows * V, kernels=1)


def _statistics(machine: Machine, method: str, rows: int, V: int) -> float:
    return 0.0 if method == "epilogue" else stream(machine, 4 * rows * V)


def head(machine: Machine, p: dict[str, Any]) -> Prediction:
    """A row of the stage `head`."""
    case = p["N"], p["D"], p["V"], p["trainable"], p.get("schedule")
    parts, limit = head_seconds(machine, *case)
    return Prediction(in_ms(parts), 1e3 * limit, peak_bytes=peak_bytes(*case))


def peak_bytes(N: int, D: int, V: int, trainable: bool, schedule: str | None = None) -> int:
    """Beyond the inputs and the gradients that are returned, by the planner's own formula."""
    return head_bytes(problem(N, D, V, trainable), plan(N, D, V, trainable, schedule)) - 2 * (N + trainable * V) * D


def head_gemms(machine: Machine, p: dict[str, Any]) -> Prediction:
    """A row of `limits`: a plan's GEMMs alone."""
    _, limit = head_seconds(machine, p["N"], p["D"], p["V"], p["trainable"], p["method"])
    return Prediction({"GEMMs": 1e3 * limit})


def peer(machine: Machine, name: str, p: dict[str, Any]) -> Prediction:
    """Another head on the same inputs."""
    N, D, V = p["N"], p["D"], p["V"]
    gemms, rate, per_logit, chunk = PEERS[name]
    times = [gemm(machine, N, V, D), gemm(machine, N, D, V), gemm(machine, V, D, N)]
    traffic = DW_TRAFFIC * V * D * (N // chunk - 1) / (machine.passes * machine.copy) if chunk else 0.0
    products = sum(times) * gemms / 3 / rate
    return Prediction(
        in_ms({"GEMMs": products, "passes": stream(machine, per_logit * N * V, machine.eager), "dW traffic": traffic})
    )


def against_peer(machine: Machine, name: str, p: dict[str, Any]) -> Prediction:
    """The peer's time over ours."""
    return Prediction(ratio=peer(machine, name, p).ms / head(machine, p).ms)


def token_logprob(machine: Machine, p: dict[str, Any], *, backward: bool) -> Prediction:
    """A pass over fp32 logits; back, one that writes their gradient, too."""
    return _pass(machine, (8 if backward else 4) * p["N"] * p["V"])


def single_read(machine: Machine, p: dict[str, Any]) -> Prediction:
    return _pass(machine, 6 * p["N"] * p["V"])


def _pass(machine: Machine, moved: int) -> Prediction:
    return Prediction({"bytes": 1e3 * stream(machine, moved)}, 1e3 * moved / machine.copy)


def tile(machine: Machine, p: dict[str, Any]) -> Prediction:
    """A configuration of the epilogue's GEMM; without one, cuBLAS."""
    limit = gemm(machine, p["C"], p["V"], p["D"])
    config = next((c for c in CONFIGS if repr(c) == p.get("config")), None)
    if config is None:
        return Prediction({"GEMM": 1e3 * limit})
    ours = exp_gemm(machine, p["C"], p["V"], p["D"], (config.BM, TILE_N), config.programs_per_sm)
    return Prediction({"GEMM": 1e3 * ours}, 1e3 * limit)


SMALL_OPS = {
    "gae": (1, 20),
    "group_advantages": (1, 16),
    "grpo_loss": (6, 40),
    "add_rms_norm": (1, 4 * 2 * 896),
    "rotate_heads": (1, 2 * (2 * 16 + 2) * 64),
    "swiglu": (1, 3 * 2 * 4864),
    "add_rms_norm_backward": (2, 4 * 2 * 896 + 8 * 896 // 16),  # fp32 sums of 16 tokens, written and read
    "rotate_heads_backward": (1, 2 * (2 * 16 + 2) * 64),
    "swiglu_backward": (1, 5 * 2 * 4864),
}
"""Operators that the host runs, times `HOST_OP`; bytes a token, of a layer's ops in bf16 at Qwen2.5-0.5B's sizes."""


def small_op(machine: Machine, op: str, p: dict[str, Any]) -> Prediction:
    """The host's time and the device's come one after the other in a single call: its event waits for both."""
    operators, per_token = SMALL_OPS[op]
    return Prediction(in_ms({"host": HOST_OP * operators * machine.host, "bytes": stream(machine, per_token * p["N"])}))


def sample_tokens(machine: Machine, rows: int, V: int) -> float:
    """Seconds without filters: bf16 logits once, and a chunk of each row a second time."""
    return stream(machine, 2 * rows * (V + 4096), kernels=2)
