"""A model's sizes, counted from its parameters, which may be on the meta device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastgrpo.config import ConfigError, GRPOConfig
from fastgrpo.distributed import owners_of
from fastgrpo.policy.memory import Adapters
from fastgrpo.policy.work import decoder_of, describe_work
from fastgrpo.records import Work


@dataclass(frozen=True, slots=True)
class Count:
    """Some parameters: how many numbers each of the tensors has."""

    sizes: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """All of them."""
        return sum(self.sizes)

    @property
    def tensors(self) -> int:
        """In how many tensors."""
        return len(self.sizes)

    def owned(self, processes: int) -> Count:
        """Those of the process that owns most."""
        owners = owners_of(self.sizes, processes)
        parts = [tuple(n for n, o in zip(self.sizes, owners, strict=True) if o == rank) for rank in range(processes)]
        return Count(max(parts, key=lambda sizes: (sum(sizes), len(sizes))))


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A causal model's sizes.

    config:       transformers' config of its decoder.
    everything:   all parameters, tied ones once.
    decoder:      those without the LM head; of a tied one, the embedding is among them.
    head:         numbers of the LM head's weight. tied: it is the embedding, too.
    widest:       numbers of the largest matrix in a layer.
    adapters:     what LoRA adds and trains, None = all weights train; lora: on which layers.
    work:         FLOPs of a forward.
    """

    config: Any
    everything: Count
    decoder: Count
    head: int
    tied: bool
    widest: int
    adapters: Count | None
    lora: Adapters | None
    work: Work

    @property
    def trainable(self) -> Count:
        """What the optimizer steps."""
        return self.adapters or self.everything

    @property
    def parameters(self) -> int:
        """Numbers of the model without adapters."""
        return self.everything.numbers


def describe_shape(model: Any, config: GRPOConfig) -> ModelShape:
    """The shape of a causal (not a PEFT) model under a run's options; `use_peft` adds LoRA.

    Raises ConfigError where lora_target_modules names no layer.
    """
    text = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    decoder = list(decoder_of(model).parameters())
    tables = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    adapted = list(_adapted(model, config)) if config.use_peft else []
    if config.use_peft and not adapted:
        raise ConfigError(f"lora_target_modules={config.lora_target_modules!r} names no linear layer of the model")
    sizes = [config.lora_r * width for _, layer in adapted for width in (layer.in_features, layer.out_features)]
    names = frozenset(name.rsplit(".", 1)[-1] for name, _ in adapted)
    return ModelShape(
        config=text,
        everything=_count(list(model.parameters())),
        decoder=_count(decoder),
        head=head.numel(),
        tied=any(p is head for p in decoder),
        widest=max(p.numel() for p in decoder if id(p) not in tables),
        adapters=Count(tuple(sizes)) if adapted else None,
        lora=Adapters(config.lora_r, names) if adapted else None,
        work=describe_work(model),
    )


def _count(parameters: list[Any]) -> Count:
    return Count(tuple(p.numel() for p in parameters))


def _adapted(model: Any, config: GRPOConfig) -> Iterator[tuple[str, Any]]:
    """The layers that PEFT would give adapters, as it reads lora_target_modules: all, a pattern, or ends of names."""
    wanted = config.lora_target_modules
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear) or layer is model.get_output_embeddings():
            continue
        if isinstance(wanted, str):
            found = wanted == "all-linear" or re.fullmatch(wanted, name) is not None
        else:
            found = any(name == end or name.endswith(f".{end}") for end in wanted)
        if found:
            yield name, layer
