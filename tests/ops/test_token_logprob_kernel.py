"""`token_logprob` in Triton's interpreter: against float64 and plain PyTorch, odd widths, layouts, -inf, NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import token_logprob
from fastgrpo_kernels.token_logprob.reference import token_logprob_reference

from .cases import relative_error

pytestmark = pytest.mark.interpreter
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgrpo_kernels.token_logprob import kernel

    class Refuse:
        def __getitem__(self, grid: Any) -> NoReturn:
            raise AssertionError(f"a launch of {grid}")

    monkeypatch.setattr(kernel, "token_logprob_forward", Refuse())
    monkeypatch.setattr(kernel, "token_logprob_backward", Refuse())


def make(n: int, v: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Random logits; the first and the last row's targets are the first and the last token."""
    g = torch.Generator().manual_seed(v)
    logits = (scale * torch.randn(n, v, generator=g)).to(dtype)
    target = torch.randint(0, v, (n,), generator=g)
    target[0], target[-1] = 0, v - 1
    return logits, target


def plain(logits: Tensor, target: Tensor, temperature: float = 1.0, softcap: float | None = None) -> list[Tensor]:
    """What PyTorch makes of it in the logits' own dtype."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, -1)
    return [logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)]


def with_gradient(function: Any, logits: Tensor, target: Tensor, weights: Tensor, *args: Any) -> list[Tensor]:
    """[logprob, entropy, gradient of `sum(weights[0] * logprob + weights[1] * entropy)`]."""
    x = logits.detach().requires_grad_()
    logprob, entropy = function(x, target, *args)
    total = (weights[0].to(logprob.dtype) * logprob + weights[1].to(entropy.dtype) * entropy).sum()
    return [logprob.detach(), entropy.detach(), torch.autograd.grad(total, x)[0]]


def triton(logits: Tensor, target: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Any:
    return token_logprob(logits, target, temperature=temperature, softcap=softcap)


def error(got: Tensor, want: Tensor) -> float:
    """Relative error; absolute where everything wanted is 0, as the entropy of one token is."""
    return relative_error(got, want) if bool(want.any()) else float(got.double().abs().max())


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("v", [1, 7, 8, 16, 513, 4097, 8203, 16640])
def test_error_is_at_most_plain_pytorchs(v: int, dtype: torch.dtype, temperature: float, softcap: float | None) -> None:
    n = 4
    logits, target = make(n, v, dtype)
    weights = torch.randn(2, n, generator=torch.Generator().manual_seed(1))
    want = with_gradient(token_logprob_reference, logits.double(), target, weights, temperature, softcap)
    got = with_gradient(triton, logits, target, weights, temperature, softcap)
    usual = with_gradient(plain, logits, target, weights, temperature, softcap)
    assert [t.dtype for t in got] == [torch.float32, torch.float32, dtype]
    for ours, theirs, exact in zip(got, usual, want, strict=True):
        assert error(ours, exact) <= 1.5 * error(theirs, exact) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [33, 1030])
def test_gradient_of_one_output_only(v: int, dtype: torch.dtype) -> None:
    """Half-precision gradients may be off by their rounding, and by no more."""
    logits, target = make(3, v, dtype)
    rounding = torch.finfo(dtype).eps / 2
    for i in range(2):
        x, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        token_logprob(x, target)[i].mul(-2.5).sum().backward()
        token_logprob_reference(exact, target)[i].mul(-2.5).sum().backward()
        assert x.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(x.grad.double(), exact.grad, rtol=rounding * 1.01 + 1e-5, atol=2e-7)


def test_logits_far_from_zero() -> None:
    """The probabilities of logits around 1e4 keep their digits, for which `z - logsumexp` in fp32 is too coarse."""
    logits, target = make(4, 1031, torch.float32)
    logits += torch.tensor([1e4, -1e4, 1e4, -1e4])[:, None]
    weights = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, -1.0, 2.0]])
    want = with_gradient(token_logprob_reference, logits.double(), target, weights)
    for got, exact in zip(with_gradient(triton, logits, target, weights), want, strict=True):
        assert relative_error(got, exact) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_extreme_logits(dtype: torch.dtype, softcap: float | None) -> None:
    n, v = 7, 2057
    logits, target = make(n, v, dtype)
    logits[0] *= 1e4
    logits[1, 1::2] = -math.inf  # half the tokens ruled out, the target among them: log-prob -inf without a softcap
    target[1] = 5
    logits[2] = -math.inf
    logits[2, target[2]] = -3.0  # certain: log-prob 0, entropy 0
    logits[3, : v - 1] = -math.inf
    logits[3, v - 1] = 3.0
    target[3] = v - 1
    logits[4] = 1e4
    logits[5, ::2], logits[5, 1::2] = 1e4, -1e4
    logits[6] = -1e4
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, -1.0, 0.3]), torch.linspace(-1, 1, n)
    logprob, entropy, grad = with_gradient(triton, logits, target, torch.stack(weights), 1.0, softcap)
    exact = logits.double().requires_grad_()
    want = token_logprob(exact, target, softcap=softcap)  # the PyTorch path: float64
    (want[0] * weights[0].double() + want[1] * weights[1].double()).sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(logprob.double(), want[0].detach(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), want[1].detach(), rtol=1e-6, atol=2e-6)
    assert grad.isfinite().all()
    torch.testing.assert_close(grad.double(), exact.grad, rtol=torch.finfo(dtype).eps / 1.9 + 1e-5, atol=2e-6)
    if softcap is None:
        assert logprob[1] == -math.inf
        assert not grad[2:4].any()
        assert not grad[1, 1 : target[1] : 2].any()


def test_nan_and_infinity_stay_in_their_row() -> None:
    logits, target = make(6, 1037, torch.float32)
    weights = torch.ones(2, 6)
    clean = with_gradient(triton, logits, target, weights)
    logits[1, 517], logits[2, 0], logits[3, 600], logits[4] = math.nan, math.nan, math.inf, -math.inf
    broken = with_gradient(triton, logits, target, weights)
    for got, want in zip(broken, clean, strict=True):
        assert torch.equal(got[[0, 5]], want[[0, 5]])
        assert got[1:5].flatten(1).isnan().all() if got.ndim > 1 else got[1:5].isnan().all()


@pytest.mark.parametrize("v", [6, 1037])
def test_rows_without_upstream_gradient_may_hold_anything(v: int) -> None:
    logits, target = make(5, v, torch.bfloat16)
    keep = torch.tensor([True, False, True, False, True])
    weights = torch.stack([keep.float(), -keep.float()])
    clean = with_gradient(triton, logits, target, weights)[2]
    logits[1], logits[3, 2] = math.nan, math.inf
    grad = with_gradient(triton, logits, target, weights)[2]
    assert torch.equal(grad, clean)
    assert not grad[~keep].any()
    assert grad[keep].any(1).all()


def test_entropy_gradient_alone_keeps_a_row_alive() -> None:
    logits, target = make(2, 50, torch.float32)
    grad = with_gradient(triton, logits, target, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))[2]
    assert grad[0].any()
    assert not grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [8, 13, 1037])
def test_any_layout(v: int, dtype: torch.dtype) -> None:
    """Row strides that keep the rows' alignment and that break it, odd first columns, columns apart, rows repeated."""
    n = 5
    logits, target = make(n, v, dtype)
    wide = torch.full((n, v + 16), math.nan, dtype=dtype)
    layouts = {"every other row": torch.full((2 * n, v), math.nan, dtype=dtype)[::2]}
    layouts |= {f"columns from {i}": wide.clone()[:, i : i + v] for i in (0, 3, 8)}
    layouts |= {"odd stride": torch.full((n, v + 3), math.nan, dtype=dtype)[:, 1 : 1 + v]}
    layouts |= {"transposed": torch.empty(v, n, dtype=dtype).t()}
    weights = torch.linspace(-1, 2, 2 * n).view(2, n)
    want = with_gradient(triton, logits, target, weights)
    tolerance = torch.finfo(dtype).eps
    for name, view in layouts.items():
        view.copy_(logits)
        got = with_gradient(triton, view, torch.stack([target, target], 1)[:, 0], weights)
        assert got[2].shape == (n, v), name
        torch.testing.assert_close(got[:2], want[:2], rtol=2e-6, atol=1e-6, msg=name)
        torch.testing.assert_close(got[2], want[2], rtol=tolerance, atol=1e-6, msg=name)
    repeated = with_gradient(triton, logits[:1].expand(3, v), target[:1].expand(3), weights[:, :1].expand(2, 3))
    assert torch.equal(repeated[0], repeated[0][:1].expand(3))
    torch.testing.assert_close(repeated[2][2], want[2][0], rtol=tolerance, atol=1e-6)


