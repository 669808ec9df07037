"""`sample_tokens`: the public function, its op, and the op's PyTorch path."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backend import use_triton
from ..checks import check_int, check_number, check_tensor, compute_dtype
from ..vocabulary import row_blocks

# Tokens whose weights are summed first: the distribution function is looked up among such sums, then inside one.
_RUN = 128


def sample_tokens(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw one token from each row of logits by the inverse of its distribution function; not differentiable.

    logits: [N, V] float, V >= 1, -inf where a token is ruled out. uniform: [N] float32 or float64 in [0, 1), one random
    number a row (values are checked on the CPU only; on a GPU others are clamped).
    temperature: >= 0, divides the logits; 0 takes the likeliest token, of equals the lowest id, with log-prob 0.
    top_k: only the k likeliest tokens, and those as likely as the k-th; 0 = all.
    top_p: in (0, 1], only the likeliest tokens that together reach this share, of equals the lowest ids; 1 = all.
    min_p: in [0, 1], only tokens at least this likely, relative to the likeliest; 0 = all. Filters act in this order.

    Returns `token` [N] int64, and `logprob` [N] in nats, fp32 (float64 for float64 logits), of the distribution drawn
    from: temperature and filters applied, renormalised. The same inputs give the same outputs; a row's do not depend on
    the others. A row that is no distribution (NaN, +inf, or nothing but -inf) gives token 0 with log-prob NaN.
    No wait for the device, and shapes that depend on shapes alone: it can be captured in a CUDA graph. Beside the
    result, a few MiB are used (on a GPU some bytes per 4096 logits, and a copy of logits whose columns do not lie side
    by side).
    Errors: TypeError or ValueError naming the argument.
    """
    check_tensor("logits", logits, (None, None), "[N, V]")
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected shape [N, V] with V >= 1, got {list(logits.shape)}")
    wide = isinstance(uniform, Tensor) and uniform.dtype == torch.float64
    check_tensor("uniform", uniform, (logits.shape[0],), "[N]", torch.float64 if wide else torch.float32, logits.device)
    check_number("temperature", temperature, 0)
    check_number("top_k", top_k, 0)
    check_int("top_k", top_k, 0)
    check_number("top_p", top_p, 0, 1, open_low=True)
    check_number("min_p", min_p, 0, 1)
    return _sample_tokens(logits.detach(), uniform.detach(), temperature, top_k, top_p, min_p)


@torch.library.custom_op("fastgrpo::sample_tokens", mutates_args=())
def _sample_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor]:
    """token, logprob, each [N]."""
    if uniform.device.type == "cpu" and not bool(((uniform >= 0) & (uniform < 1)).all()):
        raise ValueError(f"uniform: expected values in [0, 1), got values in [{uniform.min():g}, {uniform.max():g}]")
    uniform = uniform.double()
    if use_triton(logits):
        from . import kernel

        return kernel.sample(logits, uniform, temperature, top_k, top_p, min_p)
    token = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    logprob = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits))
    for rows in row_blocks(logits.shape[0], 2 * logits.shape[1]):  # logits and weights share the cache
        z = logits[rows]
        peak = z.amax(-1, keepdim=True).to(logprob.dtype)
        if temperature == 0:
            chosen, logp = z.argmax(-1), torch.zeros_like(peak[:, 0])
        else:
            weight = _weights(z, peak, temperature)
            _filter(z, weight, top_k, top_p, min_p)
            chosen, log_total = _draw(weight, uniform[rows].clamp(0, 1), z.shape[1])
            gap = (z.gather(1, chosen[:, None]) - peak)[:, 0].double()
            logp = (gap / temperature - log_total).to(peak.dtype)
        broken = ~peak[:, 0].isfinite()
        token[rows], logprob[rows] = chosen.masked_fill_(broken, 0), logp.masked_fill_(broken, math.nan)
    return token, logprob


@_sample_tokens.register_fake
def _(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=compute_dtype(logits))


def _weights(z: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """[b, V] logits, [b, 1] their maxima -> exp((z - peak) / temperature), behind them 0 up to whole runs."""
    rows, vocab_size = z.shape
    padded = peak.new_empty(rows, -(-vocab_size // _RUN) * _RUN)
    weight = padded[:, :vocab_size]
    torch.sub(z, peak, out=weight)
    if temperature != 1:
        weight.div_(min(max(temperature, 1e-37), 1e37))  # in fp32: by 0 or inf, some quotients would be NaN
    weight.exp_()
    padded[:, vocab_size:] = 0
    return padded


def _filter(z: Tensor, padded: Tensor, top_k: int, top_p: float, min_p: float) -> None:
    """Overwrite the weights with 0 where a filter leaves out a token."""
    weight = padded[:, : z.shape[1]]
    if 0 < top_k < z.shape[1]:
        weight.masked_fill_(z < z.topk(top_k).values[:, -1:], 0.0)
    if top_p < 1:
        order = z.argsort(dim=-1, descending=True, stable=True)
        ordered = weight.gather(1, order)
        up_to = ordered.double().cumsum(-1)
        ordered.masked_fill_(up_to - ordered >= top_p * up_to[:, -1:], 0.0)
        weight.scatter_(1, order, ordered)
    if min_p > 0:
        weight.masked_fill_(weight < min_p, 0.0)


def _draw(padded: Tensor, uniform: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """[b, whole runs] weights, [b] float64 -> [b] tokens, and [b] float64 logs of the weights' sums.

    Sums that are looked up are float64, and every target is below the last of them, so that what is found has a weight
    above 0. Rows of NaN give some token.
    """
    by_run = padded.view(len(padded), -1, _RUN)
    sums = by_run.sum(-1).double()
    up_to = sums.cumsum(-1)
    total = up_to[:, -1:]
    target = torch.minimum(uniform[:, None] * total, total * (1 - 2.0**-52))
    run = torch.searchsorted(up_to, target, right=True).clamp_(max=by_run.shape[1] - 1)
    target -= up_to.gather(1, run) - sums.gather(1, run)
    inside = by_run.gather(1, run[:, :, None].expand(-1, -1, _RUN))[:, 0].double().cumsum(-1)
    target = torch.minimum(target.clamp_(min=0), inside[:, -1:] * (1 - 2.0**-52))
    token = run * _RUN + torch.searchsorted(inside, target, right=True)
    return token.clamp_(max=vocab_size - 1)[:, 0], total.log()[:, 0]
