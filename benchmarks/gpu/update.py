"""The stage `update`: the trainer's own step against TRL's loss and backward; sharing, MFU, growth, checkpointing.

Every time of ours is `Updater.step`'s: rollouts to weights, packing and optimizer included (at a learning rate of 0).
TRL's is its loss and backward alone, in the fastest of its configurations tried here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.update_cases import (
    Trl,
    Workload,
    dtype_of,
    gradient_error,
    gsm8k,
    liger_layers,
    long_prompts,
    make_model,
    make_updater,
    plain_gradients,
    rollouts,
    shapes,
    step,
    step_gradients,
)
from benchmarks.small_model import Shape, make_rollouts
from fastgrpo import packing
from fastgrpo.policy.memory import activation_memory
from fastgrpo.records import Rollout
from fastgrpo.update import Updater

FASTER_THAN_TRL = {"gsm8k": 3.0, "prompt1024": 5.0}
DEAD_FASTER, OF_IDEAL_SHARING, MFU, FLAT = 1.8, 0.9, 0.5, 1.05
PEAK_FLOPS = 989e12
"""An H100's and H200's dense bf16, by the maker."""

MFU_BUDGET = 24576
"""GSM8K's 64 groups make four micro-batches of more than 16,384 tokens."""

GROWTH = {False: (128, 112, 8), True: (8, 7, 2)}
"""By the small form: tokens of a prompt, of each of its eight completions, and groups of a micro-batch."""


def update(bench: Bench) -> None:
    """In order of importance: whatever is known when time runs out has been written."""
    small, large = shapes(bench)
    _numerics(bench, small)
    _compare(bench, small, gsm8k(bench, 64))
    _compare(bench, small, long_prompts(bench, 16))
    _bodies(bench, large, gsm8k(bench, 64))
    _growth(bench, small)
    if large != small:
        _compare(bench, large, gsm8k(bench, 16))
        _compare(bench, large, long_prompts(bench, 4))
    _checkpointing(bench, large, gsm8k(bench, 16))
    if large != small:
        _bodies(bench, small, gsm8k(bench, 64))


def _numerics(bench: Bench, shape: Shape) -> None:
    """The step's gradient against float64, beside that of plain bf16 sequences (fp32 on a CPU) and TRL's."""
    for work in (gsm8k(bench, 2), long_prompts(bench, 1)):
        chosen = [r for r in rollouts(shape, work) if r.advantage]
        params = {"model": shape.name, "lengths": work.name, "prompts": work.prompts}
        true = plain_gradients(make_model(shape, bench.device, dtype_of(bench)).double(), chosen, torch.float64)
        plain = plain_gradients(make_model(shape, bench.device, dtype_of(bench)), chosen, torch.float32)
        usual = gradient_error(plain, true)
        del plain
        bench.add("numerics", "step", "plain", params, error={"gradient": usual}, correct=usual <= 0.1)
        for share in (True, False):
            run = partial(_our_error, bench, shape, work, share, true, 1.5 * usual + 1e-4)
            bench.attempt("numerics", "step", "fastgrpo", {**params, "share": share}, run)
        bench.attempt("numerics", "step", "trl", params, partial(_trl_error, bench, shape, work, true))


