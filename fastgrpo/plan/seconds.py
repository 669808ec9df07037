"""Seconds of each stage of a rollout batch, from FLOPs and bytes over a GPU's rates.

The constants are assumptions, written out in docs/plan.md, for a measurement to confirm or refute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastgrpo.plan.records import ModelBytes
from fastgrpo.policy.memory import can_fuse

if TYPE_CHECKING:
    from fastgrpo.plan.planner import MemoryPlanner

GEMM_RATE = 0.75
"""Of the maker's dense bf16 FLOP/s that large matrix products reach (an H200: 770-800 of 989 TFLOP/s)."""

ATTENTION_RATE = 0.4
"""Of the same that attention reaches over packed, causal sequences."""

ATTENTION_BACKWARD = 2.5
"""FLOPs of attention's backward by those of its forward: it computes the scores again."""

COPY_RATE = 0.85
"""Of the maker's bytes/s that passes over memory reach (an H200: 4.3 of 4.8 TB/s)."""

FORWARD_TRAFFIC, UPDATE_TRAFFIC = 2.0, 6.0
"""How often a byte that a layer keeps is moved: written and read; and with a backward."""

FUSED_FORWARD_TRAFFIC, FUSED_UPDATE_TRAFFIC = 1.2, 3.0
"""The same of fused layers, by the bytes that a layer of Qwen2.5 moves between its products."""

LAYER_KERNELS, FUSED_LAYER_KERNELS, ADAPTER_KERNELS, KERNEL_SECONDS = 38, 9, 5, 2.5e-6
"""Kernels of a decoding layer, of a fused one, of an adapter beside it, and what one costs whatever its size, in a CUDA
graph."""

LINK_RATE = 2e11
"""Bytes/s at which GPUs of one machine exchange gradients and weights (NVLink; the maker says 4.5e11 a direction)."""

VLLM_KERNELS = 12
"""Kernels of a layer in vLLM, which fuses."""


def predict_seconds(memory: MemoryPlanner) -> dict[str, float]:
    """By stage: rollout, the forwards before the update, the update by model, and the optimizer.

    Rewards are not in it: they are the user's.
    """
    clock = _Clock(memory)
    config, found = memory.config, {"rollout": clock.rollout()}
    if memory.reference:
        found["reference"] = clock.forward(with_head=True)
    if memory.share_of_old:
        found["old log-probs"] = memory.share_of_old * clock.forward(with_head=True)
    if memory.critic:
        found["values"] = clock.forward(with_head=False)
        found["critic update"] = config.num_iterations * clock.update(with_head=False)
    update = clock.update(with_head=True)
    if config.top_entropy_quantile < 1:  # the threshold takes a forward of its own
        update += clock.forward(with_head=True)
    found["update"] = config.num_iterations * update
    found["optimizer step"] = config.steps_per_batch * clock.optimizer()
    return found


