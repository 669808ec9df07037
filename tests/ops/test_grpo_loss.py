"""`grpo_loss`: against the oracle and the reference, in float64, and what it promises in fp32."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from fastgrpo_kernels import GroupRewards, LossConfig, LossOutput, group_advantages, grpo_loss
from fastgrpo_kernels.grpo_loss.reference import entropy_quantile, grpo_loss_reference

from .cases import CORRECTIONS, LOSS_TYPES, cases, configs, make_case, make_config, relative_error
from .oracle import Answer, Case, oracle, quantile

LEVELS = ("token", "sequence")


def run(case: Case, config: LossConfig, dtype: torch.dtype = torch.float64) -> tuple[Answer, LossOutput]:
    """The op's answer."""
    logprob = case.logprob.to(dtype).requires_grad_()
    entropy = case.entropy.to(dtype).requires_grad_()
    output = grpo_loss(
        logprob,
        case.advantage.to(dtype),
        case.cu_seqlens,
        entropy=entropy,
        config=config,
        **case.keywords(dtype),
    )
    grads = torch.autograd.grad(output.loss, (logprob, entropy), allow_unused=True)
    filled = [torch.zeros_like(logprob) if g is None else g for g in grads]
    return Answer(float(output.loss.detach()), filled[0], filled[1], LossOutput.reduce([output])), output


def run_reference(case: Case, config: LossConfig) -> Answer:
    logprob, entropy = case.logprob.clone().requires_grad_(), case.entropy.clone().requires_grad_()
    loss = grpo_loss_reference(logprob, case.advantage, case.cu_seqlens, config, entropy=entropy, **case.keywords())
    loss = loss + 0 * (logprob[:0].sum() + entropy[:0].sum())
    grads = torch.autograd.grad(loss, (logprob, entropy), allow_unused=True)
    filled = [torch.zeros_like(logprob) if g is None else g for g in grads]
    return Answer(float(loss.detach()), filled[0], filled[1])


def poisoned(case: Case) -> Case:
    """The same case with NaN and inf in every masked row."""
    if case.mask is None:
        return case
    per_token = case.advantage.numel() != case.cu_seqlens.numel() - 1

    values = {
        "logprob": math.nan,
        "entropy": math.nan,
        "old_logprob": math.inf,
        "ref_logprob": -math.inf,
        "sampling_logprob": math.inf,
    }
    if per_token:
        values["advantage"] = math.inf
    spoiled = {
        name: x.masked_fill(~case.mask, v) for name, v in values.items() if (x := getattr(case, name)) is not None
    }
    return replace(case, **spoiled)


def assert_same(got: Answer, want: Answer, tolerance: float = 1e-10) -> None:
    assert got.loss == pytest.approx(want.loss, rel=tolerance, abs=tolerance)
    assert relative_error(got.grad_logprob, want.grad_logprob) <= tolerance
    torch.testing.assert_close(got.grad_entropy, want.grad_entropy, rtol=tolerance, atol=0)


def check(case: Case, config: LossConfig) -> None:
    """Oracle, reference and op agree on this call: loss, gradients, metrics, with NaN in the masked rows."""
    want = oracle(case, config)
    assert_same(run_reference(case, config), want)
    got, output = run(poisoned(case), config)
    assert_same(got, want)
    assert got.metrics.keys() == want.metrics.keys()
    for name, value in want.metrics.items():
        assert got.metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
    if case.mask is not None:
        assert not got.grad_logprob[~case.mask].any()
        assert not got.grad_entropy[~case.mask].any()
    assert not output.logprob.requires_grad
    assert output.entropy is not None
    assert not output.entropy.requires_grad


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("spread", ["near", "far", "extreme"])
def test_every_loss_type_and_correction(loss_type: str, level: str, spread: str) -> None:
    for seed, correction in enumerate(CORRECTIONS):
        if loss_type == "vespo" and correction.startswith("sequence"):
            continue
        options: dict[str, Any] = {"importance_sampling_level": level, "sampling_correction": correction}
        plain = make_case(seed, [3, 0, 1, 6], spread=spread)
        check(plain, make_config(loss_type, **options))
        ragged = make_case(seed + 50, [2, 5, 0, 4], spread=spread, masked=0.3, missing=0.2)
        options |= {"beta": 0.1, "entropy_coef": 0.02, "off_policy_mask_threshold": 0.1, "top_entropy_quantile": 0.6}
        check(ragged, make_config(loss_type, **options, kl_bias_correction=True))


@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), config=configs())
def test_fuzz_against_the_oracle(case: Case, config: LossConfig) -> None:
    check(case, config)


