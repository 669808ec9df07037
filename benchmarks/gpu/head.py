"""The stages `numerics` and `head`: the fused head's errors against float64, then its times and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.head_cases import LENGTH, SMALL_LENGTH, HeadInputs, Yardstick, fused, make_inputs, make_weight
from benchmarks.gpu.limits import measured, methods, num_tokens, sizes
from fastgrpo_kernels import linear_logprob, watch_plans

REQUIRED = {(4096, True): 1.10, (2048, True): 1.15, (896, True): 1.30}
REQUIRED |= {(4096, False): 1.12, (2048, False): 1.20, (896, False): 1.40}
PEAK_BYTES = {True: 6.6e9, False: 1.5e9}
"""Of the trainable and the frozen head; required of the default schedule."""


def numerics(bench: Bench) -> None:
    """Errors of every schedule beside plain PyTorch's, and whether a second run gives the same bits."""
    N = 64 if bench.small else 2048
    for D, V in sizes(bench):
        x = make_inputs(0, N, make_weight(V, D, bench.device), trainable=True, length=_length(bench))
        params = {"N": N, "D": D, "V": V, "trainable": True}
        yardstick = Yardstick.of(x)
        for kind, found in yardstick.plain.items():
            bench.add("numerics", "linear_grpo_loss", kind, params, error=found)
        for schedule in (None, *methods(bench), "recomputed"):
            named = {**params, "schedule": schedule}
            run = partial(_check, x, yardstick, partial(fused, schedule=schedule))
            bench.attempt("numerics", "linear_grpo_loss", "fastgrpo", named, run)
            run = partial(_check, x, yardstick, partial(_by_logprob, schedule=schedule))
            bench.attempt("numerics", "linear_logprob", "fastgrpo", named, run)


def _by_logprob(x: HeadInputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same loss written on `linear_logprob`."""
    from benchmarks.cases import clipped_loss

    options["entropy_gradient"] = False
    logprob, _ = linear_logprob(x.hidden, x.weight, x.target, **options)
    loss = clipped_loss(logprob, x.old_logprob, x.advantage) / x.target.numel()
    loss.backward()
    return loss.detach(), logprob.detach()


def _check(x: HeadInputs, yardstick: Yardstick, run: Callable[[HeadInputs], Any]) -> Row:
    x.clear()
    loss, logprob = run(x)
    found = yardstick.errors(x, loss, logprob)
    first = [loss, logprob, x.hidden.grad, x.weight.grad]
    x.clear()
    again = [*run(x), x.hidden.grad, x.weight.grad]
    same = all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(first, again, strict=True)
    )
    x.clear()
    return {"error": found, "correct": yardstick.within(found) and same, "bitwise": same}


def head(bench: Bench) -> None:
    """The table's cases: each schedule, then the default, which must reach the required ratio and memory."""
    for D, V in sizes(bench):
        weight = make_weight(V, D, bench.device)
        for trainable in (True, False):
            sets = [
                make_inputs(seed, num_tokens(bench), weight, trainable=trainable, length=_length(bench))
                for seed in range(3)
            ]
            yardstick = Yardstick.of(sets[0])
            for schedule in (None, *methods(bench), "recomputed"):
                params = {"N": num_tokens(bench), "D": D, "V": V, "trainable": trainable, "schedule": schedule}
                run = partial(_measure, bench, sets, yardstick, params)
                bench.attempt("head", "linear_grpo_loss", "fastgrpo", params, run)


def _measure(bench: Bench, sets: list[HeadInputs], yardstick: Yardstick, params: dict[str, Any]) -> Row:
    schedule, trainable, D = params["schedule"], params["trainable"], params["D"]
    with watch_plans() as plans:
        checked = _check(sets[0], yardstick, partial(fused, schedule=schedule))
    if not checked["correct"]:
        return checked
    plan = plans[0]

    def one(x: HeadInputs) -> int:
        x.clear()
        fused(x, schedule=schedule)
        return x.returned_bytes()

    times = bench.times([partial(one, x) for x in sets], rounds=7 if schedule else 11)
    for x in sets:
        x.clear()
    peak = bench.peak_bytes(partial(one, sets[0]))
    same = {k: params[k] for k in ("N", "D", "V", "trainable")}
    limit = measured(bench, "head_gemms", method=plan.method, **same)
    rate = measured(bench, "gemm_rate", "tflops")
    flop = (3 if trainable else 2) * 2 * params["N"] * D * params["V"]
    row = {**checked, **times, "peak_bytes": peak, "limit_ms": limit, "plan": plan.reason}
    row["ratio_to_limit"] = limit and round(times["ms"] / limit, 4)
    row["ratio_to_rate"] = rate and round(times["ms"] / (flop / rate / 1e9), 4)
    required = REQUIRED.get((D, trainable))
    if schedule is None and required is not None and bench.device.type == "cuda":
        row |= {"required": required, "required_peak_bytes": PEAK_BYTES[trainable]}
        ratio = row["ratio_to_limit"]
        row["reached"] = ratio is not None and ratio <= required and (peak or 0) <= PEAK_BYTES[trainable]
    if schedule is None:
        row["kernels_ms"] = _kernels(bench, partial(one, sets[0]))
    return row


def _kernels(bench: Bench, run: Callable[[], int]) -> dict[str, float]:
    """ms on the device of one call by kernel, the largest first; on a CPU by operator."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    spent = {e.key[:120]: getattr(e, name) / 1e3 for e in trace.key_averages()}
    return dict(sorted(((k, round(v, 4)) for k, v in spent.items() if v > 0), key=lambda item: -item[1])[:12])


def _length(bench: Bench) -> int:
    return SMALL_LENGTH if bench.small else LENGTH
