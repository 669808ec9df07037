"""What the planner is told and what it answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fastgrpo.config import GRPOConfig
from fastgrpo.gpus import Device

CUDA_CONTEXT = 800_000_000
"""Assumed bytes of a GPU that no tensor has: the CUDA context, loaded kernels, cuBLAS's workspaces."""

FRAGMENTATION = 0.1
"""Assumed share that the caching allocator holds beside what comes and goes: rounding, and holes that nothing fits."""

LONGEST = (1 << 31) - 1
"""Tokens of a packed batch at most: its positions are int32."""

PARTS = ("weights", "reference", "gradients", "optimizer", "activations", "head", "cache", "batch")
"""What memory goes to, in the order of every table."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The tokens of a process's rollout batch: `prompts` prompts of `prompt` tokens, `group` completions each.

    longest: tokens of the longest completion, for memory. mean: of a completion on average, for time.
    processes: of the run, a GPU each.
    """

    prompts: int
    group: int
    prompt: int
    longest: int
    mean: float
    processes: int = 1

    def __post_init__(self) -> None:
        for name in ("prompts", "group", "prompt", "longest", "mean", "processes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.prompt + self.longest > LONGEST:
            raise ValueError(
                f"a prompt of {self.prompt} and a completion of {self.longest} tokens are more than the {LONGEST:,} "
                "that a sequence may have"
            )
        if self.mean > self.longest:
            raise ValueError(f"the mean length of a completion, {self.mean:g}, is above the longest, {self.longest}")

    @property
    def samples(self) -> int:
        """Completions in a rollout batch."""
        return self.prompts * self.group

    def microbatch(self, config: GRPOConfig, prompts: int | None = None) -> tuple[int, int]:
        """Tokens of the largest micro-batch, and how many of them are scored, at most; completions all the longest.

        prompts: of those that are packed together; default: of a minibatch.
        A sequence longer than the budget goes alone; fewer tokens than the budget are one micro-batch.
        """
        alone = self.prompt + self.longest
        budget = min(max(config.max_tokens_per_microbatch, alone), LONGEST)
        prompts = prompts or -(-self.prompts // config.num_minibatches)
        together = 1
        if config.share_prompts:
            together = max(1, min(self.group, (budget - self.prompt) // self.longest))
        unit = self.prompt + together * self.longest
        tokens = min(budget, -(-prompts * self.group // together) * unit)
        return tokens, min(tokens, -(-tokens * together * self.longest // unit))


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What a model takes as long as it is there.

    weights: of the forward, and fp32 masters. gradients, optimizer: of what trains.
    """

    weights: int
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True)
class Plan:
    """The prediction.

    device:   what it is for.
    inputs:   what it was made from, for people and for the record.
    models:   bytes by model: "policy", and where there is one "reference", "critic".
    phases:   bytes by phase and part (`PARTS`), of tensors alive at the same time.
    seconds:  by stage of a rollout batch; None where the device's rates are not known.
    notes:    what could not be predicted, and what was assumed.
    """

    device: Device
    inputs: dict[str, Any]
    models: dict[str, ModelBytes]
    phases: dict[str, dict[str, int]]
    seconds: dict[str, float] | None
    notes: list[str] = field(default_factory=list)

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Bytes of tensors at the peak: what `torch.cuda.max_memory_allocated` reports."""
        return sum(self.phases[self.peak_phase].values())

    @property
    def needed(self) -> int:
        """Bytes of the device: the peak, on a GPU with what the allocator and CUDA take besides."""
        if not self.device.is_gpu:
            return self.peak
        lasting = sum(model.total for model in self.models.values())
        return self.peak + round(FRAGMENTATION * (self.peak - lasting)) + CUDA_CONTEXT

    @property
    def fits(self) -> bool:
        """Is the device large enough?"""
        return self.needed <= self.device.memory

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        names = ("peak_phase", "peak", "needed", "fits")
        return asdict(self) | {name: getattr(self, name) for name in names}
