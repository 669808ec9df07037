"""On a GPU: the LM head's ops in every schedule: exactness, size, memory, graphs, streams, the rescue path."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from fastgrpo_kernels import LoRADelta, LossConfig, linear_grpo_loss, linear_logprob, watch_plans
from fastgrpo_kernels.grpo_loss.reference import grpo_loss_reference

from .fuzz import plain_statistics, relative_error, rms_error
from .test_gpu_ops import (
    LEVELS,
    VOCABULARIES,
    assert_equal,
    assert_repeats,
    boundaries,
    compilations,
    leaf,
    no_sync,
    normal,
    replayed,
    targets,
)

pytestmark = pytest.mark.gpu
HALF = (torch.bfloat16, torch.float16)
BF16_SCHEDULES = ("epilogue", "single_read", "two_read", "recomputed", None)


def skip_without_copies(schedule: str | None) -> None:
    if schedule == "epilogue" and (torch.version.hip is not None or torch.cuda.get_device_capability() < (9, 0)):
        pytest.skip("the epilogue's kernel needs Hopper or later")


class Problem:
    """Hidden states and weight of logits of standard deviation `spread`, old log-probs near the policy's."""

    def __init__(
        self, lengths: tuple[int, ...], D: int, V: int, dtype: torch.dtype = torch.bfloat16, spread: float = 2.0
    ) -> None:
        N = sum(lengths)
        self.hidden, self.weight = normal(0, N, D, dtype=dtype), normal(1, V, D, dtype=dtype, scale=spread / D**0.5)
        self.target, self.advantage, self.bounds = targets(N, V), normal(2, len(lengths)), boundaries(*lengths)
        self.old = linear_logprob(self.hidden, self.weight, self.target)[0] + 0.02 * normal(3, N)
        self.config = LossConfig(loss_type="grpo")

    def ours(self, **options: Any) -> list[Tensor]:
        """loss, dhidden, dweight."""
        h, w = leaf(self.hidden), leaf(self.weight)
        arguments: dict[str, Any] = {"old_logprob": self.old, "config": self.config, **options}
        loss = linear_grpo_loss(h, w, self.target, self.advantage, self.bounds, **arguments).loss
        return [loss.detach(), *torch.autograd.grad(loss, (h, w))]

    def loss_of(self, logits: Tensor) -> Tensor:
        logprob, entropy = plain_statistics(logits, self.target, 1.0, None)
        shared = (self.advantage.to(logprob.dtype), self.bounds, self.config)
        return grpo_loss_reference(logprob, *shared, entropy=entropy, old_logprob=self.old.to(logprob.dtype))

    def plain(self, dtype: torch.dtype) -> list[Tensor]:
        h, w = leaf(self.hidden, dtype), leaf(self.weight, dtype)
        loss = self.loss_of(linear(h, w))
        return [loss.detach(), *torch.autograd.grad(loss, (h, w))]

    def with_fp32_logits(self) -> list[Tensor]:
        """Plain PyTorch whose logits are fp32 and whose gradient of them is rounded to the inputs' dtype."""
        logits = linear(self.hidden.float(), self.weight.float()).requires_grad_()
        loss = self.loss_of(logits)
        (grad,) = torch.autograd.grad(loss, logits)
        grad = grad.to(self.hidden.dtype)
        return [loss.detach(), grad @ self.weight, grad.t() @ self.hidden]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("schedule", BF16_SCHEDULES)
def test_error_in_bf16(schedule: str | None, vocab_size: int, level: Any) -> None:
    skip_without_copies(schedule)
    problem = Problem((200, 0, 57, 255), 512, vocab_size)
    problem.config = LossConfig(loss_type="grpo", importance_sampling_level=level)
    got, exact = problem.ours(schedule=schedule, chunk_size=256), problem.plain(torch.float64)
    bf16, fp32 = problem.plain(torch.bfloat16), problem.with_fp32_logits()
    assert_no_worse(got, bf16, exact, torch.bfloat16)
    assert_no_worse(got, fp32, exact, torch.bfloat16, factor=2.0)


def assert_no_worse(
    got: list[Tensor], others: list[Tensor], exact: list[Tensor], dtype: torch.dtype, factor: float = 1.5
) -> None:
    """Of a loss and gradients. Either loss may be right by chance, hence to 1e-5 it counts as right."""
    for i, (ours, theirs, want) in enumerate(zip(got, others, exact, strict=True)):
        tolerance = 1e-6 if i else 1e-5 / max(float(want.abs()), 1e-6)
        assert rms_error([ours], [want], dtype) <= factor * rms_error([theirs], [want], dtype) + tolerance


