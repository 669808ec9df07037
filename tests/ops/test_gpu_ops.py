"""On a GPU: the ops on log-probs, logits and rewards against float64, at size, captured, compiled, without waiting.

The head's tests are in test_gpu_head.py, which takes its tools from here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import GroupRewards, LossConfig, gae, group_advantages, grpo_loss, token_logprob
from fastgrpo_kernels.gae.reference import gae_reference
from fastgrpo_kernels.group_advantages.reference import group_advantages_reference
from fastgrpo_kernels.grpo_loss.config import LOSS_TYPES
from fastgrpo_kernels.grpo_loss.reference import grpo_loss_reference
from fastgrpo_kernels.token_logprob.reference import token_logprob_reference

from .fuzz import plain_statistics, relative_error, rms_error

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VOCABULARIES = (151_936, 128_256, 32_001)
Run = Callable[[], list[Tensor]]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, device="cuda")).to(dtype)


def targets(num_rows: int, vocab_size: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randint(0, vocab_size, (num_rows,), generator=generator, device="cuda")


def boundaries(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def leaf(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.detach().to(dtype or x.dtype, copy=True).requires_grad_()


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Waiting for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The Triton kernels that are compiled, or loaded from the disk's cache, in the block."""
    from triton import knobs

    seen: list[str] = []
    before = knobs.compilation.listener

    def record(*, src: Any, **_: Any) -> None:
        seen.append(src.name)

    knobs.compilation.listener = record
    try:
        yield seen
    finally:
        knobs.compilation.listener = before


def replayed(run: Run, mode: str = "global") -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of `run` and the tensors that a replay fills; nothing has run in it yet.

    mode: "relaxed" where the capture launches kernels that the warm-up does not: "global" forbids to load them.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        outputs = run()
    return graph, outputs


def assert_repeats(run: Run, times: int = 50) -> None:
    """Bitwise, while another stream keeps the GPU busy."""
    first, load = run(), normal(9, 2048, 2048, dtype=torch.bfloat16)
    busy = torch.cuda.Stream()
    busy.wait_stream(torch.cuda.current_stream())
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(times):
        with torch.cuda.stream(busy):
            for _ in range(4):
                load @ load
        for a, b in zip(run(), first, strict=True):
            wrong += (a != b).sum()
    torch.cuda.synchronize()
    assert int(wrong) == 0


LOSS_ROWS = (37, 0, 300, 1, 174)
LEVELS = ("token", "sequence")


def loss_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Any]]:
    """logprob, (advantage, cu_seqlens), keywords."""
    N = sum(LOSS_ROWS)
    logprob = -normal(0, N).abs() - 0.1
    near = [(logprob + 0.1 * normal(seed, N)).to(dtype) for seed in (1, 2, 3)]
    keywords = dict(zip(("old_logprob", "ref_logprob", "sampling_logprob"), near, strict=True))
    return logprob.to(dtype), (normal(4, len(LOSS_ROWS)).to(dtype), boundaries(*LOSS_ROWS)), keywords


def loss_config(loss_type: str, level: str) -> LossConfig:
    options: Any = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1, "max_completion_length": 9}
    return LossConfig(**options, epsilon_high=5.0, entropy_coef=0.01)


def token_logprob_run(logits: Tensor, target: Tensor, upstream: Tensor) -> list[Tensor]:
    x = leaf(logits)
    logprob, entropy = token_logprob(x, target)
    (grad,) = torch.autograd.grad((logprob * upstream).sum() + entropy.sum(), x)
    return [logprob.detach(), entropy.detach(), grad]


def grpo_loss_run(logprob: Tensor, shared: tuple[Any, Tensor], config: LossConfig, **keywords: Any) -> list[Tensor]:
    x, entropy = leaf(logprob), leaf(logprob.detach().abs())
    loss = grpo_loss(x, *shared, entropy=entropy, config=config, **keywords).loss
    grads = torch.autograd.grad(loss, (x, entropy), allow_unused=True)
    return [loss.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 1000, *VOCABULARIES])
