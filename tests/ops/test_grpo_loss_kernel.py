"""The coefficient kernel in Triton's interpreter: against the float64 oracle and the PyTorch path, window by window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import GroupRewards, LossConfig, LossOutput
from fastgrpo_kernels.grpo_loss.arguments import LossArguments, LossOperands
from fastgrpo_kernels.grpo_loss.output import METRICS, empty_metric
from fastgrpo_kernels.grpo_loss.windows import Coefficients, _TorchCoefficients, coefficients

from .cases import CORRECTIONS, LOSS_TYPES, cases, configs, make_case, make_config, relative_error
from .oracle import Answer, Case, oracle, quantile

pytestmark = pytest.mark.interpreter
BEHAVIOUR = ("old_logprob", "ref_logprob", "sampling_logprob")
EVERYTHING: dict[str, Any] = {
    "beta": 0.1,
    "kl_bias_correction": True,
    "entropy_coef": 0.02,
    "off_policy_mask_threshold": 0.1,
    "delta": 3.0,
}


@dataclass
class Result:
    loss: Tensor
    grad_logprob: Tensor
    grad_entropy: Tensor
    metrics: Tensor


@pytest.fixture(autouse=True, scope="module")
def patch_the_language_once() -> Iterator[None]:
    """The interpreter patches triton.language at every call of a jit function, though the launch has done it: skip."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang: Any = interpreter._patch_lang  # type: ignore[attr-defined]
    scope: Any = interpreter._LangPatchScope  # type: ignore[attr-defined]

    @cache
    def languages(function: Any) -> list[Any]:
        return [lang for lang in (tl, tl.core) if any(value is lang for value in function.__globals__.values())]

    def patch_once(function: Any) -> Any:
        unpatched = any(tl.core.is_builtin(lang.load) for lang in languages(function))
        return patch_lang(function) if unpatched else scope()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield


def rounded(case: Case, behaviour: torch.dtype = torch.float32) -> Case:
    """The case with values that fp32 and, for the old, ref and sampling log-probs, `behaviour` can hold."""
    values = {name: getattr(case, name).float().double() for name in ("logprob", "advantage", "entropy")}
    values |= {name: x.to(behaviour).double() for name in BEHAVIOUR if (x := getattr(case, name)) is not None}
    return replace(case, **values)


def off_edges(case: Case, config: LossConfig) -> Case:
    """The call's own entropy quantile as a threshold, just below it, so that no entropy lies on it."""
    if config.top_entropy_quantile == 1 or case.entropy_threshold is not None:
        return case
    trained = case.entropy if case.mask is None else case.entropy[case.mask]
    own = quantile(trained.tolist(), 1 - config.top_entropy_quantile) if trained.numel() else 0.5
    return replace(case, entropy_threshold=own - 1e-4)


def poisoned(case: Case) -> Case:
    """The case with NaN and infinities in every row that does not train."""
    if case.mask is None:
        return case
    values = {"logprob": math.nan, "entropy": -math.inf, "old_logprob": math.inf, "ref_logprob": math.nan}
    values |= {"sampling_logprob": -math.inf}
    if case.advantage.numel() != case.cu_seqlens.numel() - 1:
        values["advantage"] = math.nan
    return replace(
        case,
        **{name: x.masked_fill(~case.mask, v) for name, v in values.items() if (x := getattr(case, name)) is not None},
    )


def operands(
    case: Case, config: LossConfig, rewards: GroupRewards | None = None, behaviour: torch.dtype = torch.float32
) -> LossOperands:
    old, ref, sampling = (None if x is None else x.to(behaviour) for x in (getattr(case, n) for n in BEHAVIOUR))
    advantage = case.advantage.float() if rewards is None else rewards
    arguments = LossArguments(
        advantage, case.cu_seqlens, old, ref, sampling, case.mask, case.entropy_threshold, config,
        case.num_sequences, case.num_tokens,
    )  # fmt: skip
    arguments.check(case.logprob.numel(), case.logprob.device)
    return LossOperands(*arguments.operands()).with_denominators(case.logprob.numel())


def walk(target: Coefficients, case: Case, cuts: Sequence[int] = (), entropy: bool = True) -> Result:
    """The rows in windows between the cuts."""
    N = case.logprob.numel()
    logprob, entropies = case.logprob.float(), case.entropy.float() if entropy else None
    grad_logprob, grad_entropy = torch.full((N,), math.nan), torch.full((N,), math.nan)
    for start, stop in pairwise([0, *cuts, N]):
        target.rows(start, stop, logprob, entropies, grad_logprob, grad_entropy)
    loss, metrics = target.finish()
    assert loss.dtype == metrics.dtype == torch.float64
    return Result(loss, grad_logprob, grad_entropy, metrics)


