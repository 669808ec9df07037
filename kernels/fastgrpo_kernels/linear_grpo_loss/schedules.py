"""The schedules: in which order an LM head's windows and the loss's coefficients take turns (see head/plan.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import live_rows
from ..grpo_loss.arguments import LossOperands
from ..grpo_loss.windows import Coefficients, coefficients
from ..head.engine import Head, make_head, problem_of
from ..head.operands import Guess, HeadOperands, picked
from ..head.plan import HeadPlan, Reach, even_windows, plan_head

Result = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]


def loss_and_gradients(head: HeadOperands, loss: LossOperands, index: Tensor | None, needs: list[bool]) -> Result:
    """loss 0-d float64, logprob [n], entropy [n], metrics, and the gradients of `head.differentiable`.

    index: [n] int64, the head's rows that the loss is about (None = all); denominators must be present.
    """
    num_rows = head.num_rows if index is None else index.numel()
    bonus = loss.config.entropy_coef != 0
    problem = problem_of(head, num_rows, needs, _reach(loss), bonus)
    capturing = loss.cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
    plan = plan_head(problem, None if capturing else loss.cu_seqlens.tolist, head.chunk_size, head.schedule)
    guess = (loss.old, loss.sampling)
    later = plan.schedule == "recomputed"
    engine = make_head(head, plan, [False] * len(needs) if later else needs, index, guess)
    grad_logprob = torch.empty_like(engine.logprob)
    grad_entropy = torch.empty_like(grad_logprob) if problem.entropy_gradient else None
    if plan.schedule == "fused":
        part = _fused(engine, plan, loss, grad_logprob, grad_entropy)
    else:
        part = _after_all(engine, plan, loss, grad_logprob, grad_entropy)
    value, metrics = part.finish()
    logprob, entropy, gradients = engine.logprob, engine.entropy, engine.gradients()
    if plan.schedule == "per_row":
        _weigh_rows(gradients, grad_logprob, index)
    if later:
        del engine  # and its buffers
        gradients = _again(head, plan, needs, index, guess, grad_logprob, grad_entropy)
    return value, logprob, entropy, metrics, gradients


def _reach(loss: LossOperands) -> Reach:
    if loss.own_quantile:
        return "batch"
    return "sequence" if loss.config.needs_sequences else "token"


def _fused(
    engine: Head, plan: HeadPlan, loss: LossOperands, grad_logprob: Tensor, grad_entropy: Tensor | None
) -> Coefficients:
    """Window by window: log-probs, coefficients, gradients. A threshold that is a quantile comes with one window."""
    part = None
    for window in plan.windows:
        engine.forward(window, keep=True)
        if part is None:
            part = coefficients(loss.with_threshold(engine.entropy), engine.logprob.numel(), engine.logprob)
        part.rows(window.start, window.stop, engine.logprob, engine.entropy, grad_logprob, grad_entropy)
        engine.backward(window, grad_logprob, grad_entropy)
    assert part is not None
    return part


def _after_all(
    engine: Head, plan: HeadPlan, loss: LossOperands, grad_logprob: Tensor, grad_entropy: Tensor | None
) -> Coefficients:
    """All log-probs, with each row's own derivative if the plan says so; then the coefficients."""
    per_row = plan.schedule == "per_row"
    ones = torch.ones_like(grad_logprob) if per_row else grad_logprob
    for window in plan.windows:
        engine.forward(window, keep=per_row)
        if per_row:
            engine.backward(window, ones, None)
    size = engine.logprob.numel()
    part = coefficients(loss.with_threshold(engine.entropy), size, engine.logprob)
    part.rows(0, size, engine.logprob, engine.entropy, grad_logprob, grad_entropy)
    return part


def _again(
    head: HeadOperands,
    plan: HeadPlan,
    needs: list[bool],
    index: Tensor | None,
    guess: Guess,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
) -> list[Tensor]:
    """The gradients, from logits computed a second time; where counting is free, of the rows only that have one."""
    windows = plan.windows
    if not grad_logprob.is_cuda:
        live = live_rows(grad_logprob, grad_entropy)
        index = live if index is None else index[live]
        guess = picked(guess, live)
        grad_logprob, grad_entropy = grad_logprob[live], None if grad_entropy is None else grad_entropy[live]
        windows = even_windows(live.numel(), max(1, windows[0].stop))
    engine = make_head(head, plan, needs, index, guess)
    for window in windows:
        engine.forward(window, keep=True)
        engine.backward(window, grad_logprob, grad_entropy)
    return engine.gradients()


def _weigh_rows(gradients: list[Tensor], grad_logprob: Tensor, index: Tensor | None) -> None:
    """Multiply the rows' own derivatives by the coefficients, in place."""
    for gradient in (gradients[0], gradients[3]):
        if gradient.numel():
            weights = grad_logprob
            if index is not None:
                weights = grad_logprob.new_zeros(gradient.shape[0]).index_copy_(0, index, grad_logprob)
            torch.mul(gradient, weights[:, None], out=gradient).masked_fill_(weights[:, None] == 0, 0)
