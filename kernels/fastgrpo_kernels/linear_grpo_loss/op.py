"""`linear_grpo_loss`: checks, the choice of a schedule, the schedules, the public function.

Two schedules, one maths (grpo_loss/coefficients.py). *Fused*: chunk by chunk, logits -> statistics -> loss coefficients
-> gradient in the logits' own buffer -> dH, dW; 3 GEMMs, the backward only scales. Every chunk must hold all that its
tokens' coefficients depend on. *Recomputed*: log-probs of everything first, logits again in the backward; 4 GEMMs.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..checks import check_target, compute_dtype
from ..group_advantages.op import GroupRewards
from ..grpo_loss.coefficients import evaluate
from ..grpo_loss.config import LossConfig
from ..grpo_loss.inputs import LossArguments, LossInputs
from ..grpo_loss.op import DEFAULT_CONFIG, differentiable_loss, with_gradients
from ..grpo_loss.output import LossOutput
from ..linear_logprob.op import check_linear, recomputed_logprob
from ..projection import ChunkedHead, chunk_rows, even_chunks
from ..vocabulary import LogitHead, logit_gradient_, logit_statistics


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor | GroupRewards,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    sampling_logprob: Tensor | None = None,
    mask: Tensor | None = None,
    entropy_threshold: float | Tensor | None = None,
    config: LossConfig = DEFAULT_CONFIG,
    num_sequences: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> LossOutput:
    """`grpo_loss` of `linear_logprob`, with gradients for hidden, weight and bias, never holding the [N, V] logits.

    hidden: [N, D] float, the hidden states that predict the N completion tokens. weight: [V, D]. bias: [V] or None.
    target: [N] int64 in [0, V) where the mask is True (values are checked on the CPU only). The logits are
    `softcap(logit_scale * (hidden @ weight.T + bias)) / temperature`.
    chunk_size: rows whose logits exist at a time; by default what fits 64 MiB, up to 256 MiB to hold a whole sequence
        when the loss needs that.
    The other arguments are `grpo_loss`'s. Only rows that train meet the LM head; logprob and entropy are 0 elsewhere.

    Cost with gradients: 3 GEMMs, 2 with a frozen weight (or 1 without any gradient), when the loss is token-level or
    every sequence fits a chunk (when all rows fit one, if the entropy threshold is this call's own quantile); one more
    otherwise. The result is the same to rounding. Half inputs: GEMMs and sums in fp32. Rows that train are found on the
    host: one sync outside the CPU when there is a mask or a failed sample.
    Errors: TypeError or ValueError naming the argument, before any work.
    """
    check_linear(hidden, weight, bias, chunk_size)
    num_rows, device = hidden.shape[0], hidden.device
    arguments = LossArguments(
        advantage,
        cu_seqlens,
        old_logprob,
        ref_logprob,
        sampling_logprob,
        mask,
        entropy_threshold,
        config,
        num_sequences,
        num_tokens,
    )
    arguments.check(num_rows, device)
    check_target(target, num_rows, weight.shape[0], device, mask)
    head = LogitHead(logit_scale, softcap, temperature)
    inputs = arguments.prepare(num_rows, compute_dtype(hidden, weight, bias))
    if mask is None and not isinstance(advantage, GroupRewards):
        return _loss_of_rows(hidden, weight, bias, target, None, inputs, head, config, chunk_size)
    rows = inputs.trained.nonzero()[:, 0]
    trained_before = torch.cat([inputs.trained.new_zeros(1, dtype=torch.int64), inputs.trained.cumsum(0)])
    inputs = inputs.rows(rows, trained_before[cu_seqlens.long()])
    return _loss_of_rows(hidden, weight, bias, target, rows, inputs, head, config, chunk_size)


def _loss_of_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows: Tensor | None,
    inputs: LossInputs,
    head: LogitHead,
    config: LossConfig,
    chunk_size: int | None,
) -> LossOutput:
    """The loss of the trained rows (None = all), `inputs` being theirs; logprob and entropy as long as hidden."""
    dtype = inputs.advantage.dtype
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias))
    chunks = _fused_chunks(inputs, config, weight, chunk_size)
    if rows is not None:
        target = target[rows]
    if chunks is None:
        picked = hidden if rows is None else hidden.index_select(0, rows)
        logprob, entropy = recomputed_logprob(picked, weight, bias, target, head, chunk_size)
        loss, result = differentiable_loss(logprob, entropy, inputs, config)
        output = LossOutput(loss, logprob.detach(), entropy.detach(), result.metrics)
    else:
        with torch.no_grad():
            chunked = ChunkedHead(hidden, weight, bias, head, [rows_ for rows_, _ in chunks], needs)
            output = _fused(chunked, target, rows, inputs, config, chunks)
        output.loss = with_gradients(output.loss.to(dtype), (hidden, weight, bias), chunked.gradients)
    if rows is not None:
        assert output.entropy is not None
        output.logprob = output.logprob.new_zeros(hidden.shape[0]).index_copy_(0, rows, output.logprob)
        output.entropy = output.entropy.new_zeros(hidden.shape[0]).index_copy_(0, rows, output.entropy)
    return output


def _fused(
    chunked: ChunkedHead,
    target: Tensor,
    rows: Tensor | None,
    inputs: LossInputs,
    config: LossConfig,
    chunks: list[tuple[slice, Tensor]],
) -> LossOutput:
    """Loss and gradients in one go over the chunks; the gradients are left in `chunked`."""
    logprob, entropy = (target.new_empty(target.numel(), dtype=chunked.dtype) for _ in range(2))
    loss = torch.zeros((), dtype=torch.float64, device=target.device)
    metrics = []
    for chunk, cu_seqlens in chunks:
        selected = chunk if rows is None else rows[chunk]
        x = chunked.logits(selected)
        logprob[chunk], entropy[chunk], logsumexp = logit_statistics(x, target[chunk], chunked.head)
        part = evaluate(logprob[chunk], entropy[chunk], inputs.rows(chunk, cu_seqlens), config)
        loss += part.loss
        metrics.append(part.metrics)
        if any(gradient is not None for gradient in chunked.gradients):
            slope = None if part.grad_entropy is None else part.grad_entropy.expand_as(logsumexp)
            logit_gradient_(x, target[chunk], logsumexp, entropy[chunk], part.grad_logprob, slope, chunked.head)
            chunked.accumulate(selected, x)
    return LossOutput(loss, logprob, entropy, LossOutput.combine(metrics))


def _fused_chunks(
    inputs: LossInputs, config: LossConfig, weight: Tensor, chunk_size: int | None
) -> list[tuple[slice, Tensor]] | None:
    """Chunks of rows with the boundaries of their sequences, or None when the loss looks further than a chunk.

    A token-level loss is cut anywhere, and evaluates without boundaries. N = 0 is one empty chunk.
    """
    num_rows, dtype = inputs.advantage.numel(), inputs.advantage.dtype
    cu_seqlens = inputs.cu_seqlens
    if num_rows <= chunk_rows(weight, dtype, chunk_size):
        return [(slice(0, num_rows), cu_seqlens)]
    if inputs.entropy_threshold is None and config.top_entropy_quantile < 1:
        return None
    if not config.needs_sequences:
        return [(chunk, cu_seqlens[:0]) for chunk in even_chunks(num_rows, chunk_rows(weight, dtype, chunk_size))]
    bounds = cu_seqlens.tolist()
    longest = max(b - a for a, b in pairwise(bounds))
    size = chunk_rows(weight, dtype, chunk_size, longest)
    if longest > size:
        return None
    chunks, first = [], 0
    for last in range(1, len(bounds)):
        if last + 1 == len(bounds) or bounds[last + 1] - bounds[first] > size:
            chunks.append((slice(bounds[first], bounds[last]), cu_seqlens[first : last + 1] - cu_seqlens[first]))
            first = last
    return chunks