@pytest.mark.parametrize(("estimator", "bias", "level"), list(product(["k1", "k2", "k3"], [False, True], LEVELS)))
def test_gradcheck(estimator: str, bias: bool, level: str) -> None:
    for loss_type in ("dapo", "luspo", "sapo"):  # the others stop gradients, which finite differences do not see
        case = make_case(3, [3, 0, 4], masked=0.2)
        config = make_config(
            loss_type,
            beta=0.3,
            kl_estimator=estimator,
            kl_bias_correction=bias,
            entropy_coef=0.1,
            delta=3.0,
            sampling_correction="token_truncate",
            importance_sampling_level=level,
        )

        def loss(logprob: Tensor, entropy: Tensor, case: Case = case, config: LossConfig = config) -> Tensor:
            return grpo_loss(
                logprob, case.advantage, case.cu_seqlens, entropy=entropy, config=config, **case.keywords()
            ).loss

        inputs = (case.logprob.clone().requires_grad_(), case.entropy.clone().requires_grad_())
        assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_partition_invariance(loss_type: str, level: str) -> None:
    lengths = [7, 1, 0, 12, 5, 3, 9, 2, 0, 11]
    case = make_case(11, lengths, spread="near", masked=0.2)
    config = make_config(
        loss_type,
        importance_sampling_level=level,
        beta=0.05,
        entropy_coef=0.01,
        top_entropy_quantile=0.7,
        off_policy_mask_threshold=0.05,
        sampling_correction="token_truncate",
    )
    assert case.mask is not None
    entropies = case.entropy.float()[case.mask].tolist()
    case.entropy_threshold = quantile(entropies, 0.3)
    case.num_sequences, case.num_tokens = len(lengths), int(case.mask.sum())
    whole, output = run(case, config, torch.float32)

    bounds = case.cu_seqlens.tolist()
    for cuts in ([0, 10], [0, 1, 10], [0, 3, 4, 8, 10], list(range(11))):
        parts = []
        for first, last in pairwise(cuts):
            rows = slice(bounds[first], bounds[last])
            names = ("logprob", "entropy", "old_logprob", "ref_logprob", "sampling_logprob", "mask")
            part = replace(
                case,
                advantage=case.advantage[first:last],
                cu_seqlens=case.cu_seqlens[first : last + 1] - bounds[first],
                **{name: getattr(case, name)[rows] for name in names},
            )
            parts.append(run(part, config, torch.float32))
        assert sum(p.loss for p, _ in parts) == pytest.approx(whole.loss, rel=1e-6, abs=1e-7)
        assert relative_error(torch.cat([p.grad_logprob for p, _ in parts]), whole.grad_logprob) <= 1e-6
        assert relative_error(torch.cat([p.grad_entropy for p, _ in parts]), whole.grad_entropy) <= 1e-6
        assert LossOutput.reduce([o for _, o in parts]) == pytest.approx(LossOutput.reduce([output]), rel=1e-6)


def test_clamps_have_no_gradient_outside() -> None:
    old = torch.zeros(2, dtype=torch.float64)
    logprob = torch.tensor([-25.0, 25.0], dtype=torch.float64, requires_grad=True)  # log-ratios beyond +-20
    cu = torch.tensor([0, 1, 2], dtype=torch.int32)
    config = LossConfig(beta=1.0)
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)  # the unclipped branch on both sides
    out = grpo_loss(logprob, advantage, cu, old_logprob=old, ref_logprob=old, config=config)
    (grad,) = torch.autograd.grad(out.loss, logprob)
    # Only the unclamped -d of k3 is left: d(-d)/dlogp = 1, over two tokens.
    torch.testing.assert_close(grad, torch.full((2,), 0.5, dtype=torch.float64))


def test_vespo_takes_a_mean_advantage_of_zero_as_positive() -> None:
    case = make_case(2, [2, 3], per_token=True)
    case.advantage = torch.tensor([1.0, -1.0, 0.5, 0.25, -0.75], dtype=torch.float64)
    check(case, make_config("vespo"))


def test_on_policy_is_old_equal_to_detached_logprob() -> None:
    case = make_case(5, [4, 3])
    for loss_type in LOSS_TYPES:
        case.old_logprob = None
        implicit, _ = run(case, make_config(loss_type))
        case.old_logprob = case.logprob.clone()
        explicit, _ = run(case, make_config(loss_type))
        assert_same(implicit, explicit, 1e-14)
        assert implicit.grad_logprob.any()


def test_upstream_gradient_and_second_backward() -> None:
    case = make_case(6, [4, 3])
    config = LossConfig(entropy_coef=0.1)
    base, _ = run(case, config)
    logprob, entropy = case.logprob.clone().requires_grad_(), case.entropy.clone().requires_grad_()
    out = grpo_loss(logprob, case.advantage, case.cu_seqlens, entropy=entropy, config=config, **case.keywords())
    for scale in (-2.5, 4.0):
        grads = torch.autograd.grad(out.loss * scale, (logprob, entropy), retain_graph=True)
        torch.testing.assert_close(grads[0], scale * base.grad_logprob)
        torch.testing.assert_close(grads[1], scale * base.grad_entropy)


