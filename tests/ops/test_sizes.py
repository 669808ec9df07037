# mypy: disable-error-code="call-arg, arg-type, misc"
"""Sizes and values at the ends: real vocabularies, long sequences, many sequences, more than 2^31 logits, nothing.

On the PyTorch path, against plain PyTorch in float64. N * V past 2^31 with all gradients takes a GPU: test_gpu_head.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import (
    GroupRewards,
    LossConfig,
    gae,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    token_logprob,
    watch_plans,
)
from fastgrpo_kernels.backend import INTERPRETED
from fastgrpo_kernels.grpo_loss.config import LOSS_TYPES
from fastgrpo_kernels.grpo_loss.reference import grpo_loss_reference
from fastgrpo_kernels.linear_grpo_loss.reference import linear_grpo_loss_reference
from fastgrpo_kernels.linear_logprob.reference import linear_logprob_reference
from fastgrpo_kernels.token_logprob.reference import token_logprob_reference

from .fuzz import relative_error

pytestmark = pytest.mark.skipif(INTERPRETED, reason="sizes that the interpreter has no time for")

SEQUENCE_LEVEL: list[dict[str, Any]] = [
    {"importance_sampling_level": "sequence"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.1},
    {"loss_type": "vespo"},
    {"off_policy_mask_threshold": 0.0},
    {"sampling_correction": "sequence_truncate"},
    {"sampling_correction": "sequence_mask", "sampling_clip_max": 1e9},
]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def targets(num_rows: int, vocab_size: int) -> Tensor:
    """Random token ids, the first and the last one among them."""
    target = torch.randint(0, vocab_size, (num_rows,), generator=torch.Generator().manual_seed(1))
    target[0], target[-1] = 0, vocab_size - 1
    return target


def boundaries(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def with_gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def leaves(*inputs: Tensor, dtype: torch.dtype | None = None) -> Any:
    return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in inputs]


@pytest.mark.parametrize("vocab_size", [151_936, 128_256, 32_001])
@pytest.mark.parametrize("schedule", [None, "recomputed"])
def test_real_vocabularies(vocab_size: int, schedule: Any) -> None:
    hidden, weight, target = normal(0, 6, 12), normal(1, vocab_size, 12), targets(6, vocab_size)
    shared = (target, normal(2, 2), boundaries(4, 2))
    config = LossConfig(loss_type="grpo", importance_sampling_level="sequence", entropy_coef=0.01)
    old = linear_logprob(hidden, weight, target)[0] + 0.02 * normal(3, 6)
    ours, exact = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.float64)
    loss = linear_grpo_loss(*ours, *shared, old_logprob=old, config=config, schedule=schedule, chunk_size=4).loss
    got = with_gradients(loss, *ours)
    wide = (shared[0], shared[1].double(), shared[2])
    truth = linear_grpo_loss_reference(*exact, *wide, config, old_logprob=old.double())
    for a, b in zip(got, with_gradients(truth, *exact), strict=True):
        assert relative_error(a, b) <= 1e-4


@pytest.mark.parametrize("vocab_size", [151_936, 128_256, 32_001])
def test_logits_of_real_vocabularies(vocab_size: int) -> None:
    logits, target = 5 * normal(0, 4, vocab_size), targets(4, vocab_size)
    (ours,), (exact,) = leaves(logits), leaves(logits, dtype=torch.float64)
    got, want = token_logprob(ours, target), token_logprob_reference(exact, target)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a.detach(), b.detach()) <= 1e-5
    grads = [torch.autograd.grad(x.sum() + y.sum(), z)[0] for (x, y), z in ((got, ours), (want, exact))]
    assert relative_error(*grads) <= 1e-4


@pytest.mark.parametrize("options", SEQUENCE_LEVEL)
def test_a_sequence_of_65536_tokens(options: dict[str, Any]) -> None:
    """Between two short ones, for the loss alone and for the head, whose window it exceeds."""
    lengths = (3, 65_536 + 5, 2)
    N, V = sum(lengths), 50
    hidden, weight, target = normal(0, N, 4, dtype=torch.float64), normal(1, V, 4, dtype=torch.float64), targets(N, V)
    logprob, _ = linear_logprob(hidden, weight, target)
    near = [logprob + 1e-3 * normal(seed, N, dtype=torch.float64) for seed in (2, 3, 4)]
    keywords = dict(zip(("old_logprob", "ref_logprob", "sampling_logprob"), near, strict=True))
    config, shared = LossConfig(**options), (torch.tensor([1.0, -0.7, 0.3], dtype=torch.float64), boundaries(*lengths))

    (ours,), (exact,) = leaves(logprob), leaves(logprob)
    got = with_gradients(grpo_loss(ours, *shared, config=config, **keywords).loss, ours)
    want = with_gradients(grpo_loss_reference(exact, *shared, config, **keywords), exact)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= 1e-9

    inputs, others = leaves(hidden, weight), leaves(hidden, weight)
    with watch_plans() as plans:
        output = linear_grpo_loss(*inputs, target, *shared, config=config, **keywords, chunk_size=1000)
    assert plans[0].schedule == "recomputed"
    truth = linear_grpo_loss_reference(*others, target, *shared, config, **keywords)
    for a, b in zip(with_gradients(output.loss, *inputs), with_gradients(truth, *others), strict=True):
        assert relative_error(a, b) <= 1e-9


@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_gae_of_65536_tokens(lam: float) -> None:
    bounds = boundaries(1, 65_536 + 1, 7)
    rewards, values = normal(0, 65_545, dtype=torch.float64), normal(1, 65_545, dtype=torch.float64)
    got = gae(rewards, values, bounds, gamma=0.999, lam=lam)[0]
    want, r, v = torch.zeros_like(got), rewards.tolist(), values.tolist()
    for start, stop in ((0, 1), (1, 65_538), (65_538, 65_545)):
        running = following = 0.0
        for t in reversed(range(start, stop)):
            running = r[t] + 0.999 * following - v[t] + 0.999 * lam * running
            want[t], following = running, v[t]
    assert relative_error(got, want) <= 1e-9
    short = gae(rewards.float(), values.float(), bounds, gamma=0.999, lam=lam)[0]
    assert relative_error(short, want) <= 1e-4


@pytest.mark.parametrize("options", [{}, *SEQUENCE_LEVEL])
def test_70000_sequences(options: dict[str, Any]) -> None:
    """A third of them empty, in groups of 7, one sample in ten failed."""
    S = 70_000
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 3, (S,), generator=g)
    bounds = boundaries(*lengths.tolist())
    N, groups = int(lengths.sum()), torch.arange(S) // 7
    rewards = torch.rand(S, generator=g, dtype=torch.float64)
    rewards[torch.rand(S, generator=g) < 0.1] = math.nan
    logprob = -normal(1, N, dtype=torch.float64).abs()
    near = [logprob + 0.1 * normal(seed, N, dtype=torch.float64) for seed in (2, 3, 4)]
    keywords = dict(zip(("old_logprob", "ref_logprob", "sampling_logprob"), near, strict=True))
    config = LossConfig(**{"loss_type": "grpo", **options})
    lived = ~rewards.isnan()
    (ours,), (exact,) = leaves(logprob), leaves(logprob)
    got = with_gradients(grpo_loss(ours, GroupRewards(rewards, groups), bounds, config=config, **keywords).loss, ours)
    mean = torch.nan_to_num(rewards).view(-1, 7).sum(1) / lived.view(-1, 7).sum(1)
    centred = torch.where(lived.view(-1, 7), rewards.view(-1, 7) - mean[:, None], 0)
    std = (centred.square().sum(1) / (lived.view(-1, 7).sum(1) - 1)).sqrt()
    advantage = (centred / (std[:, None] + 1e-4)).flatten()
    assert relative_error(group_advantages(rewards, groups), advantage) <= 1e-12
    keywords |= {"mask": lived.repeat_interleave(lengths), "num_sequences": lived.sum()}
    want = with_gradients(grpo_loss_reference(exact, advantage, bounds, config, **keywords), exact)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= 1e-9


def test_more_than_2_to_the_31_logits() -> None:
    """A head of four million tokens over 520 rows, in chunks; log-probs only, from logits a * column."""
    N, V = 520, 1 << 22
    assert N * V > 2**31
    ramp = torch.linspace(-1, 1, V)[:, None]
    slope, target = normal(0, N, 1), targets(N, V)
    with torch.no_grad():
        logprob, _ = linear_logprob(slope, ramp, target)
    some = torch.tensor([0, 1, 255, N - 1])
    want, _ = linear_logprob_reference(slope[some].double(), ramp.double(), target[some])
    assert relative_error(logprob[some], want) <= 1e-6


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype: torch.dtype, softcap: float | None) -> None:
    """Of +-1e4, and one token that a bias of -inf rules out."""
    N, V = 12, 70
    hidden, weight = 1e4 * normal(0, N, V, dtype=dtype).sign(), torch.eye(V, dtype=dtype)
    bias, target = normal(1, V, dtype=dtype), targets(N, V)
    target[target == 5] = 6
    bias[5] = -math.inf
    inputs, exact = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.float64)
    got = linear_logprob(*inputs, target, bias=bias, softcap=softcap)
    finite = bias.double().clamp(min=-1e300)
    want = linear_logprob_reference(*exact, target, finite, softcap=softcap)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a.detach(), b.detach(), floor=1.0) <= (1e-9 if dtype == torch.float64 else 1e-4)
    if softcap is None:  # with one, the ruled-out token is merely -softcap
        assert got[1].isfinite().all()
    ours, theirs = (torch.autograd.grad(x.sum() + y.sum(), z) for (x, y), z in ((got, inputs), (want, exact)))
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b, floor=1e-6) <= (1e-9 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_of_zero(loss_type: str) -> None:
    """The loss is 0 and so is every gradient, exactly."""
    config = LossConfig(loss_type=loss_type, epsilon_high=5.0, max_completion_length=4)
    inputs, target = leaves(normal(0, 6, 5), normal(1, 30, 5)), targets(6, 30)
    rewards = GroupRewards(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int64))
    for advantage in (torch.zeros(3), torch.zeros(6), rewards):
        for schedule in (None, "recomputed"):
            loss = linear_grpo_loss(
                *inputs,
                target,
                advantage,
                boundaries(3, 0, 3),
                old_logprob=-3 + normal(2, 6),
                config=config,
                schedule=schedule,
            ).loss
            for x in with_gradients(loss, *inputs):
                assert not x.any()


def _every_op() -> dict[str, Any]:
    hidden, weight, target, bounds = normal(0, 40, 16), normal(1, 700, 16), targets(40, 700), boundaries(15, 0, 25)
    advantage, old = normal(2, 3), -6 + normal(3, 40)
    rewards = GroupRewards(advantage, torch.tensor([0, 0, 0]))
    config = LossConfig(importance_sampling_level="sequence", entropy_coef=0.1)

    def head(schedule: Any, chunk_size: int, frozen: bool = False) -> list[Tensor]:
        inputs = leaves(hidden) if frozen else leaves(hidden, weight)
        arguments: dict[str, Any] = {"old_logprob": old, "schedule": schedule, "chunk_size": chunk_size}
        part = config if not frozen else LossConfig(importance_sampling_level="sequence")
        heads = (inputs[0], weight) if frozen else inputs
        return with_gradients(
            linear_grpo_loss(*heads, target, advantage, bounds, config=part, **arguments).loss, *inputs
        )

    def logprobs() -> list[Tensor]:
        inputs = leaves(hidden, weight)
        logprob, entropy = linear_logprob(*inputs, target, chunk_size=7)
        return with_gradients((logprob * old).sum() + entropy.sum(), *inputs)

    def logits() -> list[Tensor]:
        (x,) = leaves(normal(4, 40, 700))
        logprob, entropy = token_logprob(x, target)
        return with_gradients((logprob * old).sum() + entropy.sum(), x)

    def loss() -> list[Tensor]:
        (x,) = leaves(old)
        return with_gradients(grpo_loss(x, rewards, bounds, old_logprob=old + 0.1).loss, x)

    return {
        "fused": lambda: head(None, 64),
        "fused by sequences": lambda: head(None, 26),
        "recomputed": lambda: head("recomputed", 7),
        "per row": lambda: head(None, 7, frozen=True),
        "linear_logprob": logprobs,
        "token_logprob": logits,
        "grpo_loss": loss,
        "group_advantages": lambda: [group_advantages(normal(5, 40), torch.arange(40) % 6)],
        "gae": lambda: [*gae(normal(6, 40), normal(7, 40), bounds)],
    }


@pytest.mark.parametrize("op", _every_op())
def test_repeats_bitwise(op: str) -> None:
    run = _every_op()[op]
    first = run()
    for _ in range(5):
        for a, b in zip(run(), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (1,), (0, 1)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_and_next_to_nothing(loss_type: str, lengths: tuple[int, ...]) -> None:
    N, S = sum(lengths), len(lengths)
    config = LossConfig(loss_type=loss_type, epsilon_high=5.0, max_completion_length=4, entropy_coef=0.1)
    inputs, others = leaves(normal(0, N, 4), normal(1, 9, 4)), leaves(normal(0, N, 4), normal(1, 9, 4))
    shared = (torch.arange(N) + 3, torch.ones(S), boundaries(*lengths))
    for schedule in (None, "recomputed"):
        got = with_gradients(linear_grpo_loss(*inputs, *shared, config=config, schedule=schedule).loss, *inputs)
        want = with_gradients(linear_grpo_loss_reference(*others, *shared, config), *others)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
