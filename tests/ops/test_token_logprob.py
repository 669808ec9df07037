"""`token_logprob`: against a float64 softmax in loops, gradients, -inf and NaN rows, memory layout, half precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import token_logprob, vocabulary
from fastgrpo_kernels.token_logprob.reference import token_logprob_reference

from .cases import relative_error


def softmax_loop(logits: list[float], target: int, temperature: float, softcap: float | None) -> tuple[float, float]:
    """Log-prob of the target and entropy of one row, the definition with Python floats."""
    if softcap is not None:
        logits = [softcap * math.tanh(x / softcap) for x in logits]
    z = [x / temperature for x in logits]
    peak = max(z)
    lse = peak + math.log(sum(math.exp(x - peak) for x in z))
    entropy = -sum(math.exp(x - lse) * (x - lse) for x in z if x > -math.inf)
    return z[target] - lse, entropy


def make(n: int, v: int, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, v, generator=g, dtype=torch.float64)
    return logits, torch.randint(0, v, (n,), generator=g)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 5),
    v=st.integers(1, 9),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 1.0, 300.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
)
def test_matches_the_definition(
    n: int, v: int, seed: int, scale: float, temperature: float, softcap: float | None
) -> None:
    logits, target = make(n, v, seed, scale)
    logprob, entropy = token_logprob(logits, target, temperature=temperature, softcap=softcap)
    for i in range(n):
        want = softmax_loop(logits[i].tolist(), int(target[i]), temperature, softcap)
        assert float(logprob[i]) == pytest.approx(want[0], rel=1e-12, abs=1e-12)
        assert float(entropy[i]) == pytest.approx(want[1], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(softcap: float | None, temperature: float) -> None:
    logits, target = make(3, 5)

    def op(x: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprob(x, target, temperature=temperature, softcap=softcap)

    assert torch.autograd.gradcheck(op, logits.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: op(x)[0], logits)
    assert torch.autograd.gradcheck(lambda x: op(x)[1], logits)


def test_row_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = make(11, 7)
    logits.requires_grad_()
    outputs = []
    for elements in (1, 21, 1 << 19):
        monkeypatch.setattr(vocabulary, "BLOCK_ELEMENTS", elements)
        logprob, entropy = token_logprob(logits, target, softcap=4.0)
        (grad,) = torch.autograd.grad((logprob * 2 - entropy).sum(), logits)
        outputs.append((logprob.detach(), entropy.detach(), grad))
    for other in outputs[1:]:
        for got, want in zip(other, outputs[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)


def test_tokens_ruled_out_by_minus_infinity() -> None:
    logits, target = make(4, 6)
    logits[0, (target[0] + 1) % 6] = -math.inf
    logits[1] = -math.inf
    logits[1, target[1]] = 3.0  # certain: log-prob 0, entropy 0
    logits.requires_grad_()
    logprob, entropy = token_logprob(logits, target)
    for i in range(4):
        want = softmax_loop(logits[i].tolist(), int(target[i]), 1.0, None)
        assert float(logprob[i].detach()) == pytest.approx(want[0], abs=1e-14)
        assert float(entropy[i].detach()) == pytest.approx(want[1], abs=1e-14)
    (grad,) = torch.autograd.grad((logprob + 0.5 * entropy).sum(), logits)
    assert grad.isfinite().all()
    assert grad[0, (target[0] + 1) % 6] == 0
    assert not grad[1].any()


def test_rows_without_upstream_gradient_may_hold_anything() -> None:
    logits, target = make(5, 6)
    clean = logits.clone().requires_grad_()
    logits[1], logits[3, 2] = math.nan, math.inf
    logits.requires_grad_()
    keep = torch.tensor([True, False, True, False, True])
    grads = []
    for x in (clean, logits):
        logprob, entropy = token_logprob(x, target)
        total = torch.where(keep, logprob, 0).sum() + torch.where(keep, entropy, 0).sum()
        grads.append(torch.autograd.grad(total, x)[0])
    assert torch.equal(grads[0], grads[1])
    assert not grads[1][~keep].any()


def test_non_contiguous_logits() -> None:
    logits, target = make(6, 8)
    view = logits.t().contiguous().t().requires_grad_()
    logprob, _ = token_logprob(view, target)
    want, _ = token_logprob_reference(logits, target)
    torch.testing.assert_close(logprob.detach(), want)
    logprob.sum().backward()
    assert view.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_plain_pytorchs(dtype: torch.dtype) -> None:
    logits, target = make(64, 1000, scale=4.0)
    logits = logits.to(dtype)
    exact = logits.double().requires_grad_()
    (token_logprob_reference(exact, target, 0.7)[0]).sum().backward()
    want = token_logprob_reference(exact.detach(), target, 0.7)

    ours = logits.clone().requires_grad_()
    got = token_logprob(ours, target, temperature=0.7)
    assert got[0].dtype == got[1].dtype == torch.float32
    got[0].sum().backward()
    plain = logits.clone().requires_grad_()
    lp = torch.log_softmax(plain / 0.7, -1)
    (selected := lp.gather(1, target[:, None])[:, 0]).sum().backward()
    assert relative_error(got[0], want[0]) <= 1.5 * relative_error(selected, want[0]) + 1e-6
    assert relative_error(got[1], want[1]) <= 1.5 * relative_error(-(lp.exp() * lp).sum(-1), want[1]) + 1e-6
    assert ours.grad is not None
    assert plain.grad is not None
    assert exact.grad is not None
    assert ours.grad.dtype == dtype
    assert relative_error(ours.grad, exact.grad) <= 1.5 * relative_error(plain.grad, exact.grad) + 1e-6


def test_bad_inputs() -> None:
    logits, target = make(4, 6)
    with pytest.raises(TypeError, match=r"logits: expected dtype .*got int64"):
        token_logprob(logits.long(), target)
    with pytest.raises(ValueError, match=r"logits: expected shape \[N, V\].*got \[24\]"):
        token_logprob(logits.flatten(), target)
    with pytest.raises(TypeError, match=r"target: expected dtype int64, got int32"):
        token_logprob(logits, target.int())
    with pytest.raises(ValueError, match=r"target: expected shape \[N\] = \[4\], got \[3\]"):
        token_logprob(logits, target[:3])
    with pytest.raises(ValueError, match=r"target: expected token ids in \[0, V\) with V = 6"):
        token_logprob(logits, target + 6)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            token_logprob(logits, target, temperature=bad)
        with pytest.raises(ValueError, match="softcap"):
            token_logprob(logits, target, softcap=bad)