def test_rows_past_two_to_the_31_elements(tmp_path: Path) -> None:
    """Three rows 2^30 + 8 apart in a sparse file: the third begins where an int32 offset has wrapped round."""
    v, stride = 40, (1 << 30) + 8
    base = torch.from_file(str(tmp_path / "logits"), shared=True, size=2 * stride + v, dtype=torch.bfloat16)
    view = base.as_strided((3, v), (stride, 1))
    logits, target = make(3, v, torch.bfloat16)
    view.copy_(logits)
    weights = torch.ones(2, 3)
    for got, want in zip(
        with_gradient(triton, view, target, weights), with_gradient(triton, logits, target, weights), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("v", "dtype"), [(1, torch.bfloat16), (7, torch.float16), (9, torch.float32), (1037, HALF[0])])
def test_nothing_is_written_around_the_gradient(v: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = make(3, v, dtype)
    pad = 64
    guarded = torch.full((3 * v + 2 * pad,), 123.0, dtype=dtype)
    inner = guarded[pad : pad + 3 * v].view(3, v)
    want = with_gradient(triton, logits, target, torch.ones(2, 3))[2]
    logits.requires_grad_()
    logprob, entropy = token_logprob(logits, target)
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: inner)
    (logprob + entropy).sum().backward()
    assert torch.equal(inner, want)
    assert (guarded[:pad] == 123).all()
    assert (guarded[-pad:] == 123).all()