@dataclass(frozen=True)
class _Clock:
    memory: MemoryPlanner

    def _gemm(self, flops: float) -> float:
        assert self.memory.device.flops is not None
        return flops / (GEMM_RATE * self.memory.device.flops)

    def _attention(self, flops: float) -> float:
        assert self.memory.device.flops is not None
        return flops / (ATTENTION_RATE * self.memory.device.flops)

    def _copy(self, size: float) -> float:
        assert self.memory.device.bandwidth is not None
        return size / (COPY_RATE * self.memory.device.bandwidth)

    @property
    def _batch(self) -> tuple[float, float, float]:
        """Packed tokens of a rollout batch, those scored, and the FLOPs of attention over them."""
        work, load = self.memory.shape.work, self.memory.workload
        length = round(load.mean)
        copies, group = (1, load.group) if self.memory.config.share_prompts else (load.group, 1)
        tokens, scored = load.prompt + group * length, group * length
        first = work.of(load.prompt, [])
        each = work.of(load.prompt, [length]) - first - (work.per_token + work.per_scored) * length
        attended = first - work.per_token * load.prompt + group * each
        units = load.prompts * copies
        return units * tokens, units * scored, units * attended

    @property
    def _kept(self) -> float:
        """Bytes that the layers keep per token: what they write."""
        known = self.memory.activations
        return known.layer * known.num_layers if known else 0.0

    @property
    def _traffic(self) -> tuple[float, float]:
        """How often those bytes are moved, without and with a backward."""
        if self.memory.fused:
            return FUSED_FORWARD_TRAFFIC, FUSED_UPDATE_TRAFFIC
        return FORWARD_TRAFFIC, UPDATE_TRAFFIC

    @property
    def _again(self) -> float:
        """Share of the layers' products that checkpointing repeats: not the last of a layer, which keeps nothing."""
        config, every = self.memory.shape.config, self.memory.checkpoint_every
        last = 2 * config.num_hidden_layers * config.hidden_size * getattr(config, "intermediate_size", 0)
        return max(0.0, 1 - last / self.memory.shape.work.per_token) / every if every else 0.0

    def forward(self, *, with_head: bool) -> float:
        """Of the whole batch, without gradients."""
        tokens, scored, attended = self._batch
        work = self.memory.shape.work
        products = work.per_token * tokens + work.per_scored * scored * with_head
        return self._gemm(products) + self._attention(attended) + self._copy(self._traffic[0] * self._kept * tokens)

    def update(self, *, with_head: bool) -> float:
        """Forward and backward of the whole batch; frozen weights want no gradient, checkpointed layers run twice."""
        tokens, scored, attended = self._batch
        work, again = self.memory.shape.work, self._again
        passes = (3 if self.memory.shape.adapters is None else 2) + again
        _, plan = self.memory.problem(self.memory.microbatch[1], differentiable=True)
        products = work.per_token * tokens * passes + work.per_scored * scored * plan.gemms * with_head
        attention = self._attention(attended * (1 + ATTENTION_BACKWARD + again))
        once, trained = self._traffic
        traffic = (trained + again * once) * self._kept * tokens
        return self._gemm(products) + attention + self._copy(traffic)

    def optimizer(self) -> float:
        """Of one step: gradients read for the norm, scaled, read, zeroed; moments and weights read and written.

        Several processes send all gradients to their owners, and the weights from there.
        """
        sent = 0
        if self.memory.workload.processes > 1:
            trained = self.memory.shape.trainable.numbers
            sent = sum(m.gradients for m in self._learners) + len(self._learners) * self.memory.dtype.itemsize * trained
        passes = self._copy(sum(5 * m.gradients + 2 * m.optimizer + 2 * m.weights for m in self._learners))
        return passes + sent / LINK_RATE

    @property
    def _learners(self) -> list[ModelBytes]:
        return [self.memory.models[name] for name in ("policy", "critic") if name in self.memory.models]

    def rollout(self) -> float:
        """Prompts once per group; then a token for every row and step, limited by bytes, FLOPs or launches."""
        memory = self.memory
        work, load = memory.shape.work, memory.workload
        servers = len(memory.config.vllm_server_urls or memory.config.vllm_server_devices) or 1
        prefill = work.of(load.prompt, [])
        attended = prefill - work.per_token * load.prompt
        first = load.prompts * (self._gemm(work.per_token * load.prompt) + self._attention(attended)) / servers
        samples = load.samples / servers
        steps = max(samples * load.mean / memory.rollout.rows, load.longest)
        alive = samples * load.mean / steps
        e = memory.dtype.itemsize
        weights = e * (work.per_token + work.per_scored) / 2
        keys = memory.rollout.key_bytes * (load.prompt + load.mean / 2)
        computed = self._gemm(alive * (work.per_token + work.per_scored))
        return first + steps * (max(self._copy(weights + alive * keys), computed) + self._launches())

    def _launches(self) -> float:
        shape = self.memory.shape
        if self.memory.engine.startswith("vllm"):  # it merges adapters into the weights
            return float(shape.config.num_hidden_layers * VLLM_KERNELS * KERNEL_SECONDS)
        adapters = shape.adapters.tensors // 2 if shape.adapters else 0
        each = FUSED_LAYER_KERNELS if can_fuse(shape.config) else LAYER_KERNELS  # in rollouts whatever the options
        return (shape.config.num_hidden_layers * each + adapters * ADAPTER_KERNELS) * KERNEL_SECONDS
