"""The stage `limits`: what this GPU can do, measured in the same run; what every other figure is held against."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.head_cases import SIZES, SMALL_SIZES
from benchmarks.limits import copy as large_copy
from benchmarks.limits import gemm as square_gemm
from fastgrpo_kernels.head.plan import HeadPlan, HeadProblem, plan_head


def num_tokens(bench: Bench) -> int:
    return 64 if bench.small else 32768


def sizes(bench: Bench) -> tuple[tuple[int, int], ...]:
    return SMALL_SIZES if bench.small else SIZES


def plan(bench: Bench, D: int, V: int, trainable: bool, schedule: str) -> HeadPlan:
    """The plan that the op makes for a token-level loss."""
    on_device = bench.device.type == "cuda"
    copies = on_device and torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)
    dtype, N = torch.bfloat16, num_tokens(bench)
    problem = HeadProblem(N, D, V, dtype, trainable, True, False, "token", on_device, copies)
    return plan_head(problem, None, None, schedule)


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in out's dtype; a CPU has no half GEMM with fp32 results."""
    if a.is_cuda and out.dtype != a.dtype:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.float(), b.float())


def head_gemms(bench: Bench, D: int, V: int, made: HeadPlan, trainable: bool) -> Callable[[], None]:
    """The GEMMs of one plan through cuBLAS: logits (bf16 where the epilogue leaves no fp32), dH fp32, dW += fp32."""
    N, device, C = num_tokens(bench), bench.device, made.chunk_rows
    width = -(-V // 64) * 64
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, generator=g, device=device).bfloat16()
    weight = torch.randn(V, D, generator=g, device=device).bfloat16()
    rows = torch.randn(C, width, generator=g, device=device, dtype=torch.bfloat16)[:, :V]
    step = made.logit_rows or C
    dtype = torch.float32 if made.logit_rows else torch.bfloat16
    logits = torch.empty(step, width, dtype=dtype, device=device)[:, :V]
    grad_hidden = torch.empty(C, D, device=device)
    grad_weight = torch.empty(V, D, device=device) if trainable else None

    def run() -> None:
        for a in range(0, N, C):
            n = min(C, N - a)
            for i in range(0, n, step):
                part = hidden[a + i : a + min(i + step, n)]
                mm(part, weight.t(), logits[: len(part)])
            mm(rows[:n], weight, grad_hidden[:n])
            if grad_weight is not None and a == 0:
                mm(rows[:n].t(), hidden[:n], grad_weight)
            elif grad_weight is not None:
                add_mm(grad_weight, rows[:n].t(), hidden[a : a + n])

    return run


def limits(bench: Bench) -> None:
    """GEMM rate (TFLOP/s), copy bandwidth (GB/s, read + write), and each head case's own GEMMs by method."""
    n = 64 if bench.small else 8192

    def gemm() -> Row:
        times = bench.times([square_gemm(bench.device, n, torch.bfloat16)], rounds=21, warmup=5)
        return {**times, "tflops": 2 * n**3 / times["ms"] / 1e9}

    def copy() -> Row:
        size = 1 << (16 if bench.small else 32)
        times = bench.times([large_copy(bench.device, size)], rounds=11)
        return {**times, "gb_per_s": 2 * size / times["ms"] / 1e6}

    bench.attempt("gemm_rate", "limit", "cublas", {"n": n}, gemm)
    bench.attempt("copy_bandwidth", "limit", "copy", {}, copy)
    for D, V in sizes(bench):
        for trainable in (True, False):
            for method in methods(bench):
                params = {"N": num_tokens(bench), "D": D, "V": V, "trainable": trainable, "method": method}
                bench.attempt("head_gemms", "limit", "cublas", params, partial(_head, bench, D, V, trainable, method))


def methods(bench: Bench) -> tuple[str, ...]:
    return ("epilogue", "single_read", "two_read") if bench.device.type == "cuda" else ("two_read",)


def _head(bench: Bench, D: int, V: int, trainable: bool, method: str) -> Row:
    return bench.times([head_gemms(bench, D, V, plan(bench, D, V, trainable, method), trainable)], rounds=5)


def measured(bench: Bench, case: str, key: str = "ms", **params: object) -> float | None:
    """A limit that the stage found, None where it did not."""
    for row in bench.earlier("limits"):
        if row["case"] == case and params.items() <= row["params"].items():
            return row.get(key)
    return None