def test_half_inputs_compute_in_fp32_and_get_half_gradients() -> None:
    case = make_case(8, [5, 6], spread="near")
    case.logprob = case.logprob.bfloat16().double()
    got, output = run(case, LossConfig(beta=0.1), torch.bfloat16)
    case.old_logprob, case.ref_logprob = (
        None if x is None else x.bfloat16().double() for x in (case.old_logprob, case.ref_logprob)
    )
    case.advantage, case.sampling_logprob = case.advantage.bfloat16().double(), None
    want = oracle(case, LossConfig(beta=0.1))
    assert output.loss.dtype == torch.float32
    assert got.grad_logprob.dtype == torch.bfloat16
    assert got.loss == pytest.approx(want.loss, rel=1e-5)
    assert relative_error(got.grad_logprob, want.grad_logprob) <= 2**-8


def test_advantage_shapes() -> None:
    case = make_case(9, [1, 1, 1], ref=False, sampling=False)  # S = N: [S] it is, which is the same thing here
    per_sequence, _ = run(case, LossConfig())
    assert_same(per_sequence, oracle(case, LossConfig()))
    ragged = make_case(9, [2, 0, 3], ref=False, sampling=False)
    spread = replace(ragged, advantage=ragged.advantage.repeat_interleave(torch.tensor([2, 0, 3])))
    assert_same(run(ragged, LossConfig())[0], run(spread, LossConfig())[0])


def test_group_rewards_are_normalised_and_failures_leave_the_denominators() -> None:
    rewards = torch.tensor([1.0, math.nan, 0.0, 3.0, 2.0, 2.0], dtype=torch.float64)
    groups = torch.tensor([7, 7, 7, 7, -1, -1])
    case = make_case(10, [2, 3, 1, 4, 2, 2], ref=False, sampling=False)
    valid = ~rewards.isnan()
    for loss_type, baseline, scale in product(LOSS_TYPES, ("mean", "leave_one_out"), ("group", "batch", "none")):
        config = make_config(loss_type)
        logprob = case.logprob.clone().requires_grad_()
        record = GroupRewards(rewards, groups, baseline, scale)
        got = grpo_loss(logprob, record, case.cu_seqlens, old_logprob=case.old_logprob, config=config)
        (grad,) = torch.autograd.grad(got.loss, logprob)
        case.advantage = group_advantages(rewards, groups, baseline=baseline, scale=scale)
        case.mask = valid.repeat_interleave(torch.tensor([2, 3, 1, 4, 2, 2]))
        case.num_sequences = 5
        want = oracle(case, config)
        assert float(got.loss.detach()) == pytest.approx(want.loss, rel=1e-12)
        torch.testing.assert_close(grad, want.grad_logprob, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1]])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_smallest_calls(lengths: list[int], loss_type: str) -> None:
    config = make_config(loss_type, entropy_coef=0.1, top_entropy_quantile=0.5, beta=0.1)
    check(make_case(1, lengths), config)


def test_denominators_may_be_tensors() -> None:
    case = make_case(12, [3, 2])
    for loss_type in LOSS_TYPES:
        case.num_sequences, case.num_tokens = 5, 31
        want, _ = run(case, make_config(loss_type, entropy_coef=0.1))
        case.num_sequences, case.num_tokens = torch.tensor(5), torch.tensor(31.0)  # type: ignore[assignment]
        got, _ = run(case, make_config(loss_type, entropy_coef=0.1))
        assert_same(got, want, 1e-14)


def test_bitwise_repeatable() -> None:
    case = make_case(13, [40, 3, 80], masked=0.1)
    config = LossConfig(importance_sampling_level="sequence", beta=0.1, entropy_coef=0.1)
    (first, _), (second, _) = (run(case, config, torch.float32) for _ in range(2))
    assert first.loss == second.loss
    assert torch.equal(first.grad_logprob, second.grad_logprob)


def test_entropy_quantile_matches_a_sort() -> None:
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 100):
        values = torch.rand(n, generator=g, dtype=torch.float64)
        trained = torch.rand(n, generator=g) < 0.7
        trained[0] = True
        for q in (0.0, 0.2, 0.5, 1.0):
            want = quantile(values[trained].tolist(), q)
            assert float(entropy_quantile(values, trained, q)) == pytest.approx(want, rel=1e-14)
            assert float(torch.quantile(values[trained], q)) == pytest.approx(want, rel=1e-14)


def test_grad_is_not_tracked_through_constants() -> None:
    case = make_case(14, [3, 2])
    old = case.old_logprob.clone().requires_grad_()  # type: ignore[union-attr]
    out = grpo_loss(case.logprob, case.advantage, case.cu_seqlens, old_logprob=old)
    assert not out.loss.requires_grad
