"""Every op on random calls (see fuzz.py), on each backend. `--fuzz N` runs N of each op, `--fuzz A:B` repeats some."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import (
    LossOutput,
    gae,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    token_logprob,
)
from fastgrpo_kernels.backend import INTERPRETED

from .fuzz import (
    HALF,
    Bench,
    Draw,
    LossCall,
    assert_gradients,
    assert_near,
    plain_statistics,
    random_head,
    random_loss_call,
    random_schedule,
)
from .oracle import oracle

ON_CPU = Bench()
INTERPRETER = Bench(triton=True, copies=True, max_rows=30, vocab=(1, 7, 64, 130), hidden=(1, 8, 24, 33))
INTERPRETED_CALLS = {
    "linear_grpo_loss": 40,
    "linear_logprob": 20,
    "token_logprob": 25,
    "grpo_loss": 30,
    "group_advantages": 25,
    "gae": 10,
}
ORACLE_ROWS = 64
"""Tokens of a loss that the oracle's loops are asked about, too."""


def on_gpu() -> Bench:
    return Bench(
        device="cuda",
        triton=True,
        copies=torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0),
        lengths=(0, 1, 2, 17, 64, 300, 1100),
        max_rows=3000,
        vocab=(1, 7, 129, 1024, 5003, 32001),
        hidden=(8, 33, 64, 256, 520),
    )


def check_linear_grpo_loss(draw: Draw, bench: Bench) -> bool:
    lengths = draw.lengths(bench)
    head = random_head(draw, bench, sum(lengths))
    exact = head.leaves(torch.float64)
    logprob, entropy = head.plain(exact)
    call = random_loss_call(draw, lengths, logprob.detach(), entropy.detach(), head.dtype)
    bonus, upstream = call.config.entropy_coef != 0, draw.pick([1.0, -3.0, 0.25])
    schedule, chunk_size = random_schedule(draw, bench, head, bonus), draw.pick([None, None, 1, 2, 5, 16, 64])
    into_main_grad = "weight" in head.wanted and head.dtype != torch.float64 and draw.chance(0.15)
    if head.dtype != torch.float64 and call.on_branch(logprob, entropy):
        return False

    want = call.reference(logprob, entropy)
    leaves = head.leaves()
    spoiled = head.target.masked_fill(~call.trained, -100)
    leaves["hidden"].data[~call.trained] = math.nan
    if into_main_grad:
        leaves["weight"].main_grad = torch.zeros_like(leaves["weight"], dtype=torch.float32)  # type: ignore[attr-defined]
    output = linear_grpo_loss(
        leaves["hidden"],
        leaves["weight"],
        spoiled,
        **call.arguments,
        **head.arguments(leaves),
        schedule=schedule,
        chunk_size=chunk_size,
        into_main_grad=into_main_grad,
    )
    # LoRA's hidden states are rounded to the call's dtype on the way, so half ones are no closer than gradients are.
    if "a" not in leaves or head.dtype not in HALF:
        assert_outputs(call, output, want, logprob, entropy, head.dtype)
    assert output.loss.requires_grad == bool(head.wanted)
    if not head.wanted:
        return True
    (output.loss * upstream).backward()
    found: dict[str, Any] = {name: leaves[name].grad for name in head.wanted}
    if into_main_grad:
        assert found["weight"] is None
        found["weight"] = leaves["weight"].main_grad  # type: ignore[attr-defined]

    def usual(dtype: torch.dtype) -> list[Tensor]:
        plain = head.leaves(dtype)
        return gradients(call.reference(*head.plain(plain)) * upstream, plain, head.wanted)

    if "hidden" in found:
        assert not found["hidden"][~call.trained].any()
    true = gradients(want * upstream, exact, head.wanted)
    assert_gradients(list(found.values()), true, usual, head.dtype, rounded_rows=bench.triton, at_most=head.at_most)
    return True