@pytest.mark.parametrize("v", [513, 9001])
def test_repeats_bit_for_bit(v: int) -> None:
    logits, target = make(3, v, torch.bfloat16)
    weights = torch.randn(2, 3, generator=torch.Generator().manual_seed(2))
    first, second = (with_gradient(triton, logits.clone(), target, weights, 0.9, 20.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows_no_launch(no_launch: None) -> None:
    logits = torch.zeros(0, 11, dtype=torch.bfloat16, requires_grad=True)
    logprob, entropy = token_logprob(logits, torch.zeros(0, dtype=torch.int64))
    assert logprob.shape == entropy.shape == (0,)
    assert logprob.dtype == entropy.dtype == torch.float32
    (logprob.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 11)


def test_float64_takes_the_pytorch_path(no_launch: None) -> None:
    logits, target = make(2, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda x: token_logprob(x, target), logits.requires_grad_())


def test_a_target_outside_the_vocabulary_is_nan() -> None:
    """The kernel's own behaviour: on a GPU nobody looks at the targets before the launch."""
    from fastgrpo_kernels.token_logprob import kernel
    from fastgrpo_kernels.vocabulary import LogitHead

    logits, _ = make(3, 9, torch.float32)
    logprob, entropy, *_ = kernel.forward(logits, torch.tensor([-1, 4, 9]), LogitHead())
    assert logprob.isnan().tolist() == [True, False, True]
    assert not entropy.isnan().any()


def test_small_logits_under_a_large_softcap() -> None:
    """tanh near 0, where the formula with one exponential has lost its digits."""
    logits, target = make(4, 40, torch.float32, scale=1e-3)
    weights = torch.tensor([[1.0, -2.0, 0.5, 3.0], [1e3, 0.0, 2e3, -1e3]])
    want = with_gradient(token_logprob_reference, logits.double(), target, weights, 0.01, 50.0)
    got = with_gradient(triton, logits, target, weights, 0.01, 50.0)
    for ours, exact in zip(got, want, strict=True):
        assert relative_error(ours, exact) <= 1e-6


def test_every_launched_variant_is_listed() -> None:
    from fastgrpo_kernels.token_logprob import kernel

    assert len({spec.name for spec in kernel.KERNELS}) == len(kernel.KERNELS)
    listed = [dict(spec.constexprs, num_warps=spec.num_warps) for spec in kernel.KERNELS]
    for itemsize in (2, 4):
        for v in (1, 1023, 4096, 8192, 151_936):
            for stride in (v, v + 1, 2 * v + 8)[: None if v >= 8192 else 1]:  # short rows are listed aligned only
                for softcap in (False, True):
                    launched = kernel._tiling(itemsize, v, stride, softcap) | {"SOFTCAP": softcap}
                    assert any(launched.items() <= variant.items() for variant in listed), (itemsize, v, stride)
