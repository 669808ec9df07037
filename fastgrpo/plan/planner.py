"""From a model's shape, the options, a device and the tokens of a batch to a `Plan`: the memory.

What is alive together follows the loop of `trainer.py`. Weights, gradients (zeros, never None) and the optimizer's
state stay throughout; each phase adds its own, and gives it back. The peak is that of the phase that needs most.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from fastgrpo.config import GRPOConfig
from fastgrpo.gpus import Device
from fastgrpo.plan.records import CUDA_CONTEXT, PARTS, ModelBytes, Plan, Workload
from fastgrpo.plan.rollouts import RolloutMemory, rollout_memory
from fastgrpo.plan.seconds import predict_seconds
from fastgrpo.plan.shapes import Count, ModelShape
from fastgrpo.policy.memory import ActivationMemory, activation_memory, can_fuse
from fastgrpo.rollout.engine import choose_engine
from fastgrpo_kernels.head.plan import HeadPlan, HeadProblem, head_bytes, plan_head

_FLOAT = 4
# Per packed token: ids and positions. Per scored token: target and predictor, three log-probs, and what comes out.
_TOKEN, _SCORED = 16, 36


def plan_run(
    shape: ModelShape,
    config: GRPOConfig,
    device: Device,
    workload: Workload,
    *,
    reference: bool | None = None,
    critic: bool | None = None,
) -> Plan:
    """What the run will need.

    reference: is there a reference model? critic: PPO's? None = what the options say.
    """
    memory = MemoryPlanner(
        shape,
        config,
        device,
        workload,
        reference=config.needs_reference if reference is None else reference,
        critic=config.has_critic if critic is None else critic,
    )
    phases = memory.phases()
    tokens, scored = memory.microbatch
    inputs = {
        "parameters": shape.parameters,
        "trainable": shape.trainable.numbers,
        "dtype": str(memory.dtype).removeprefix("torch."),
        "gradient_checkpointing": memory.checkpoint_every,
        "fused_layers": memory.fused,
        "microbatch_tokens": tokens,
        "microbatch_scored": scored,
        "engine": memory.engine,
        "rollout_rows": memory.rollout.rows,
        "processes": workload.processes,
        "prompts": workload.prompts,
        "group": workload.group,
        "prompt_tokens": workload.prompt,
        "longest_completion": workload.longest,
        "mean_completion": workload.mean,
    }
    seconds = predict_seconds(memory) if device.flops and device.bandwidth else None
    return Plan(device, inputs, memory.models, phases, seconds, memory.notes)


@dataclass(frozen=True)
class MemoryPlanner:
    """The parts of a prediction; `phases` puts them together."""

    shape: ModelShape
    config: GRPOConfig
    device: Device
    workload: Workload
    reference: bool
    critic: bool

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the forward, as `pick_dtype` has it."""
        if self.config.dtype == "auto":
            return torch.bfloat16 if self.device.is_gpu else torch.float32
        return getattr(torch, self.config.dtype)

    @property
    def checkpoint_every(self) -> int:
        """0 = no layer is checkpointed."""
        return self.config.gradient_checkpointing_every if self.config.gradient_checkpointing else 0

    @property
    def share_of_old(self) -> float:
        """Share of a batch whose old log-probs take a forward of their own: all for a KL penalty in the reward."""
        return 1.0 if self.config.kl_coef else 1 - 1 / self.config.num_minibatches

    @cached_property
    def microbatch(self) -> tuple[int, int]:
        """Tokens of the largest one of the update, and how many are scored."""
        return self.workload.microbatch(self.config)

    @cached_property
    def _whole(self) -> tuple[int, int]:
        """The same of the forwards before it, over the whole batch."""
        return self.workload.microbatch(self.config, self.workload.prompts)

    @cached_property
    def engine(self) -> str:
        """Who generates."""
        device = "cuda" if self.device.is_gpu else "cpu"
        return choose_engine(self.config.rollout_engine, device, self.workload.processes)[0]

    @cached_property
    def fused(self) -> bool:
        """Do the update's layers run fused, as `load_policy` has it? Unasked on a GPU where they can."""
        if self.config.fused_layers is None:
            return self.device.is_gpu and not self.config.torch_compile and can_fuse(self.shape.config)
        return self.config.fused_layers

    @cached_property
    def _known(self) -> tuple[ActivationMemory | None, str | None]:
        on_cpu = not self.device.is_gpu
        try:
            known = activation_memory(
                self.shape.config, dtype=self.dtype, adapters=self.shape.lora, on_cpu=on_cpu, fused=self.fused
            )
        except ValueError as error:
            return None, f"activations are not counted: {error}"
        return known, None

    @property
    def activations(self) -> ActivationMemory | None:
        """None for a family whose layers are not known."""
        return self._known[0]

    @property
    def notes(self) -> list[str]:
        """What is not in the prediction."""
        other = self.config.critic_model
        critic = f"the critic is taken to be of the policy's size, whatever critic_model={other} is" if other else None
        return [note for note in (self._known[1], self.rollout.note, critic) if note]

    # -------------------------------------------------------------------------------------------------- what stays

    @cached_property
    def models(self) -> dict[str, ModelBytes]:
        """By name; see `Plan.models`."""
        shape, e = self.shape, self.dtype.itemsize
        added = shape.adapters.numbers if shape.adapters else 0
        own = self._trained(shape.trainable)
        models = {
            "policy": ModelBytes(
                e * shape.everything.numbers + _FLOAT * added + own.weights, own.gradients, own.optimizer
            )
        }
        if self.reference:  # with adapters, the policy without them
            models["reference"] = ModelBytes(0 if shape.adapters else e * shape.everything.numbers)
        if self.critic:  # copies of what trains, and an fp32 value head; frozen weights are the policy's
            body = shape.adapters or shape.decoder
            own = self._trained(body)
            head = self._trained(Count((shape.config.hidden_size, 1)), masters=False, fp32=True)
            models["critic"] = ModelBytes(
                (_FLOAT if shape.adapters else e) * body.numbers + own.weights + head.gradients,
                own.gradients + head.gradients,
                own.optimizer + head.optimizer,
            )
        return models

    def _trained(self, count: Count, *, masters: bool | None = None, fp32: bool = False) -> ModelBytes:
        """Masters, gradients and AdamW's moments with a counter per tensor, of what trains.

        Of several processes each has all gradients, and the rest of what it owns.
        """
        masters = self._masters if masters is None else masters
        kept = _FLOAT if fp32 or masters or self.shape.adapters else self.dtype.itemsize
        own = count.owned(self.workload.processes)
        return ModelBytes(
            _FLOAT * own.numbers * masters, kept * count.numbers, 2 * kept * own.numbers + _FLOAT * own.tensors
        )

    @property
    def _masters(self) -> bool:
        return self.dtype != torch.float32 and self.config.master_weights and self.shape.adapters is None

    @cached_property
    def lasting(self) -> dict[str, int]:
        """Bytes by part that every phase has."""
        learners = [self.models[name] for name in ("policy", "critic") if name in self.models]
        reference = self.models.get("reference", ModelBytes(0))
        return {
            "weights": sum(m.weights for m in learners),
            "reference": reference.total,
            "gradients": sum(m.gradients for m in learners),
            "optimizer": sum(m.optimizer for m in learners),
        }

    # ------------------------------------------------------------------------------------------------- what comes, goes

    def phases(self) -> dict[str, dict[str, int]]:
        """Bytes by phase and part."""
        found = {"rollout": self._rollout()}
        if self.reference:
            found["reference"] = self._scoring(self._whole)
        if self.share_of_old:
            prompts = max(1, round(self.share_of_old * self.workload.prompts))
            found["old log-probs"] = self._scoring(self.workload.microbatch(self.config, prompts))
        if self.critic:
            found["values"] = self._scoring(self._whole, with_head=False)
            found["critic update"] = self._update(critic=True)
        found["update"] = self._update(critic=False)
        found["optimizer step"] = {"batch": self._batch(self.config.num_minibatches)}
        return {name: self._with_lasting(parts) for name, parts in found.items()}

    def _with_lasting(self, parts: dict[str, int]) -> dict[str, int]:
        return {part: self.lasting.get(part, 0) + parts.get(part, 0) for part in PARTS}

    @cached_property
    def rollout(self) -> RolloutMemory:
        """The engine's memory, in what the lasting parts leave of the device."""
        free = self.device.memory - CUDA_CONTEXT * self.device.is_gpu - sum(self.lasting.values())
        return rollout_memory(self.engine, self.shape, self.config, self.device, self.workload, self.dtype, free)

    def _rollout(self) -> dict[str, int]:
        found = self.rollout
        activations = found.tokens * self.activations.forward if self.activations else 0
        return {"cache": found.cache, "activations": activations, "head": found.logits, "batch": found.numbers}

    def _batch(self, minibatches: int = 1) -> int:
        """The packed batches of a share of the rollouts and what came out, which stay until all are done."""
        tokens, scored = self.microbatch
        needed = -(-self.workload.samples // minibatches) * self.workload.longest
        return _TOKEN * tokens * -(-needed // scored) + _SCORED * needed

    def problem(self, scored: int, *, differentiable: bool) -> tuple[HeadProblem, HeadPlan]:
        """The LM head's work over so many scored tokens of a micro-batch, and how it is done."""
        hidden = self.shape.config.hidden_size
        problem = HeadProblem(
            num_rows=scored,
            hidden_size=hidden,
            vocab_size=self.shape.head // hidden,
            dtype=self.dtype,
            trainable=differentiable and self.shape.adapters is None,
            differentiable=differentiable,
            entropy_gradient=differentiable and self.config.entropy_coef != 0,
            reach="sequence" if self.config.loss_config().needs_sequences else "token",
            on_device=self.device.is_gpu,
            tensor_copies=self.device.capability in (9, 10) and self.dtype.itemsize == 2 and hidden % 8 == 0,
        )
        bounds = [*range(0, scored, self.workload.longest), scored]
        return problem, plan_head(problem, lambda: bounds, watched=False)

    def _scoring(self, microbatch: tuple[int, int], *, with_head: bool = True) -> dict[str, int]:
        """Log-probs or values without gradients: the widest layer, or the head over the last hidden states."""
        tokens, scored = microbatch
        hidden = self.shape.config.hidden_size
        states = (tokens + scored) * self.dtype.itemsize * hidden
        head = head_bytes(*self.problem(scored, differentiable=False)) if with_head else _FLOAT * scored * hidden
        layers = tokens * self.activations.forward if self.activations else 0
        if layers > states + head:
            return {"activations": layers, "batch": self._batch()}
        return {"activations": states, "head": head, "batch": self._batch()}

    def _update(self, *, critic: bool) -> dict[str, int]:
        """The widest of three moments of a micro-batch; parts that last are not in it."""
        tokens, scored = self.microbatch
        known, e, shape = self.activations, self.dtype.itemsize, self.shape
        kept = peak = least = 0
        if known is not None:
            kept = known.kept(tokens, num_scored=scored, checkpoint_every=self.checkpoint_every)
            peak = known.peak(tokens, num_scored=scored, checkpoint_every=self.checkpoint_every)
            least = tokens * (known.outside + known.checkpoint)
        if critic:
            head, waiting = 2 * _FLOAT * scored * shape.config.hidden_size, 0
        else:
            head = head_bytes(*self.problem(scored, differentiable=True))
            waiting = e * shape.head if shape.tied and shape.adapters is None else 0
        moments = [{"activations": kept, "head": head}, {"activations": peak, "head": waiting}]
        if shape.adapters is None:
            # A weight's gradient in the model's dtype lives until it is added to the fp32 sum, on a CPU as a copy.
            copied = e + _FLOAT * (self._masters and not self.device.is_gpu)
            beside = e * tokens * getattr(shape.config, "intermediate_size", 0)
            moments[1]["gradients"] = max(0, copied * shape.widest - beside)
            embedding = max(waiting + e * shape.head, copied * shape.head)  # tied, it is added to what waits
            moments.append({"activations": least, "gradients": embedding})
        return max(moments, key=lambda parts: sum(parts.values())) | {"batch": self._batch(self.config.num_minibatches)}
