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
"""A log of which the exponential is 0 in every dtype, for tokens that -inf logits rule out: 0 * -inf is NaN."""


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


def logit_statistics(x: Tensor, target: Tensor, head: LogitHead) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[C, V] scaled input, [C] targets -> log-prob of the target, entropy, peak, log of the sum, each [C]; `x` stays.

    `peak` is the largest logit, the sum that of exp(z - peak). Their sum, the log-sum-exp, would round away what the
    gradient needs where logits are large.
    """
    blocks = row_blocks(*x.shape)
    logprob, entropy, peaks, log_sum = (x.new_empty(x.shape[0], 1) for _ in range(4))
    scratch = x.new_empty(2, blocks[0].stop if blocks else 0, x.shape[1])
    for rows in blocks:
        shifted, exponential = scratch[:, : rows.stop - rows.start]
        z = x[rows]
        if head.softcap is not None:
            z = torch.tanh(z, out=exponential).mul_(head.ceiling)
        peak = torch.amax(z, -1, keepdim=True, out=peaks[rows])
        torch.sub(z, peak, out=shifted)
        at_target = shifted.gather(-1, target[rows, None])
        torch.exp(shifted, out=exponential)
        total = exponential.sum(-1, keepdim=True)
        log_total = torch.log(total, out=log_sum[rows])
        expected = _expectation(exponential, shifted) / total
        torch.sub(at_target, log_total, out=logprob[rows])
        torch.sub(log_total, expected, out=entropy[rows])
    return logprob[:, 0], entropy[:, 0], peaks[:, 0], log_sum[:, 0]


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
    peak: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    head: LogitHead,
) -> Tensor:
    """Overwrite the [C, V] scaled input with `dL/dz * (1 - tanh(x)^2)` (no second factor without a softcap).

    `dlogp/dz_j = [j = y] - p_j` and `dH/dz_j = -p_j (log p_j + H)`. grad_logprob is [C]; grad_entropy [C], or None when
    the loss does not look at the entropy; peak, log_sum, entropy are `logit_statistics`'s. The rest of the chain,
    `head.slope`, is the caller's.
    """
    blocks = row_blocks(*x.shape)
    two = head.softcap is not None or grad_entropy is not None
    scratch = x.new_empty(2 if two else 0, blocks[0].stop if blocks else 0, x.shape[1])
    for rows in blocks:
        z, size = x[rows], rows.stop - rows.start
        if head.softcap is not None:
            tanh = torch.tanh(z, out=scratch[0, :size])
            torch.mul(tanh, head.ceiling, out=z)
        z.sub_(peak[rows, None])
        upstream, log_total = grad_logprob[rows, None], log_sum[rows, None]
        over_total = log_total.neg().exp_()
        if grad_entropy is None:
            z.exp_().mul_(-upstream * over_total)
        else:
            slope = grad_entropy[rows, None]
            factor = torch.mul(z.clamp_(min=LOG_ZERO), -slope * over_total, out=scratch[1, :size])
            factor.sub_((upstream + slope * (entropy[rows, None] - log_total)) * over_total)
            z.exp_().mul_(factor)
        index = target[rows, None]
        z.scatter_(-1, index, z.gather(-1, index) + upstream)
        if head.softcap is not None:
            z.mul_(tanh.square_().neg_().add_(1))
    return x