def on_device(case: Case, config: LossConfig, cuts: Sequence[int] = (), **options: Any) -> Result:
    from fastgrpo_kernels.grpo_loss.kernel import DeviceCoefficients

    target = coefficients(operands(case, config, **options), case.logprob.numel(), case.logprob.float())
    assert isinstance(target, DeviceCoefficients)
    return walk(target, case, cuts)


def in_pytorch(case: Case, config: LossConfig, **options: Any) -> Result:
    N = case.logprob.numel()
    return walk(_TorchCoefficients(operands(case, config, **options), N, torch.float32), case)


def assert_close(got: Result, want: Result, tolerance: float) -> None:
    """Within the tolerance, gradients relative to their largest."""
    assert float(got.loss) == pytest.approx(float(want.loss), rel=tolerance, abs=tolerance)
    assert relative_error(got.grad_logprob, want.grad_logprob) <= tolerance
    assert relative_error(got.grad_entropy, want.grad_entropy) <= tolerance
    torch.testing.assert_close(got.metrics, want.metrics, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_no_worse(got: Result, usual: Result, want: Answer) -> None:
    """Against the oracle: no worse than 1.5 x fp32 PyTorch, beyond 1e-5."""

    def limit(error: float) -> float:
        return 1.5 * error + 1e-5

    scale = max(abs(want.loss), 1.0)
    assert abs(float(got.loss) - want.loss) / scale <= limit(abs(float(usual.loss) - want.loss) / scale)
    for name in ("grad_logprob", "grad_entropy"):
        ours, theirs = (relative_error(getattr(r, name), getattr(want, name)) for r in (got, usual))
        assert ours <= limit(theirs), name
    ours, theirs = (LossOutput.reduce([dict(zip(METRICS, r.metrics, strict=True))]) for r in (got, usual))
    for name, value in want.metrics.items():
        if math.isnan(value):
            assert math.isnan(ours[name]), name
        else:
            assert abs(ours[name] - value) <= 1.5 * abs(theirs[name] - value) + 1e-5 * max(abs(value), 1.0), name


def check(case: Case, config: LossConfig, behaviour: torch.dtype = torch.float32) -> None:
    case = off_edges(rounded(case, behaviour), config)
    spoiled = poisoned(case)
    got = on_device(spoiled, config, behaviour=behaviour)
    usual = in_pytorch(spoiled, config, behaviour=behaviour)
    assert_close(got, usual, 5e-6)
    assert_no_worse(got, usual, oracle(case, config))
    if case.mask is not None:
        assert not got.grad_logprob[~case.mask].any()
        assert not got.grad_entropy[~case.mask].any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_loss_type_and_level(loss_type: str, level: str) -> None:
    """With everything on, under the extremest of log-ratios and another correction each."""
    seed = LOSS_TYPES.index(loss_type)
    allowed = CORRECTIONS[:3] if loss_type == "vespo" else CORRECTIONS
    options = {"importance_sampling_level": level, "sampling_correction": allowed[seed % len(allowed)]}
    for spread in ("near", "extreme"):
        case = make_case(seed, [2, 5, 0, 4], spread=spread, masked=0.3, missing=0.2, per_token=seed % 2 == 1)
        check(case, make_config(loss_type, **options, **EVERYTHING, top_entropy_quantile=0.6))


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), config=configs(), behaviour=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_fuzz_against_the_oracle_and_pytorch(case: Case, config: LossConfig, behaviour: torch.dtype) -> None:
    check(case, config, behaviour)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), config=configs(), block=st.sampled_from([2, 4, 512]), data=st.data())
def test_windows_change_nothing(case: Case, config: LossConfig, block: int, data: st.DataObject) -> None:
    from fastgrpo_kernels.grpo_loss import kernel

    case = poisoned(off_edges(rounded(case), config))
    places = case.cu_seqlens.tolist() if config.needs_sequences else list(range(case.logprob.numel() + 1))
    cuts = sorted(data.draw(st.lists(st.sampled_from(places), max_size=4)))
    want = on_device(case, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BLOCK", block)
        patch.setattr(kernel, "FINISH_BLOCK", 2)
        got = on_device(case, config, cuts)
    if config.needs_sequences and block < 512:  # sums in blocks of another size may round to another fp32
        assert_close(got, want, 1e-6)
        return
    assert torch.equal(got.grad_logprob, want.grad_logprob)
    assert torch.equal(got.grad_entropy, want.grad_entropy)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got.metrics, want.metrics, rtol=1e-12, atol=1e-14)


