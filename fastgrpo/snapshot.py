"""What a checkpoint of a run holds, and how a run takes it up again.

model/                  a Hugging Face folder (adapters for PEFT), tokenizer included
optimizer.safetensors   AdamW's moments, and fp32 master weights where the model is a 16-bit one; of several processes
                        each has written those of its parameters: optimizer-1.safetensors, ...
critic.safetensors      the critic's weights; critic_optimizer.safetensors: as the policy's
reference.safetensors   only when the reference model moves (sync_ref_model)
rollouts.safetensors    the rollout batch in use, when it serves more steps
state.json              counters, random generators, the rest of the above
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastgrpo.data import PromptSource
from fastgrpo.optim import Optimizer
from fastgrpo.records import RolloutBatch, TrainState
from fastgrpo.state import (
    CheckpointError,
    check_optimizer,
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


@dataclass(frozen=True)
class Part:
    """What each process has of a checkpoint, beside the files it wrote.

    rng: its random generators. optimizers: of each optimizer's state what is not tensors.
    """

    rng: dict[str, Any]
    optimizers: dict[str, dict[str, Any]]


def write_part(folder: Path, *, updater: Updater, rng: dict[str, Any]) -> Part:
    """A process's part; its optimizers' files go into `folder`, for `write_snapshot`. The first process writes none."""
    optimizers = {}
    for name, optimizer in _optimizers(updater).items():
        tensors, optimizers[name] = pack_optimizer(optimizer.torch_optimizer, optimizer.names)
        if not updater.ranks.first:
            folder.mkdir(exist_ok=True)
            save_tensors(folder / f"{name}-{updater.ranks.rank}.safetensors", {**tensors, **optimizer.masters()})
    return Part(rng, optimizers)


def write_snapshot(
    folder: Path,
    *,
    updater: Updater,
    state: TrainState,
    parts: list[Part],
    files: Path,
    pending: RolloutBatch | None,
) -> None:
    """Write everything that decides the future of a run into `folder`. Done by the first process.

    parts: of all processes; files: where they put theirs.
    """
    updater.policy.save(folder / MODEL_FOLDER)
    contents: dict[str, Any] = {"state": asdict(state), "rng": parts[0].rng}
    contents["rng_of_others"] = [part.rng for part in parts[1:]]
    for name, optimizer in _optimizers(updater).items():
        tensors, _ = pack_optimizer(optimizer.torch_optimizer, optimizer.names)
        save_tensors(folder / f"{name}.safetensors", {**tensors, **optimizer.masters()})
        contents[name] = _joined([part.optimizers[name] for part in parts])
        for rank in range(1, len(parts)):
            shutil.move(files / f"{name}-{rank}.safetensors", folder)
    shutil.rmtree(files, ignore_errors=True)
    if updater.critic is not None:
        save_tensors(folder / "critic.safetensors", dict(updater.critic.trainable()))
    if updater.moving_reference is not None:
        save_tensors(folder / "reference.safetensors", updater.moving_reference.weights())
    if pending is not None:
        rollout_tensors, contents["rollouts"] = pack_rollouts(pending.rollouts)
        contents["batch"] = {"metrics": pending.metrics, "used": pending.used, "use": updater.use}
        save_tensors(folder / "rollouts.safetensors", rollout_tensors)
    save_json(folder / "state.json", contents)


def read_snapshot(folder: Path, *, updater: Updater, source: PromptSource) -> tuple[TrainState, RolloutBatch | None]:
    """Put a run back where `write_snapshot` found it, the random generators included.

    Of those of the process that reads them; a process that the run did not have keeps its own.

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
    generators = [contents["rng"], *contents.get("rng_of_others", [])]
    if updater.ranks.rank < len(generators):
        set_rng_state(generators[updater.ranks.rank])
    return TrainState(**contents["state"]), pending


def _name_what_is_left_out(folder: Path, updater: Updater) -> None:
    if updater.critic is None and (folder / "critic.safetensors").is_file():
        logger.warning("%s holds a critic; algorithm=%s has none: it is dropped", folder, updater.config.algorithm)
    if updater.moving_reference is None and (folder / "reference.safetensors").is_file():
        logger.warning("%s holds a reference model that has moved; without sync_ref_model it is dropped", folder)


def _optimizers(updater: Updater) -> dict[str, Optimizer]:
    """By the names of their files."""
    both = {"optimizer": updater.optimizer, "critic_optimizer": updater.critic_optimizer}
    return {name: optimizer for name, optimizer in both.items() if optimizer is not None}


def _joined(metas: list[dict[str, Any]]) -> dict[str, Any]:
    """What `pack_optimizer` says beside the tensors, of the parameters of all processes."""
    return metas[0] | {key: {k: v for meta in metas for k, v in meta[key].items()} for key in ("shapes", "values")}


def _read_optimizer(folder: Path, name: str, optimizer: Optimizer, contents: dict[str, Any]) -> None:
    """Of all processes' files what this one's parameters need: there may have been another number of processes."""
    meta = contents[name]
    check_optimizer(meta, optimizer.torch_optimizer, optimizer.shapes)
    groups = {f"group/{i}" for i in range(len(optimizer.torch_optimizer.param_groups))}
    masters, own = optimizer.masters(), groups.union(optimizer.names)

    def mine(key: str) -> bool:
        return key in masters or key.rpartition("/")[0] in own

    files = [folder / f"{name}.safetensors", *sorted(folder.glob(f"{name}-*.safetensors"))]
    tensors = {key: tensor for file in files for key, tensor in load_tensors(file, mine).items()}
    optimizer.load_masters(tensors)
    moments = {key: tensor for key, tensor in tensors.items() if key not in masters}
    shapes = {key: shape for key, shape in meta["shapes"].items() if key in own}
    values = {key: value for key, value in meta["values"].items() if mine(key)}
    unpack_optimizer(optimizer.torch_optimizer, moments, meta | {"shapes": shapes, "values": values}, optimizer.names)
