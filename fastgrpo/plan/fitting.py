"""What would fit: the largest micro-batch, and the options that make a run smaller."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastgrpo.config import ConfigError, GRPOConfig
from fastgrpo.gpus import Device
from fastgrpo.plan.planner import plan_run
from fastgrpo.plan.records import LONGEST, Plan, Workload
from fastgrpo.plan.shapes import describe_shape

_STEP = 256


@dataclass(frozen=True)
class Planning:
    """A run to be planned, and the same with other options.

    model: a causal model, its weights on any device. reference, critic: as of `plan_run`.
    """

    model: Any
    config: GRPOConfig
    device: Device
    workload: Workload
    reference: bool | None = None
    critic: bool | None = None

    def plan(self, **changes: Any) -> Plan:
        """With these options changed."""
        config = replace(self.config, **changes)
        shape = describe_shape(self.model, config)
        return plan_run(shape, config, self.device, self.workload, reference=self.reference, critic=self.critic)

    def largest_microbatch(self, **changes: Any) -> int | None:
        """The largest `max_tokens_per_microbatch` that fits, to 256 tokens; None when not even one sequence does.

        No more than a minibatch has.
        """
        low = self.workload.prompt + self.workload.longest
        if not self.plan(**changes, max_tokens_per_microbatch=low).fits:
            return None
        high = self.plan(**changes, max_tokens_per_microbatch=LONGEST).inputs["microbatch_tokens"]
        if self.plan(**changes, max_tokens_per_microbatch=high).fits:
            return int(high)
        while high - low > _STEP:
            middle = (low + high) // 2
            if self.plan(**changes, max_tokens_per_microbatch=middle).fits:
                low = middle
            else:
                high = middle
        return int(low)

    def suggestions(self) -> list[tuple[dict[str, Any], Plan]]:
        """Changes that make it fit, the cheapest first, each with its plan: one for this kind of training, one LoRA."""

        def changes(**wanted: Any) -> dict[str, Any]:
            return {name: value for name, value in wanted.items() if getattr(self.config, name) != value}

        one = changes(max_tokens_per_microbatch=self.workload.prompt + self.workload.longest)
        all_layers = changes(gradient_checkpointing=True, gradient_checkpointing_every=1)
        found: dict[bool, tuple[dict[str, Any], Plan]] = {}
        for lora in (self.config.use_peft, True):
            for smaller in ({}, all_layers, one, all_layers | one):
                made = changes(use_peft=lora) | smaller
                try:
                    plan = self.plan(**made)
                except ConfigError:  # another option excludes it
                    continue
                if lora not in found and plan.fits:
                    found[lora] = made, plan
        return list(found.values())
