"""AdamW with fp32 master weights, clipping, the learning-rate schedule, and steps that a non-finite gradient skips.

Several processes share the work: each parameter has an owner, which alone keeps its master and moments, gets the sum of
all gradients and hands the new weights out (ZeRO, stage 1: Rajbhandari et al., arXiv 1910.02054, by whole parameters).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.distributed import Ranks, owners_of
from fastgrpo.errors import RunError


def learning_rate(step: int, total_steps: int, config: GRPOConfig, peak: float | None = None) -> float:
    """The rate of optimizer step `step` (the first is 1): of the step alone, so there is nothing to resume.

    peak: the highest rate; default: `config.learning_rate`.
    """
    peak = config.learning_rate if peak is None else peak
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.lr_scheduler_type == "constant":
        return peak
    done = (step - 1 - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    done = min(done, 1.0)
    falling = 1 - done if config.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * falling)


class Optimizer:
    """One `backward` after another adds up; `step` applies the sum.

    named_parameters: (name, parameter) of what trains. 16-bit parameters get an fp32 master copy when `master_weights`;
    each backward's gradient is added to an fp32 sum and freed at once.
    ranks: the processes that share the parameters out among them; all train the same ones.
    """

    def __init__(
        self, named_parameters: list[tuple[str, torch.nn.Parameter]], config: GRPOConfig, ranks: Ranks | None = None
    ) -> None:
        if not named_parameters:
            raise ValueError("nothing to train: no parameter of the model requires a gradient")
        self.ranks = ranks or Ranks()
        self._max_norm = config.max_grad_norm
        self._hooks: list[Any] = []
        # Matrices first: weight decay is theirs alone.
        named_parameters = sorted(named_parameters, key=lambda item: item[1].ndim < 2)
        self.shapes = {name: list(p.shape) for name, p in named_parameters}
        self._parameters = [p for _, p in named_parameters]
        self._owners = owners_of([p.numel() for p in self._parameters], self.ranks.size)
        mine = [owner == self.ranks.rank for owner in self._owners]
        self.names = [name for name, own in zip(self.shapes, mine, strict=True) if own]
        self._masters = [
            self._master(p, config.master_weights, own) for p, own in zip(self._parameters, mine, strict=True)
        ]
        self._own = [(p, master) for p, master, own in zip(self._parameters, self._masters, mine, strict=True) if own]
        matrices = [p for _, p in self._own if p.ndim >= 2]
        vectors = [p for _, p in self._own if p.ndim < 2]
        self.torch_optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        self.zero_grad()

    def _master(self, parameter: torch.nn.Parameter, wanted: bool, own: bool) -> Tensor:
        """What holds the sum of the gradients, and if it is this process's the fp32 weights."""
        if parameter.dtype not in (torch.bfloat16, torch.float16) or not wanted:
            return parameter
        if own:
            master = parameter.detach().float().clone()
        else:  # a shape without memory: only its gradient is kept here
            master = torch.zeros((), dtype=torch.float32, device=parameter.device).expand(parameter.shape)

        def accumulate(p: Tensor) -> None:
            assert master.grad is not None
            assert p.grad is not None
            master.grad += p.grad
            p.grad = None

        self._hooks.append(parameter.register_post_accumulate_grad_hook(accumulate))
        return master

    def close(self) -> None:
        """Let go of the model's parameters: another optimizer may train them."""
        for hook in self._hooks:
            hook.remove()

    def zero_grad(self) -> None:
        """Gradients are zeros, not None: a step whose every sequence was skipped is the step it would have been."""
        for p in self._masters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            else:
                p.grad.zero_()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The 2-norm of the whole gradient before clipping, 0-d, on the device.

        Of several processes each first gets the sum of all gradients for its own parameters: call it once a step.
        """
        self.ranks.add_up_at(self._owners, [p.grad for p in self._masters])
        norm = torch.nn.utils.get_total_norm([p.grad for _, p in self._own if p.grad is not None])
        if self.ranks.alone:
            return norm
        square = norm.to(self._parameters[0].device, torch.float64).square()
        self.ranks.add_up([square])
        return square.sqrt()

    @torch.no_grad()
    def step(self, rate: float, norm: float) -> bool:
        """Clip to the limit, given the gradient's `norm`, and apply; a non-finite norm changes nothing: False."""
        applied = math.isfinite(norm)
        if applied:
            if 0 < self._max_norm < norm + 1e-6:  # else clipping would multiply by 1: two passes for nothing
                own = [master for _, master in self._own]
                torch.nn.utils.clip_grads_with_norm_(own, self._max_norm, torch.tensor(norm))
            for group in self.torch_optimizer.param_groups:
                group["lr"] = rate
            self.torch_optimizer.step()
            for parameter, master in self._own:
                if master is not parameter:
                    parameter.copy_(master)
            self.ranks.copy_from(self._owners, self._parameters)
        self.zero_grad()
        return applied

    def masters(self) -> dict[str, Tensor]:
        """The fp32 weights that the model's own do not already hold, by place; empty for an fp32 model.

        Of several processes, those of this one's parameters.
        """
        everything = zip(self._parameters, self._masters, self._owners, strict=True)
        kept = [(master, owner) for parameter, master, owner in everything if master is not parameter]
        return {f"master.{i}": master for i, (master, owner) in enumerate(kept) if owner == self.ranks.rank}

    @torch.no_grad()
    def load_masters(self, tensors: dict[str, Any]) -> None:
        """Take what `masters` gave; the model's own weights were loaded before. RunError when they are missing."""
        if missing := sorted(self.masters().keys() - tensors.keys()):
            raise RunError(
                f"the checkpoint holds no fp32 weights ({missing[0]}, ...): it is of a run with another dtype or "
                "master_weights, which cannot be changed when a run goes on"
            )
        for name, master in self.masters().items():
            master.copy_(tensors[name])
