"""Token log-probability and entropy in plain differentiable PyTorch: the maths to read first."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype


def token_logprob_reference(
    logits: Tensor, target: Tensor, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`z = softcap(logits) / T`; `logp = z[y] - logsumexp(z)`, `H = -sum p log p`. [N, V], [N] -> [N], [N]."""
    z = logits.to(compute_dtype(logits))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z / temperature, dim=-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, target[:, None])[:, 0], entropy
