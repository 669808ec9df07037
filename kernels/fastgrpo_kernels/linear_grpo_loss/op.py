"""`linear_grpo_loss`: the public function, and its op, which runs the plan of head/plan.py.

One maths (grpo_loss/windows.py), several schedules; whichever it is, loss and gradients are known when the forward
ends, and the backward only scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_target_values
from ..gradients import into_main_grad as add_to_main_grad
from ..gradients import scale_gradient
from ..group_advantages.op import GroupRewards
from ..grpo_loss.arguments import LossArguments, LossOperands
from ..grpo_loss.config import LossConfig
from ..grpo_loss.op import DEFAULT_CONFIG
from ..grpo_loss.output import METRICS, LossOutput, as_metrics
from ..head.operands import HeadArguments, HeadOperands, LoRADelta, Schedule, needs_gradient
from .schedules import loss_and_gradients


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
    lora: LoRADelta | None = None,
    chunk_size: int | None = None,
    schedule: Schedule | None = None,
    into_main_grad: bool = False,
) -> LossOutput:
    """`grpo_loss` of `linear_logprob`, with gradients for hidden, weight, bias and lora, never holding [N, V] logits.

    hidden: [N, D] float, the hidden states that predict the N completion tokens. weight: [V, D]. bias: [V] or None.
    target: [N] int64 in [0, V) where the mask is True (values are checked on the CPU only; on a GPU a wrong one makes
        the loss NaN). The logits are `softcap(logit_scale * (hidden @ weight.T + bias)) / temperature`.
    lora: a low-rank change of the weight, added to `hidden @ weight.T`.
    chunk_size: rows whose logits, or their gradients, exist at a time; by default what a budget allows: 64 MiB on the
        CPU, up to 256 MiB to hold a whole sequence; on a GPU 3 GiB of gradient rows, 512 MiB with a frozen weight.
    schedule: how logits become gradients (head/plan.py), None = chosen; `watch_plans` shows what was.
    into_main_grad: the weight's gradient is added to `weight.main_grad` (fp32) in the backward; `weight.grad` stays.
    The other arguments are `grpo_loss`'s. Only rows that train meet the LM head; logprob and entropy are 0 elsewhere.

    Cost with gradients: 3 GEMMs when the loss is token-level or every sequence fits a chunk (when all rows fit one, if
    the entropy threshold is this call's own quantile); one more otherwise. 2 with a frozen weight whatever the loss, 3
    if that loss has an entropy bonus and does not fit; 1 without any gradient. The result is the same to rounding.
    On a GPU nothing waits for the device, with two exceptions, neither while a CUDA graph is captured: a mask, whose
    rows that train are counted, and a loss on whole sequences that takes several chunks, whose boundaries are read.
    Errors: TypeError or ValueError naming the argument, before any work.
    """
    head = HeadArguments(
        hidden, weight, target, bias, logit_scale, softcap, temperature, lora, chunk_size, schedule, into_main_grad
    )
    head.check()
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
    arguments.check(hidden.shape[0], hidden.device)
    operands = head.operands()
    loss, logprob, entropy, metrics, *_ = _linear_grpo_loss(
        *operands, *arguments.operands(), needs_gradient(operands), head.main_grad()
    )
    named = as_metrics(metrics, entropy=True, ref=ref_logprob is not None, sampling=sampling_logprob is not None)
    return LossOutput(loss, logprob, entropy, named)


@torch.library.custom_op("fastgrpo::linear_grpo_loss", mutates_args=())
def _linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    autocast: torch.dtype | None,
    chunk_size: int | None,
    schedule: str,
    advantage: Tensor,
    group_index: Tensor | None,
    cu_seqlens: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    sampling: Tensor | None,
    mask: Tensor | None,
    entropy_threshold: Tensor | None,
    num_sequences: Tensor | None,
    num_tokens: Tensor | None,
    config: str,
    baseline: str,
    scale: str,
    needs: list[bool],
    main_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss 0-d, logprob [N], entropy [N], `METRICS`, and the gradients of `HeadOperands.differentiable`."""
    head = HeadOperands(
        hidden, weight, bias, lora_hidden, lora_weight, target,
        logit_scale, softcap, temperature, autocast, chunk_size, schedule,
    )  # fmt: skip
    loss = LossOperands(
        advantage, group_index, cu_seqlens, old, ref, sampling, mask,
        entropy_threshold, num_sequences, num_tokens, config, baseline, scale,
    )  # fmt: skip
    loss.check_values(head.num_rows)
    loss = loss.with_denominators(head.num_rows)
    trained, index = loss.trained(head.num_rows), None
    if trained is not None and _may_count(loss):
        index = trained.nonzero()[:, 0]
        loss = loss.pick(index, trained)
    elif trained is not None:
        head = head.quiet(trained)
    check_target_values(head.target if index is None else head.target[index], weight.shape[0])
    with head.exactly():
        value, logprob, entropy, metrics, gradients = loss_and_gradients(head, loss, index, needs)
    if index is not None:
        logprob, entropy = (x.new_zeros(head.num_rows).index_copy_(0, index, x) for x in (logprob, entropy))
    elif trained is not None:
        logprob, entropy = (torch.where(trained, x, 0) for x in (logprob, entropy))
    by_hidden, by_weight, by_bias, by_lora_hidden, by_lora_weight = gradients
    value = value.to(head.dtype)
    return value, logprob, entropy, metrics, by_hidden, by_weight, by_bias, by_lora_hidden, by_lora_weight


def _may_count(loss: LossOperands) -> bool:
    """Whether rows that do not train are worth a wait for their number: not for failed samples alone."""
    if not loss.cu_seqlens.is_cuda:
        return True
    return loss.mask is not None and not torch.cuda.is_current_stream_capturing()


@_linear_grpo_loss.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    head, needs = HeadOperands(*arguments[:12]), arguments[25]
    logprob = head.hidden.new_empty(head.num_rows, dtype=head.dtype)
    metrics = logprob.new_empty(len(METRICS), dtype=torch.float64)
    return logprob.new_empty(()), logprob, torch.empty_like(logprob), metrics, *head.new_gradients(needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:5]]
    ctx.main_grad = inputs[26]


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    returned: list[Tensor | None] = [None] * 27
    for i, gradient in enumerate(ctx.saved_tensors):
        if upstream is None or not ctx.needs_input_grad[i]:
            continue
        if i == 1 and ctx.main_grad is not None:
            add_to_main_grad(ctx.main_grad, gradient, upstream)
        else:
            returned[i] = scale_gradient(gradient, upstream, ctx.dtypes[i])
    return tuple(returned)


_linear_grpo_loss.register_autograd(_backward, setup_context=_save)
