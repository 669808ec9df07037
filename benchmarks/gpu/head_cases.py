"""The LM head's inputs, its true results in float64, the errors of others beside it, and the rules for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import clipped_loss
from fastgrpo_kernels import linear_grpo_loss

SIZES = ((4096, 128256), (2048, 151936), (896, 151936))
"""(D, V) of the table."""

SMALL_SIZES = ((64, 520),)
LENGTH = 128
SMALL_LENGTH = 16
TOLERANCE = {"loss": 1e-5, "logprob": 1e-5, "grad_hidden": 1e-4, "grad_weight": 1e-4}
"""Added to the multiple of plain PyTorch's error."""


@dataclass
class HeadInputs:
    """hidden [N, D], weight [V, D] bf16; target, advantage (per token), old_logprob [N]; sequences of `length`."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    advantage: Tensor
    old_logprob: Tensor
    cu_seqlens: Tensor
    length: int

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def returned_bytes(self) -> int:
        gradients = (self.hidden.grad, self.weight.grad)
        return sum(g.numel() * g.element_size() for g in gradients if g is not None)


def make_weight(V: int, D: int, device: torch.device) -> Tensor:
    g = torch.Generator(device).manual_seed(1)
    return (torch.randn(V, D, generator=g, device=device) / D**0.5).bfloat16()


def make_inputs(seed: int, N: int, weight: Tensor, *, trainable: bool, length: int) -> HeadInputs:
    """Logits are standard normal; ratios stand on both sides of the clip range."""
    device, (V, D) = weight.device, weight.shape
    g = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, device=device).bfloat16()
    target = torch.randint(V, (N,), generator=g, device=device)
    z = torch.cat([(hidden[a : a + 2048].float() * weight[target[a : a + 2048]]).sum(1) for a in range(0, N, 2048)])
    logsumexp = torch.tensor(float(V)).log().item() + hidden.float().square().sum(1) / (2 * D)
    old = z - logsumexp + 0.2 * torch.randn(N, generator=g, device=device)
    advantage = torch.randn(N // length, generator=g, device=device).repeat_interleave(length)
    bounds = torch.arange(0, N + 1, length, dtype=torch.int32, device=device)
    weight = weight.detach().requires_grad_(trainable)
    return HeadInputs(hidden.requires_grad_(), weight, target, advantage, old, bounds, length)


def fused(x: HeadInputs, **options: Any) -> tuple[Tensor, Tensor]:
    """loss, logprob of the op; gradients land in `.grad`."""
    N = x.target.numel()
    output = linear_grpo_loss(
        x.hidden, x.weight, x.target, x.advantage, x.cu_seqlens, old_logprob=x.old_logprob, num_tokens=N, **options
    )
    output.loss.backward()
    return output.loss.detach(), output.logprob


class Fp32Logits(torch.autograd.Function):
    """bf16 operands, fp32 logits; their gradient is rounded to bf16 before its GEMMs: plain, but not coarse."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        if hidden.is_cuda:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return hidden.float() @ weight.float().t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        return grad @ weight, grad.t() @ hidden if ctx.needs_input_grad[1] else None


@dataclass
class Outcome:
    """loss 0-d, logprob [N], and the gradients, of one way to compute them."""

    loss: Tensor
    logprob: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor | None


def reference(x: HeadInputs, kind: str, rows: int = 1024) -> Outcome:
    """`float64`, or plain PyTorch with `fp32_logits` or `bf16_logits`, `rows` at a time.

    The plain kinds sum dW over the chunks in fp32, and round each gradient to bf16 once, at the end.
    """
    wide = torch.float64 if kind == "float64" else torch.float32
    weight = x.weight.detach()
    weight = (weight.double() if kind == "float64" else weight).requires_grad_(x.weight.requires_grad)
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if weight.requires_grad else None
    total, N = torch.zeros((), dtype=torch.float64, device=weight.device), x.target.numel()
    logprobs, gradients = [], []
    for part in torch.arange(N, device=weight.device).split(rows):
        hidden = x.hidden.detach()[part].to(weight.dtype).requires_grad_()
        logits = Fp32Logits.apply(hidden, weight) if kind == "fp32_logits" else F.linear(hidden, weight).to(wide)
        logprob = torch.log_softmax(logits, -1).gather(1, x.target[part, None]).squeeze(1)
        del logits
        loss = clipped_loss(logprob, x.old_logprob[part].to(wide), x.advantage[part].to(wide)) / N
        loss.backward()
        total += loss.detach()
        logprobs.append(logprob.detach())
        assert hidden.grad is not None
        gradients.append(hidden.grad)
        if grad_weight is not None:
            assert weight.grad is not None
            grad_weight += weight.grad
            weight.grad = None
    if kind != "float64" and grad_weight is not None:
        grad_weight = grad_weight.bfloat16()
    return Outcome(total, torch.cat(logprobs), torch.cat(gradients), grad_weight)


def errors(found: Outcome, truth: Outcome, scale: Tensor) -> dict[str, float]:
    """loss: relative to `scale`, the mean |advantage|; logprob: root mean square in nats; gradients: relative norm."""
    pairs = {
        "grad_hidden": (found.grad_hidden, truth.grad_hidden),
        "grad_weight": (found.grad_weight, truth.grad_weight),
    }
    result = {
        "loss": float(((found.loss - truth.loss).abs() / scale).item()),
        "logprob": float((found.logprob.double() - truth.logprob).square().mean().sqrt().item()),
    }
    for name, (value, true) in pairs.items():
        if value is not None and true is not None:
            result[name] = _relative_norm(value, true)
    return result


def _relative_norm(value: Tensor, true: Tensor) -> float:
    """Some rows at a time: a float64 copy of a large gradient is gigabytes."""
    wrong, whole = 0.0, 0.0
    for a, b in zip(value.split(16384), true.split(16384), strict=True):
        wrong += float((a.double() - b).square().sum().item())
        whole += float(b.square().sum().item())
    return float((wrong / whole) ** 0.5)


@dataclass
class Yardstick:
    """Truth, and how far plain PyTorch is from it."""

    truth: Outcome
    scale: Tensor
    plain: dict[str, dict[str, float]]

    @classmethod
    def of(cls, x: HeadInputs) -> Yardstick:
        truth, scale = reference(x, "float64", 512), x.advantage.abs().mean().double()
        plain = {kind: errors(reference(x, kind), truth, scale) for kind in ("bf16_logits", "fp32_logits")}
        return cls(truth, scale, plain)

    def errors(self, x: HeadInputs, loss: Tensor, logprob: Tensor) -> dict[str, float]:
        assert x.hidden.grad is not None
        return errors(Outcome(loss, logprob, x.hidden.grad, x.weight.grad), self.truth, self.scale)

    def within(self, found: dict[str, float]) -> bool:
        """<= 1.5 x the error with bf16 logits and <= 2 x that with fp32 logits; NaN is not."""
        coarse, fine = self.plain["bf16_logits"], self.plain["fp32_logits"]
        return all(e <= min(1.5 * coarse[n], 2 * fine[n]) + TOLERANCE[n] for n, e in found.items())