def test_rows_outside_the_window_are_left_alone() -> None:
    case, config = rounded(make_case(4, [3, 0, 4, 5])), make_config("grpo", **EVERYTHING | {"beta": 0.0})
    target = coefficients(operands(case, config), 12, case.logprob.float())
    grads = torch.full((12,), 7.0), torch.full((12,), 7.0)
    target.rows(3, 7, case.logprob.float(), case.entropy.float(), *grads)
    for grad in grads:
        assert (grad[:3] == 7).all()
        assert (grad[7:] == 7).all()
        assert (grad[3:7] != 7).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_group_rewards(loss_type: str) -> None:
    pairs = [("mean", "group"), ("leave_one_out", "group"), ("mean", "batch"), ("leave_one_out", "none")]
    baseline, scale = [*pairs, ("none", "batch")][LOSS_TYPES.index(loss_type) % 5]
    rewards = torch.tensor([1.0, math.nan, 0.0, 3.0, 0.1, 0.1, 0.1, 1000.0, 1000.0625, 5.0, math.nan])
    groups = torch.tensor([7, 7, 7, 7, -1, -1, -1, 2**40, 2**40, 3, 3])
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    rewards, groups = rewards[order], groups[order]
    lengths = [2, 3, 1, 4, 2, 0, 5, 1, 2, 3, 3]
    case = make_case(10, lengths, masked=0.2)
    kept = case.mask
    assert kept is not None
    failed = rewards.isnan().repeat_interleave(torch.tensor(lengths))
    level = "sequence" if baseline == "mean" else "token"
    config = make_config(loss_type, **EVERYTHING | {"importance_sampling_level": level})
    # The failed samples' rows hold NaN here: they are left out because their rewards are NaN.
    record = GroupRewards(rewards.to(torch.bfloat16 if scale == "batch" else torch.float32), groups, baseline, scale)
    case = poisoned(rounded(replace(case, mask=~failed)))
    case.mask = kept
    got, want = on_device(case, config, rewards=record), in_pytorch(case, config, rewards=record)
    assert_close(got, want, 2e-6)
    assert not got.grad_logprob[failed].any()
    assert not got.grad_entropy[failed].any()
    assert got.metrics[METRICS.index("entropy/count")] == (kept & ~failed).sum()


def test_group_rewards_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgrpo_kernels.grpo_loss import kernel

    monkeypatch.setattr(kernel, "BLOCK", 4)
    g = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 3, (11,), generator=g)
    rewards = torch.rand(11, generator=g)
    rewards[[2, 7]] = math.nan
    case = rounded(make_case(3, [1] * 10 + [0]))
    for pair in (("mean", "group"), ("leave_one_out", "batch")):
        record = GroupRewards(rewards, groups, *pair)
        config = make_config("dapo")
        assert_close(on_device(case, config, rewards=record), in_pytorch(case, config, rewards=record), 1e-6)


def test_equal_rewards_and_single_ones_have_no_gradient() -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 2.0, math.nan, math.nan, 1.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    case = rounded(make_case(5, [2, 1, 3, 2, 2, 1, 2], ref=False, sampling=False))
    for pair in (("mean", "group"), ("leave_one_out", "group"), ("mean", "batch"), ("mean", "none")):
        got = on_device(case, make_config("grpo"), rewards=GroupRewards(rewards, groups, *pair))
        assert not got.grad_logprob.any()
        assert got.loss == 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_sequence_of_70000_tokens(level: str) -> None:
    case = off_edges(rounded(make_case(1, [3, 70_000, 5], spread="near", masked=0.1)), LossConfig())
    config = make_config("grpo", importance_sampling_level=level, beta=0.1, entropy_coef=0.02)
    want = in_pytorch(case, config)
    assert_close(on_device(case, config, [] if level == "sequence" else [2, 40_000]), want, 2e-6)
    assert relative_error(want.grad_logprob, torch.zeros_like(want.grad_logprob)) > 1  # there is something to compare


