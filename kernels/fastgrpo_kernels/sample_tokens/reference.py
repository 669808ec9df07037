"""Sampling in plain PyTorch, in float64: the definition to read first. It sorts, and makes several [N, V] tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import compute_dtype


def filtered_weights(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """[N, V] finite or -inf logits, temperature > 0 -> [N, V] float64 probabilities over that of the likeliest token.

    The filters follow the temperature, in this order. Ties: top-k keeps every token as likely as the k-th, as
    transformers does. Top-p keeps the shortest run of tokens, likeliest first and of equals the lowest id first, that
    reaches the share `top_p`; transformers leaves it to its sort which of equals are kept. min-p keeps equals.
    """
    z = logits.double()
    if 0 < top_k < z.shape[1]:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -math.inf)
    weight = ((z - z.amax(-1, keepdim=True)) / temperature).exp()
    if top_p < 1:
        order = z.argsort(dim=-1, descending=True, stable=True)
        ordered = weight.gather(1, order)
        up_to = ordered.cumsum(-1)
        kept = up_to - ordered < top_p * up_to[:, -1:]
        weight = torch.zeros_like(weight).scatter_(1, order, ordered * kept)
    return weight.masked_fill(weight < min_p, 0.0)


def sample_tokens_reference(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative probability, in the order of the ids, exceeds `uniform`; and its log-prob.

    [N, V], [N] -> [N] int64, [N] fp32 (float64 for float64 logits). Temperature 0 is the likeliest token, of equals the
    lowest id, with log-prob 0. A row that is no distribution (NaN, +inf, or nothing but -inf) gives token 0 with NaN.
    """
    broken = ~logits.amax(-1).isfinite()
    z = logits.masked_fill(broken[:, None], 0.0)
    if temperature == 0:
        token = z.argmax(-1)
        logprob = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    else:
        weight = filtered_weights(z, temperature, top_k, top_p, min_p)
        up_to = weight.cumsum(-1)
        total = up_to[:, -1:]
        target = torch.minimum(uniform.double()[:, None] * total, total * (1 - 2.0**-52))
        token = torch.searchsorted(up_to, target, right=True)[:, 0]
        logprob = (weight.gather(1, token[:, None]) / total).log()[:, 0]
    return token.masked_fill(broken, 0), logprob.masked_fill(broken, math.nan).to(compute_dtype(logits))
