"""AdamW with master weights, the schedule, skipped steps."""

from __future__ import annotations

import math

import pytest
import torch

from fastgrpo.config import GRPOConfig
from fastgrpo.optim import Optimizer, learning_rate


def _parameters(dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"bias": (4,), "matrix": (3, 4), "other": (5, 2)}
    return [(n, torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype))) for n, s in shapes.items()]


def _step(optimizer: Optimizer, rate: float) -> tuple[float, bool]:
    norm = optimizer.norm().item()
    return norm, optimizer.step(rate, norm)


def test_constant_linear_cosine_with_warmup() -> None:
    def rates(**options: object) -> list[float]:
        config = GRPOConfig(learning_rate=1.0, **options)  # type: ignore[arg-type]
        return [learning_rate(s, 10, config) for s in range(1, 11)]

    assert rates() == [1.0] * 10
    assert rates(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = rates(lr_scheduler_type="linear", warmup_steps=2, min_lr_ratio=0.2)
    assert linear[:3] == [0.5, 1.0, 1.0]
    assert linear[3:] == pytest.approx([1 - 0.1 * k for k in range(1, 8)])
    cosine = rates(lr_scheduler_type="cosine")
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(10)])
    assert learning_rate(99, 10, GRPOConfig(learning_rate=1.0, lr_scheduler_type="linear")) == 0.0


def test_fp32_steps_are_torchs_adamw_with_decay_on_matrices_only() -> None:
    config = GRPOConfig(weight_decay=0.1, max_grad_norm=0, learning_rate=1e-2)
    ours, theirs = _parameters(), _parameters()
    optimizer = Optimizer(ours, config)
    plain = torch.optim.AdamW(
        [
            {"params": [p for _, p in theirs if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for _, p in theirs if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    for step in range(3):
        for (_, p), (_, q) in zip(ours, theirs, strict=True):
            for part in (1.0, 2.0):  # two backward passes add up
                (p * (p.detach() + step) * part).sum().backward()
                (q * (q.detach() + step) * part).sum().backward()
        applied = _step(optimizer, 1e-2)[1]
        assert applied
        plain.step()
        plain.zero_grad()
    for (name, p), (_, q) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7, msg=name)


def test_clipping_scales_to_the_norm_and_reports_the_norm_before() -> None:
    config = GRPOConfig(max_grad_norm=1.0)
    parameters = _parameters()
    optimizer = Optimizer(parameters, config)
    seen = []
    optimizer.torch_optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.nn.utils.get_total_norm([p.grad for _, p in parameters]).item())
    )
    sum((p * 3.0).sum() for _, p in parameters).backward()  # type: ignore[union-attr]
    norm, _ = _step(optimizer, 1e-3)
    assert norm == pytest.approx(3.0 * math.sqrt(4 + 12 + 10))
    assert seen == [pytest.approx(1.0, rel=1e-4)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing_and_is_forgotten(bad: float) -> None:
    parameters = _parameters()
    optimizer = Optimizer(parameters, GRPOConfig())
    before = [p.detach().clone() for _, p in parameters]
    (parameters[1][1] * bad).sum().backward()
    norm, applied = _step(optimizer, 1e-2)
    assert not applied
    assert not math.isfinite(norm)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, parameters, strict=True))
    sum(p.sum() for _, p in parameters).backward()  # type: ignore[union-attr]
    norm, applied = _step(optimizer, 1e-2)
    assert applied
    assert math.isfinite(norm)


def test_small_steps_survive_in_the_master_weights_of_a_bf16_model() -> None:
    """1,000 steps of 1e-6 in one direction: lost in bfloat16, kept in the fp32 master and seen in the end."""
    moved = {}
    for master in (True, False):
        parameter = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
        optimizer = Optimizer([("w", parameter)], GRPOConfig(master_weights=master))
        for _ in range(1000):
            parameter.sum().backward()
            _step(optimizer, 5e-6)
        moved[master] = (1 - parameter.float().mean()).item()
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(5e-3, rel=0.3)


def test_bf16_gradients_of_many_microbatches_add_up_in_fp32() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", parameter)], GRPOConfig(max_grad_norm=0))
    parameter.sum().backward()
    for _ in range(512):
        (parameter * 2.0**-9).sum().backward()  # too small to change 1.0 in bfloat16
    norm, _ = _step(optimizer, 0.0)
    assert norm == 2.0 * 4
    assert parameter.grad is None


def test_a_step_without_any_backward_still_moves_by_momentum() -> None:
    """A step whose sequences were all skipped is the step with zero gradients, not a step left out."""
    ours, theirs = _parameters(), _parameters()
    optimizer, other = Optimizer(ours, GRPOConfig()), Optimizer(theirs, GRPOConfig())
    for o, parameters in ((optimizer, ours), (other, theirs)):
        sum((p**2).sum() for _, p in parameters).backward()  # type: ignore[union-attr]
        _step(o, 1e-2)
    _step(optimizer, 1e-2)
    sum((p * 0).sum() for _, p in theirs).backward()  # type: ignore[union-attr]
    _step(other, 1e-2)
    for (_, p), (_, q) in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        Optimizer([], GRPOConfig())
