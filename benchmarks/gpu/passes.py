"""The stages `passes` and `small_ops`: kernels bound by memory, the tiles of the head's GEMM, and the small ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.limits import measured, mm, sizes
from fastgrpo_kernels import (
    add_rms_norm,
    gae,
    group_advantages,
    grpo_loss,
    rotate_heads,
    swiglu,
    token_logprob,
)

MUST_SHARE = 0.85
"""Of the copy bandwidth."""


def passes(bench: Bench) -> None:
    """GB/s of passes over fp32 logits, V = 151,936; then TFLOP/s of each tile configuration of the epilogue's GEMM."""
    N, V = (64, 520) if bench.small else (4096, 151936)
    params, device = {"N": N, "V": V}, bench.device
    logits = torch.randn(N, V, device=device)
    target = torch.randint(V, (N,), device=device)
    matrix = logits.numel() * logits.element_size()
    forward = partial(token_logprob, logits, target)
    bench.attempt("forward", "token_logprob", "fastgrpo", params, partial(_bandwidth, bench, forward, matrix))
    leaf = logits.detach().requires_grad_()
    logprob, _ = token_logprob(leaf, target)
    total = logprob.sum()

    backward = partial(torch.autograd.grad, total, leaf, retain_graph=True)
    bench.attempt("backward", "token_logprob", "fastgrpo", params, partial(_bandwidth, bench, backward, 2 * matrix))
    if device.type != "cuda":
        return  # what follows exists as Triton kernels only
    bench.attempt("single_read", "head", "fastgrpo", params, partial(_single_read, bench, logits, target))
    del leaf, logprob, total, forward, backward
    for D, vocab in sizes(bench):
        _tiles(bench, D, vocab)


def _bandwidth(bench: Bench, run: Callable[[], Any], moved: int) -> Row:
    times = bench.times([run], rounds=15)
    found: Row = {**times, "gb_per_s": moved / times["ms"] / 1e6}
    copy = measured(bench, "copy_bandwidth", "gb_per_s")
    if copy is not None:
        found["limit_ms"] = moved / copy / 1e6
        found["ratio_to_limit"] = round(times["ms"] / found["limit_ms"], 4)
        if bench.device.type == "cuda":
            found |= {"required": round(1 / MUST_SHARE, 4), "reached": found["gb_per_s"] >= MUST_SHARE * copy}
    return found


