"""LoRA on the LM head: the ops with `LoRADelta` against the dense merged weight, which they never form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import LoRADelta, LossConfig, linear_grpo_loss, linear_logprob, watch_plans
from fastgrpo_kernels.grpo_loss.reference import grpo_loss_reference
from fastgrpo_kernels.head import host
from fastgrpo_kernels.linear_logprob.reference import linear_logprob_reference

from .cases import relative_error

CU = torch.tensor([0, 4, 4, 11, 12], dtype=torch.int32)
NAMES = ("hidden", "weight", "bias", "a", "b")
SEQUENCE = LossConfig(importance_sampling_level="sequence", beta=0.1)
BONUS = LossConfig(importance_sampling_level="sequence", beta=0.1, entropy_coef=0.2)
HEADS: list[dict[str, Any]] = [{}, {"logit_scale": 1.7, "softcap": 2.0, "temperature": 1.3}]


class Problem:
    """Twelve rows, and every input of the head, in float64."""

    def __init__(self, rank: int, n: int = 12, d: int = 6, v: int = 19, scale: float = 0.7) -> None:
        g = torch.Generator().manual_seed(rank)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.scale, self.n = scale, n
        self.tensors = {"hidden": normal(n, d), "weight": normal(v, d) / 2, "bias": normal(v)}
        self.tensors |= {"a": normal(rank, d) / math.sqrt(rank), "b": normal(v, rank) / 2}
        self.target = torch.randint(0, v, (n,), generator=g)
        self.advantage = normal(4)
        self.mask = torch.rand(n, generator=g) < 0.8
        self.cu_seqlens = CU if n == 12 else torch.tensor([0, n // 4, n // 2, n // 2, n], dtype=torch.int32)
        logprob, _ = merged(self, self.leaves(()), {})
        self.old, self.ref = (logprob + 0.2 * normal(n) for _ in range(2))

    def leaves(self, wanted: tuple[str, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {name: x.detach().to(dtype).requires_grad_(name in wanted) for name, x in self.tensors.items()}


Run = Callable[[Problem, dict[str, Tensor], dict[str, Any]], tuple[Tensor, ...]]


def merged(problem: Problem, t: dict[str, Tensor], head: dict[str, Any]) -> tuple[Tensor, ...]:
    """logprob and entropy with W + scale * B A, in plain PyTorch."""
    weight = t["weight"] + problem.scale * t["b"] @ t["a"]
    return linear_logprob_reference(t["hidden"], weight, problem.target, t["bias"], **head)


def merged_loss(problem: Problem, t: dict[str, Tensor], config: LossConfig, head: dict[str, Any]) -> Tensor:
    logprob, entropy = merged(problem, t, head)
    return grpo_loss_reference(
        logprob, problem.advantage.to(logprob.dtype), problem.cu_seqlens, config,
        entropy=entropy, old_logprob=problem.old, ref_logprob=problem.ref, mask=problem.mask,
    )  # fmt: skip


def ours(problem: Problem, t: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
    lora = LoRADelta(t["a"], t["b"], problem.scale)
    return linear_logprob(t["hidden"], t["weight"], problem.target, bias=t["bias"], lora=lora, **options)


def our_loss(problem: Problem, t: dict[str, Tensor], config: LossConfig, options: dict[str, Any]) -> Tensor:
    lora = LoRADelta(t["a"], t["b"], problem.scale)
    return linear_grpo_loss(
        t["hidden"], t["weight"], problem.target, problem.advantage, problem.cu_seqlens,
        bias=t["bias"], lora=lora, config=config,
        old_logprob=problem.old, ref_logprob=problem.ref, mask=problem.mask, **options,
    ).loss  # fmt: skip


def ramp(logprob: Tensor, entropy: Tensor) -> Tensor:
    weights = torch.linspace(-1, 2, logprob.numel(), dtype=logprob.dtype)
    return (weights * logprob - 0.3 * weights.flip(0) * entropy).sum()


def assert_same_gradients(got: Tensor, t: dict[str, Tensor], want: Tensor, exact: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    got.backward()
    want.backward()
    for name in NAMES:
        assert (t[name].grad is None) == (exact[name].grad is None) == (not t[name].requires_grad), name
        if t[name].requires_grad:
            torch.testing.assert_close(t[name].grad, exact[name].grad, rtol=1e-10, atol=1e-12, msg=name)


WANTED = (NAMES, ("hidden", "a", "b"), ("a",), ("b",), ("hidden", "a"))
every_wanted = pytest.mark.parametrize("wanted", WANTED, ids="-".join)
every_rank = pytest.mark.parametrize("rank", [1, 3, 8, 17])
every_head = pytest.mark.parametrize("head", HEADS, ids=["plain", "softcap"])


@every_rank
@every_head
@every_wanted
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_logprob_is_the_merged_weights(
    rank: int, head: dict[str, Any], wanted: tuple[str, ...], chunk_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "VOCAB_TILE", 7)  # several tiles, the last one short
    problem = Problem(rank)
    t, exact = problem.leaves(wanted), problem.leaves(wanted)
    got = ours(problem, t, {**head, "chunk_size": chunk_size})
    assert_same_gradients(ramp(*got), t, ramp(*merged(problem, exact, head)), exact)


@every_rank
@every_head
@every_wanted
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LossConfig(beta=0.1), {}),
        (LossConfig(beta=0.1, entropy_coef=0.2), {"chunk_size": 5}),
        (SEQUENCE, {"chunk_size": 7}),
        (SEQUENCE, {"chunk_size": 2}),
        (BONUS, {"chunk_size": 2}),
        (BONUS, {"schedule": "recomputed"}),
    ],
)
def test_loss_is_the_merged_weights(
    rank: int, head: dict[str, Any], wanted: tuple[str, ...], config: LossConfig, options: dict[str, Any]
) -> None:
    problem = Problem(rank)
    t, exact = problem.leaves(wanted), problem.leaves(wanted)
    got = our_loss(problem, t, config, {**head, **options})
    assert_same_gradients(got, t, merged_loss(problem, exact, config, head), exact)


def test_the_schedules_are_those_meant() -> None:
    """Without a gradient for B, dL/d(hidden A^T) is a row's own: 2 GEMMs for a frozen head. That of B is thin."""
    problem = Problem(3)
    seen = []
    for wanted, options in (
        (NAMES, {}),
        (("hidden", "a", "b"), {"chunk_size": 2}),
        (("hidden", "a"), {"chunk_size": 2}),
        (("a",), {"chunk_size": 2}),
        ((), {}),
    ):
        with watch_plans() as plans:
            our_loss(problem, problem.leaves(wanted), SEQUENCE, options)
        seen += [(plan.schedule, plan.gemms) for plan in plans]
    assert seen == [("fused", 3), ("recomputed", 3), ("per_row", 2), ("per_row", 2), ("forward", 1)]