def test_bitwise_repeatable() -> None:
    case = rounded(make_case(13, [40, 3, 1500], masked=0.1))
    config = make_config("sapo", **EVERYTHING, importance_sampling_level="sequence", sampling_correction="token_mask")
    first, second = (on_device(case, config, [40]) for _ in range(2))
    for a, b in zip(vars(first).values(), vars(second).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nan_in_a_row_that_trains_shows(loss_type: str) -> None:
    """In loss, gradient and extremes, whatever clamps there are on the way; elsewhere exactly where PyTorch has it."""
    for level, on_policy in (("token", False), ("sequence", False), ("token", True)):
        case = rounded(make_case(2, [3, 2]))
        case.logprob[1] = math.nan
        if on_policy:
            case.old_logprob = None
        config = make_config(loss_type, beta=0.1, importance_sampling_level=level)
        got, want = on_device(case, config), in_pytorch(case, config)
        assert got.loss.isnan() and got.grad_logprob[1].isnan()  # noqa: PT018
        assert not got.grad_logprob[3:].isnan().any()
        if (loss_type, level) != ("reinforce", "sequence"):  # a ratio nobody uses: 0 * NaN in PyTorch, left out here
            assert torch.equal(got.grad_logprob.isnan(), want.grad_logprob.isnan())
        assert torch.equal(got.metrics.isnan(), want.metrics.isnan())
        for name in ("sampling_logp_difference/max", "importance_sampling_ratio/min", "importance_sampling_ratio/max"):
            assert got.metrics[METRICS.index(f"sampling/{name}")].isnan() == on_policy


def test_engine_far_away() -> None:
    """exp(old - samp) overflows before it is clamped; an infinite sampling log-prob is one that was reported."""
    case = rounded(make_case(6, [3, 2, 4, 2]))
    assert case.sampling_logprob is not None
    case.sampling_logprob[:5] = torch.tensor([-200.0, 200.0, -math.inf, -500.0, 1.0])
    for correction in CORRECTIONS:
        config = make_config("dapo", sampling_correction=correction, sampling_clip_min=0.5)
        assert_close(on_device(case, config), in_pytorch(case, config), 1e-6)


def test_without_entropy_and_without_its_gradient() -> None:
    case, config = rounded(make_case(7, [3, 4])), make_config("dapo")
    want, N = on_device(case, config), 7
    target = coefficients(operands(case, config), N, case.logprob.float())
    grad = torch.full((N,), math.nan)
    target.rows(0, N, case.logprob.float(), None, grad, None)
    loss, metrics = target.finish()
    assert torch.equal(loss, want.loss) and torch.equal(grad, want.grad_logprob)  # noqa: PT018
    assert not want.grad_entropy.any()
    assert metrics[METRICS.index("entropy/count")] == 0


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_rows_no_launch(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgrpo_kernels.grpo_loss import kernel

    class Refuse:
        def __getitem__(self, grid: Any) -> NoReturn:
            raise AssertionError(f"a launch of {grid}")

    monkeypatch.setattr(kernel, "coefficients_kernel", Refuse())
    monkeypatch.setattr(kernel, "finish_kernel", Refuse())
    got = on_device(make_case(0, lengths), make_config("grpo", **EVERYTHING))
    assert got.loss == 0
    assert got.metrics.tolist() == [empty_metric(name) for name in METRICS]
    got.metrics.zero_()  # ours to change
    assert on_device(make_case(0, lengths), make_config("grpo")).metrics.tolist() == [empty_metric(n) for n in METRICS]


def test_strided_vectors_and_integer_denominators() -> None:
    from fastgrpo_kernels.grpo_loss.kernel import DeviceCoefficients

    case, config = rounded(make_case(8, [4, 3], masked=0.3)), make_config("grpo", beta=0.1)
    case.num_sequences, case.num_tokens = 2, 7

    def strided(x: Tensor | None) -> Tensor:
        assert x is not None
        return torch.stack([x, x], 1)[:, 0]

    target = DeviceCoefficients(
        advantage=strided(case.advantage.float()),
        per_token=False,
        cu_seqlens=strided(case.cu_seqlens),
        num_rows=7,
        old=strided(case.old_logprob).float(),
        ref=strided(case.ref_logprob).float(),
        sampling=strided(case.sampling_logprob).bfloat16().float(),
        mask=strided(case.mask),
        entropy_threshold=None,
        num_sequences=torch.tensor(2, dtype=torch.int32),
        num_tokens=torch.tensor(7),
        config=config,
    )
    got, want = walk(target, case), on_device(case, config)
    assert torch.equal(got.grad_logprob, want.grad_logprob)
    assert torch.equal(got.loss, want.loss)


def test_kernels_are_listed_once_and_take_25_arguments_at_most() -> None:
    from fastgrpo_kernels.grpo_loss import kernel

    assert len({spec.name for spec in kernel.KERNELS}) == len(kernel.KERNELS)
    assert all(len(spec.signature.keys() | spec.constexprs.keys()) <= 25 for spec in kernel.KERNELS)


def test_variants_differ_in_name_and_know_what_they_need() -> None:
    from fastgrpo_kernels.grpo_loss.kernel_terms import Variant

    changes: list[dict[str, Any]] = [{}, {"importance_sampling_level": "sequence"}, {"kl_estimator": "k1"}]
    changes += [{"beta": 0.1}, {"beta": 0.1, "kl_bias_correction": True}, {"entropy_coef": 0.1}]
    changes += [{"off_policy_mask_threshold": 0.0}, *({"sampling_correction": c} for c in CORRECTIONS[1:3])]
    variants = [Variant.of(make_config(name, **change)) for name in LOSS_TYPES for change in changes]
    variants += [Variant.of(make_config("dapo"), True), Variant.of(make_config("dapo"), False, "mean", "group")]
    assert len({repr(variant) for variant in variants}) == len(variants)
    assert all(repr(variant).isidentifier() for variant in variants)
    for name in LOSS_TYPES:
        for change in changes:
            config = make_config(name, **change)
            assert Variant.of(config).needs_sequences == config.needs_sequences
