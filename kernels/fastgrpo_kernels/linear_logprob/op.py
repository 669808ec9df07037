"""`linear_logprob`: the public function, its op, and the op of its backward, which computes the logits again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_bool, check_target_values
from ..gradients import into_main_grad as add_to_main_grad
from ..gradients import live_rows, scale_rows_of_gradient
from ..head.engine import make_head, problem_of
from ..head.operands import HeadArguments, HeadOperands, LoRADelta, Schedule, needs_gradient
from ..head.plan import plan_head


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    lora: LoRADelta | None = None,
    chunk_size: int | None = None,
    schedule: Schedule | None = None,
    entropy_gradient: bool = True,
    into_main_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under the LM head, and the entropy, for any loss built on them.

    hidden: [N, D] float. weight: [V, D] float. bias: [V] float or None. target: [N] int64 in [0, V) (checked on the CPU
    only; on a GPU a wrong one makes its log-prob NaN). The logits are
    `softcap(logit_scale * (hidden @ weight.T + bias)) / temperature`; `lora` adds its product to `hidden @ weight.T`.
    chunk_size: rows whose logits, or their gradients, exist at a time; by default what a budget allows: 64 MiB on the
        CPU; on a GPU 3 GiB, or 512 MiB with a frozen weight.
    schedule: how the logits become gradients (head/plan.py), None = chosen; `watch_plans` shows what was.
    entropy_gradient: the entropy is differentiable, too; without it a frozen weight costs 2 GEMMs in place of 3.
    into_main_grad: the weight's gradient is added to `weight.main_grad` (fp32) in the backward; `weight.grad` stays.

    Returns `logprob` [N] and `entropy` [N] in nats, fp32 (float64 if an input is), differentiable with respect to
    hidden, weight, bias and lora. The backward computes the logits again, 4 GEMMs in all; with a frozen weight and
    `entropy_gradient=False` it does not, 2 GEMMs. Under autocast GEMM operands are rounded as in any linear layer, the
    logits never. Rows whose upstream gradients are 0 get zeros, and a NaN among them changes nothing.
    Errors: TypeError or ValueError naming the argument.
    """
    arguments = HeadArguments(
        hidden, weight, target, bias, logit_scale, softcap, temperature, lora, chunk_size, schedule, into_main_grad
    )
    arguments.check()
    check_bool("entropy_gradient", entropy_gradient)
    operands = arguments.operands()
    logprob, entropy, *_ = _linear_logprob(*operands, needs_gradient(operands), entropy_gradient, arguments.main_grad())
    return logprob, entropy


@torch.library.custom_op("fastgrpo::linear_logprob", mutates_args=())
def _linear_logprob(
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
    needs: list[bool],
    entropy_gradient: bool,
    main_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, [N] each; in a `per_row` plan dlogp/dhidden [N, D], dlogp/dlora_hidden [N, r], else empty."""
    operands = HeadOperands(
        hidden, weight, bias, lora_hidden, lora_weight, target,
        logit_scale, softcap, temperature, autocast, chunk_size, schedule,
    )  # fmt: skip
    check_target_values(target, weight.shape[0])
    problem = problem_of(operands, operands.num_rows, needs, "unknown", entropy_gradient)
    plan = plan_head(problem, None, chunk_size, schedule)
    per_row = _is_per_row(needs, entropy_gradient, schedule)
    head = make_head(operands, plan, needs if per_row else [False] * 5)
    ones = torch.ones_like(head.logprob) if per_row else head.logprob
    with operands.exactly():
        for window in plan.windows:
            head.forward(window, keep=per_row)
            if per_row:
                head.backward(window, ones, None)
        by_hidden, _, _, by_lora_hidden, _ = head.gradients()
    return head.logprob, head.entropy, by_hidden, by_lora_hidden


def _is_per_row(needs: list[bool], entropy_gradient: bool, schedule: str) -> bool:
    """Each row's own derivative is kept for the backward, which then needs no logits: `plan_head` says the same."""
    trainable = needs[1] or needs[2] or needs[4]
    return any(needs) and not trainable and not entropy_gradient and schedule != "recomputed"


@_linear_logprob.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands, (needs, entropy_gradient, _) = HeadOperands(*arguments[:12]), arguments[12:]
    per_row = _is_per_row(needs, entropy_gradient, operands.schedule)
    gradients = operands.new_gradients(needs if per_row else [False] * 5)
    logprob = operands.hidden.new_empty(operands.num_rows, dtype=operands.dtype)
    return logprob, torch.empty_like(logprob), gradients[0], gradients[3]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    needs, entropy_gradient, ctx.main_grad = inputs[12:]
    _, entropy, *per_row = output
    ctx.mark_non_differentiable(*per_row, *(() if entropy_gradient else (entropy,)))
    ctx.set_materialize_grads(False)
    ctx.per_row = _is_per_row(needs, entropy_gradient, inputs[11])
    ctx.save_for_backward(*(per_row if ctx.per_row else inputs[:6]))
    ctx.options, ctx.dtypes = inputs[6:12], [None if x is None else x.dtype for x in inputs[:5]]


def _backward(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    if not any(needs) or (grad_logprob is None and grad_entropy is None):
        return (None,) * 15
    if ctx.per_row:
        by_hidden, by_lora_hidden = ctx.saved_tensors
        assert grad_logprob is not None
        hidden, lora_hidden = (
            scale_rows_of_gradient(x, grad_logprob, ctx.dtypes[i]) if needs[i] else None
            for i, x in ((0, by_hidden), (3, by_lora_hidden))
        )
        return hidden, None, None, lora_hidden, *[None] * 11
    gradients = _linear_logprob_backward(*ctx.saved_tensors, *ctx.options, needs, grad_logprob, grad_entropy)
    returned = [g.to(dtype) if needed else None for g, dtype, needed in zip(gradients, ctx.dtypes, needs, strict=True)]
    if needs[1] and ctx.main_grad is not None:
        add_to_main_grad(ctx.main_grad, gradients[1], None)
        returned[1] = None
    return *returned, *[None] * 10


_linear_logprob.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("fastgrpo::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
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
    needs: list[bool],
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
) -> list[Tensor]:
    """The gradients of `HeadOperands.differentiable`."""
    operands = HeadOperands(
        hidden, weight, bias, lora_hidden, lora_weight, target,
        logit_scale, softcap, temperature, autocast, chunk_size, schedule,
    )  # fmt: skip
    if grad_logprob is None:
        assert grad_entropy is not None
        grad_logprob = torch.zeros_like(grad_entropy)
    index = None
    if hidden.is_cuda:  # to leave dead rows out, the host would have to wait for their number
        operands = operands.quiet(
            grad_logprob != 0 if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0)
        )
    else:
        index = live_rows(grad_logprob, grad_entropy)
        grad_logprob = grad_logprob[index]
        grad_entropy = None if grad_entropy is None else grad_entropy[index]
    problem = problem_of(operands, grad_logprob.numel(), needs, "token", grad_entropy is not None)
    method = "" if schedule == "recomputed" else schedule
    plan = plan_head(problem, None, chunk_size, method, watched=False)
    head = make_head(operands, plan, needs, index)
    with operands.exactly():
        for window in plan.windows:
            head.forward(window, keep=True)
            head.backward(window, grad_logprob, grad_entropy)
        return head.gradients()


@_linear_logprob_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return HeadOperands(*arguments[:12]).new_gradients(arguments[12])