def test_per_row_logprob() -> None:
    problem = Problem(8)
    t, exact = problem.leaves(("hidden", "a")), problem.leaves(("hidden", "a"))
    with watch_plans() as plans:
        logprob, entropy = ours(problem, t, {"entropy_gradient": False, "chunk_size": 5})
    assert [plan.schedule for plan in plans] == ["per_row"]
    assert not entropy.requires_grad
    weights = torch.linspace(-1, 2, problem.n, dtype=torch.float64)
    want, _ = merged(problem, exact, {})
    assert_same_gradients((weights * logprob).sum(), t, (weights * want).sum(), exact)


@pytest.mark.parametrize("config", [LossConfig(), SEQUENCE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [3, 8])
def test_error_is_at_most_plain_pytorchs(config: LossConfig, dtype: torch.dtype, rank: int) -> None:
    """Plain: the low-rank product as PEFT computes it, all in the dtype of the inputs."""
    problem = Problem(rank, n=96, d=64, v=500)
    problem.tensors["weight"] *= 0.4

    def run(kind: str) -> list[Tensor]:
        rounded = {name: x.to(dtype) for name, x in problem.leaves(()).items()}
        t = {k: x.to(torch.float64 if kind == "exact" else dtype).requires_grad_() for k, x in rounded.items()}
        if kind == "exact":
            loss = merged_loss(problem, t, config, {})
        elif kind == "ours":
            loss = our_loss(problem, t, config, {"chunk_size": 40})
        else:
            linear = torch.nn.functional.linear
            low_rank = linear(linear(t["hidden"], t["a"]), t["b"]) * problem.scale
            logits = linear(t["hidden"], t["weight"], t["bias"]) + low_rank
            logprob = torch.log_softmax(logits, -1).gather(1, problem.target[:, None])[:, 0]
            arguments = {"old_logprob": problem.old, "ref_logprob": problem.ref, "mask": problem.mask}
            arguments = {k: x if x.dtype == torch.bool else x.to(dtype) for k, x in arguments.items()}
            loss = grpo_loss_reference(logprob, problem.advantage.to(dtype), problem.cu_seqlens, config, **arguments)
        return [loss.detach(), *torch.autograd.grad(loss, list(t.values()))]

    exact, got, plain = run("exact"), run("ours"), run("plain")
    assert got[0].dtype == torch.float32
    assert all(x.dtype == dtype for x in got[1:])
    for name, value, other, want in zip(("loss", *NAMES), got, plain, exact, strict=True):
        assert relative_error(value, want) <= 1.5 * relative_error(other, want) + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_another_dtype(dtype: torch.dtype) -> None:
    """PEFT keeps adapters in fp32 beside bf16 weights: their gradients come back in fp32."""
    problem = Problem(4)
    t = problem.leaves(("hidden", "a", "b"), dtype)
    t |= {name: t[name].detach().float().requires_grad_() for name in ("a", "b")}
    our_loss(problem, t, LossConfig(), {}).backward()
    assert [t[name].grad.dtype for name in ("hidden", "a", "b")] == [dtype, torch.float32, torch.float32]  # type: ignore[union-attr]
    exact = {k: x.detach().double().requires_grad_(x.requires_grad) for k, x in t.items()}
    merged_loss(problem, exact, LossConfig(), {}).backward()
    for name in ("hidden", "a", "b"):
        assert relative_error(t[name].grad, exact[name].grad) <= (2e-2 if dtype == torch.bfloat16 else 1e-5)  # type: ignore[arg-type]


def allocations(work: Callable[[], Any], size: int) -> int:
    """How many times `work` allocates `size` bytes or more at once; the profiler looks into custom ops, too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    return sum(event.self_cpu_memory_usage >= size for event in profile.events())


@pytest.mark.parametrize("config", [LossConfig(), SEQUENCE])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_delta_is_never_formed(
    config: LossConfig, trainable: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "VOCAB_TILE", 100)
    problem = Problem(3, n=40, d=64, v=300)
    t = problem.leaves(NAMES if trainable else ("hidden", "a", "b"), dtype)
    size = 300 * 64 * dtype.itemsize
    options = {"chunk_size": 8}

    def logprob() -> None:
        values, entropy = ours(problem, {k: x.detach().requires_grad_(x.requires_grad) for k, x in t.items()}, options)
        (values.sum() + entropy.sum()).backward()

    # A trainable weight has its gradient: fp32 sums, and what the backward makes of them, for which PyTorch's `mul`
    # takes a copy on the CPU when it also casts; a frozen weight has nothing of its size.
    half = dtype != torch.float32
    assert allocations(lambda: our_loss(problem, t, config, options).backward(), size) == (2 + half if trainable else 0)
    assert allocations(logprob, size) == (1 + half if trainable else 0)
    assert allocations(lambda: merged(problem, t, {}), size) >= 1, "a delta that is formed is seen"


def test_scale() -> None:
    t = Problem(3).leaves(())
    target = torch.zeros(12, dtype=torch.int64)
    plain, _ = linear_logprob(t["hidden"], t["weight"], target)
    for scale, change in ((0.0, False), (-1.5, True), (2, True)):
        got, _ = linear_logprob(t["hidden"], t["weight"], target, lora=LoRADelta(t["a"], t["b"], scale))
        weight = t["weight"] + scale * t["b"] @ t["a"]
        torch.testing.assert_close(got, linear_logprob(t["hidden"], weight, target)[0], rtol=1e-12, atol=1e-13)
        assert torch.allclose(got, plain) != change


def test_rows_that_do_not_train_may_hold_anything() -> None:
    problem = Problem(3)
    dead = (~problem.mask).nonzero()[0, 0]
    gradients = []
    for value in (1.0, math.nan, math.inf):
        t = problem.leaves(())
        t["hidden"][dead] = value
        t = {name: x.requires_grad_() for name, x in t.items()}
        our_loss(problem, t, LossConfig(beta=0.1), {"chunk_size": 5}).backward()
        gradients.append([t[name].grad for name in NAMES])
    for other in gradients[1:]:
        for got, want in zip(other, gradients[0], strict=True):
            assert got is not None
            assert want is not None
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_no_rows_and_rank_zero() -> None:
    problem = Problem(3)
    t = problem.leaves(NAMES)
    lora = LoRADelta(t["a"], t["b"])
    logprob, _ = linear_logprob(t["hidden"][:0], t["weight"], problem.target[:0], lora=lora)
    logprob.sum().backward()
    assert logprob.shape == (0,)
    for name in ("weight", "a", "b"):
        assert t[name].grad is not None
        assert not t[name].grad.any()  # type: ignore[union-attr]
    empty = LoRADelta(t["a"][:0], t["b"][:, :0])
    plain = linear_logprob(t["hidden"], t["weight"], problem.target)
    for got, want in zip(linear_logprob(t["hidden"], t["weight"], problem.target, lora=empty), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["linear_logprob", "linear_grpo_loss"])
def test_bad_arguments_are_named(name: str) -> None:
    problem = Problem(3)
    t = problem.leaves(())
    a, b = t["a"], t["b"]
    op: Callable[..., Any] = linear_logprob if name == "linear_logprob" else linear_grpo_loss
    rest = () if name == "linear_logprob" else (problem.advantage, CU)
    for lora, error, message in (
        ((a, b), TypeError, "lora: expected a LoRADelta, got tuple"),
        (LoRADelta(a[:, :5], b), ValueError, r"lora\.a: expected shape \[r, D\] = \[any, 6\], got \[3, 5\]"),
        (LoRADelta(a[:2], b), ValueError, r"lora\.b: expected shape \[V, r\] = \[19, 2\], got \[19, 3\]"),
        (LoRADelta(a, b[:18]), ValueError, r"lora\.b: expected shape \[V, r\] = \[19, 3\], got \[18, 3\]"),
        (LoRADelta(a.long(), b), TypeError, r"lora\.a: expected dtype .*, got int64"),
        (LoRADelta(a, [b]), TypeError, r"lora\.b: expected a tensor of shape \[V, r\] .* got list"),  # type: ignore[arg-type]
        (LoRADelta(a, b.to("meta")), ValueError, r"lora\.b: expected a tensor on cpu, got one on meta"),
        (LoRADelta(a, b, math.nan), ValueError, r"lora\.scale: expected a finite number, got nan"),
        (LoRADelta(a, b, True), ValueError, r"lora\.scale: expected a finite number, got True"),
    ):
        with pytest.raises(error, match=message):
            op(t["hidden"], t["weight"], problem.target, *rest, lora=lora)