@pytest.mark.parametrize("vocab_size", [7, 1000, 32_001])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("schedule", ["two_read", "recomputed"])
def test_error_in_other_dtypes(schedule: str, dtype: torch.dtype, vocab_size: int) -> None:
    problem = Problem((100, 33), 256, vocab_size, dtype)
    got, exact = problem.ours(schedule=schedule, chunk_size=128), problem.plain(torch.float64)
    assert_no_worse(got, problem.plain(dtype), exact, dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_linear_logprob(entropy_gradient: bool, dtype: torch.dtype) -> None:
    """With a bias, a low rank, a softcap, a scale and a temperature."""
    N, D, V, r = 300, 256, 5003, 9
    inputs = [normal(0, N, D), normal(1, V, D, scale=0.1), normal(2, V), normal(3, r, D, scale=0.1), normal(4, V, r)]
    inputs, target, upstream = [x.to(dtype) for x in inputs], targets(N, V), normal(5, N)

    def total(logprob: Tensor, entropy: Tensor) -> Tensor:
        result = (logprob * upstream.to(logprob.dtype)).sum()
        return result + entropy.sum() if entropy_gradient else result

    def plain(dtype: torch.dtype) -> list[Tensor]:
        h, w, bias, a, b = leaves = [leaf(x, dtype) for x in inputs]
        logits = 1.3 * (linear(h, w, bias) + 0.5 * linear(linear(h, a), b))
        return list(torch.autograd.grad(total(*plain_statistics(logits, target, 0.8, 20.0)), leaves))

    h, w, bias, a, b = leaves = [leaf(x) for x in inputs]
    form: dict[str, Any] = {"logit_scale": 1.3, "softcap": 20.0, "temperature": 0.8, "chunk_size": 128}
    lora = LoRADelta(a, b, 0.5)
    outputs = linear_logprob(h, w, target, bias=bias, lora=lora, entropy_gradient=entropy_gradient, **form)
    got, exact = torch.autograd.grad(total(*outputs), leaves), plain(torch.float64)
    assert rms_error(list(got), exact, dtype) <= 1.5 * rms_error(plain(dtype), exact, dtype) + 1e-6


@pytest.mark.parametrize("schedule", ["epilogue", "single_read", "recomputed"])
def test_a_chunk_past_2_to_the_31_logits(schedule: str) -> None:
    skip_without_copies(schedule)
    N, V = 17_408, 128_256
    assert N * V > 2**31
    problem = Problem((N,), 64, V)
    problem.config, problem.old = LossConfig(loss_type="reinforce"), problem.old[:]
    loss, by_hidden, by_weight = problem.ours(schedule=schedule, chunk_size=N)
    small = problem.ours(schedule=schedule, chunk_size=512)
    assert relative_error(loss, small[0].double()) <= 1e-5
    assert relative_error(by_weight, small[2].double()) <= 2**-7
    last = slice(N - 64, N)
    h = leaf(problem.hidden[last], torch.float64)
    logprob, _ = plain_statistics(linear(h, problem.weight.double()), problem.target[last], 1.0, None)
    (want,) = torch.autograd.grad(-problem.advantage.double() * logprob.sum() / N, h)
    assert relative_error(by_hidden[last], want) <= 2**-7


@pytest.mark.parametrize("options", [{"importance_sampling_level": "sequence"}, {"loss_type": "vespo"}, {}])
def test_a_sequence_of_70000_tokens(options: dict[str, Any]) -> None:
    problem = Problem((3, 70_000, 5), 64, 1024)
    problem.config = LossConfig(**options)
    for chunk_size in (None, 4096):
        got, exact = problem.ours(chunk_size=chunk_size), problem.plain(torch.float64)
        assert relative_error(got[0], exact[0], floor=1e-3) <= 1e-4
        for a, b in zip(got[1:], exact[1:], strict=True):
            assert rms_error([a], [b], torch.bfloat16) <= 2**-8


@pytest.mark.parametrize("schedule", ["epilogue", "single_read", "two_read", "recomputed"])
def test_garbage_in_masked_rows_changes_nothing(schedule: str) -> None:
    skip_without_copies(schedule)
    problem = Problem((200, 57, 255), 256, 5003)
    mask = normal(5, 512) > 0
    want = problem.ours(mask=mask, schedule=schedule, chunk_size=128)
    problem.hidden[~mask] = math.nan
    problem.hidden[(~mask).nonzero()[0, 0]] = math.inf
    problem.target[~mask], problem.old[~mask] = -100, math.nan
    got = problem.ours(mask=mask, schedule=schedule, chunk_size=128)
    assert_equal(got, want)
    assert not got[1][~mask].any()


@pytest.mark.parametrize("offset", [100.0, -100.0])
@pytest.mark.parametrize("schedule", ["epilogue", "single_read"])
def test_guesses_far_off(schedule: str, offset: float) -> None:
    """Old log-probs only guess the rows' scale here; where they are off by e^100 the rows are computed again."""
    skip_without_copies(schedule)
    problem = Problem((200, 57, 255), 256, 32_001)
    problem.config = LossConfig(loss_type="reinforce")
    exact, coarse = problem.plain(torch.float64), problem.plain(torch.bfloat16)
    problem.old[::3] += offset
    got = problem.ours(schedule=schedule, chunk_size=256)
    assert_no_worse(got, coarse, exact, torch.bfloat16)


@pytest.mark.parametrize("schedule", ["epilogue", "single_read"])
def test_extreme_logits(schedule: str) -> None:
    skip_without_copies(schedule)
    N, V = 256, 1000
    hidden, target = 1e4 * normal(0, N, 1000, dtype=torch.bfloat16).sign(), targets(N, V)
    weight = torch.eye(V, dtype=torch.bfloat16, device="cuda")
    h, w = leaf(hidden), leaf(weight)
    bias = normal(1, V)
    bias[5], target[target == 5] = -math.inf, 6
    options: dict[str, Any] = {"bias": bias.bfloat16(), "schedule": schedule, "entropy_gradient": False}
    logprob, _ = linear_logprob(h, w, target, **options)
    got = torch.autograd.grad(logprob.sum(), (h, w))
    x, y = leaf(hidden, torch.float64), leaf(weight, torch.float64)
    logits = linear(x, y, bias.bfloat16().double().clamp(min=-1e300))
    want, _ = plain_statistics(logits, target, 1.0, None)
    assert relative_error(logprob.detach(), want.detach()) <= 1e-4
    for a, b in zip(got, torch.autograd.grad(want.sum(), (x, y)), strict=True):
        assert rms_error([a], [b], torch.bfloat16) <= 2**-7


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("schedule", BF16_SCHEDULES)
def test_repeats_bitwise(schedule: str | None, level: Any) -> None:
    skip_without_copies(schedule)
    problem = Problem((200, 0, 57, 255), 256, 5003)
    problem.config = LossConfig(loss_type="grpo", importance_sampling_level=level)
    assert_repeats(partial(problem.ours, schedule=schedule, chunk_size=256))


@pytest.mark.parametrize("schedule", BF16_SCHEDULES)
def test_nothing_waits(schedule: str | None) -> None:
    """Without a mask and with a loss whose tokens are on their own; so does `linear_logprob`."""
    skip_without_copies(schedule)
    problem = Problem((200, 57, 255), 256, 5003)
    for run in (partial(problem.ours, schedule=schedule, chunk_size=128), partial(_logprob_run, problem, schedule)):
        run()
        with no_sync():
            run()


def _logprob_run(problem: Problem, schedule: str | None) -> list[Tensor]:
    h, w = leaf(problem.hidden), leaf(problem.weight)
    options: dict[str, Any] = {"schedule": schedule, "entropy_gradient": False, "chunk_size": 128}
    logprob, entropy = linear_logprob(h, w, problem.target, **options)
    return [logprob.detach(), entropy, *torch.autograd.grad((logprob * problem.old).sum(), (h, w))]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("schedule", BF16_SCHEDULES)
def test_captured_in_a_graph(schedule: str | None, level: Any, masked: bool) -> None:
    """Replays see changed data, the mask included. A graph cannot leave masked rows out: the sums' order differs."""
    skip_without_copies(schedule)
    problem = Problem((200, 57, 255), 256, 5003)
    problem.config = LossConfig(loss_type="grpo", importance_sampling_level=level)
    mask = normal(5, 512) > -0.5 if masked else None
    run = partial(problem.ours, schedule=schedule, mask=mask)
    graph, outputs = replayed(run, "relaxed" if masked else "global")
    for _ in range(2):
        for x in (problem.hidden, problem.target, problem.advantage, problem.old, *([] if mask is None else [mask])):
            x.copy_(x.flip(0))
        graph.replay()
        for a, b in zip(outputs, run(), strict=True):
            assert relative_error(a, b.double()) <= (2**-7 if masked or level == "sequence" else 0.0)


@pytest.mark.parametrize("schedule", ["epilogue", "recomputed"])
def test_linear_logprob_in_a_graph(schedule: str) -> None:
    skip_without_copies(schedule)
    problem = Problem((512,), 256, 5003)
    run = partial(_logprob_run, problem, schedule)
    graph, outputs = replayed(run)
    problem.hidden.copy_(problem.hidden.flip(0))
    problem.old.copy_(problem.old.flip(0))
    graph.replay()
    assert_equal(outputs, run())


@pytest.mark.parametrize("schedule", BF16_SCHEDULES)
def test_on_another_stream(schedule: str | None) -> None:
    skip_without_copies(schedule)
    problem = Problem((200, 57, 255), 256, 5003)
    want, side = problem.ours(schedule=schedule), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = problem.ours(schedule=schedule)
    side.synchronize()
    assert_equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("schedule", BF16_SCHEDULES)
def test_on_the_second_device(schedule: str | None) -> None:
    skip_without_copies(schedule)
    problem = Problem((200, 57, 255), 256, 5003)
    want = problem.ours(schedule=schedule)
    for name in ("hidden", "weight", "target", "advantage", "bounds", "old"):
        setattr(problem, name, getattr(problem, name).to("cuda:1"))
    assert_equal([x.to("cuda:0") for x in problem.ours(schedule=schedule)], want)


@pytest.mark.parametrize("schedule", BF16_SCHEDULES)
def test_lengths_change_without_compiling(schedule: str | None) -> None:
    skip_without_copies(schedule)

    def run(*lengths: int) -> None:
        for level in ("token", "sequence"):
            problem = Problem(lengths, 64, 1003)
            problem.config = LossConfig(loss_type="grpo", importance_sampling_level=level)
            problem.ours(schedule=schedule, chunk_size=128)
            problem.ours(schedule=schedule, mask=normal(5, sum(lengths)) > 0)

    run(64, 64, 128)
    with compilations() as seen:
        run(17)
        run(3, 0, 14)
        run(*range(20))
        run(500, 1)
    assert not seen


@pytest.mark.parametrize("schedule", [None, "recomputed"])
def test_compiled_whole(schedule: Any) -> None:
    problem = Problem((200, 57, 255), 256, 5003)
    shared = (problem.target, problem.advantage, problem.bounds)

    def call(h: Tensor, w: Tensor) -> Tensor:
        return 2 * linear_grpo_loss(h * 1.0, w, *shared, old_logprob=problem.old, schedule=schedule).loss

    def gradients(function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        h, w = leaf(problem.hidden), leaf(problem.weight)
        return list(torch.autograd.grad(function(h, w), (h, w)))

    assert_equal(gradients(torch.compile(call, fullgraph=True)), gradients(call))


@pytest.mark.parametrize(("trainable", "limit"), [(True, 6.6e9), (False, 1.5e9)])
@pytest.mark.parametrize("num_rows", [8192, 32_768])
def test_memory(num_rows: int, trainable: bool, limit: float) -> None:
    """Bytes beyond inputs and returned gradients, whatever N: D = 4096, V = 128256, bf16."""
    D, V = 4096, 128_256
    Problem((64,), 64, 128).ours()  # cuBLAS's workspace
    h = normal(0, num_rows, D, dtype=torch.bfloat16).requires_grad_()
    w = torch.empty(V, D, dtype=torch.bfloat16, device="cuda")
    w.normal_(std=0.02, generator=torch.Generator("cuda").manual_seed(1)).requires_grad_(trainable)
    target, advantage, bounds = targets(num_rows, V), normal(2, 1), boundaries(num_rows)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with watch_plans() as plans:
        loss = linear_grpo_loss(h, w, target, advantage, bounds).loss
    loss.backward()
    torch.cuda.synchronize()
    returned = sum(x.grad.numel() * x.grad.element_size() for x in (h, w) if x.grad is not None)
    extra = torch.cuda.max_memory_allocated() - before - returned
    assert extra <= limit, f"{extra / 1e9:.2f} GB with {plans[0]}"
