"""The stage `sweep`: the configurations that compiling ahead of time has left, timed, the best against the default.

Results are held against those of the launched configuration: whatever the block, an op computes the same to rounding.
Times are the device's alone, as in `attention`: some of these kernels take less than the host needs to launch them.
The stage is the last one, for a session of its own; where no kernel runs, a family's op is timed once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.attention import _by_turns
from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.limits import measured
from fastgrpo_kernels import decode_attention, grpo_loss, sample_tokens, token_logprob
from fastgrpo_kernels.backend import INTERPRETED


@dataclass(frozen=True)
class Case:
    """run: the op with a configuration, None where none is meant; gives what may differ by rounding alone.

    moved: bytes at least. flop: of matrix products.
    """

    params: Row
    run: Callable[[dict[str, int] | None], Tensor]
    moved: int
    flop: int = 0


def sweep(bench: Bench) -> None:
    """A row a configuration, what is launched first, and one with the best of each family."""
    cases = {
        "decode_attention": _decoding,
        "token_logprob": _logprob,
        "sample_tokens": _sampling,
        "coefficients": _loss,
    }
    if bench.device.type == "cuda" or INTERPRETED:  # these are kernels alone
        cases |= {"exp_gemm": _exp_gemm, "single_read": _single_read}
    for family, make in cases.items():
        _family(bench, family, make(bench))
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _family(bench: Bench, family: str, case: Case) -> None:
    configs = _configs(bench, family)
    if not configs:
        missing = f"compile them first: python -m benchmarks.config_space --arch {_arch(bench)}"
        bench.add("sweep", family, "fastgrpo", case.params, error=missing)
        return
    true = case.run(None)
    for config in configs:
        run = partial(_time, bench, family, case, config, true)
        bench.attempt("sweep", family, "fastgrpo", {**case.params, **(config or {})}, run)
    timed = [(row["ms"], row["params"]) for row in bench.rows[-len(configs) :] if row["ms"]]
    first = bench.rows[-len(configs)]["ms"]
    if timed and first:
        ms, best = min(timed, key=lambda found: found[0])
        bench.add("best", family, "fastgrpo", best, ms=ms, speed_ratio=round(first / ms, 4))


def _configs(bench: Bench, family: str) -> list[dict[str, int] | None]:
    """[None] where no kernel runs; none where none was compiled for this GPU."""
    if bench.device.type != "cuda" and not INTERPRETED:
        return [None]
    from benchmarks.config_space import RESULTS, surviving

    found = surviving(RESULTS, family, _arch(bench))
    return [*found[:2]] if bench.small else [*found]


def _arch(bench: Bench) -> str:
    if bench.device.type != "cuda":
        return "sm_90"  # interpreted
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(bench.device).gcnArchName).split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(bench.device))


def _time(bench: Bench, family: str, case: Case, config: dict[str, int] | None, true: Tensor) -> Row:
    with _configured(family, config):
        found = case.run(config)
        wrong = (~torch.isclose(found.double(), true.double(), rtol=1e-2, atol=1e-3)).double().mean().item()
        if wrong > 1e-3:  # a token drawn where sums were rounded apart
            return {"correct": False, "error": {"wrong": wrong}}
        (ms,) = _by_turns(bench, [partial(case.run, config)])
    limit = _limit(bench, case)
    ratio = limit and round(ms / limit, 4)
    return {"ms": ms, "limit_ms": limit, "ratio_to_limit": ratio, "correct": True, "error": {"wrong": wrong}}


def _configured(family: str, config: dict[str, int] | None) -> Any:
    if config is None:
        return nullcontext()
    from benchmarks.config_space import FAMILIES

    return next(f for f in FAMILIES if f.name == family).configured(config)


def _limit(bench: Bench, case: Case) -> float | None:
    copy, rate = measured(bench, "copy_bandwidth", "gb_per_s"), measured(bench, "gemm_rate", "tflops")
    return max(case.moved / copy / 1e6, case.flop / rate / 1e9) if copy and rate else None


def _decoding(bench: Bench) -> Case:
    """Qwen2.5-1.5B's heads; every row a prompt of 128 that 16 share."""
    rows, own, heads, repeat, size, prompt = (4, 9, 2, 3, 16, 5) if bench.small else (512, 256, 2, 6, 128, 128)
    device, own_room, groups = bench.device, own + 1, -(-rows // 16)
    g = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device).bfloat16()

    places = groups * prompt + rows * own_room
    new = numbers(rows, heads * repeat, size), numbers(rows, heads, size), numbers(rows, heads, size)
    pool = numbers(places, heads, size), numbers(places, heads, size)
    row = torch.arange(rows, device=device)
    start = groups * prompt + row * own_room
    where = torch.stack([row // 16 * prompt, torch.full_like(row, prompt), start, torch.full_like(row, own)])

    def run(_: dict[str, int] | None) -> Tensor:
        return decode_attention(*new, *pool, where, longest=prompt + own_room)

    params = {"rows": rows, "length": prompt + own, "heads": heads, "size": size}
    return Case(params, run, rows * (prompt + own) * 2 * heads * size * 2)


def _logits(bench: Bench, N: int) -> tuple[Tensor, Tensor]:
    V = 520 if bench.small else 151936
    g = torch.Generator(bench.device).manual_seed(0)
    logits = torch.randn(N, V, generator=g, device=bench.device)
    return logits, torch.randint(V, (N,), generator=g, device=bench.device)


def _logprob(bench: Bench) -> Case:
    """Forward and backward over fp32 logits."""
    logits, target = _logits(bench, 4 if bench.small else 4096)
    leaf = logits.requires_grad_()

    def run(_: dict[str, int] | None) -> Tensor:
        logprob, _entropy = token_logprob(leaf, target)
        (gradient,) = torch.autograd.grad(logprob.sum(), leaf)
        return torch.cat([logprob.detach(), gradient[:, 0]])

    N, V = logits.shape
    return Case({"N": N, "V": V}, run, 12 * N * V)


def _sampling(bench: Bench) -> Case:
    logits, _ = _logits(bench, 4 if bench.small else 1024)
    half, uniform = logits.bfloat16(), torch.rand(len(logits), dtype=torch.float64, device=bench.device)

    def run(_: dict[str, int] | None) -> Tensor:
        return sample_tokens(half, uniform, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0)[1]

    N, V = logits.shape
    return Case({"N": N, "V": V}, run, 2 * N * V)


def _loss(bench: Bench) -> Case:
    S, N = (4, 64) if bench.small else (1024, 1 << 20)
    g = torch.Generator(bench.device).manual_seed(0)
    logprob = (-torch.randn(N, generator=g, device=bench.device).abs()).requires_grad_()
    old = logprob.detach() + 0.1 * torch.randn(N, generator=g, device=bench.device)
    advantage = torch.randn(S, generator=g, device=bench.device)
    bounds = torch.arange(0, N + 1, N // S, dtype=torch.int32, device=bench.device)

    def run(_: dict[str, int] | None) -> Tensor:
        loss = grpo_loss(logprob, advantage, bounds, old_logprob=old, num_tokens=1).loss
        return torch.autograd.grad(loss, logprob)[0]

    return Case({"S": S, "N": N}, run, 12 * N)


def _exp_gemm(bench: Bench) -> Case:
    from fastgrpo_kernels.head.exp_gemm.kernel import exp_gemm, num_tiles

    C, D, V = (8, 32, 130) if bench.small else (8192, 2048, 151936)
    g = torch.Generator(bench.device).manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=g, device=bench.device).bfloat16() for n in (C, V))
    weight = weight / D**0.5
    out = torch.empty(C, -(-V // 64) * 64, dtype=torch.bfloat16, device=bench.device)[:, :V]
    shift = torch.zeros(C, device=bench.device)
    sums, moments = torch.zeros(2, num_tiles(V), C, device=bench.device)

    def run(config: dict[str, int] | None) -> Tensor:
        from benchmarks.config_space import tile_of

        tile = tile_of(config, _arch(bench)) if config else None
        exp_gemm(hidden, weight, shift, sums, moments, mode="exp", input_scale=1.0, out=out, config=tile)
        return sums.sum(0)

    return Case({"C": C, "D": D, "V": V}, run, 2 * C * V, 2 * C * D * V)


def _single_read(bench: Bench) -> Case:
    from fastgrpo_kernels.head.rows.kernel import single_read

    logits, target = _logits(bench, 4 if bench.small else 4096)
    N, V = logits.shape
    out = torch.empty(N, -(-V // 64) * 64, dtype=torch.bfloat16, device=bench.device)[:, :V]
    c, logprob, entropy, row_sum = (torch.empty(N, device=bench.device) for _ in range(4))
    statistics: dict[str, Any] = {"logprob": logprob, "entropy": entropy, "row_sum": row_sum}

    def run(_: dict[str, int] | None) -> Tensor:
        single_read(logits, target, c, None, out, input_scale=1.0, guess=(None, None), **statistics)
        return torch.cat([logprob, entropy])

    return Case({"N": N, "V": V}, run, 6 * N * V)
