"""A policy's weights as a checkpoint has them: what vLLM loads, whatever the transport.

Names and shapes are those of `save_pretrained` (transformers may hold e.g. a layer's experts fused). Tied weights come
once. Adapters are merged, one layer at a time on a copy, so the policy is not touched and memory stays bounded.
Not done here: adapters that vLLM would apply itself, quantized policies.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SHARD_BYTES = 4 * 2**30


@torch.no_grad()
def checkpoint_weights(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the policy's weights, detached, on its device; a fresh pass over them as they stand.

    Raises ValueError for adapters that no checkpoint of this model can hold: those on tied embeddings, and wrappers
    that are neither a tuner layer nor a copy of a module.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = policy.causal_lm
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    tensors = _merged(model) if policy.is_peft else _all(model)
    # A conversion never reaches beyond a layer, and a layer at a time bounds the memory of what is merged.
    for _, layer in groupby(tensors, key=lambda item: _layer(item[0])):
        weights = {name: tensor.detach() for name, tensor in layer if name not in tied}
        yield from revert_weight_conversion(model, weights).items()


def write_model_folder(policy: Any, folder: Path, *, weights: bool = True) -> None:
    """A model folder that vLLM loads: config and tokenizer, and the weights unless they come another way."""
    config = copy.deepcopy(policy.causal_lm.config)
    config.architectures = [type(policy.causal_lm).__name__]
    config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    if weights:
        write_weights(policy, folder)


def write_weights(policy: Any, folder: Path) -> None:
    """The weights as safetensors files of about 4 GiB, each replaced in one go: a reader never sees half a file."""
    shard: dict[str, Tensor] = {}
    size = number = 0
    for name, tensor in checkpoint_weights(policy):
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            _write_shard(shard, folder, number)
            shard, size, number = {}, 0, number + 1
        # A view would be written with all of its storage.
        shard[name] = tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        size += tensor.nbytes
    _write_shard(shard, folder, number)


def _write_shard(shard: dict[str, Tensor], folder: Path, number: int) -> None:
    from safetensors.torch import save_file

    temporary = folder / f".tmp-model-{number:05d}"
    save_file(shard, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / f"model-{number:05d}.safetensors")


def _all(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a module and all below it, under their full names."""
    for path, inner in module.named_modules(prefix=prefix):
        yield from _own(inner, path)


def _own(module: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the module at `path` alone."""
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name not in module._non_persistent_buffers_set:
            yield f"{path}.{name}" if path else name, tensor


def _merged(model: Any) -> Iterator[tuple[str, Tensor]]:
    """As `_all`, with the active adapters merged and the modules that train besides them in their places."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    _refuse_tied(model, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    done: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if done and path.startswith(done):
            continue
        if isinstance(module, BaseTunerLayer):
            merged: Any = copy.deepcopy(module)
            merged.merge()
            yield from _all(merged.get_base_layer(), path)
        elif isinstance(module, ModulesToSaveWrapper):
            yield from _all(module.modules_to_save[module.active_adapters[0]], path)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"vLLM cannot take over {path}: {type(module).__name__} is not an adapter that merges")
        else:
            yield from _own(module, path)
            continue
        done += (f"{path}.",)


def _refuse_tied(model: Any, wrappers: tuple[type, ...]) -> None:
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and any(isinstance(module, wrappers) for module in embeddings):
        raise ValueError(
            "vLLM cannot take over adapters on tied embeddings: leave embed_tokens and lm_head out of the PEFT config"
        )


def _layer(name: str) -> str:
    """The name up to its first number: the decoder layer a weight belongs to, "" for embeddings, norm and head."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), "")
