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

# The distribution function is summed over blocks first, then inside one block: one pass over the logits.
_BLOCK = 128
# Numbers worked on at once on a CPU: what its second-level cache holds.
_CPU_NUMBERS = 1 << 18


def uniforms(seed: int, group: int, n: int, count: int) -> Tensor:
    """[n, count] float64 in [0, 1) on the CPU: the random numbers of a prompt's samples, one per token."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "group", group))
    return torch.rand(n, count, generator=generator, dtype=torch.float64)


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row of logits [B, V], by uniform [B] float64: tokens [B] int64, log-probs [B] fp32, no host sync.

    The log-probs are those of the distribution drawn from: temperature and filters applied. A row with NaN gives some
    token with log-prob NaN.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    if logits.device.type != "cpu":  # the fused kernel; on a CPU the way below is faster
        return sample_tokens(
            logits,
            uniform,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
    rows = max(1, _CPU_NUMBERS // logits.shape[1])
    parts = [_draw(z, u, sampling) for z, u in zip(logits.split(rows), uniform.split(rows), strict=True)]
    tokens, logprobs = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // _BLOCK)
    top = logits.amax(-1, keepdim=True).float()
    weight = torch.zeros(rows, blocks * _BLOCK, device=logits.device)
    real = torch.sub(logits, top, out=weight[:, :vocabulary])
    if sampling.temperature != 1:
        real.div_(sampling.temperature)
    real.exp_()
    weight = _filter(weight, sampling)
    by_block = weight.view(rows, blocks, _BLOCK)
    sums = by_block.sum(-1).double()
    up_to = sums.cumsum(-1)
    total = up_to[:, -1:]
    # Below the total, however the product rounds: what is found then has a weight above 0.
    target = torch.minimum(uniform[:, None] * total, total * (1 - 2.0**-52))
    block = torch.searchsorted(up_to, target, right=True).clamp_(max=blocks - 1)
    before = up_to.gather(1, block) - sums.gather(1, block)
    inside = before + by_block.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).double().cumsum(-1)
    # The block's sum was rounded otherwise than its running sum: stay inside it.
    target = torch.maximum(torch.minimum(target, inside[:, -1:] * (1 - 2.0**-52)), before)
    token = block * _BLOCK + torch.searchsorted(inside, target, right=True).clamp_(max=_BLOCK - 1)
    token.clamp_(max=vocabulary - 1)
    drawn = (logits.gather(1, token).float() - top).div_(sampling.temperature)
    return token.squeeze(1), (drawn.double() - total.log()).squeeze(1).float()


def _filter(weight: Tensor, sampling: Sampling) -> Tensor:
    """Weights [B, W], 1 for the likeliest token, with 0 for the tokens that top-k, top-p or min-p leave out."""
    if 0 < sampling.top_k < weight.shape[1]:
        least = weight.topk(sampling.top_k).values[:, -1:]
        weight = weight.masked_fill(weight < least, 0.0)
    if sampling.top_p < 1:
        ordered, index = weight.sort(descending=True, stable=True)
        up_to = ordered.double().cumsum(-1)
        ordered[up_to - ordered >= sampling.top_p * up_to[:, -1:]] = 0.0
        weight = torch.zeros_like(weight).scatter_(1, index, ordered)
    if sampling.min_p > 0:
        weight = weight.masked_fill(weight < sampling.min_p, 0.0)
    return weight
