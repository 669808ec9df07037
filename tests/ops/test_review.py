"""What reading and misusing the ops found: numbers out of range, large logits, defaults of the process, equality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgrpo_kernels import (
    GroupRewards,
    LoRADelta,
    LossConfig,
    LossOutput,
    PackedLayout,
    add_rms_norm,
    gae,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    sample_tokens,
    swiglu,
    token_logprob,
)
from fastgrpo_kernels.grpo_loss.reference import entropy_quantile
from fastgrpo_kernels.linear_logprob.reference import linear_logprob_reference
from fastgrpo_kernels.token_logprob.reference import token_logprob_reference

HUGE = 10**400
"""An int that no float holds."""

N, D, V = 5, 4, 7
CU = torch.tensor([0, 2, 5], dtype=torch.int32)
TARGET = torch.tensor([0, 1, 2, 3, 6])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def fused(**options: Any) -> LossOutput:
    return linear_grpo_loss(normal(N, D), normal(V, D), TARGET, torch.tensor([1.0, -1.0]), CU, **options)


def from_logprobs(**options: Any) -> LossOutput:
    return grpo_loss(-normal(N).abs(), torch.tensor([1.0, -1.0]), CU, entropy=normal(N).abs(), **options)


def logprobs(**options: Any) -> tuple[Tensor, Tensor]:
    return linear_logprob(normal(N, D), normal(V, D), TARGET, **options)


def of_logits(**options: Any) -> tuple[Tensor, Tensor]:
    return token_logprob(normal(N, V), TARGET, **options)


def of_rewards(**options: Any) -> Tensor:
    return group_advantages(normal(2), torch.tensor([0, 0]), **options)


def of_values(**options: Any) -> tuple[Tensor, Tensor]:
    return gae(normal(N), normal(N), CU, **options)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        *((call, name) for call in (fused, logprobs) for name in ("temperature", "softcap", "logit_scale")),
        *((call, name) for call in (fused, logprobs) for name in ("chunk_size",)),
        *((call, name) for call in (fused, from_logprobs) for name in ("num_tokens", "num_sequences")),
        *((call, "entropy_threshold") for call in (fused, from_logprobs)),
        (of_logits, "temperature"),
        (of_rewards, "eps"),
        (of_values, "lam"),
        (LossConfig, "epsilon"),
        (LossConfig, "max_completion_length"),
    ],
)
@pytest.mark.parametrize("value", [HUGE, 2**1024], ids=["10**400", "2**1024"])
def test_integers_beyond_every_dtype(call: Callable[..., Any], name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        call(**{name: value})


def test_integers_beyond_64_bits() -> None:
    calls: list[tuple[Callable[..., Any], str]] = [
        (fused, "chunk_size"),
        (from_logprobs, "num_tokens"),
        (LossConfig, "max_completion_length"),
    ]
    for call, name in calls:
        with pytest.raises(ValueError, match=f"^{name}: expected .*2\\^63|^{name}: expected .* 64 bits"):
            call(**{name: 2**63})
    assert fused(chunk_size=2**63 - 1).loss == fused().loss
    with pytest.raises(ValueError, match=r"^lora\.scale: expected a finite number"):
        logprobs(lora=LoRADelta(normal(2, D), normal(V, 2), HUGE))


@pytest.mark.parametrize("call", [fused, from_logprobs])
@pytest.mark.parametrize("name", ["num_tokens", "num_sequences", "entropy_threshold"])
def test_scalars_that_are_tensors(call: Callable[..., LossOutput], name: str) -> None:
    for value, error in (
        (torch.tensor(True), TypeError),
        (torch.tensor(1j), TypeError),
        (torch.tensor(3, device="meta"), ValueError),
        (torch.tensor(float("nan")), ValueError),
        *([] if name == "entropy_threshold" else [(torch.tensor(-3), ValueError)]),
    ):
        with pytest.raises(error, match=f"^{name}: expected "):
            call(**{name: value})
    assert call(**{name: torch.tensor(1)}).loss == call(**{name: 1}).loss


@pytest.mark.parametrize("call", [fused, from_logprobs])
def test_an_infinite_denominator(call: Callable[..., LossOutput]) -> None:
    """It would make the loss 0, and the update none."""
    for name in ("num_tokens", "num_sequences"):
        with pytest.raises(ValueError, match=f"^{name}: expected an int >= 0 or a 0-d tensor, got one of inf"):
            call(**{name: torch.tensor(float("inf"))})


DIFFERENTIABLE: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "hidden": (lambda x: linear_grpo_loss(x, normal(V, D), TARGET, torch.ones(2), CU).loss, normal(N, D)),
    "weight": (lambda x: linear_logprob(normal(N, D), x, TARGET)[0], normal(V, D)),
    "lora.b": (lambda x: logprobs(lora=LoRADelta(normal(2, D), x))[0], normal(V, 2)),
    "logits": (lambda x: token_logprob(x, TARGET)[0], normal(N, V)),
    "logprob": (lambda x: grpo_loss(x, torch.ones(2), CU).loss, normal(N)),
    "gate": (lambda x: swiglu(x, normal(N, D)), normal(N, D)),
    "x": (lambda x: add_rms_norm(x, None, normal(D), eps=1e-6)[0], normal(N, D)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("wanted", [False, True], ids=["constant", "requires_grad"])
def test_forward_mode_raises_and_is_not_zero(name: str, wanted: bool) -> None:
    call, x = DIFFERENTIABLE[name]
    with pytest.raises(TypeError, match=f"^{name}: expected a tensor without a tangent, got a dual tensor"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(wanted), torch.ones_like(x))
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor without a tangent, got a dual tensor"):
            call(dual)


@pytest.mark.filterwarnings("ignore:.*(Sparse|nested)")
def test_tensors_that_are_not_dense() -> None:
    for x, kind in (
        (normal(N, D).to_sparse(), "sparse_coo"),
        (normal(N, D).to_sparse_csr(), "sparse_csr"),
        (torch.nested.nested_tensor([normal(3, D), normal(2, D)]), "nested"),
        (torch.nested.nested_tensor([normal(3, D), normal(2, D)], layout=torch.jagged), "nested"),
    ):
        with pytest.raises(TypeError, match=rf"^hidden: expected a dense tensor of shape \[N, D\], got a {kind} one"):
            linear_logprob(x, normal(V, D), TARGET)


def test_random_numbers_out_of_range() -> None:
    for uniform, found in ((torch.ones(N), r"\[1, 1\]"), (torch.full((N,), float("nan")), r"\[nan, nan\]")):
        with pytest.raises(ValueError, match=rf"^uniform: expected values in \[0, 1\), got values in {found}"):
            sample_tokens(normal(N, V), uniform)


def test_a_choice_that_is_an_array() -> None:
    with pytest.raises(ValueError, match=r"^loss_type: expected one of grpo, .*, got array"):
        LossConfig(np.array(["dapo", "grpo"]))  # type: ignore[arg-type]


def test_outputs_that_are_no_list_of_outputs() -> None:
    for reduce in (LossOutput.reduce, LossOutput.combine):
        for outputs, kind in ((fused(), "LossOutput"), (fused().metrics, "dict"), (None, "NoneType")):
            with pytest.raises(TypeError, match=f"^outputs: expected a list of LossOutput or .*, got {kind}"):
                reduce(outputs)  # type: ignore[arg-type]
        for output, kind in ((3, "int"), ({"kl/sum": 1.0, "kl/count": 2.0}, "dict")):
            with pytest.raises(TypeError, match=rf"^outputs\[1\]: expected a LossOutput or .*, got {kind}"):
                reduce([fused(), output])  # type: ignore[list-item]


def test_flags() -> None:
    with pytest.raises(ValueError, match=r"^entropy_gradient: expected True or False, got 'no'"):
        logprobs(entropy_gradient="no")
    for call in (fused, logprobs):
        with pytest.raises(ValueError, match=r"^into_main_grad: expected True or False, got None"):
            call(into_main_grad=None)


def test_sharded_operands_besides_the_weight() -> None:
    sharded = torch.nn.Parameter(torch.empty(0))
    sharded.ds_id = 3  # type: ignore[attr-defined]
    for name, options in (("bias", {"bias": sharded}), ("lora.a", {"lora": LoRADelta(sharded, normal(V, 2))})):
        with pytest.raises(TypeError, match=f"^{name}: expected a plain tensor, got a parameter sharded by DeepSpeed"):
            logprobs(**options)


def test_records_of_tensors_compare_by_identity() -> None:
    rewards = [GroupRewards(normal(2), torch.tensor([0, 0])) for _ in range(2)]
    outputs, deltas = [fused(), fused()], [LoRADelta(normal(2, D), normal(V, 2)) for _ in range(2)]
    for first, second in (rewards, outputs, deltas):
        assert first == first
        assert first != second
    assert outputs.index(outputs[1]) == 1


def test_layout_takes_no_default_device() -> None:
    want = PackedLayout([2, 1], [[2, 1], [0]])
    with torch.device("meta"):
        for layout in (PackedLayout([2, 1], [[2, 1], [0]]), PackedLayout([2, 1], [[2, 1], [0]], device="cpu")):
            for name in ("position_ids", "predictor_index", "cu_seqlens"):
                assert getattr(layout, name).device.type == "cpu"
                assert torch.equal(getattr(layout, name), getattr(want, name))
    assert PackedLayout([2], [[1]], device="meta").position_ids.is_meta


def test_layout_names_what_is_no_list() -> None:
    with pytest.raises(TypeError, match=r"^prompt_lengths: expected a list of ints, got int"):
        PackedLayout(3, [[1]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^completion_lengths: expected a list of lists of ints, got int"):
        PackedLayout([3], 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^completion_lengths\[0\]: expected a list of ints, got int"):
        PackedLayout([3], [1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"^prompt_lengths: expected a list of ints, got Tensor; `tolist"):
        PackedLayout(torch.tensor([3]), [[1]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^completion_lengths\[0\]: expected a list of ints, got ndarray; `tolist"):
        PackedLayout([3], [np.array([1])])  # type: ignore[list-item]


def test_quantile_of_nothing() -> None:
    for size in (0, 3):
        nothing = entropy_quantile(torch.rand(size), torch.zeros(size, dtype=torch.bool), 0.5)
        assert nothing == float("inf")


def errors_of(got: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> list[tuple[float, float]]:
    def error(x: Tensor, y: Tensor) -> float:
        return float((x.double() - y).abs().max() / y.abs().max())

    return [(error(a, c), error(b, c)) for a, b, c in zip(got, plain, exact, strict=True)]


@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.parametrize("softcap", [None, 1e6])
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_gradient_of_large_logits(offset: float, softcap: float | None, slope: float) -> None:
    """A log-sum-exp in fp32 has lost the probabilities' digits when the logits are large."""
    g = torch.Generator().manual_seed(1)
    logits, target = torch.randn(16, 300, generator=g) + offset, torch.randint(300, (16,), generator=g)

    def gradient(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        x = logits.to(dtype, copy=True).requires_grad_()
        logprob, entropy = function(x, target, softcap=softcap)
        (logprob.sum() + slope * entropy.sum()).backward()
        assert x.grad is not None
        return x.grad

    plain = gradient(token_logprob_reference, torch.float32)
    [(ours, theirs)] = errors_of(
        [gradient(token_logprob, torch.float32)], [plain], [gradient(token_logprob_reference, torch.float64)]
    )
    assert ours <= 1.5 * theirs + 1e-6


def test_gradient_of_a_head_with_large_logits() -> None:
    """Scale and bias are powers of two, so that the logits themselves are the same in every order of operations."""
    g = torch.Generator().manual_seed(2)
    hidden = torch.randint(-4, 5, (8, 8), generator=g) / 4
    weight, target = torch.randint(-4, 5, (100, 8), generator=g) / 4, torch.randint(100, (8,), generator=g)

    def gradients(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Tensor]:
        operands = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        logprob, entropy = function(*operands, target, bias=torch.full((100,), 4096.0, dtype=dtype))
        return list(torch.autograd.grad(logprob.sum() + 0.5 * entropy.sum(), operands))

    plain, exact = (gradients(linear_logprob_reference, dtype) for dtype in (torch.float32, torch.float64))
    for ours, theirs in errors_of(gradients(linear_logprob, torch.float32), plain, exact):
        assert ours <= 1.5 * theirs + 1e-6
