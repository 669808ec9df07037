"""Linear log-probability in plain differentiable PyTorch, logits of all rows at once: the maths to read first."""

from __future__ import annotations

from torch import Tensor

from ..checks import compute_dtype
from ..token_logprob.reference import token_logprob_reference


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`z = softcap(logit_scale * (h @ W.T + b)) / T`. [N, D], [V, D], [N] -> logprob [N], entropy [N]."""
    dtype = compute_dtype(hidden, weight, bias)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return token_logprob_reference(logit_scale * logits, target, temperature, softcap)
