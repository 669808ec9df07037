"""The stage `rollout`: tokens per second of every engine, the loop's decoding against what a GPU can do, and memory.

Completions end after each token with the same probability, by the weights: all engines sample the same lengths. Times
are those of a whole `generate`, prompts, log-probs and texts included, after one that warms up. `steady` is one burst
of a batch in which every row is alive; its limit is what must be read, at the copy's bandwidth, and the products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.limits import measured
from benchmarks.gpu.update_cases import dtype_of, make_model, shapes
from benchmarks.small_model import Shape, make_ending, make_word_tokenizer
from fastgrpo.config import GRPOConfig
from fastgrpo.packing import pack
from fastgrpo.policy import Policy, load_policy
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout.loop import LoopEngine
from fastgrpo.rollout.loop.burst import _STATE, Plan, Session
from fastgrpo.rollout.loop.slots import BURST

FASTER_THAN_TRANSFORMERS = (3.0, 2.0)
"""The loop, against continuous batching at its best; at 0.5B, at 1.5B."""
OF_LIMIT, LIVE = 2.0, 512
"""At least half of what the GPU could do, once so many rows are alive."""
LOGPROB = {torch.bfloat16: 0.05, torch.float32: 1e-4}
"""Mean difference of a token's log-prob between decoding and the training forward."""

_END = 1


@dataclass(frozen=True)
class Job:
    """`prompts` of `length` tokens, `n` completions each, of `mean` tokens on average and `longest` at most."""

    prompts: int
    n: int
    length: int
    mean: float
    longest: int

    @property
    def params(self) -> Row:
        return {"prompts": self.prompts, "n": self.n, "length": self.length, "mean": self.mean, "longest": self.longest}

    def make(self, vocabulary: int) -> list[Prompt]:
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(2, vocabulary, (self.prompts, self.length), generator=g).tolist()
        return [Prompt(i, "", tokens) for i, tokens in enumerate(ids)]


JOBS = {False: Job(64, 16, 128, 300.0, 1024), True: Job(3, 4, 6, 8.0, 16)}
"""By the small form."""


def rollout(bench: Bench) -> None:
    """In order of importance: whatever is known when time runs out has been written."""
    job = JOBS[bench.small]
    for i, shape in enumerate(dict.fromkeys(shapes(bench))):
        _engines(bench, shape, job, FASTER_THAN_TRANSFORMERS[i])
        for rows, length in ((6, 8),) if bench.small else ((512, 384), (1024, 640), (64, 640), (1, 640)):
            params = {"model": shape.name, "rows": rows, "length": length}
            bench.attempt("steady", "rollout", "fastgrpo", params, partial(_steady, bench, shape, job, rows, length))
        bench.attempt("memory", "rollout", "fastgrpo", {"model": shape.name}, partial(_memory, bench, shape, job))


def make_policy(bench: Bench, shape: Shape, job: Job) -> Policy:
    model = make_model(shape, bench.device, dtype_of(bench))
    make_ending(model, [p.token_ids for p in job.make(shape.vocabulary)[:4]], end=_END, mean=job.mean)
    config = GRPOConfig(device="cuda:0" if bench.device.type == "cuda" else "cpu")
    return load_policy(model, make_word_tokenizer(shape.vocabulary), config)


def _engines(bench: Bench, shape: Shape, job: Job, required: float) -> None:
    """Each engine in turn, with the device to itself."""
    rates: dict[str, float] = {}
    rows = min(1024, job.prompts * job.n)
    for name, make in _makers(bench).items():
        params = {"model": shape.name, **job.params}
        peer = "fastgrpo" if name == "loop" else name
        bench.attempt("generate", "rollout", peer, params, partial(_generate, bench, shape, job, make, rows))
        if bench.rows[-1]["ms"]:
            rates[name] = bench.rows[-1]["tokens_per_second"]
        bench.free()
    for name in rates.keys() - {"loop"}:
        found: Row = {"speed_ratio": round(rates["loop"] / rates[name], 3)} if "loop" in rates else {}
        if bench.device.type == "cuda" and name == "transformers" and found:
            found |= {"required": required, "reached": found["speed_ratio"] >= required}
        bench.add("against", "rollout", name, {"model": shape.name, **job.params}, **found)


