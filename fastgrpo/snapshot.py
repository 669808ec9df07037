"""What a checkpoint of a run holds, and how a run takes it up again.

model/                  a Hugging Face folder (adapters for PEFT), tokenizer included
optimizer.safetensors   AdamW's moments, and fp32 master weights where the model is a 16-bit one
reference.safetensors   only when the reference model moves (sync_ref_model)
rollouts.safetensors    the rollout batch in use, when it serves more steps
state.json              counters, random generators, the rest of the above
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastgrpo.data import PromptSource
from fastgrpo.optim import Optimizer
from fastgrpo.policy import Policy, Reference
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

MODEL_FOLDER = "model"


def write_snapshot(
    folder: Path,
    *,
    policy: Policy,
    optimizer: Optimizer,
    reference: Reference | None,
    state: TrainState,
    rng: dict[str, Any],
    pending: RolloutBatch | None,
    use: dict[str, Any],
) -> None:
    """Write everything that decides the future of a run into `folder`.

    reference: only when it moves. use: `Updater.use`, how the pending rollouts are being used.
    """
    policy.save(folder / MODEL_FOLDER)
    tensors, values = pack_optimizer(optimizer.torch_optimizer, optimizer.names)
    save_tensors(folder / "optimizer.safetensors", {**tensors, **optimizer.masters()})
    contents: dict[str, Any] = {"state": asdict(state), "rng": rng, "optimizer": values}
    if reference is not None:
        save_tensors(folder / "reference.safetensors", reference.weights())
    if pending is not None:
        rollout_tensors, contents["rollouts"] = pack_rollouts(pending.rollouts)
        contents["batch"] = {"metrics": pending.metrics, "used": pending.used, "use": use}
        save_tensors(folder / "rollouts.safetensors", rollout_tensors)
    save_json(folder / "state.json", contents)


def read_snapshot(
    folder: Path,
    *,
    policy: Policy,
    optimizer: Optimizer,
    reference: Reference | None,
    source: PromptSource,
    use: dict[str, Any],
) -> tuple[TrainState, RolloutBatch | None]:
    """Put a run back where `write_snapshot` found it, the random generators included.

    Raises CheckpointError or ValueError when the checkpoint is another model's, optimizer's or data set's, or when its
    pending rollouts were being used in another way.
    """
    contents = load_json(folder / "state.json")
    policy.load(folder / MODEL_FOLDER)
    tensors = load_tensors(folder / "optimizer.safetensors")
    optimizer.load_masters(tensors)
    moments = {name: t for name, t in tensors.items() if name not in optimizer.masters()}
    unpack_optimizer(optimizer.torch_optimizer, moments, contents["optimizer"], optimizer.names)
    if reference is not None:
        if not (folder / "reference.safetensors").is_file():
            raise CheckpointError(f"{folder} holds no reference model, but sync_ref_model moves one")
        reference.load_weights(load_tensors(folder / "reference.safetensors"))
    pending = None
    if "batch" in contents:
        was = contents["batch"].pop("use", None)
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
