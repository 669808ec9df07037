"""Drawing tokens: one uniform number per token, turned into a token by the inverse of the distribution function.

A sample's numbers follow from the seed, its place among the prompts and in its group, and the limit of tokens; not from
what is decoded beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.records import Sampling
from fastgrpo.seeding import derive_seed
from fastgrpo_kernels import sample_tokens


def uniforms(seed: int, group: int, n: int, count: int) -> Tensor:
    """[n, count] float64 in [0, 1) on the CPU: the random numbers of a prompt's samples, one per token."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "group", group))
    return torch.rand(n, count, generator=generator, dtype=torch.float64)


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row of logits [B, V], by uniform [B] float64: tokens [B] int64, log-probs [B] fp32, no host sync.

    The log-probs are those of the distribution drawn from: temperature and filters applied. A row with NaN gives token
    0 with log-prob NaN.
    """
    return sample_tokens(
        logits,
        uniform,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