def assert_outputs(
    call: LossCall, output: LossOutput, loss: Tensor, logprob: Tensor, entropy: Tensor | None, dtype: torch.dtype
) -> None:
    """Everything that the forward gives, with the oracle's loss and metrics where it has the time."""
    rows = call.trained
    policy = float(loss.detach().abs())
    assert_near("loss", output.loss, loss, dtype, floor=max(1.0, policy))
    assert_near("logprob", output.logprob[rows], logprob[rows], dtype)
    if entropy is not None:
        assert output.entropy is not None
        assert_near("entropy", output.entropy[rows], entropy[rows], dtype)
    if rows.numel() > ORACLE_ROWS or loss.is_cuda:
        return
    call.case.logprob = logprob.detach()
    if entropy is not None:
        call.case.entropy = entropy.detach()
    answer, got = oracle(call.case, call.config), LossOutput.reduce([output])
    assert_near("the oracle's loss", output.loss, torch.tensor(answer.loss, dtype=torch.float64), dtype)
    assert got.keys() == answer.metrics.keys() - ({"entropy"} if entropy is None else set())
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for name, value in got.items():
        assert value == pytest.approx(answer.metrics[name], rel=tolerance, abs=tolerance, nan_ok=True), name


def gradients(total: Tensor, leaves: dict[str, Tensor], wanted: list[str]) -> list[Tensor]:
    inputs = [leaves[name] for name in wanted]
    found = torch.autograd.grad(total + 0 * sum(x[:0].sum() for x in inputs), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def check_linear_logprob(draw: Draw, bench: Bench) -> bool:
    num_rows = draw.pick([0, 1, 2, 7, bench.max_rows // 2, bench.max_rows])
    head = random_head(draw, bench, num_rows)
    by_logprob, by_entropy = draw.normal(num_rows), draw.normal(num_rows)
    entropy_gradient = draw.chance(0.5)
    schedule = random_schedule(draw, bench, head, entropy_gradient)
    live = ~draw.share(draw.pick([0.0, 0.3, 1.0]), num_rows)
    chunk_size = draw.pick([None, None, 1, 2, 5, 16, 64])

    def weighted(logprob: Tensor, entropy: Tensor) -> Tensor:
        """Rows that are not live get an upstream gradient of exactly 0, whatever they hold."""
        total = (torch.where(live, logprob, 0) * by_logprob.to(logprob.dtype)).sum()
        if entropy_gradient:
            total = total + (torch.where(live, entropy, 0) * by_entropy.to(entropy.dtype)).sum()
        return total

    exact, leaves = head.leaves(torch.float64), head.leaves()
    logprob, entropy = head.plain(exact)
    leaves["hidden"].data[~live] = math.nan
    got = linear_logprob(
        leaves["hidden"],
        leaves["weight"],
        head.target,
        **head.arguments(leaves),
        schedule=schedule,
        chunk_size=chunk_size,
        entropy_gradient=entropy_gradient,
    )
    if "a" not in leaves or head.dtype not in HALF:
        for name, ours, want in zip(("logprob", "entropy"), got, (logprob, entropy), strict=True):
            assert_near(name, ours[live], want[live], head.dtype)
    if not head.wanted:
        assert not got[0].requires_grad
        return True

    def usual(dtype: torch.dtype) -> list[Tensor]:
        plain = head.leaves(dtype)
        return gradients(weighted(*head.plain(plain)), plain, head.wanted)

    found = gradients(weighted(*got), leaves, head.wanted)
    true = gradients(weighted(logprob, entropy), exact, head.wanted)
    assert_gradients(found, true, usual, head.dtype, rounded_rows=bench.triton, at_most=head.at_most)
    return True


def check_token_logprob(draw: Draw, bench: Bench) -> bool:
    dtype, V = draw.pick(bench.dtypes), draw.pick(bench.vocab)
    num_rows = draw.pick([0, 1, 2, 7, bench.max_rows])
    form = {"temperature": draw.pick([1.0, 0.6, 2.0]), "softcap": draw.pick([None, None, 3.0, 30.0])}
    logits, target = draw.normal(num_rows, V, scale=draw.pick([0.0, 1.0, 4.0])).to(dtype), draw.below(V, num_rows)
    by_logprob, by_entropy = draw.normal(num_rows).float(), draw.normal(num_rows).float()
    live = ~draw.share(draw.pick([0.0, 0.3]), num_rows)
    outputs = draw.pick([(0,), (1,), (0, 1)])
    if V > 1 and draw.chance(0.3) and form["softcap"] is None:
        ruled_out = draw.share(0.2, V).expand(num_rows, V).clone()
        logits[ruled_out.scatter(1, target[:, None], False)] = -math.inf
    layout = draw.pick(["whole", "padded", "transposed", "shifted"])

    def weighted(both: tuple[Tensor, Tensor]) -> Tensor:
        upstream = (by_logprob, by_entropy)
        return sum((torch.where(live, both[i], 0) * upstream[i].to(both[i].dtype)).sum() for i in outputs)  # type: ignore[return-value]

    def plain(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
        """Logits of -inf are replaced by ones that are as impossible: plain PyTorch's entropy would be NaN."""
        x = logits.to(dtype).clamp(min=-3e4).requires_grad_()
        both = plain_statistics(x, target, form["temperature"], form["softcap"])
        return both, gradients(weighted(both), {"logits": x}, ["logits"])

    spoiled = logits.masked_fill(~live[:, None], math.nan)
    x = _laid_out(spoiled, layout).detach().requires_grad_()
    got = token_logprob(x, target, **form)
    exact, want = plain(torch.float64)
    for name, ours, truth in zip(("logprob", "entropy"), got, exact, strict=True):
        assert_near(name, ours[live], truth[live], dtype)
    assert_gradients(gradients(weighted(got), {"x": x}, ["x"]), want, lambda dtype: plain(dtype)[1], dtype)
    return True


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same matrix, otherwise in memory."""
    N, V = x.shape
    if layout == "padded":
        return torch.cat([x, x.new_full((N, 3), math.nan)], 1)[:, :V]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "shifted":
        return torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(N, V)
    return x


def check_grpo_loss(draw: Draw, bench: Bench) -> bool:
    lengths, dtype = draw.lengths(bench), draw.pick(bench.dtypes)
    N = sum(lengths)
    logprob = (-draw.normal(N, scale=2.0).abs() - 0.1).to(dtype)
    entropy = (draw.normal(N).abs() + 0.01).to(dtype)
    call = random_loss_call(draw, lengths, logprob.double(), entropy.double(), dtype)
    upstream = draw.pick([1.0, -3.0, 0.25])
    wanted = ["logprob", "entropy"] if call.config.entropy_coef else ["logprob"]
    if dtype != torch.float64 and call.on_branch(logprob.double(), entropy.double()):
        return False

    def plain(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        x = {"logprob": logprob.to(dtype, copy=True), "entropy": entropy.to(dtype, copy=True)}
        x = {name: value.requires_grad_() for name, value in x.items()}
        loss = call.reference(**x)
        return loss, x, gradients(loss * upstream, x, wanted)

    leaves = {"logprob": logprob.clone(), "entropy": entropy.clone()}
    for x in leaves.values():
        x[~call.trained] = math.nan
        x.requires_grad_()
    output = grpo_loss(leaves["logprob"], entropy=leaves["entropy"], **call.arguments)
    loss, exact, want = plain(torch.float64)
    assert_outputs(call, output, loss, exact["logprob"], exact["entropy"], dtype)
    got = gradients(output.loss * upstream, leaves, wanted)
    assert all(not g[~call.trained].any() for g in got)
    assert_gradients(got, want, lambda dtype: plain(dtype)[2], dtype)
    return True


def check_group_advantages(draw: Draw, bench: Bench) -> bool:
    dtype, S = draw.pick(bench.dtypes), draw.pick([0, 1, 2, 9, bench.max_rows])
    baseline, eps = draw.pick(["mean", "leave_one_out", "none"]), draw.pick([1e-4, 0.5])
    scale = draw.pick(["batch", "none"] + ["group"] * (baseline != "none"))
    rewards = draw.pick([draw.normal(S), draw.below(3, S) / 10.0]).to(dtype)
    rewards[draw.share(draw.pick([0.0, 0.3, 1.0]), S)] = math.nan
    group_index = draw.below(max(1, S // 4), S) * draw.pick([1, 2**40]) - 3
    got = group_advantages(rewards, group_index, baseline=baseline, scale=scale, eps=eps)
    want = _advantages(rewards.tolist(), group_index.tolist(), baseline, scale, eps)
    assert_near("advantages", got, torch.tensor(want, dtype=torch.float64, device=got.device), dtype)
    assert got.eq(0).tolist() == [x == 0 for x in want]
    return True


def _advantages(rewards: list[float], groups: list[int], baseline: str, scale: str, eps: float) -> list[float]:
    members: dict[int, list[float]] = {group: [] for group in groups}
    for reward, group in zip(rewards, groups, strict=True):
        if not math.isnan(reward):
            members[group].append(reward)
    valid = [reward for group in members.values() for reward in group]
    divisors = {"none": 1.0, "batch": (stdev(valid) if len(valid) > 1 else 0.0) + eps}
    result = []
    for reward, group in zip(rewards, groups, strict=True):
        others = members[group]
        if math.isnan(reward) or (baseline != "none" and len(set(others)) == 1):
            result.append(0.0)
            continue
        mean = 0.0 if baseline == "none" else fmean(others)
        advantage = (reward - mean) * (len(others) / (len(others) - 1) if baseline == "leave_one_out" else 1.0)
        result.append(advantage / (stdev(others) + eps if scale == "group" else divisors[scale]))
    return result


def check_gae(draw: Draw, bench: Bench) -> bool:
    lengths, dtype = draw.lengths(bench), draw.pick(bench.dtypes)
    rewards, values = (draw.normal(sum(lengths)).to(dtype) for _ in range(2))
    gamma, lam = draw.pick([1.0, 0.99, 0.0]), draw.pick([1.0, 0.95, 0.0])
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    got = gae(rewards, values, bounds.to(draw.device), gamma=gamma, lam=lam)
    r, v, want = rewards.tolist(), values.tolist(), [0.0] * sum(lengths)
    for start, stop in pairwise(bounds.tolist()):
        running = following = 0.0
        for t in reversed(range(start, stop)):
            running = r[t] + gamma * following - v[t] + gamma * lam * running
            want[t], following = running, v[t]
    advantages = torch.tensor(want, dtype=torch.float64, device=draw.device)
    assert_near("advantages", got[0], advantages, dtype)
    assert_near("returns", got[1], advantages + values.double(), dtype)
    return True


CHECKS: dict[str, Callable[[Draw, Bench], bool]] = {
    "linear_grpo_loss": check_linear_grpo_loss,
    "linear_logprob": check_linear_logprob,
    "token_logprob": check_token_logprob,
    "grpo_loss": check_grpo_loss,
    "group_advantages": check_group_advantages,
    "gae": check_gae,
}


def check_all(op: str, numbers: range, bench: Bench) -> None:
    """Every call is right, and few were left out for lying on a branch."""
    wrong, left_out = [], 0
    for number in numbers:
        try:
            left_out += not CHECKS[op](Draw(f"{op} {number}", bench.device), bench)
        except Exception as error:
            wrong.append(f"{op} {number}: {type(error).__name__}: {error}")
    assert not wrong, f"{len(wrong)} of {len(numbers)} calls are wrong; `--fuzz A:B` repeats some:\n" + "\n".join(wrong)
    assert left_out <= 3 + len(numbers) // 7, f"{left_out} of {len(numbers)} calls lie on a branch"


def _numbers(config: pytest.Config, default: int) -> range:
    asked: Any = config.getoption("--fuzz")
    if asked is None:
        return range(default)
    first, _, last = asked.rpartition(":")
    return range(int(first or 0), int(last))


@pytest.mark.timeout(0)
@pytest.mark.skipif(INTERPRETED, reason="the marked test below runs kernels")
@pytest.mark.parametrize("op", CHECKS)
def test_pytorch_path(op: str, pytestconfig: pytest.Config) -> None:
    check_all(op, _numbers(pytestconfig, 150 if op == "linear_grpo_loss" else 80), ON_CPU)


@pytest.mark.timeout(0)
@pytest.mark.interpreter
@pytest.mark.parametrize("op", CHECKS)
def test_interpreter(op: str, pytestconfig: pytest.Config) -> None:
    check_all(op, _numbers(pytestconfig, INTERPRETED_CALLS[op]), INTERPRETER)


@pytest.mark.timeout(0)
@pytest.mark.gpu
@pytest.mark.parametrize("op", CHECKS)
def test_gpu(op: str, pytestconfig: pytest.Config) -> None:
    check_all(op, _numbers(pytestconfig, 60 if op == "linear_grpo_loss" else 20), on_gpu())