def test_token_logprob(vocab_size: int, dtype: torch.dtype) -> None:
    logits, target, upstream = normal(0, 48, vocab_size, dtype=dtype, scale=4), targets(48, vocab_size), normal(2, 48)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        x = leaf(logits, dtype)
        logprob, entropy = plain_statistics(x, target, 1.0, None)
        total = (logprob * upstream.to(dtype)).sum() + entropy.sum()
        return [logprob.detach(), entropy.detach(), *torch.autograd.grad(total, x)]

    exact, got = plain(torch.float64), token_logprob_run(logits, target, upstream)
    for ours, theirs, want in zip(got, plain(dtype), exact, strict=True):
        assert rms_error([ours], [want], dtype) <= 1.5 * rms_error([theirs], [want], dtype) + 1e-6


def test_rows_of_logits_past_2_to_the_31() -> None:
    N, V = 17_000, 128_256
    assert N * V > 2**31
    logits, target = torch.empty(N, V, dtype=torch.bfloat16, device="cuda"), targets(N, V)
    logits.normal_(generator=torch.Generator("cuda").manual_seed(0))
    upstream = normal(2, N)
    logprob, entropy, grad = token_logprob_run(logits, target, upstream)
    last = slice(N - 16, N)
    x = leaf(logits[last], torch.float64)
    want = token_logprob_reference(x, target[last])
    (slope,) = torch.autograd.grad((want[0] * upstream[last]).sum() + want[1].sum(), x)
    assert relative_error(logprob[last], want[0].detach()) <= 1e-5
    assert relative_error(entropy[last], want[1].detach()) <= 1e-5
    assert relative_error(grad[last], slope) <= 2**-8


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_grpo_loss(loss_type: str, level: str) -> None:
    logprob, shared, keywords = loss_case()
    config = loss_config(loss_type, level)
    mask = normal(5, logprob.numel()) > -0.5
    got = grpo_loss_run(logprob.masked_fill(~mask, math.nan), shared, config, mask=mask, **keywords)
    x, entropy = leaf(logprob, torch.float64), leaf(logprob.abs(), torch.float64)
    wide = {name: value.double() for name, value in keywords.items()}
    loss = grpo_loss_reference(x, shared[0].double(), shared[1], config, entropy=entropy, mask=mask, **wide)
    for a, b in zip(got, [loss.detach(), *torch.autograd.grad(loss, (x, entropy))], strict=True):
        assert relative_error(a, b) <= 1e-4


@pytest.mark.parametrize("level", LEVELS)
def test_a_sequence_of_70000_tokens_and_70000_sequences(level: str) -> None:
    config = loss_config("grpo", level)
    for bounds in (boundaries(5, 70_000, 3), torch.arange(70_001, dtype=torch.int32, device="cuda")):
        N, S = int(bounds[-1]), bounds.numel() - 1
        logprob, advantage = -normal(0, N).abs(), normal(1, S)
        keywords = {"old_logprob": logprob + 0.01 * normal(2, N), "ref_logprob": logprob + 0.01 * normal(3, N)}
        got = grpo_loss_run(logprob, (advantage, bounds), config, **keywords)
        x, entropy = leaf(logprob, torch.float64), leaf(logprob.abs(), torch.float64)
        wide = {name: value.double() for name, value in keywords.items()}
        loss = grpo_loss_reference(x, advantage.double(), bounds, config, entropy=entropy, **wide)
        for a, b in zip(got, [loss.detach(), *torch.autograd.grad(loss, (x, entropy))], strict=True):
            assert relative_error(a, b) <= 1e-4
        rewards, values = normal(4, N), normal(5, N)
        want = gae_reference(rewards.double(), values.double(), bounds, 1.0, 0.95)
        for a, b in zip(gae(rewards, values, bounds), want, strict=True):
            assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_group_advantages(baseline: str, scale: str) -> None:
    rewards, groups = normal(0, 9000).round(decimals=1), torch.arange(9000, device="cuda") // 9
    rewards[normal(1, 9000) > 1] = math.nan
    want = group_advantages_reference(rewards.double(), groups, baseline, scale, 1e-4)
    got = group_advantages(rewards, groups, baseline=baseline, scale=scale)
    assert relative_error(got, want) <= 1e-5
    assert torch.equal(got == 0, want == 0)


