"""The stage `peers`: the same loss and gradients by others' heads, each imported where it runs or skipped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import heads
from benchmarks.cases import clipped_loss
from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.head_cases import LENGTH, SMALL_LENGTH, HeadInputs, fused, make_inputs, make_weight, reference
from benchmarks.gpu.limits import num_tokens, sizes
from benchmarks.heads import Head

Peer = Callable[[HeadInputs], Tensor | None]
"""Leaves gradients in the inputs; returns logprob [N] where it has them."""


def _loss(x: HeadInputs, logprob: Tensor) -> Tensor:
    (clipped_loss(logprob, x.old_logprob, x.advantage) / x.target.numel()).backward()
    return logprob.detach()


def _by_head(x: HeadInputs, head: Head) -> Tensor:
    return _loss(x, head(x.hidden, x.weight, x.target))


def compiled(x: HeadInputs) -> Tensor:
    backend = "inductor" if x.hidden.is_cuda else "aot_eager"  # the small form needs no C++ compiler
    return _by_head(x, partial(heads.compiled, backend=backend))


def torch_head(x: HeadInputs) -> None:
    """Plain negative log-likelihood, no policy loss."""
    heads.torch_loss(x.hidden, x.weight, x.target).backward()


def liger(x: HeadInputs) -> None:
    """It gives no log-probs."""
    heads.liger_loss(x.hidden, x.weight, x.target, x.advantage, x.old_logprob, x.length).backward()


def cut(x: HeadInputs) -> Tensor:
    if not x.hidden.is_cuda:
        raise ImportError("its kernels need a GPU")
    return _by_head(x, heads.cut)


def ours(x: HeadInputs) -> Tensor:
    return fused(x)[1]


PEERS: dict[str, Peer] = {
    "fastgrpo": ours,
    "trl": partial(_by_head, head=heads.trl),
    "liger": liger,
    "cce": cut,
    "torch": torch_head,
    "naive": partial(_by_head, head=heads.naive),
    "torch_compile": compiled,
}


def peers(bench: Bench) -> None:
    """All peers on each size; N is halved while memory runs out, which the row says."""
    for D, V in sizes(bench):
        weight = make_weight(V, D, bench.device)
        for peer, run in PEERS.items():
            params = {"N": num_tokens(bench), "D": D, "V": V, "trainable": True}
            bench.attempt("peers", "linear_grpo_loss", peer, params, partial(_fitting, bench, run, weight))
        _compare(bench, D, V)


def _fitting(bench: Bench, run: Peer, weight: Tensor) -> Row:
    N = num_tokens(bench)
    while True:
        try:
            return {**_measure(bench, run, weight, N), "N_measured": N}
        except torch.cuda.OutOfMemoryError:
            if N <= 4096:
                raise
            N //= 2
        torch.cuda.empty_cache()


def _measure(bench: Bench, run: Peer, weight: Tensor, N: int) -> Row:
    length = SMALL_LENGTH if bench.small else LENGTH
    sets = [make_inputs(seed, N, weight, trainable=True, length=length) for seed in range(2)]
    with torch.no_grad():
        small = make_inputs(0, min(N, 1024), weight.detach(), trainable=False, length=length)
    small.weight = weight.detach().requires_grad_()
    truth = reference(small, "float64", 512)
    logprob = run(small)
    found: dict[str, Any] = {}
    if logprob is not None:
        found["logprob"] = (logprob.double() - truth.logprob).square().mean().sqrt().item()
    if run is not torch_head and small.hidden.grad is not None:
        wrong = (small.hidden.grad.double() - truth.grad_hidden).norm() / truth.grad_hidden.norm()
        found["grad_hidden"] = wrong.item()
    small.clear()
    del truth, logprob
    if any(not error <= 0.1 for error in found.values()):
        return {"correct": False, "error": found}

    def one(x: HeadInputs) -> int:
        x.clear()
        run(x)
        return x.returned_bytes()

    times = bench.times([partial(one, x) for x in sets], rounds=5)
    for x in sets:
        x.clear()
    peak = bench.peak_bytes(partial(one, sets[0]))
    return {**times, "ms_per_1024_tokens": 1024 * times["ms"] / N, "peak_bytes": peak, "correct": True, "error": found}


def _compare(bench: Bench, D: int, V: int) -> None:
    """Faster than each, and 1.3 x TRL's, by token: `ratio` is the peer's time over ours."""
    rows = {r["peer"]: r for r in bench.rows if r["case"] == "peers" and (r["params"]["D"], r["params"]["V"]) == (D, V)}
    mine = rows["fastgrpo"].get("ms_per_1024_tokens")
    for peer, row in rows.items():
        theirs = row.get("ms_per_1024_tokens")
        if peer == "fastgrpo" or row["ms"] is None or theirs is None:
            continue
        required = 1.3 if peer == "trl" else 1.0
        ratio = theirs / mine if mine and rows["fastgrpo"]["ms"] else None
        found: Row = {"speed_ratio": ratio}
        if bench.device.type == "cuda":
            found |= {"required": required, "reached": ratio is not None and ratio >= required}
        bench.add("against", "linear_grpo_loss", peer, row["params"], **found)
