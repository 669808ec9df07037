"""What a checkpoint holds beside the model: state as tensors (safetensors) and JSON, and back, bit for bit.

No pickle anywhere: reading a checkpoint runs no code. Only optimizer state, random generators and rollouts are known
here; the model's own folder is written and read by `policy/`. Sharded (DTensor) state must be gathered first.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.errors import RunError
from fastgrpo.records import PER_TOKEN, Prompt, Rollout


class CheckpointError(RunError):
    """A checkpoint that cannot be written, is damaged, or does not fit the run. One line that says which and why."""


# --------------------------------------------------------------------------------------------------------------- files


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes `tensors` of any shape, dtype and device as safetensors; tensors that share memory are written apart."""
    from safetensors.torch import save_file

    storages: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    save_file(apart, path)


def load_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a safetensors file that are `wanted`, on the CPU. CheckpointError if it is missing or damaged.

    They are copies in memory of torch's own: views of the mapped file are aligned to less, and reductions over them
    may round differently from those of a run that was never stopped.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as tensors: {error}") from error


def save_json(path: Path, data: Any) -> None:
    """Writes `data` as JSON in Python's dialect (NaN and infinities allowed: only `load_json` reads it)."""
    path.write_text(json.dumps(data), encoding="utf-8")


def load_json(path: Path) -> Any:
    """What `save_json` wrote. CheckpointError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


# ----------------------------------------------------------------------------------------------------------- optimizer


def pack_optimizer(
    optimizer: torch.optim.Optimizer, names: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of any torch optimizer as (tensors, JSON-able rest). The tensors are the live ones, not copies.

    names: a name for every parameter in the order of `param_groups`; default: that order's numbers.
    Raises CheckpointError for state that is neither tensor nor plain value.
    """
    params, names = _named(optimizer, names)
    owners: list[tuple[str, dict[str, Any]]] = [
        (name, optimizer.state[p]) for name, p in zip(names, params, strict=True) if p in optimizer.state
    ]
    owners += [
        (f"group/{i}", {key: value for key, value in group.items() if key != "params"})
        for i, group in enumerate(optimizer.param_groups)
    ]
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for owner, state in owners:
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{owner}/{key}"] = value.detach()
            else:
                values[f"{owner}/{key}"] = value
    try:
        json.dumps(values)
    except TypeError as error:
        raise CheckpointError(f"state of {type(optimizer).__name__} cannot be saved: {error}") from error
    return tensors, {"optimizer": type(optimizer).__name__, "shapes": _shapes(names, params), "values": values}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    names: Sequence[str] | None = None,
) -> None:
    """Gives `optimizer` the state `pack_optimizer` took: dtypes kept, tensors copied to the parameters' devices.

    `Optimizer.load_state_dict` is not used: it would cast fp32 moments of bf16 parameters to bf16.
    Raises CheckpointError, and changes nothing, when the optimizer's class or its parameters are others.
    """
    params, names = _named(optimizer, names)
    check_optimizer(meta, optimizer, _shapes(names, params))
    state: dict[str, dict[str, Any]] = {}
    for name, value in {**meta["values"], **tensors}.items():
        owner, _, key = name.rpartition("/")
        state.setdefault(owner, {})[key] = value
    order = iter(names)
    optimizer.state.clear()
    for i, group in enumerate(optimizer.param_groups):
        for key, value in state.pop(f"group/{i}", {}).items():
            group[key] = _restore_option(value, group.get(key))
        on_device = bool(group.get("fused") or group.get("capturable"))
        for param in group["params"]:
            if own_state := state.get(next(order)):
                optimizer.state[param] = {key: _restore(value, param, on_device) for key, value in own_state.items()}


def check_optimizer(meta: dict[str, Any], optimizer: torch.optim.Optimizer, own: dict[str, list[int]]) -> None:
    """Raises CheckpointError when `meta` is of another class of optimizer, or of parameters of other shapes."""
    kind = type(optimizer).__name__
    if meta["optimizer"] != kind:
        raise CheckpointError(f"the checkpoint holds the state of {meta['optimizer']}, this run uses {kind}")
    saved = meta["shapes"]
    if saved != own:
        odd = next(name for name in {**saved, **own} if saved.get(name) != own.get(name))
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(saved)} parameters, this run {len(own)}; first difference: "
            f"{odd!r} of shape {saved.get(odd)} there, {own.get(odd)} here"
        )