def _runs() -> dict[str, tuple[Callable[..., list[Tensor]], list[Tensor]]]:
    """By name, an op and its tensors, all of which a replay may find changed."""
    logprob, (advantage, bounds), keywords = loss_case()
    N, config = logprob.numel(), loss_config("grpo", "sequence")
    groups = torch.zeros(len(LOSS_ROWS), dtype=torch.int64, device="cuda")

    def loss(logprob: Tensor, advantage: Tensor, old: Tensor, ref: Tensor, mask: Tensor) -> list[Tensor]:
        return grpo_loss_run(logprob, (advantage, bounds), config, old_logprob=old, ref_logprob=ref, mask=mask > 0)

    def by_rewards(logprob: Tensor, rewards: Tensor) -> list[Tensor]:
        return grpo_loss_run(logprob, (GroupRewards(rewards, groups), bounds), LossConfig())

    near = [keywords["old_logprob"], keywords["ref_logprob"]]
    target = targets(N, 5003)
    return {
        "token_logprob": (lambda x, up: token_logprob_run(x, target, up), [normal(6, N, 5003), normal(7, N)]),
        "grpo_loss": (loss, [logprob, advantage, *near, normal(8, N)]),
        "grpo_loss of rewards": (by_rewards, [logprob, advantage]),
        "group_advantages": (lambda r: [group_advantages(r, groups)], [advantage]),
        "gae": (lambda r, v: [*gae(r, v, bounds)], [normal(10, N), normal(11, N)]),
    }


NAMES = ("token_logprob", "grpo_loss", "grpo_loss of rewards", "group_advantages", "gae")


@pytest.mark.parametrize("name", NAMES)
def test_repeats_bitwise(name: str) -> None:
    function, inputs = _runs()[name]
    assert_repeats(lambda: function(*inputs))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits(name: str) -> None:
    function, inputs = _runs()[name]
    function(*inputs)
    with no_sync():
        function(*inputs)


@pytest.mark.parametrize("name", NAMES)
def test_captured_in_a_graph(name: str) -> None:
    function, inputs = _runs()[name]
    graph, outputs = replayed(lambda: function(*inputs))
    for _ in range(2):
        for x in inputs:
            x.copy_(x.flip(0) * 0.9)
        graph.replay()
        assert_equal(outputs, function(*inputs))


@pytest.mark.parametrize("name", NAMES)
def test_on_another_stream(name: str) -> None:
    function, inputs = _runs()[name]
    want, side = function(*inputs), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = function(*inputs)
    side.synchronize()
    assert_equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("name", NAMES)
def test_on_the_second_device(name: str) -> None:
    """Its tensors are there while the current device is the first."""
    rewards = torch.tensor([0.0, 1.0, 3.0])
    groups, bounds = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 3], dtype=torch.int32)
    calls: dict[str, Callable[[str], list[Tensor]]] = {
        "token_logprob": lambda d: [*token_logprob(torch.eye(3, 9).to(d), torch.arange(3).to(d))],
        "grpo_loss": lambda d: [grpo_loss(rewards.to(d), rewards[:2].to(d), bounds.to(d)).loss],
        "grpo_loss of rewards": lambda d: [
            grpo_loss(rewards.to(d), GroupRewards(rewards[:2].to(d), groups[:2].to(d)), bounds.to(d)).loss
        ],
        "group_advantages": lambda d: [group_advantages(rewards.to(d), groups.to(d))],
        "gae": lambda d: [*gae(rewards.to(d), rewards.to(d), bounds.to(d))],
    }
    for a, b in zip(calls[name]("cuda:1"), calls[name]("cpu"), strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), b)


def test_lengths_change_without_compiling() -> None:
    def everything(*lengths: int) -> None:
        N, S, bounds = sum(lengths), len(lengths), boundaries(*lengths)
        logprob, rewards = -normal(0, N).abs(), normal(1, S)
        groups = torch.arange(S, device="cuda") // 2
        for level in LEVELS:
            grpo_loss_run(
                logprob, (GroupRewards(rewards, groups), bounds), loss_config("grpo", level), ref_logprob=logprob
            )
        group_advantages(rewards, groups)
        gae(logprob, logprob, bounds)
        token_logprob_run(normal(2, N, 1003), targets(N, 1003), logprob)

    everything(64, 64, 128)
    with compilations() as seen:
        everything(1)
        everything(3, 0, 14)
        everything(*range(40))
        everything(4096)
    assert not seen


def test_compiled_whole() -> None:
    logprob, shared, keywords = loss_case()
    config = loss_config("grpo", "token")

    def call(x: Tensor) -> Tensor:
        return grpo_loss(x, *shared, entropy=x.abs(), config=config, **keywords).loss

    x, y = leaf(logprob), leaf(logprob)
    torch.compile(call, fullgraph=True)(x).backward()
    call(y).backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-9)
