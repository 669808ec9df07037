"""What a checkpoint of a run holds, and how a run takes it up again.

model/                  a Hugging Face folder (adapters for PEFT), tokenizer included
optimizer.safetensors   AdamW's moments, and fp32 master weights where the model is a 16-bit one
critic.safetensors      the critic's weights; critic_optimizer.safetensors: as the policy's
reference.safetensors   only when the reference model moves (sync_ref_model)
rollouts.safetensors    the rollout batch in use, when it serves more steps
state.json              counters, random generators, the rest of the above
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastgrpo.data import PromptSource
from fastgrpo.optim import Optimizer
from fastgrpo.records import RolloutBatch, TrainState
from fastgrpo.state import (
    CheckpointError,
    load_json,
    load_tensors,
    pack_optimizer,
    pack_rollouts,
    save_json,
    save_tensors,
    set_rng_state,
    unpack_optimizer,
    unpack_rollouts,
)
from fastgrpo.update import Updater

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"


def write_snapshot(
    folder: Path, *, updater: Updater, state: TrainState, rng: dict[str, Any], pending: RolloutBatch | None
) -> None:
    """Write everything that decides the future of a run into `folder`."""
    updater.policy.save(folder / MODEL_FOLDER)
    contents: dict[str, Any] = {"state": asdict(state), "rng": rng}
    contents["optimizer"] = _write_optimizer(folder, "optimizer", updater.optimizer)
    if updater.critic is not None and updater.critic_optimizer is not None:
        save_tensors(folder / "critic.safetensors", dict(updater.critic.trainable()))
        contents["critic_optimizer"] = _write_optimizer(folder, "critic_optimizer", updater.critic_optimizer)
    if updater.moving_reference is not None:
        save_tensors(folder / "reference.safetensors", updater.moving_reference.weights())
    if pending is not None:
        rollout_tensors, contents["rollouts"] = pack_rollouts(pending.rollouts)
        contents["batch"] = {"metrics": pending.metrics, "used": pending.used, "use": updater.use}
        save_tensors(folder / "rollouts.safetensors", rollout_tensors)
    save_json(folder / "state.json", contents)


def read_snapshot(folder: Path, *, updater: Updater, source: PromptSource) -> tuple[TrainState, RolloutBatch | None]:
    """Put a run back where `write_snapshot` found it, the random generators included.

    Raises CheckpointError or ValueError when the checkpoint is another model's, optimizer's or data set's, or when its
    pending rollouts were being used in another way.
    """
    contents = load_json(folder / "state.json")
    updater.policy.load(folder / MODEL_FOLDER)
    _read_optimizer(folder, "optimizer", updater.optimizer, contents)
    if updater.critic is not None and updater.critic_optimizer is not None:
        if not (folder / "critic.safetensors").is_file():
            raise CheckpointError(f"{folder} holds no critic, but algorithm={updater.config.algorithm} trains one")
        updater.critic.load(load_tensors(folder / "critic.safetensors"))
        _read_optimizer(folder, "critic_optimizer", updater.critic_optimizer, contents)
    if updater.moving_reference is not None:
        if not (folder / "reference.safetensors").is_file():
            raise CheckpointError(f"{folder} holds no reference model, but sync_ref_model moves one")
        updater.moving_reference.load_weights(load_tensors(folder / "reference.safetensors"))
    _name_what_is_left_out(folder, updater)
    pending = None
    if "batch" in contents:
        was, use = contents["batch"].pop("use", None), updater.use
        if was != use:
            old = was or {}
            changed = [f"{name}: {old.get(name)} -> {value}" for name, value in use.items() if old.get(name) != value]
            raise CheckpointError(
                f"{folder} holds rollouts that are being used otherwise ({', '.join(changed)}): change these options "
                "from a checkpoint without pending rollouts"
            )
        saved = load_tensors(folder / "rollouts.safetensors")
        rollouts = unpack_rollouts(saved, contents["rollouts"], source.__getitem__)
        pending = RolloutBatch(rollouts, **contents["batch"])
    set_rng_state(contents["rng"])
    return TrainState(**contents["state"]), pending


def _name_what_is_left_out(folder: Path, updater: Updater) -> None:
    if updater.critic is None and (folder / "critic.safetensors").is_file():
        logger.warning("%s holds a critic; algorithm=%s has none: it is dropped", folder, updater.config.algorithm)
    if updater.moving_reference is None and (folder / "reference.safetensors").is_file():
        logger.warning("%s holds a reference model that has moved; without sync_ref_model it is dropped", folder)


def _write_optimizer(folder: Path, name: str, optimizer: Optimizer) -> dict[str, Any]:
    """Its tensors into a file; the rest, for `state.json`, is returned."""
    tensors, values = pack_optimizer(optimizer.torch_optimizer, optimizer.names)
    save_tensors(folder / f"{name}.safetensors", {**tensors, **optimizer.masters()})
    return values


def _read_optimizer(folder: Path, name: str, optimizer: Optimizer, contents: dict[str, Any]) -> None:
    tensors = load_tensors(folder / f"{name}.safetensors")
    optimizer.load_masters(tensors)
    masters = optimizer.masters()
    moments = {key: tensor for key, tensor in tensors.items() if key not in masters}
    unpack_optimizer(optimizer.torch_optimizer, moments, contents[name], optimizer.names)
