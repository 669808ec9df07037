"""`linear_grpo_loss`: both schedules against plain PyTorch in float64, and what the fused one saves."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import GroupRewards, LossConfig, LossOutput, grpo_loss, linear_grpo_loss, linear_logprob
from fastgrpo_kernels.grpo_loss.reference import grpo_loss_reference
from fastgrpo_kernels.head.host import TorchHead
from fastgrpo_kernels.linear_grpo_loss.reference import linear_grpo_loss_reference

from .cases import LOSS_TYPES, configs, make_case, make_config, relative_error
from .oracle import Case

LENGTHS = [4, 0, 7, 1, 3, 6, 0]
HEAD: dict[str, Any] = {"logit_scale": 1.4, "softcap": 5.0, "temperature": 0.8}


class Problem:
    """Hidden states, head and loss arguments whose log-prob scale is that of the head."""

    def __init__(self, seed: int = 0, d: int = 6, v: int = 19, spread: float = 0.2, **options: Any) -> None:
        g = torch.Generator().manual_seed(seed)
        self.lengths = options.pop("lengths", LENGTHS)
        n = sum(self.lengths)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.hidden, self.weight, self.bias = normal(n, d), normal(v, d), normal(v)
        self.target = torch.randint(0, v, (n,), generator=g)
        self.case: Case = make_case(seed, self.lengths, **options)
        logprob, _ = linear_logprob(self.hidden, self.weight, self.target, bias=self.bias, **HEAD)
        for name in ("old_logprob", "ref_logprob", "sampling_logprob"):
            if (given_logprob := getattr(self.case, name)) is not None:
                setattr(self.case, name, torch.where(given_logprob.isnan(), math.nan, logprob + spread * normal(n)))

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def ours(self, config: LossConfig, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, ...]:
        """loss, dhidden, dweight, dbias, output."""
        h, w, b = (x.detach().to(dtype).requires_grad_() for x in self.inputs)
        arguments = {"bias": b, "config": config, **HEAD, **self.case.keywords(dtype), **options}
        output = linear_grpo_loss(h, w, self.target, self.case.advantage.to(dtype), self.case.cu_seqlens, **arguments)
        return (output.loss.detach(), *torch.autograd.grad(output.loss, (h, w, b)), output)

    def plain(self, config: LossConfig) -> tuple[Tensor, ...]:
        h, w, b = (x.detach().requires_grad_() for x in self.inputs)
        arguments = {"bias": b, **HEAD, **self.case.keywords()}
        loss = linear_grpo_loss_reference(
            h, w, self.target, self.case.advantage, self.case.cu_seqlens, config, **arguments
        )
        loss = loss + 0 * (h[:0].sum() + w[:0].sum() + b[:0].sum())
        return (loss.detach(), *torch.autograd.grad(loss, (h, w, b)))


def assert_close(got: tuple[Any, ...], want: tuple[Any, ...], tolerance: float = 1e-10) -> None:
    for a, b in zip(got[:4], want[:4], strict=True):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * max(1e-3, float(b.abs().max()) if b.numel() else 0)
        )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("chunk_size", [None, 1, 5, 9, 21])
def test_matches_plain_pytorch(loss_type: str, level: str, chunk_size: int | None) -> None:
    problem = Problem(masked=0.2, missing=0.1)
    extras: list[dict[str, Any]] = [
        {},
        {"beta": 0.1, "entropy_coef": 0.05, "sampling_correction": "token_truncate"},
        {"off_policy_mask_threshold": 0.02},
        {"top_entropy_quantile": 0.6, "beta": 0.1, "kl_bias_correction": True},
    ]
    for extra in extras:
        config = make_config(loss_type, importance_sampling_level=level, **extra)
        assert_close(problem.ours(config, chunk_size=chunk_size), problem.plain(config))


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    config=configs(),
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(0, 5), max_size=5),
    chunk_size=st.sampled_from([None, 1, 2, 4, 7]),
    masked=st.sampled_from([0.0, 0.4, 1.0]),
    per_token=st.booleans(),
)
def test_fuzz(
    config: LossConfig, seed: int, lengths: list[int], chunk_size: int | None, masked: float, per_token: bool
) -> None:
    problem = Problem(seed, lengths=lengths, masked=masked, missing=0.2, per_token=per_token)
    assert_close(problem.ours(config, chunk_size=chunk_size), problem.plain(config))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck(level: str) -> None:
    problem = Problem(2, d=3, v=5, lengths=[3, 0, 2], masked=0.2)
    config = make_config("sapo", importance_sampling_level=level, beta=0.2, entropy_coef=0.1)
    for chunk_size in (2, 3, 5):  # recomputed, fused in several chunks, fused in one

        def loss(h: Tensor, w: Tensor, b: Tensor, chunk_size: int = chunk_size) -> Tensor:
            arguments = {**HEAD, **problem.case.keywords(), "config": config, "chunk_size": chunk_size}
            return linear_grpo_loss(
                h, w, problem.target, problem.case.advantage, problem.case.cu_seqlens, bias=b, **arguments
            ).loss

        assert torch.autograd.gradcheck(loss, tuple(x.detach().requires_grad_() for x in problem.inputs))


class Gemms:
    """Counts rows that enter the LM head forward, and rows whose logit gradients come back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward = self.backward = self.largest = 0
        logits, accumulate = TorchHead._logits, TorchHead._accumulate

        def count_logits(head: TorchHead, rows: slice | Tensor) -> Tensor:
            out = logits(head, rows)
            self.forward += out.shape[0]
            self.largest = max(self.largest, out.shape[0])
            return out

        def count_accumulate(head: TorchHead, rows: slice | Tensor, grad: Tensor) -> None:
            self.backward += grad.shape[0]
            accumulate(head, rows, grad)

        monkeypatch.setattr(TorchHead, "_logits", count_logits)
        monkeypatch.setattr(TorchHead, "_accumulate", count_accumulate)


