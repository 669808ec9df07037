"""The memory of rollouts: keys and values, logits, and the tokens of one forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from fastgrpo.config import GRPOConfig
from fastgrpo.gpus import Device
from fastgrpo.plan.records import Workload
from fastgrpo.plan.shapes import ModelShape
from fastgrpo.rollout.loop.burst import room_for, tokens_at_once
from fastgrpo.rollout.loop.cache import Group, Row, SlabCache
from fastgrpo.rollout.loop.decoder import Decoder
from fastgrpo.rollout.loop.slabs import SMALLEST, KeyShape
from fastgrpo.rollout.loop.slots import bytes_for_slots, groups_at_once, rows_within, slot_bytes
from fastgrpo.rollout.vllm.engine import MEMORY_SHARE


@dataclass(frozen=True, slots=True)
class RolloutMemory:
    """Bytes, and what they are of.

    rows:    completions decoded at once. tokens: of the largest forward.
    cache:   keys and values; of vLLM all that it takes. logits: of a step. numbers: random ones, for sampling.
    key_bytes: keys and values of a token. note: what was assumed.
    """

    rows: int
    tokens: int
    cache: int
    logits: int
    numbers: int
    key_bytes: int
    note: str | None = None


def rollout_memory(
    engine: str,
    shape: ModelShape,
    config: GRPOConfig,
    device: Device,
    workload: Workload,
    dtype: torch.dtype,
    free: int,
) -> RolloutMemory:
    """What `engine` needs in `free` bytes of the device, of which it takes no more than it has to."""
    rows = min(config.rollout_batch_size, workload.samples)
    keys = key_shape(shape.config, dtype)
    per_token = keys.numbers * dtype.itemsize
    if engine == "vllm_server":
        return RolloutMemory(rows, 0, 0, 0, 0, per_token, "rollouts take no memory here: they are made by servers")
    if engine == "vllm":
        share = (config.vllm_args or {}).get("gpu_memory_utilization", MEMORY_SHARE)
        taken = f"vLLM takes gpu_memory_utilization={share:g} of the device while it generates, its weights among it"
        return RolloutMemory(rows, 0, round(share * device.memory), 0, 0, per_token, taken)
    note: str | None = None
    at_once = Decoder.prefill_tokens
    if device.is_gpu and keys.size <= 256:
        at_once = tokens_at_once(dtype)
        sizes = (room_for(workload.prompt), workload.longest)
        asked, rows = rows, rows_within(bytes_for_slots(free), keys, rows, workload.group, *sizes)
        cache = slot_bytes(keys, rows, groups_at_once(rows, workload.group), *sizes)
        if rows < asked:
            note = f"memory for keys and values is short: room for {rows} of the {asked} completions to decode at once"
        joining = workload.prompts
    else:
        cache = slab_bytes(keys, rows, workload)
        # Slabs come with the tokens: there are few of them yet when the first prompts are run.
        joining = workload.prompts - -(-rows // workload.group) * (workload.longest >= workload.prompt)
    prompts = min(joining, max(1, at_once // workload.prompt), -(-rows // workload.group))
    vocab_size = shape.head // shape.config.hidden_size
    return RolloutMemory(
        rows=rows,
        tokens=rows + prompts * workload.prompt,
        cache=cache,
        logits=(rows + 2 * prompts) * vocab_size * dtype.itemsize,
        numbers=8 * rows * workload.longest,
        key_bytes=per_token,
        note=note,
    )


def key_shape(config: Any, dtype: torch.dtype) -> KeyShape:
    """Keys and values of a token, by the model's config; on the meta device."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KeyShape(config.num_hidden_layers, heads, size, dtype, torch.device("meta"))


def slab_bytes(keys: KeyShape, rows: int, workload: Workload) -> int:
    """Slabs for `rows` completions that grow to the longest side by side, found by letting them."""
    cache = SlabCache(keys, rows=rows, longest_prompt=workload.prompt, longest_completion=workload.longest)
    prompt = cast("list[int]", range(workload.prompt))  # their number alone counts
    groups = [Group(token_ids=prompt) for _ in range(-(-rows // workload.group))]
    cache.add_prompts(groups)
    members = [Row(group=groups[i // workload.group]) for i in range(rows)]
    for row in members:
        cache.add_row(row)
    length, last = 0, workload.longest - 1  # the newest token is not among the keys
    while length < last:
        step = min(max(SMALLEST, length), last - length)  # to the end of the next class
        cache.completions.grow(members, step)
        length += step
    return cache.nbytes