def _named(optimizer: torch.optim.Optimizer, names: Sequence[str] | None) -> tuple[list[Tensor], list[str]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    names = [str(i) for i in range(len(params))] if names is None else list(names)
    if len(set(names)) != len(params):
        raise ValueError(f"{len(set(names))} different names for the optimizer's {len(params)} parameters")
    return params, names


def _shapes(names: Sequence[str], params: Sequence[Tensor]) -> dict[str, list[int]]:
    return {name: list(param.shape) for name, param in zip(names, params, strict=True)}


def _restore_option(value: Any, current: Any) -> Any:
    """JSON made lists of tuples; a learning rate may be a tensor, and stays on its device."""
    if isinstance(value, Tensor):
        return value.to(current.device if isinstance(current, Tensor) else "cpu", copy=True)
    return tuple(value) if isinstance(current, tuple) else value


def _restore(value: Any, param: Tensor, on_device: bool) -> Any:
    """A copy where the optimizer expects it: step counters (0-d) live on the host unless fused or capturable."""
    if not isinstance(value, Tensor):
        return value
    return value.to(param.device if on_device or value.dim() else "cpu", copy=True)


# ---------------------------------------------------------------------------------------------------------- generators


def rng_state() -> dict[str, Any]:
    """The states of Python's, numpy's (legacy, global) and torch's generators, of all CUDA devices too; JSON-able."""
    import numpy as np

    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global one is what user code draws from
    inner = numpy_state["state"]
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": {**numpy_state, "state": {"key": inner["key"].tolist(), "pos": int(inner["pos"])}},
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": [_to_hex(state) for state in cuda],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` took. CUDA devices beyond those there now, or then, keep their state."""
    import numpy as np

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    inner = state["numpy"]["state"]
    numpy_state = {**state["numpy"], "state": {"key": np.array(inner["key"], np.uint32), "pos": inner["pos"]}}
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_rng_state(_from_hex(state["torch"]))
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, text in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(_from_hex(text), device)


def _to_hex(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()


# ------------------------------------------------------------------------------------------------------------ rollouts


def pack_rollouts(rollouts: Sequence[Rollout]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rollouts as (tensors, JSON-able rest), floats bit for bit.

    Of a prompt only its index and a digest of its tokens are kept: its columns may hold anything, and the data set has
    them. What there is per token must be [L] fp32 on the CPU, as `Rollout` says; ValueError otherwise.
    """
    lengths = [rollout.num_tokens for rollout in rollouts]
    tensors = {
        "length": torch.tensor(lengths, dtype=torch.int64),
        "token_ids": torch.tensor([t for r in rollouts for t in r.token_ids], dtype=torch.int64),
        "group": torch.tensor([r.group for r in rollouts], dtype=torch.int64),
        "prompt_index": torch.tensor([r.prompt.index for r in rollouts], dtype=torch.int64),
        "finished": torch.tensor([r.finished for r in rollouts], dtype=torch.bool),
        "weights_version": torch.tensor([r.weights_version for r in rollouts], dtype=torch.int64),
        "reward": torch.tensor([r.reward for r in rollouts], dtype=torch.float64),
        "advantage": torch.tensor([r.advantage for r in rollouts], dtype=torch.float64),
        "rewards": torch.tensor([x for r in rollouts for x in r.rewards.values()], dtype=torch.float64),
    }
    for name in PER_TOKEN:
        values = [getattr(rollout, name) for rollout in rollouts]
        for i, (value, length) in enumerate(zip(values, lengths, strict=True)):
            if value is not None and (value.shape != (length,) or value.dtype != torch.float32):
                raise ValueError(f"rollout {i}: {name} is {value.dtype} {list(value.shape)}, expected fp32 [{length}]")
        given = [value for value in values if value is not None]
        tensors[name] = torch.cat(given) if given else torch.zeros(0)
        tensors[f"{name}_given"] = torch.tensor([value is not None for value in values], dtype=torch.bool)
    meta = {
        "texts": [rollout.text for rollout in rollouts],
        "reward_names": [list(rollout.rewards) for rollout in rollouts],
        "prompts": {
            str(index): _digest(prompt) for index, prompt in {r.prompt.index: r.prompt for r in rollouts}.items()
        },
    }
    return tensors, meta


def unpack_rollouts(
    tensors: dict[str, Tensor], meta: dict[str, Any], prompts: Callable[[int], Prompt]
) -> list[Rollout]:
    """The rollouts `pack_rollouts` took, with `prompts(index)` for their prompts, asked once for each.

    Raises CheckpointError when a prompt has other tokens than it had: the data set or the tokenizer has changed.
    """
    by_index = {int(index): prompts(int(index)) for index in meta["prompts"]}
    for index, prompt in by_index.items():
        if _digest(prompt) != meta["prompts"][str(index)]:
            raise CheckpointError(f"the prompt of row {index} is not what it was: data set or tokenizer has changed")
    lengths = tensors["length"].tolist()
    per_rollout = ("group", "prompt_index", "finished", "weights_version", "reward", "advantage")
    columns = {name: tensors[name].tolist() for name in per_rollout}
    token_ids = iter(tensors["token_ids"].tolist())
    rewards = iter(tensors["rewards"].tolist())
    names = [name for name in PER_TOKEN if name in tensors]  # older checkpoints know fewer
    starts = dict.fromkeys(names, 0)
    rollouts = []
    for i, length in enumerate(lengths):
        per_token: dict[str, Any] = {}
        for name in names:
            if tensors[f"{name}_given"][i]:
                per_token[name] = tensors[name][starts[name] : starts[name] + length].clone()
                starts[name] += length
        rollouts.append(
            Rollout(
                prompt=by_index[columns["prompt_index"][i]],
                group=columns["group"][i],
                token_ids=[next(token_ids) for _ in range(length)],
                finished=columns["finished"][i],
                text=meta["texts"][i],
                weights_version=columns["weights_version"][i],
                rewards={name: next(rewards) for name in meta["reward_names"][i]},
                reward=columns["reward"][i],
                advantage=columns["advantage"][i],
                **per_token,
            )
        )
    return rollouts


def _digest(prompt: Prompt) -> str:
    return hashlib.sha256(json.dumps(prompt.token_ids).encode()).hexdigest()