@pytest.mark.parametrize(
    ("options", "chunk_size", "fused"),
    [
        ({}, 2, True),  # token-level: cut anywhere
        ({"beta": 0.1, "sampling_correction": "token_mask", "entropy_coef": 0.1}, 2, True),
        ({"importance_sampling_level": "sequence"}, 7, True),  # whole sequences fit
        ({"importance_sampling_level": "sequence"}, 6, False),  # one is longer
        ({"loss_type": "vespo"}, 7, True),
        ({"loss_type": "vespo"}, 6, False),
        ({"off_policy_mask_threshold": 0.1}, 6, False),
        ({"sampling_correction": "sequence_mask"}, 6, False),
        ({"top_entropy_quantile": 0.5}, 20, False),  # the quantile of the whole call
        ({"top_entropy_quantile": 0.5}, 21, True),
    ],
)
def test_schedule(options: dict[str, Any], chunk_size: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    gemms = Gemms(monkeypatch)
    problem.ours(make_config(**{"loss_type": "dapo", **options}), chunk_size=chunk_size)
    assert gemms.largest <= chunk_size
    # Recomputing goes over the rows again that have a gradient: not those of clipped tokens or zero advantages.
    assert gemms.forward == sum(LENGTHS) + (0 if fused else gemms.backward)
    assert gemms.backward == sum(LENGTHS) if fused else 0 < gemms.backward <= sum(LENGTHS)


def test_threshold_given_needs_no_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    problem.case.entropy_threshold = 1.5
    gemms = Gemms(monkeypatch)
    got = problem.ours(LossConfig(top_entropy_quantile=0.5), chunk_size=4)
    assert gemms.forward == sum(LENGTHS)
    assert_close(got, problem.plain(LossConfig(top_entropy_quantile=0.5)))


def test_masked_rows_never_meet_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(masked=0.4)
    mask = problem.case.mask
    assert mask is not None
    want = problem.ours(LossConfig(beta=0.1), chunk_size=5)
    gemms = Gemms(monkeypatch)
    problem.hidden[~mask] = math.nan
    problem.hidden[(~mask).nonzero()[0, 0], 0] = math.inf
    problem.target[~mask] = -100
    for x in (problem.case.old_logprob, problem.case.ref_logprob, problem.case.sampling_logprob):
        assert x is not None
        x[~mask] = math.nan
    got = problem.ours(LossConfig(beta=0.1), chunk_size=5)
    assert gemms.forward == gemms.backward == int(mask.sum())
    for a, b in zip(got[:4], want[:4], strict=True):
        assert torch.equal(a, b)
    assert not got[1][~mask].any()
    assert not got[4].logprob[~mask].any()
    assert got[4].logprob[mask].all()


def test_outputs_are_those_of_the_two_ops_apart() -> None:
    problem = Problem(masked=0.2, missing=0.1)
    for chunk_size, level in ((4, "token"), (7, "sequence"), (2, "sequence")):
        config = make_config("grpo", importance_sampling_level=level, beta=0.1, entropy_coef=0.1)
        output = problem.ours(config, chunk_size=chunk_size)[4]
        logprob, entropy = linear_logprob(problem.hidden, problem.weight, problem.target, bias=problem.bias, **HEAD)
        apart = grpo_loss(
            logprob,
            problem.case.advantage,
            problem.case.cu_seqlens,
            entropy=entropy,
            config=config,
            **problem.case.keywords(),
        )
        mask = problem.case.mask
        torch.testing.assert_close(output.logprob[mask], logprob[mask])
        torch.testing.assert_close(output.entropy[mask], entropy[mask])
        assert LossOutput.reduce([output]) == pytest.approx(LossOutput.reduce([apart]), rel=1e-10)


@pytest.mark.parametrize("chunk_size", [2, 21])
def test_frozen_parts_and_no_grad(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    config = LossConfig(importance_sampling_level="sequence")
    want = problem.ours(config, chunk_size=chunk_size)
    arguments = {**HEAD, **problem.case.keywords(), "config": config, "chunk_size": chunk_size}
    shared = (problem.target, problem.case.advantage, problem.case.cu_seqlens)
    for i in range(3):
        inputs = [x.detach().clone().requires_grad_(i == j) for j, x in enumerate(problem.inputs)]
        linear_grpo_loss(inputs[0], inputs[1], *shared, bias=inputs[2], **arguments).loss.backward()
        assert [x.grad is not None for x in inputs] == [i == j for j in range(3)]
        torch.testing.assert_close(inputs[i].grad, want[1 + i], rtol=1e-12, atol=1e-14)
    gemms = Gemms(monkeypatch)
    with torch.no_grad():
        inputs = [x.detach().clone().requires_grad_() for x in problem.inputs]
        output = linear_grpo_loss(inputs[0], inputs[1], *shared, bias=inputs[2], **arguments)
    assert (gemms.forward, gemms.backward) == (sum(LENGTHS), 0)
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, want[0])


@pytest.mark.parametrize("chunk_size", [2, 21])
def test_upstream_gradient_and_second_backward(chunk_size: int) -> None:
    problem = Problem()
    config = LossConfig(importance_sampling_level="sequence", entropy_coef=0.1)
    want = problem.ours(config, chunk_size=chunk_size)
    h, w, b = (x.detach().requires_grad_() for x in problem.inputs)
    arguments = {**HEAD, **problem.case.keywords(), "config": config, "chunk_size": chunk_size, "bias": b}
    out = linear_grpo_loss(h, w, problem.target, problem.case.advantage, problem.case.cu_seqlens, **arguments)
    for scale in (-3.0, 0.5):
        grads = torch.autograd.grad(out.loss * scale, (h, w, b), retain_graph=True)
        for got, base in zip(grads, want[1:4], strict=True):
            torch.testing.assert_close(got, scale * base, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_partition_invariance(loss_type: str, level: str) -> None:
    lengths = [9, 2, 0, 14, 5, 1, 8]
    problem = Problem(3, d=16, v=64, spread=0.1, lengths=lengths)
    config = make_config(loss_type, importance_sampling_level=level, beta=0.05, entropy_coef=0.01)
    whole = problem.ours(config, torch.float32, num_sequences=7, num_tokens=39)
    bounds = problem.case.cu_seqlens.tolist()
    for cuts in ([0, 3, 7], [0, 1, 2, 4, 5, 7], list(range(8))):
        loss, grad_hidden, grad_weight = 0.0, [], torch.zeros(64, 16)
        for first, last in pairwise(cuts):
            rows = slice(bounds[first], bounds[last])
            h, w = problem.hidden[rows].float().requires_grad_(), problem.weight.float().requires_grad_()
            keywords = problem.case.keywords(torch.float32)
            for name in ("old_logprob", "ref_logprob", "sampling_logprob"):
                keywords[name] = keywords[name][rows]
            keywords |= {"num_sequences": 7, "num_tokens": 39}
            out = linear_grpo_loss(
                h,
                w,
                problem.target[rows],
                problem.case.advantage[first:last].float(),
                problem.case.cu_seqlens[first : last + 1] - bounds[first],
                bias=problem.bias.float(),
                config=config,
                **HEAD,
                **keywords,
            )
            out.loss.backward()
            loss += float(out.loss.detach())
            assert h.grad is not None
            assert w.grad is not None
            grad_hidden.append(h.grad)
            grad_weight += w.grad
        assert loss == pytest.approx(float(whole[0]), rel=1e-6, abs=1e-7)
        assert relative_error(torch.cat(grad_hidden), whole[1]) <= 1e-6
        assert relative_error(grad_weight, whole[2]) <= 1e-6


@pytest.mark.parametrize("chunk_size", [3, None])
def test_bitwise_repeatable(chunk_size: int | None) -> None:
    problem = Problem(4, d=32, v=300)
    config = LossConfig(beta=0.1, entropy_coef=0.1)
    first, second = (problem.ours(config, torch.float32, chunk_size=chunk_size) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_error_is_at_most_plain_pytorchs(dtype: torch.dtype, level: str) -> None:
    problem = Problem(5, d=64, v=500, lengths=[30, 20, 14], ref=False, sampling=False)
    problem.weight *= 0.2
    h, w = problem.hidden.to(dtype), problem.weight.to(dtype)
    noise = 0.05 * torch.randn(64, generator=torch.Generator().manual_seed(7))
    old = (linear_logprob(h, w, problem.target)[0] + noise).to(dtype)
    advantage = problem.case.advantage.to(dtype)
    config = make_config("grpo", importance_sampling_level=level)

    def run(kind: str) -> tuple[Tensor, ...]:
        hidden, weight = (x.to(torch.float64 if kind == "exact" else dtype).requires_grad_() for x in (h, w))
        shared = (problem.target, advantage.to(hidden.dtype), problem.case.cu_seqlens)
        if kind == "ours":
            loss = linear_grpo_loss(hidden, weight, *shared, old_logprob=old, config=config, chunk_size=30).loss
        else:
            logits = torch.nn.functional.linear(hidden, weight)
            logprob = torch.log_softmax(logits, -1).gather(1, problem.target[:, None])[:, 0]
            loss = grpo_loss_reference(logprob, *shared[1:], config, old_logprob=old.to(logprob.dtype))
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    exact, ours, plain = run("exact"), run("ours"), run("plain")
    assert ours[0].dtype == torch.float32
    for got, other, want in zip(ours, plain, exact, strict=True):
        assert relative_error(got, want) <= 1.5 * relative_error(other, want) + 1e-6


def test_group_rewards() -> None:
    problem = Problem(6, masked=0.2, ref=False, sampling=False)
    rewards = torch.tensor([1.0, 0.0, math.nan, 2.0, 5.0, 5.0, 1.0], dtype=torch.float64)
    record = GroupRewards(rewards, torch.tensor([0, 0, 0, 0, 1, 1, 1]))
    failed = rewards.isnan().repeat_interleave(torch.tensor(LENGTHS))
    assert problem.case.mask is not None
    for chunk_size in (4, None):
        arguments = {**HEAD, **problem.case.keywords(), "bias": problem.bias, "chunk_size": chunk_size}
        h = problem.hidden.detach().clone().requires_grad_()
        got = linear_grpo_loss(h, problem.weight, problem.target, record, problem.case.cu_seqlens, **arguments)
        (grad,) = torch.autograd.grad(got.loss, h)
        assert not grad[failed].any()
        arguments |= {"mask": problem.case.mask & ~failed, "num_sequences": 6}
        want = linear_grpo_loss(
            h, problem.weight, problem.target, record.advantages(), problem.case.cu_seqlens, **arguments
        )
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(grad, torch.autograd.grad(want.loss, h)[0])


def test_errors_name_the_argument() -> None:
    problem = Problem()
    shared = (problem.target, problem.case.advantage, problem.case.cu_seqlens)
    with pytest.raises(ValueError, match=r"advantage: expected shape \[S\] = \[7\] or \[N\] = \[21\], got \[5\]"):
        linear_grpo_loss(problem.hidden, problem.weight, problem.target, torch.ones(5), problem.case.cu_seqlens)
    with pytest.raises(ValueError, match=r"target: expected token ids in \[0, V\) with V = 19"):
        linear_grpo_loss(problem.hidden, problem.weight, problem.target + 19, *shared[1:])
    with pytest.raises(ValueError, match=r"mask: expected shape \[N\] = \[21\], got \[20\]"):
        linear_grpo_loss(problem.hidden, problem.weight, *shared, mask=torch.ones(20, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ref_logprob: expected a tensor with beta=0.1"):
        linear_grpo_loss(problem.hidden, problem.weight, *shared, config=LossConfig(beta=0.1))
