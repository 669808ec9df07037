"""The passes over the vocabulary, shared by every op that sees logits: PyTorch, row block after row block.

A *scaled input* `x` is what a GEMM leaves: the logits of the contract are `z = cap / T * tanh(x)` with a softcap and
`z = x` without, `LogitHead.input_scale` having been applied to the hidden states or logits. Blocks are small enough for
the cache, so that the sweeps over them cost little memory traffic. Nothing here is differentiable by autograd: the
gradient is written out in `logit_gradient_`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_number

BLOCK_ELEMENTS = 1 << 19
"""Elements of a row block: 2 MiB in fp32; two such scratch blocks are the passes' own memory."""

LOG_ZERO = -1e4
"""A log-probability whose exponential is 0 in every dtype, for tokens that -inf logits rule out: 0 * -inf is NaN."""


@dataclass(frozen=True)
class LogitHead:
    """`z = softcap(logit_scale * y) / temperature`, `y = hidden @ weight.T + bias`, `softcap(a) = cap * tanh(a / cap)`.

    Errors: ValueError for a number that is not finite, or a softcap or temperature that is not positive.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("logit_scale", self.logit_scale)
        check_number("temperature", self.temperature, 0, open_low=True)
        if self.softcap is not None:
            check_number("softcap", self.softcap, 0, open_low=True)

    @property
    def input_scale(self) -> float:
        """x = input_scale * y."""
        return self.logit_scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def slope(self) -> float:
        """dz/dy before the softcap's own derivative `1 - tanh(x)^2`."""
        return self.logit_scale / self.temperature

    @property
    def ceiling(self) -> float:
        """cap / T, what tanh(x) is multiplied by."""
        assert self.softcap is not None
        return self.softcap / self.temperature


def row_blocks(num_rows: int, vocab_size: int) -> list[slice]:
    """Slices that cut the rows into blocks of at most BLOCK_ELEMENTS elements (one row at least)."""
    step = max(1, BLOCK_ELEMENTS // max(1, vocab_size))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def logit_statistics(x: Tensor, target: Tensor, head: LogitHead) -> tuple[Tensor, Tensor, Tensor]:
    """[C, V] scaled input, [C] targets -> log-prob of the target, entropy, log-sum-exp, each [C]; `x` stays."""
    blocks = row_blocks(*x.shape)
    logprob, entropy, logsumexp = (x.new_empty(x.shape[0], 1) for _ in range(3))
    scratch = x.new_empty(2, blocks[0].stop if blocks else 0, x.shape[1])
    for rows in blocks:
        shifted, exponential = scratch[:, : rows.stop - rows.start]
        z = x[rows]
        if head.softcap is not None:
            z = torch.tanh(z, out=exponential).mul_(head.ceiling)
        peak = z.amax(-1, keepdim=True)
        torch.sub(z, peak, out=shifted)
        at_target = shifted.gather(-1, target[rows, None])
        torch.exp(shifted, out=exponential)
        total = exponential.sum(-1, keepdim=True)
        log_total = total.log()
        expected = _expectation(exponential, shifted) / total
        torch.sub(at_target, log_total, out=logprob[rows])
        torch.sub(log_total, expected, out=entropy[rows])
        torch.add(log_total, peak, out=logsumexp[rows])
    return logprob[:, 0], entropy[:, 0], logsumexp[:, 0]


def _expectation(weights: Tensor, values: Tensor) -> Tensor:
    """[b, V] x [b, V] -> [b, 1] sums of products, overwriting `values`; a value of -inf with weight 0 counts 0."""
    product = values.mul_(weights)
    total = product.sum(-1, keepdim=True)
    if bool(total.isnan().any()):
        total = product.masked_fill_(weights == 0, 0).sum(-1, keepdim=True)
    return total


def logit_gradient_(
    x: Tensor,
    target: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    head: LogitHead,
) -> Tensor:
    """Overwrite the [C, V] scaled input with `dL/dz * (1 - tanh(x)^2)` (no second factor without a softcap).

    `dlogp/dz_j = [j = y] - p_j` and `dH/dz_j = -p_j (log p_j + H)`. grad_logprob is [C]; grad_entropy [C], or None when
    the loss does not look at the entropy. The rest of the chain, `head.slope`, is the caller's.
    """
    blocks = row_blocks(*x.shape)
    two = head.softcap is not None or grad_entropy is not None
    scratch = x.new_empty(2 if two else 0, blocks[0].stop if blocks else 0, x.shape[1])
    for rows in blocks:
        z, size = x[rows], rows.stop - rows.start
        if head.softcap is not None:
            tanh = torch.tanh(z, out=scratch[0, :size])
            torch.mul(tanh, head.ceiling, out=z)
        z.sub_(logsumexp[rows, None])
        upstream = grad_logprob[rows, None]
        if grad_entropy is None:
            z.exp_().mul_(-upstream)
        else:
            slope = grad_entropy[rows, None]
            factor = torch.mul(z.clamp_(min=LOG_ZERO), -slope, out=scratch[1, :size])
            factor.sub_(upstream + slope * entropy[rows, None])
            z.exp_().mul_(factor)
        index = target[rows, None]
        z.scatter_(-1, index, z.gather(-1, index) + upstream)
        if head.softcap is not None:
            z.mul_(tanh.square_().neg_().add_(1))
    return x
