"""The stage `attention`: shared prompts against plain varlen, errors, times both ways, and what few prompts cost.

Times are the device's alone: the host is given a head start, as it has one in training.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.limits import measured
from fastgrpo_kernels import PackedLayout, shared_prefix_attention
from fastgrpo_kernels.shared_prefix_attention import backends, cpu, dense, varlen
from fastgrpo_kernels.shared_prefix_attention.options import Options
from fastgrpo_kernels.shared_prefix_attention.reference import shared_prefix_attention_reference

SHAPES = {"qwen2.5-0.5b": (14, 2, 64), "qwen2.5-1.5b": (12, 2, 128), "qwen2.5-7b": (28, 4, 128)}
_TINY = {"tiny": (4, 2, 16)}
"""Query heads, key heads, head size."""

COMPLETION = 256
ALONE = 1.03
"""Of plain varlen's time, forward and backward together, where no prompt is shared."""

_KEYS_PER_BLOCK = 128
"""Of flash attention's backward, which gives each multiprocessor a block of keys of one head: an estimate."""

Run = Callable[[], Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(bench: Bench) -> None:
    """Which kernels; errors; then by shape, the important sizes first."""
    bench.add("backends", "environment", "", dict(backends.describe(bench.device)), correct=True)
    heads = _TINY if bench.small else SHAPES
    for shape in heads:
        _numerics(bench, shape, heads[shape])
    for shape in heads:
        bench.attempt("alone", "attention", "fastgrpo", {"shape": shape}, partial(_alone, bench, heads[shape]))
        for prompt in (32,) if bench.small else (256, 1024):
            for n in (4,) if bench.small else (8, 16):
                _shared(bench, shape, heads[shape], prompt, n, whole_batch=True)
        _shared(bench, shape, heads[shape], 32 if bench.small else 1024, 4 if bench.small else 16, whole_batch=False)


def _operands(bench: Bench, rows: int, heads: tuple[int, int, int], seed: int = 0) -> list[Tensor]:
    """q, k, v, which want gradients, and the upstream gradient."""
    num_q, num_kv, d = heads
    g = torch.Generator(bench.device).manual_seed(seed)
    sizes = (num_q, num_kv, num_kv, num_q)
    x = [torch.randn(rows, h, d, generator=g, device=bench.device).bfloat16() for h in sizes]
    return [*(t.requires_grad_() for t in x[:3]), x[3]]


def _ours(layout: PackedLayout) -> Attend:
    return lambda q, k, v: shared_prefix_attention(q, k, v, layout)


def _both(attend: Attend, x: Sequence[Tensor]) -> list[Tensor]:
    """out, dq, dk, dv."""
    out = attend(x[0], x[1], x[2])
    return [out.detach(), *torch.autograd.grad(out, x[:3], x[3])]


def _errors(found: Sequence[Tensor], true: Sequence[Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm."""
    names = ("out", "dq", "dk", "dv")
    pairs = zip(names, found, true, strict=True)
    return {name: _off(a, b) for name, a, b in pairs}


def _off(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true.double()).norm() / true.double().norm())


def _numerics(bench: Bench, shape: str, heads: tuple[int, int, int]) -> None:
    """bf16 against float64 over all scores, beside plain PyTorch in bf16: no more than 1.5 x its error."""
    layouts = {
        "shared": PackedLayout([70, 40], [[30, 45, 20], [60, 10]], bench.device),
        "plain": PackedLayout([100, 33, 7], [[], [], []], bench.device),
    }
    for kind, layout in layouts.items():
        params = {"shape": shape, "layout": kind, "rows": layout.num_tokens}
        run = partial(_error, bench, heads, layout)
        bench.attempt("numerics", "attention", "fastgrpo", params, run)


def _error(bench: Bench, heads: tuple[int, int, int], layout: PackedLayout) -> Row:
    x = _operands(bench, layout.num_tokens, heads)
    wide = [*(t.detach().double().requires_grad_() for t in x[:3]), x[3].double()]
    plain = partial(shared_prefix_attention_reference, layout=layout)
    true = _both(plain, wide)
    usual = _errors(_both(plain, x), true)
    first, again = (_both(_ours(layout), x) for _ in range(2))
    found, same = _errors(first, true), all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    right = same and all(found[name] <= 1.5 * usual[name] + 1e-4 for name in found)
    return {"error": found, "plain": usual, "correct": right, "bitwise": same}


def alone_lengths(small: bool) -> list[int]:
    """Of the sequences that share nothing."""
    return [5, 9, 16, 3] if small else [128 + 16 * i for i in range(64)]


def heads_of(shape: str) -> tuple[int, int, int]:
    return (SHAPES | _TINY)[shape]


def _alone(bench: Bench, heads: tuple[int, int, int]) -> Row:
    """Sequences that share nothing, as packing lays them out, against the same kernels called for plain varlen.

    `single`: one prompt with one completion, whose layout names both.
    """
    lengths = alone_lengths(bench.small)
    found: Row = {"correct": True}
    layouts = {
        "packed": PackedLayout(lengths, [[]] * len(lengths), bench.device),
        "single": PackedLayout([lengths[-1]], [[8 * lengths[-1]]], bench.device),
    }
    for name, layout in layouts.items():
        x = _operands(bench, layout.num_tokens, heads)
        attends = (_ours(layout), _plain(layout))
        ours, plain = (_both(attend, x) for attend in attends)
        if not all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True)):
            return {"correct": False, "error": f"{name}: other results than the kernels' own"}
        mine, theirs = _by_turns(bench, [partial(_both, attend, x) for attend in attends])
        found |= {f"{name}_ms": mine, f"{name}_plain_ms": theirs, f"{name}_ratio": round(mine / theirs, 4)}
    found |= {"ms": found["packed_ms"], "limit_ms": found["packed_plain_ms"]}
    found["ratio_to_limit"] = max(found["packed_ratio"], found["single_ratio"])
    if bench.device.type == "cuda":
        found |= {"required": ALONE, "reached": found["ratio_to_limit"] <= ALONE}
    return found


class _Plain(torch.autograd.Function):
    """The chosen kernels on a layout's own sequences, without the op around them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        r = layout.attention
        ctx.options = Options(q.shape[2] ** -0.5, None, None)
        ctx.name, ctx.ranges = backends.choose(q, r, ctx.options), r
        out, lse = _kernels(ctx.name)[0](q, k, v, r, ctx.options)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *_kernels(ctx.name)[1](dout, *ctx.saved_tensors, ctx.ranges, ctx.options), None


def _plain(layout: PackedLayout) -> Attend:
    return lambda q, k, v: _Plain.apply(q, k, v, layout)


def _kernels(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if name in backends._KERNELS:
        kernels = backends._KERNELS[name]
        return partial(varlen.forward, kernels), partial(varlen.backward, kernels)
    module = cpu if name == "cpu" else dense
    return module.forward, module.backward


def _shared(bench: Bench, shape: str, heads: tuple[int, int, int], prompt: int, n: int, *, whole_batch: bool) -> None:
    """Prompts shared, against the same sequences with their prompts repeated; each pass on its own.

    whole_batch: as many prompts as make 64k rows when repeated; else one, which leaves most of a GPU idle in the
    backward, where work is handed out by blocks of keys.
    """
    completion = 16 if bench.small else COMPLETION
    prompts = max(1, (256 if bench.small else 65536) // (n * (prompt + completion))) if whole_batch else 1
    shared = PackedLayout([prompt] * prompts, [[completion] * n] * prompts, bench.device)
    plain = PackedLayout([prompt + completion] * (n * prompts), [[]] * (n * prompts), bench.device)
    params = {"shape": shape, "prompt": prompt, "n": n, "completion": completion, "prompts": prompts}
    bench.attempt("shared", "attention", "fastgrpo", params, partial(_compare, bench, heads, shared, plain))


def _compare(bench: Bench, heads: tuple[int, int, int], shared: PackedLayout, plain: PackedLayout) -> Row:
    num_q, _, d = heads
    rows = _origin(shared)
    x = _operands(bench, shared.num_tokens, heads)
    y = [*(t.detach()[rows].requires_grad_() for t in x[:3]), x[3][rows]]
    sides = [(_ours(layout), a) for a, layout in ((x, shared), (y, plain))]
    outs = [attend(a[0], a[1], a[2]) for attend, a in sides]
    error = _off(outs[0].detach()[rows], outs[1].detach())
    if not error <= 1e-2:
        return {"correct": False, "error": {"out": error}}
    forward = [partial(attend, a[0], a[1], a[2]) for attend, a in sides]
    backward = [
        partial(torch.autograd.grad, out, a[:3], a[3], retain_graph=True)
        for out, (_, a) in zip(outs, sides, strict=True)
    ]
    found: Row = {"correct": True, "error": {"out": error}, "backend": _chosen(x[0], shared)}
    pairs = [_pairs(layout) for layout in (shared, plain)]
    found["ideal"] = pairs[1] / pairs[0]
    rate = measured(bench, "gemm_rate", "tflops")
    for name, runs, flop in (("forward", forward, 4), ("backward", backward, 10)):
        mine, theirs = _by_turns(bench, runs)
        found |= {f"{name}_ms": mine, f"{name}_plain_ms": theirs, f"{name}_times": theirs / mine}
        found[f"{name}_tflops"] = flop * num_q * d * pairs[0] / mine / 1e9
        found[f"{name}_plain_tflops"] = flop * num_q * d * pairs[1] / theirs / 1e9
    found["ms"] = found["forward_ms"] + found["backward_ms"]
    found["limit_ms"] = rate and 14 * num_q * d * pairs[0] / rate / 1e9
    found["ratio_to_limit"] = found["limit_ms"] and round(found["ms"] / found["limit_ms"], 4)
    found["times_faster"] = (found["forward_plain_ms"] + found["backward_plain_ms"]) / found["ms"]
    found["of_ideal"] = found["times_faster"] / found["ideal"]
    if bench.device.type == "cuda":
        blocks = sum(-(-length // _KEYS_PER_BLOCK) for length in shared.prompt_lengths) * num_q
        units = torch.cuda.get_device_properties(bench.device).multi_processor_count
        found["shared_backward_blocks_per_multiprocessor"] = blocks / units
    return found


def _chosen(q: Tensor, layout: PackedLayout) -> str:
    return backends.choose(q, layout.attention, Options(1.0, None, None))


def _origin(layout: PackedLayout) -> Tensor:
    """The row of `layout` that each row of the same sequences, packed plainly, is a copy of."""
    rows, prompt, completion = [], 0, layout.num_prompt_tokens
    for length, group in zip(layout.prompt_lengths, layout.completion_lengths, strict=True):
        for tokens in group:
            rows += [torch.arange(prompt, prompt + length), torch.arange(completion, completion + tokens)]
            completion += tokens
        prompt += length
    return torch.cat(rows).to(layout.position_ids.device)


def _pairs(layout: PackedLayout) -> int:
    """Queries with the keys they see: a row sees its position and all before it."""
    return int(layout.position_ids.sum()) + layout.num_tokens


def _by_turns(bench: Bench, runs: Sequence[Run]) -> list[float]:
    """Median ms of each; a round runs every one once."""
    rounds = 2 if bench.small else 15
    seconds: list[list[float]] = [[] for _ in runs]
    for i in range(rounds + 2):
        for run, times in zip(runs, seconds, strict=True):
            spent = _one(bench, run)
            if i >= 2:
                times.append(spent)
    return [round(statistics.median(times), 4) for times in seconds]


def _one(bench: Bench, run: Run) -> float:
    if bench.device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000)  # two milliseconds, in which the host can say all that is to be done
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))
