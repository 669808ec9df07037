"""`linear_logprob`: against plain PyTorch in float64, every gradient, chunks, frozen parts, half precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import linear_logprob
from fastgrpo_kernels.head import host, plan
from fastgrpo_kernels.linear_logprob.reference import linear_logprob_reference

from .cases import relative_error

HEADS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.25},
    {"softcap": 3.0},
    {"logit_scale": 1.7, "softcap": 2.0, "temperature": 1.3},
]


def make(n: int = 13, d: int = 5, v: int = 17, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, d), (v, d), (v,)))
    return hidden, weight, bias, torch.randint(0, v, (n,), generator=g)


def gradients(logprob: Tensor, entropy: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    ramp = torch.linspace(-1, 2, logprob.numel(), dtype=logprob.dtype)
    return torch.autograd.grad((ramp * logprob - 0.3 * ramp.flip(0) * entropy).sum(), inputs)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 13, 1000])
def test_matches_plain_pytorch(head: dict[str, Any], chunk_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "VOCAB_TILE", 6)  # several tiles, the last one short
    hidden, weight, bias, target = make()
    inputs = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    want = linear_logprob_reference(hidden, weight, target, bias, **head)
    got = linear_logprob(hidden, weight, target, bias=bias, chunk_size=chunk_size, **head)
    for a, b in zip((*got, *gradients(*got, inputs)), (*want, *gradients(*want, inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck(head: dict[str, Any]) -> None:
    hidden, weight, bias, target = make(4, 3, 6)

    def op(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(h, w, target, bias=b, chunk_size=3, **head)

    assert torch.autograd.gradcheck(op, tuple(x.requires_grad_() for x in (hidden, weight, bias)))


def test_default_chunk_keeps_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "HOST_LOGITS", 17 * 8 * 3)
    hidden, weight, _, target = make()
    rows = []
    original = host.TorchHead._logits

    def spy(self: host.TorchHead, selected: slice | Tensor) -> Tensor:
        out = original(self, selected)
        rows.append(out.shape[0])
        return out

    monkeypatch.setattr(host.TorchHead, "_logits", spy)
    logprob, _ = linear_logprob(hidden, weight.requires_grad_(), target)
    logprob.sum().backward()
    assert max(rows) == 3
    assert sum(rows) == 26


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_requires_a_gradient_gets_one(needed: tuple[bool, ...]) -> None:
    hidden, weight, bias, target = make()
    inputs = tuple(x.requires_grad_(need) for x, need in zip((hidden, weight, bias), needed, strict=True))
    linear_logprob(hidden, weight, target, bias=bias)[0].sum().backward()
    assert [x.grad is not None for x in inputs] == list(needed)


def test_rows_without_upstream_gradient_may_hold_anything() -> None:
    hidden, weight, _, target = make()
    keep = torch.ones(13, dtype=torch.bool)
    keep[[2, 7]] = False
    dirty = hidden.clone()
    dirty[2], dirty[7, 1] = math.nan, math.inf
    grads = []
    for h in (hidden, dirty):
        inputs = (h.requires_grad_(), weight.requires_grad_())
        logprob, _ = linear_logprob(*inputs, target, chunk_size=4)
        grads.append(torch.autograd.grad(torch.where(keep, logprob, 0).sum(), inputs))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])
    assert not grads[1][0][~keep].any()


def test_empty_and_non_contiguous() -> None:
    hidden, weight, _, target = make()
    logprob, entropy = linear_logprob(hidden[:0].requires_grad_(), weight.requires_grad_(), target[:0])
    assert logprob.shape == entropy.shape == (0,)
    logprob.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    transposed = hidden.t().contiguous().t()
    torch.testing.assert_close(
        linear_logprob(transposed, weight.t().contiguous().t(), target)[0], linear_logprob(hidden, weight, target)[0]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_plain_pytorchs(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    base = [torch.randn(96, 64, generator=g), 0.3 * torch.randn(700, 64, generator=g)]
    target = torch.randint(0, 700, (96,), generator=g)

    def run(kind: str) -> list[Tensor]:
        wide = torch.float64 if kind == "exact" else dtype
        h, w = (x.to(dtype).to(wide).requires_grad_() for x in base)
        if kind == "ours":
            logprob, entropy = linear_logprob(h, w, target, chunk_size=40)
        else:
            lp = torch.log_softmax(torch.nn.functional.linear(h, w), -1)
            logprob, entropy = lp.gather(1, target[:, None])[:, 0], -(lp.exp() * lp).sum(-1)
        return [logprob.detach(), entropy.detach(), *torch.autograd.grad(logprob.sum() + entropy.sum(), (h, w))]

    exact, ours, plain = run("exact"), run("ours"), run("plain")
    assert [x.dtype for x in ours] == [torch.float32, torch.float32, dtype, dtype]
    for got, other, want in zip(ours, plain, exact, strict=True):
        assert relative_error(got, want) <= 1.5 * relative_error(other, want) + 1e-6


def test_autocast_rounds_the_operands_and_not_the_logits() -> None:
    hidden, weight, bias, target = (x.float() if x.is_floating_point() else x for x in make(64, 32, 50))
    inputs = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    rounded = tuple(x.detach().bfloat16().float().requires_grad_() for x in inputs)
    want = linear_logprob(*rounded[:2], target, bias=rounded[2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_logprob(*inputs[:2], target, bias=inputs[2])
    for a, b in zip((*got, *gradients(*got, inputs)), (*want, *gradients(*want, rounded)), strict=True):
        assert a.dtype == torch.float32  # the gradients of fp32 parameters are not rounded either
        assert torch.equal(a, b)


def test_bad_inputs() -> None:
    hidden, weight, bias, target = make()
    with pytest.raises(ValueError, match=r"weight: expected shape \[V, D\] = \[any, 5\], got \[17, 4\]"):
        linear_logprob(hidden, weight[:, :4], target)
    with pytest.raises(ValueError, match=r"weight: .*V >= 1"):
        linear_logprob(hidden, weight[:0], target)
    with pytest.raises(ValueError, match=r"bias: expected shape \[V\] = \[17\], got \[16\]"):
        linear_logprob(hidden, weight, target, bias=bias[:16])
    with pytest.raises(TypeError, match=r"hidden: expected a tensor of shape \[N, D\] and dtype .*, got list"):
        linear_logprob(hidden.tolist(), weight, target)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight: expected a tensor on cpu, got one on meta"):
        linear_logprob(hidden, weight.to("meta"), target)
    for bad in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="chunk_size"):
            linear_logprob(hidden, weight, target, chunk_size=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logit_scale"):
        linear_logprob(hidden, weight, target, logit_scale=math.inf)