def _makers(bench: Bench) -> dict[str, Callable[[Policy, int], Any]]:
    def loop(policy: Policy, rows: int) -> Any:
        return LoopEngine(policy.model, policy.tokenizer, batch_size=rows)

    def transformers(policy: Policy, rows: int) -> Any:
        from fastgrpo.rollout.transformers import TransformersEngine

        try:
            return TransformersEngine(policy.model, policy.tokenizer, batch_size=rows)
        except ValueError as error:  # transformers is too old, say: nothing that it computes is wrong
            raise ImportError(str(error)) from error

    def vllm(policy: Policy, rows: int) -> Any:
        from fastgrpo.rollout.vllm.engine import VLLMEngine

        return VLLMEngine(policy, max_length=2048, engine_args={"gpu_memory_utilization": 0.6, "max_num_seqs": rows})

    return {"loop": loop, "transformers": transformers} | ({} if bench.small else {"vllm": vllm})


def _generate(bench: Bench, shape: Shape, job: Job, make: Callable[[Policy, int], Any], rows: int) -> Row:
    policy = make_policy(bench, shape, job)
    prompts = job.make(shape.vocabulary)
    engine = make(policy, rows)
    made: list[Rollout] = []
    runs: list[tuple[float, float, int]] = []  # seconds of the sync, of the samples, and their tokens
    try:
        for seed in range(2 if bench.small else 3):

            def generate(seed: int = seed) -> None:
                made[:] = _one(engine, prompts, job, seed)

            sync = _clock(bench, partial(engine.sync, policy))
            runs.append((sync, _clock(bench, generate), sum(r.num_tokens for r in made)))
        peak = _peak(bench, lambda: _one(engine, prompts, job, 9))
        names = ("reason", "unfused", "unslotted", "uncaptured", "_attention")
        ways = {name: value for name in names if (value := getattr(engine, name, None))}
    finally:
        engine.close()
    error = _difference(policy, made[: 4 * job.n])
    syncs, seconds, tokens = zip(*runs[1:], strict=True)  # the first one warmed up
    times = {name: 1e3 * f(seconds) for name, f in (("ms", statistics.median), ("p20", min), ("p80", max))}
    return {
        **{name: round(value, 3) for name, value in times.items()},
        "tokens": sum(tokens), "tokens_per_second": round(sum(tokens) / sum(seconds)), "engine": ways,
        "sync_ms": round(1e3 * statistics.median(syncs), 3), "peak_bytes": peak,
        "error": {"logprob": error}, "correct": error <= LOGPROB[policy.dtype] and _lengths_right(made, job),
    }  # fmt: skip


def _one(engine: Any, prompts: list[Prompt], job: Job, seed: int) -> list[Rollout]:
    made: list[Rollout] = engine.generate(prompts, job.n, Sampling(job.longest, seed=seed))
    return made


def _lengths_right(made: list[Rollout], job: Job) -> bool:
    """Their mean within 5 standard errors of what the end token's probability makes of it."""
    keep = 1 - 1 / job.mean
    expected = (1 - keep**job.longest) / (1 - keep)
    lengths = [r.num_tokens for r in made]
    return abs(statistics.fmean(lengths) - expected) <= 5 * job.mean / len(lengths) ** 0.5


def _difference(policy: Policy, rollouts: list[Rollout]) -> float:
    """Mean difference of a token's log-prob from the training forward's."""
    away, count = 0.0, 0
    for batch in policy.placed(pack(rollouts, max_tokens=8192, share=policy.shares)):
        assert batch.sampling_logprob is not None
        off = policy.logprobs(batch, 1.0)[0] - batch.sampling_logprob
        away, count = away + off.abs().sum().item(), count + len(off)
    return away / count