def _our_error(
    bench: Bench, shape: Shape, work: Workload, share: bool, true: list[torch.Tensor], allowed: float
) -> Row:
    updater = make_updater(bench, shape, work, share_prompts=share, max_grad_norm=0.0)
    chosen = rollouts(shape, work)
    first, again = (step_gradients(updater, chosen) for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    error = gradient_error(first, true)
    return {"error": {"gradient": error}, "allowed": allowed, "correct": error <= allowed, "bitwise": same}


def _trl_error(bench: Bench, shape: Shape, work: Workload, true: list[torch.Tensor]) -> Row:
    trl = Trl(bench, shape, work)
    trl.backward(trl.micro_batches(rollouts(shape, work), work.count))
    error = gradient_error([p.grad for p in trl.model.parameters() if p.grad is not None], true)
    return {"error": {"gradient": error}, "correct": error <= 0.1}


def _compare(bench: Bench, shape: Shape, work: Workload) -> None:
    """Ours, with half the groups dead and with prompts repeated beside it; TRL's; what is required of each ratio."""
    params: dict[str, Any] = {"model": shape.name, "lengths": work.name, "prompts": work.prompts, "n": work.n}
    with _freed(bench):
        ours = _ours(bench, shape, work, params)
    best: float | None = None
    sizes = [work.n << i for i in range(5) if work.n << i <= work.count]
    for layers in ("transformers", "liger") if bench.device.type == "cuda" else ("transformers",):
        with _freed(bench):
            run = partial(_trl, bench, shape, work, layers, sizes)
            bench.attempt("update", "step", "trl", {**params, "dead": 0, "layers": layers}, run)
        row = bench.rows[-1]
        if row["ms"]:
            best = min(best or row["ms"], row["ms"])
            sizes = [size for size in (row["micro_batch"], 2 * row["micro_batch"]) if size in sizes]
    if ours and best:
        _ratio(bench, "against", "trl", params, best / ours, FASTER_THAN_TRL[work.name])


def _ours(bench: Bench, shape: Shape, work: Workload, params: dict[str, Any]) -> float | None:
    """ms of the step with every group alive."""
    updater = make_updater(bench, shape, work)
    for dead in (0, work.prompts // 2):
        run = partial(_step, bench, updater, rollouts(shape, work, dead))
        bench.attempt("update", "step", "fastgrpo", {**params, "dead": dead}, run)
    alive, half = (row["ms"] for row in bench.rows[-2:])
    if alive and half:
        _ratio(bench, "dead_groups", "all_alive", params, alive / half, DEAD_FASTER)
    bench.attempt("sharing", "body", "fastgrpo", params, partial(_sharing, bench, updater, rollouts(shape, work)))
    body = bench.rows[-1]
    if body["ms"]:
        _ratio(bench, "sharing", "plain", params, body["plain_ms"] / body["ms"], OF_IDEAL_SHARING * body["ideal"])
    return alive


def _ratio(bench: Bench, case: str, peer: str, params: dict[str, Any], ratio: float, required: float) -> None:
    """How many times as fast; required on a GPU alone."""
    found: Row = {"speed_ratio": round(ratio, 4)}
    if bench.device.type == "cuda":
        found |= {"required": round(required, 4), "reached": ratio >= required}
    bench.add(case, "step", peer, params, **found)


@contextmanager
def _freed(bench: Bench) -> Iterator[None]:
    """What the block leaves behind goes back to the device, for the next one to have all of it."""
    try:
        yield
    finally:
        gc.collect()  # trainers and models refer to themselves
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _step(bench: Bench, updater: Updater, chosen: list[Rollout]) -> Row:
    metrics = step(updater, chosen)
    times = bench.times([partial(step, updater, chosen)], rounds=3, warmup=1)
    return {**times, **_work(updater, chosen, times["ms"], metrics), "peak_bytes": _peak(bench, updater, chosen)}


def _peak(bench: Bench, updater: Updater, chosen: list[Rollout]) -> int | None:
    def run() -> int:
        step(updater, chosen)
        return 0

    return bench.peak_bytes(run)


def _work(updater: Updater, chosen: list[Rollout], ms: float, metrics: dict[str, float]) -> Row:
    """Tokens that went through the model, how many a micro-batch, and 6 x parameters FLOPs of each against the peak."""
    needed = sum(r.num_tokens + len(r.prompt.token_ids) for r in chosen) * (1 - metrics["perf/skipped_token_fraction"])
    tokens = round(needed / metrics["perf/prompt_sharing_ratio"])
    return {
        "tokens": tokens,
        "tokens_per_microbatch": tokens / metrics["perf/microbatches"],
        "us_per_token": 1e3 * ms / tokens,
        "mfu": 6 * updater.policy.num_parameters * tokens / (ms / 1e3) / PEAK_FLOPS,
        "unshared": updater.policy.unshared,
        "balance": metrics["perf/microbatch_balance"],
        "grad_norm": metrics["grad_norm"],
    }


def _sharing(bench: Bench, updater: Updater, chosen: list[Rollout]) -> Row:
    """The body alone, forward and backward, head and loss left out: with prompts shared, and packed plainly."""
    policy, budget = updater.policy, updater.config.max_tokens_per_microbatch
    if not policy.shares:
        return {"correct": False, "error": f"not shared: {policy.unshared}"}
    runs, tokens = [], []
    for share in (True, False):
        batches = packing.pack(chosen, max_tokens=budget, share=share, work=policy.work)
        tokens.append(sum(len(b.input_ids) for b in batches))
        runs.append(partial(_body, updater, [b.to(policy.device) for b in batches]))
    shared, plain = (bench.times([run], rounds=3, warmup=1) for run in runs)
    return {**shared, "plain_ms": plain["ms"], "ideal": tokens[1] / tokens[0]}


def _body(updater: Updater, batches: list[Any]) -> None:
    with updater.policy.mode(training=True):
        for batch in batches:
            hidden = updater.policy.hidden(batch)
            hidden.backward(hidden.detach())


def _trl(bench: Bench, shape: Shape, work: Workload, layers: str, sizes: list[int]) -> Row:
    """The fastest micro-batch is looked for with one of each size, until memory runs out."""
    trl, chosen = Trl(bench, shape, work), rollouts(shape, work)
    tried: dict[int, float | str] = {}
    with liger_layers(trl.model) if layers == "liger" else nullcontext():
        for size in sizes:
            batch = trl.micro_batches(chosen, size)[:1]
            ms = _fits(bench, partial(trl.backward, batch))
            trl.model.zero_grad(set_to_none=True)
            tried[size] = "out of memory" if ms is None else ms / size
            if ms is None:
                torch.cuda.empty_cache()
                break
        timed = {size: ms for size, ms in tried.items() if isinstance(ms, float)}
        if not timed:
            return {"error": "out of memory", "ms_per_sequence": tried}
        size = min(timed, key=lambda size: timed[size])
        batches = trl.micro_batches(chosen, size)
        times = bench.times([partial(trl.backward, batches)], rounds=2, warmup=1)
    padded = sum(b["prompt_ids"].numel() + b["completion_ids"].numel() for b in batches)
    found = {"micro_batch": size, "ms_per_sequence": tried, "tokens": padded, "attention": trl.attention}
    return {**times, **found}


def _fits(bench: Bench, run: Callable[[], None]) -> float | None:
    """ms; None where memory ran out."""
    try:
        return float(bench.times([run], rounds=1, warmup=1)["ms"])
    except torch.cuda.OutOfMemoryError:
        return None


def _bodies(bench: Bench, shape: Shape, work: Workload) -> None:
    """How the layers are computed; the best one must reach the MFU, at the larger shape."""
    params = {"model": shape.name, "lengths": work.name, "prompts": work.prompts}
    rates: dict[str, float] = {}
    norm: float | None = None
    on_gpu = bench.device.type == "cuda"
    for body in ("eager", "fused", "torch_compile", "liger") if on_gpu else ("eager", "fused"):
        with _freed(bench):
            run = partial(_body_step, bench, shape, work, body, norm)
            bench.attempt("body", "step", "liger" if body == "liger" else "fastgrpo", {**params, "body": body}, run)
        row = bench.rows[-1]
        norm = norm or row.get("grad_norm")
        if row["ms"] and row["tokens_per_microbatch"] >= 16384:
            rates[body] = row["mfu"]
    if rates and shape == shapes(bench)[1]:
        body = max(rates, key=lambda body: rates[body])
        bench.add("mfu", "step", body, params, speed_ratio=rates[body], required=MFU, reached=rates[body] >= MFU)


def _body_step(bench: Bench, shape: Shape, work: Workload, body: str, norm: float | None) -> Row:
    """norm: that of the gradient by the eager layers, which this one's must come near."""
    options: dict[str, Any] = {"max_tokens_per_microbatch": MFU_BUDGET, "fused_layers": body == "fused"}
    if body == "torch_compile":
        options[body] = True
    updater = make_updater(bench, shape, work, **options)
    with liger_layers(updater.policy.causal_lm) if body == "liger" else nullcontext():
        found = _step(bench, updater, rollouts(shape, work))
    away = 0.0 if norm is None else abs(found["grad_norm"] / norm - 1)
    return {**found, "error": {"grad_norm": away}, "correct": away <= 0.02}


def _growth(bench: Bench, shape: Shape) -> None:
    """From 8k to 128k tokens in micro-batches of 8k: time per token, up to the gradients and their one transfer.

    The optimizer's own step, which costs the same for any number of tokens, is left out. Lengths are equal, so that
    every micro-batch is full.
    """
    prompt, completion, per_batch = GROWTH[bench.small]
    group = prompt + 8 * completion
    work = Workload("equal", 16 * per_batch, 8, (prompt, prompt), completion, completion)
    params = {"model": shape.name, "budget": per_batch * group}
    each = []
    with _freed(bench):
        updater = make_updater(bench, shape, work, max_tokens_per_microbatch=per_batch * group)
        with mock.patch.object(updater.optimizer, "step", return_value=True):
            for count in (1, 2, 4, 8, 16):
                groups = count * per_batch
                chosen = make_rollouts(shape, [prompt] * groups, [[completion] * 8] * groups, seed=0)
                run = partial(_step, bench, updater, chosen)
                bench.attempt("growth", "gradients", "fastgrpo", {**params, "tokens": groups * group}, run)
                each.append(bench.rows[-1])
        del updater
    if all(row["ms"] for row in each):
        spent = [row["us_per_token"] for row in each]
        found: Row = {"ratio_to_limit": round(max(spent) / min(spent), 4)}
        if bench.device.type == "cuda":
            found |= {"required": FLAT, "reached": max(spent) <= FLAT * min(spent)}
        bench.add("growth", "gradients", "itself", params, **found)


def _checkpointing(bench: Bench, shape: Shape, work: Workload) -> None:
    """One micro-batch: what recomputing all layers, or every second, costs in time and saves in memory.

    `predicted_bytes` is the formula's peak of the activations; the measured one holds the head's buffers, too.
    """
    params = {"model": shape.name, "lengths": work.name, "prompts": work.prompts}
    for every in (0, 1, 2):
        with _freed(bench):
            run = partial(_checkpointed, bench, shape, work, every)
            bench.attempt("checkpointing", "step", "fastgrpo", {**params, "every": every}, run)


def _checkpointed(bench: Bench, shape: Shape, work: Workload, every: int) -> Row:
    options: dict[str, Any] = {"gradient_checkpointing_every": every} if every > 1 else {}
    updater = make_updater(
        bench, shape, work, max_tokens_per_microbatch=2 * MFU_BUDGET, gradient_checkpointing=every > 0, **options
    )
    chosen = rollouts(shape, work)
    found = _step(bench, updater, chosen)
    fused = bench.device.type == "cuda"  # as the options have it, unasked
    formula = activation_memory(updater.policy.causal_lm.config, dtype=updater.policy.dtype, fused=fused)
    scored = sum(r.num_tokens for r in chosen)
    found["predicted_bytes"] = formula.peak(int(found["tokens"]), num_scored=scored, checkpoint_every=every)
    return found