def _single_read(bench: Bench, logits: torch.Tensor, target: torch.Tensor) -> Row:
    from fastgrpo_kernels.head.rows.kernel import single_read

    N, V = logits.shape
    out = torch.empty(N, -(-V // 64) * 64, dtype=torch.bfloat16, device=logits.device)[:, :V]
    c, logprob, entropy, row_sum = (torch.empty(N, device=logits.device) for _ in range(4))
    statistics: dict[str, Any] = {"logprob": logprob, "entropy": entropy, "row_sum": row_sum}

    def run() -> None:
        single_read(logits, target, c, None, out, input_scale=1.0, guess=(None, None), **statistics)

    run()
    error = (logprob - token_logprob(logits, target)[0]).abs().max().item()
    if not error <= 1e-4:
        return {"correct": False, "error": {"logprob": error}}
    return {**_bandwidth(bench, run, 6 * N * V), "correct": True, "error": {"logprob": error}}


def _tiles(bench: Bench, D: int, V: int) -> None:
    """The tuning table: a chunk of 8192 rows, E and sums written, against cuBLAS with bf16 results."""
    from fastgrpo_kernels.head.exp_gemm.config import CONFIGS

    C, device = 8192, bench.device
    hidden, weight = torch.randn(C, D, device=device).bfloat16(), (torch.randn(V, D, device=device) / D**0.5).bfloat16()
    out = torch.empty(C, -(-V // 64) * 64, dtype=torch.bfloat16, device=device)[:, :V]
    params: dict[str, Any] = {"C": C, "D": D, "V": V}
    flop = 2 * C * D * V

    def cublas() -> Row:
        times = bench.times([lambda: mm(hidden, weight.t(), out)], rounds=11)
        return {**times, "tflops": flop / times["ms"] / 1e9}

    bench.attempt("tiles", "exp_gemm", "cublas", params, cublas)
    limit = next((r["ms"] for r in bench.rows if r["peer"] == "cublas" and r["params"] == params), None)
    for config in CONFIGS:
        if "sm_90" in config.archs or not config.TMA:
            named = {**params, "config": repr(config)}
            run = partial(_tile, bench, (hidden, weight, out), config, flop, limit)
            bench.attempt("tiles", "exp_gemm", "fastgrpo", named, run)


def _tile(
    bench: Bench, operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor], config: Any, flop: int, limit: float | None
) -> Row:
    from fastgrpo_kernels.head.exp_gemm.kernel import exp_gemm, num_tiles

    hidden, weight, out = operands
    C, V = out.shape
    shift = torch.zeros(C, device=hidden.device)
    sums, moments = torch.empty(2, num_tiles(V), C, device=hidden.device)

    def run() -> None:
        exp_gemm(hidden, weight, shift, sums, moments, mode="exp", input_scale=1.0, out=out, config=config)

    run()
    true = torch.cat([(h.double() @ weight.double().t()).exp().sum(1) for h in hidden[:512].split(128)])
    error = ((sums.double().sum(0)[:512] - true).abs() / true).max().item()
    if not error <= 1e-4:
        return {"correct": False, "error": {"row_sum": error}}
    times = bench.times([run], rounds=11)
    ratio = limit and round(times["ms"] / limit, 4)
    found = {**times, "tflops": flop / times["ms"] / 1e9, "limit_ms": limit, "ratio_to_limit": ratio}
    return {**found, "correct": True, "error": {"row_sum": error}}


def small_ops(bench: Bench) -> None:
    """Times of the ops on vectors, S sequences in groups of 8, N tokens; then of a layer's small ops."""
    S, N = (16, 256) if bench.small else (1024, 1 << 20)
    device, params = bench.device, {"S": S, "N": N}
    bounds = torch.arange(0, N + 1, N // S, dtype=torch.int32, device=device)
    rewards, group = torch.randn(S, device=device), torch.arange(S, device=device) // 8
    token, value = torch.randn(N, device=device), torch.randn(N, device=device)
    logprob = (-token.abs()).requires_grad_()
    old, advantage = logprob.detach() + 0.1 * value, torch.randn(S, device=device)

    def loss() -> None:
        logprob.grad = None
        grpo_loss(logprob, advantage, bounds, old_logprob=old, num_tokens=N).loss.backward()

    runs: dict[str, Callable[[], Any]] = {
        "gae": partial(gae, token, value, bounds),
        "group_advantages": partial(group_advantages, rewards, group),
        "grpo_loss": loss,
    }
    for op, run in runs.items():
        bench.attempt("small_ops", op, "fastgrpo", params, partial(bench.times, [run], rounds=31))
    _layer_ops(bench)


def _layer_ops(bench: Bench) -> None:
    """Those of a decoding step of Qwen2.5-0.5B, a token a row."""
    rows, width, (queries, keys, size), inner = 4 if bench.small else 512, 896, (14, 2, 64), 4864

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=bench.device).bfloat16()

    heads = numbers(rows, queries + 2 * keys, size)
    q, k = heads[:, :queries], heads[:, queries : queries + keys]
    runs: dict[str, Callable[[], Any]] = {
        "add_rms_norm": partial(add_rms_norm, numbers(rows, width), numbers(rows, width), numbers(width), eps=1e-6),
        "rotate_heads": partial(rotate_heads, q, k, numbers(rows, size), numbers(rows, size)),
        "swiglu": partial(swiglu, *numbers(rows, 2 * inner).chunk(2, -1)),
    }
    for op, run in runs.items():
        bench.attempt("small_ops", op, "fastgrpo", {"N": rows}, partial(bench.times, [run], rounds=31))
    _layer_backwards(bench)


def _layer_backwards(bench: Bench) -> None:
    """Those of an update of Qwen2.5-0.5B, whose norms train; the forward's graph is kept."""
    rows, width, (queries, keys, size), inner = 4 if bench.small else 16_384, 896, (14, 2, 64), 4864

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=bench.device).bfloat16().requires_grad_()

    states, heads = (
        (leaf(rows, width), leaf(rows, width), leaf(width)),
        (leaf(rows, queries, size), leaf(rows, keys, size)),
    )
    gates = leaf(rows, inner), leaf(rows, inner)
    angles = leaf(rows, size).detach(), leaf(rows, size).detach()
    made: dict[str, tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]] = {
        "add_rms_norm_backward": (add_rms_norm(*states, eps=1e-6), states),
        "rotate_heads_backward": (rotate_heads(*heads, *angles), heads),
        "swiglu_backward": ((swiglu(*gates),), gates),
    }
    for op, (out, leaves) in made.items():
        run = partial(torch.autograd.grad, out, leaves, [torch.randn_like(x) for x in out], retain_graph=True)
        bench.attempt("small_ops", op, "fastgrpo", {"N": rows}, partial(bench.times, [run], rounds=31))