def _steady(bench: Bench, shape: Shape, job: Job, rows: int, length: int) -> Row:
    """One token for each of `rows` rows that have `length` tokens, prompts of `job.length` among them."""
    policy = make_policy(bench, shape, job)
    engine = LoopEngine(policy.model, policy.tokenizer)
    engine.generate(job.make(shape.vocabulary)[:1], 1, Sampling(2))  # finds out how the model can be decoded
    if engine._shape is None or (engine.unslotted is not None and bench.device.type == "cuda"):
        raise ValueError(f"not decoded over slots: {engine.reason or engine.unslotted}")
    sampling = Sampling(length + 4 * BURST)
    with torch.no_grad(), policy.mode(training=False):
        plan = Plan.of(policy.model, rows, job.n, job.length, sampling)
        session = Session.make(plan, engine._shape, job.n)
        if session.plan != plan:
            raise torch.cuda.OutOfMemoryError(f"room for {session.plan.rows} rows")
        session.cache.pool.normal_()
        burst = session.burst(engine._body, sampling, rows, plan.longest)
        runs = [partial(burst.run, _state(session, rows, job, length))]
        times = bench.times(runs, rounds=5, warmup=2)
    times = {name: round(value / BURST, 4) for name, value in times.items()}
    limit = _limit(bench, policy, engine, job, rows, length)
    found: Row = {**times, "captured": session.reason is None, "tokens_per_second": round(1e3 * rows / times["ms"])}
    if limit:
        found |= {"limit_ms": round(limit, 4), "ratio_to_limit": round(times["ms"] / limit, 3)}
        if rows >= LIVE:
            found |= {"required": OF_LIMIT, "reached": times["ms"] <= OF_LIMIT * limit}
    return found


def _state(session: Session, rows: int, job: Job, length: int) -> torch.Tensor:
    """All alive; row i of group i // n. Room is left for the bursts that follow one another."""
    cache, own = session.cache, length - job.length if length > job.length else 1
    state = torch.zeros(_STATE, rows, dtype=torch.int64)
    row = torch.arange(rows)
    prompts = torch.tensor(cache.free)[row // job.n]
    state[0], state[1], state[2] = 2, prompts, job.length
    state[3], state[4], state[5] = BURST + row * (cache.longest_completion + BURST), own, row
    return state.to(cache.shape.device)


def _limit(bench: Bench, policy: Policy, engine: LoopEngine, job: Job, rows: int, length: int) -> float | None:
    """ms: keys and values at the copy's bandwidth, and the weights' bytes or products, whichever takes longer.

    The copy moves bytes both ways; what is only read is assumed to come as fast.
    """
    bandwidth = measured(bench, "copy_bandwidth", "gb_per_s")
    rate = measured(bench, "gemm_rate", "tflops")
    if not bandwidth or not rate or engine._shape is None:
        return None
    own, prompts = rows * (length - job.length), -(-rows // job.n) * job.length  # a prompt once for its rows
    kept = (own + prompts) * engine._shape.numbers * engine._shape.dtype.itemsize / bandwidth / 1e6
    weights = policy.num_parameters * policy.dtype.itemsize / bandwidth / 1e6
    products = 2 * rows * policy.num_parameters / rate / 1e9
    return kept + max(weights, products)


def _memory(bench: Bench, shape: Shape, job: Job) -> Row:
    """Ten times the prompts, the same rows at once: the same memory. Timed are the many."""
    policy = make_policy(bench, shape, job)
    peaks, caches, seconds = [], [], 0.0
    for times in (1, 10):
        engine = LoopEngine(policy.model, policy.tokenizer, batch_size=job.n * 2)
        some = Job(2 * times, job.n, job.length, job.mean, min(job.longest, 128))
        run = partial(_one, engine, some.make(shape.vocabulary), some, 0)
        seconds = _clock(bench, run)
        peaks.append(_peak(bench, run))
        caches.append(engine.cache_bytes)
        engine.close()
    few, many = (peak or 0 for peak in peaks)
    found: Row = {"cache_bytes": caches, "peak_bytes": peaks[1], "peak_bytes_of_fewer": peaks[0]}
    return {"ms": round(1e3 * seconds, 3), **found, "correct": caches[1] <= caches[0] and many <= 1.05 * few}


def _clock(bench: Bench, run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _peak(bench: Bench, run: Callable[[], Any]) -> int | None:
    def nothing() -> int:
        run()
        return 0

    return bench.peak_bytes(nothing)
