"""Optimizers, random generators and rollouts: to files and back, bit for bit."""

from __future__ import annotations

import datetime
import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo.records import PER_TOKEN, Prompt, Rollout
from fastgrpo.state import (
    CheckpointError,
    load_json,
    load_tensors,
    pack_optimizer,
    pack_rollouts,
    rng_state,
    save_json,
    save_tensors,
    set_rng_state,
    unpack_optimizer,
    unpack_rollouts,
)


def through_files(folder: Path, packed: tuple[dict[str, Tensor], dict[str, Any]]) -> tuple[dict[str, Tensor], Any]:
    save_tensors(folder / "x.safetensors", packed[0])
    save_json(folder / "x.json", packed[1])
    return load_tensors(folder / "x.safetensors"), load_json(folder / "x.json")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes: NaNs count, and so do their payloads and the sign of zero."""
    bits = [t.contiguous().flatten().view(torch.uint8).tolist() for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and bits[0] == bits[1]


# ------------------------------------------------------------------------------------------------------------- tensors


def test_tensors_of_all_kinds(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    tensors = {
        "shared": base,
        "view": base[3:7],
        "transposed": base.view(3, 4).T,
        "scalar": torch.tensor(1.5),
        "none at all": torch.zeros(0, 3),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        **{str(t): torch.ones(3).to(t) for t in (torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)},
    }
    save_tensors(tmp_path / "x", tensors)
    loaded = load_tensors(tmp_path / "x")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(loaded[name], tensor.detach()), name


def test_loaded_tensors_are_aligned_and_outlive_the_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"a": torch.ones(1, dtype=torch.uint8), "b": torch.arange(1000.0)})
    loaded = load_tensors(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"\xff" * (tmp_path / "x").stat().st_size)
    assert torch.equal(loaded["b"], torch.arange(1000.0))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values())


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("nonsense")
    for load, kind in ((load_tensors, "tensors"), (load_json, "JSON")):
        with pytest.raises(CheckpointError, match=rf"/x: cannot be read as {kind}"):
            load(tmp_path / "x")
        with pytest.raises(CheckpointError, match=rf"/missing: cannot be read as {kind}"):
            load(tmp_path / "missing")


# ----------------------------------------------------------------------------------------------------------- optimizer


class WideMoments(torch.optim.Optimizer):
    """Keeps fp32 state for bf16 parameters, which `load_state_dict` would cast down, and plain values beside it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["sum"] = state.get("sum", torch.zeros(p.shape)) + p.grad.float() / 3
                state["count"] = state.get("count", 0) + 1
                p.sub_(group["lr"] * state["count"] * state["sum"])


def two_groups(params: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "betas": (0.5, 0.6)}]


OPTIMIZERS: dict[str, tuple[Callable[[list[Tensor]], torch.optim.Optimizer], torch.dtype]] = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01), torch.float32),
    "adamw amsgrad": (lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, foreach=False), torch.float32),
    "adamw fused": (lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), torch.float32),
    "adamw groups": (lambda p: torch.optim.AdamW(two_groups(p), lr=0.01), torch.float32),
    "adamw lr tensor": (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), capturable=False), torch.float32),
    "adamw bf16": (lambda p: torch.optim.AdamW(p, lr=0.01), torch.bfloat16),
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.01), torch.float32),
    "sgd momentum": (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), torch.float64),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=0.01), torch.float32),
    "wide moments": (WideMoments, torch.bfloat16),
}


def start(kind: str) -> tuple[list[Tensor], torch.optim.Optimizer]:
    make, dtype = OPTIMIZERS[kind]
    generator = torch.Generator().manual_seed(0)
    params: list[Tensor] = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((7, 5), (3,), (2, 2))
    ]
    params[2].requires_grad_(False)  # a parameter that never gets a gradient has no state
    return params, make(params)


def steps(params: list[Tensor], optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    for i in range(begin, end):
        generator = torch.Generator().manual_seed(i)
        for param in params[:2]:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if isinstance(optimizer, WideMoments):
            params[2].grad = torch.zeros_like(params[2])
        optimizer.step()
        for group in optimizer.param_groups:  # as a schedule does
            group["lr"] = group["lr"] * 0.9


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_goes_on_as_if_never_stopped(tmp_path: Path, kind: str) -> None:
    params, optimizer = start(kind)
    steps(params, optimizer, 0, 6)

    before, stopped = start(kind)
    steps(before, stopped, 0, 3)
    names = ["embed.weight", "norm.bias", "frozen"]
    packed = through_files(tmp_path, pack_optimizer(stopped, names))
    after, resumed = start(kind)
    for new, old in zip(after, before, strict=True):
        new.data.copy_(old.data)
    unpack_optimizer(resumed, *packed, names)
    for new, old in zip(after, before, strict=True):
        assert set(resumed.state[new]) == set(stopped.state.get(old, {}))
        for key, value in resumed.state[new].items():
            expected = stopped.state[old][key]
            assert same_bits(value, expected) if isinstance(value, Tensor) else value == expected
    for new_group, old_group in zip(resumed.param_groups, stopped.param_groups, strict=True):
        assert {k: v for k, v in new_group.items() if k != "params"} == {
            k: v for k, v in old_group.items() if k != "params"
        }
    steps(after, resumed, 3, 6)
    for one, other in zip(params, after, strict=True):
        assert same_bits(one.detach(), other.detach())


def test_unpacked_state_is_a_copy() -> None:
    params, optimizer = start("adamw lr tensor")
    steps(params, optimizer, 0, 1)
    other_params, other = start("adamw lr tensor")
    unpack_optimizer(other, *pack_optimizer(optimizer))
    kept = optimizer.state[params[0]]["exp_avg"].clone()
    steps(other_params, other, 1, 2)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], kept)
    unpack_optimizer(other, *pack_optimizer(optimizer))
    other.param_groups[0]["lr"].zero_()
    assert optimizer.param_groups[0]["lr"] > 0


def test_optimizer_that_does_not_fit() -> None:
    params, optimizer = start("adamw")
    steps(params, optimizer, 0, 1)
    packed = pack_optimizer(optimizer, ["a", "b", "c"])
    with pytest.raises(CheckpointError, match="holds the state of AdamW, this run uses SGD"):
        unpack_optimizer(torch.optim.SGD(params), *packed, ["a", "b", "c"])
    with pytest.raises(
        CheckpointError, match=r"3 parameters, this run 1; first difference: 'b' of shape \[3\] there, N"
    ):
        unpack_optimizer(torch.optim.AdamW(params[:1]), *packed, ["a"])
    with pytest.raises(CheckpointError, match=r"first difference: 'a' of shape \[7, 5\] there, \[3\] here"):
        unpack_optimizer(optimizer, *packed, ["b", "a", "c"])
    with pytest.raises(ValueError, match="2 different names for the optimizer's 3 parameters"):
        pack_optimizer(optimizer, ["a", "b", "b"])
    optimizer.state[params[0]]["closure"] = print
    with pytest.raises(CheckpointError, match=r"state of AdamW cannot be saved: .*not JSON serializable"):
        pack_optimizer(optimizer)


# ---------------------------------------------------------------------------------------------------------- generators


def draws() -> list[Any]:
    return [
        [random.random() for _ in range(5)],
        random.gauss(0, 1),
        np.random.rand(5).tolist(),  # noqa: NPY002 - the global generator is what is saved
        float(np.random.standard_normal()),  # noqa: NPY002
        torch.rand(700).tolist(),
        torch.randn(3).tolist(),
        torch.randperm(10).tolist(),
    ]


@pytest.mark.parametrize("warm", [0, 1, 3])
def test_generators_go_on(tmp_path: Path, warm: int) -> None:
    kept = rng_state()
    try:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(5)
        for _ in range(warm):
            draws()  # an odd number leaves each `gauss` its second half
        save_json(tmp_path / "rng.json", rng_state())
        expected = [draws(), draws()]
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(6)
        assert draws() != expected[0]
        set_rng_state(load_json(tmp_path / "rng.json"))
        assert [draws(), draws()] == expected
    finally:
        set_rng_state(kept)


def test_generators_of_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: that each device's state gets back to its device, and missing devices are passed over."""
    states = [torch.arange(16, dtype=torch.uint8), torch.full((16,), 7, dtype=torch.uint8)]
    given_back: dict[int, list[int]] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    state = json.loads(json.dumps(rng_state()))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, device: given_back.update({device: s.tolist()}))
    for devices in (2, 1):
        given_back.clear()
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=devices: n)
        set_rng_state(state)
        assert given_back == {i: states[i].tolist() for i in range(devices)}


# ------------------------------------------------------------------------------------------------------------ rollouts

PROMPTS = [
    Prompt(0, "1+1=", [1, 2, 3], {"answer": "2", "when": datetime.datetime(2024, 1, 1), "raw": b"\x00"}),
    Prompt(1, [{"role": "user", "content": "hi"}], [4], {"object": object()}),
    Prompt(2, "x", [5, 6]),
]


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    token_ids = draw(st.lists(st.integers(0, 2**31), max_size=6))
    bits = st.lists(st.integers(0, 2**32 - 1), min_size=len(token_ids), max_size=len(token_ids))
    logprob = bits.map(lambda words: torch.tensor(words, dtype=torch.int64).to(torch.uint32).view(torch.float32))
    number = st.floats(allow_nan=True, allow_infinity=True)
    return Rollout(
        prompt=draw(st.sampled_from(PROMPTS)),
        group=draw(st.integers(0, 2**40)),
        token_ids=token_ids,
        sampling_logprob=draw(logprob),
        finished=draw(st.booleans()),
        text=draw(st.text(st.characters(codec=None), max_size=8)),
        rewards=draw(st.dictionaries(st.text(max_size=3), number, max_size=3)),
        reward=draw(number),
        advantage=draw(number),
        **{name: draw(st.none() | logprob) for name in PER_TOKEN if name != "sampling_logprob"},
    )


def as_bits(rollout: Rollout) -> list[Any]:
    def pack(x: float) -> bytes:
        return struct.pack("d", x)

    def tensor(t: Tensor | None) -> Any:
        return None if t is None else (t.dtype, t.view(torch.int32).tolist())

    return [
        rollout.prompt,
        rollout.group,
        rollout.token_ids,
        rollout.finished,
        rollout.text,
        [(name, pack(value)) for name, value in rollout.rewards.items()],
        pack(rollout.reward),
        pack(rollout.advantage),
        *(tensor(getattr(rollout, name)) for name in PER_TOKEN),
    ]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rollouts(), max_size=6))
def test_rollouts_come_back_bit_for_bit(tmp_path: Path, batch: list[Rollout]) -> None:
    asked: list[int] = []

    def prompts(index: int) -> Prompt:
        asked.append(index)
        return PROMPTS[index]

    restored = unpack_rollouts(*through_files(tmp_path, pack_rollouts(batch)), prompts)
    assert [as_bits(r) for r in restored] == [as_bits(r) for r in batch]
    assert len(asked) == len({r.prompt.index for r in batch})


def rollout(**changes: Any) -> Rollout:
    fields = {"prompt": PROMPTS[0], "group": 0, "token_ids": [1, 2], "sampling_logprob": torch.zeros(2)}
    return Rollout(**{**fields, "finished": True, **changes})


def test_changed_data_set_is_noticed() -> None:
    packed = pack_rollouts([rollout()])
    with pytest.raises(CheckpointError, match="the prompt of row 0 is not what it was"):
        unpack_rollouts(*packed, lambda index: Prompt(0, "1+1=", [1, 2, 4]))


def test_a_checkpoint_from_before_there_were_values(tmp_path: Path) -> None:
    kept = rollout(old_logprob=torch.tensor([-1.0, -2.0]))
    tensors, meta = pack_rollouts([kept])
    older = {
        name: tensor for name, tensor in tensors.items() if not name.startswith(("values", "returns", "advantages"))
    }
    [restored] = unpack_rollouts(older, meta, PROMPTS.__getitem__)
    assert as_bits(restored) == as_bits(kept)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_rollouts_of_another_shape_are_refused(name: str) -> None:
    for wrong in (torch.zeros(3), torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(ValueError, match=rf"rollout 1: {name} is torch.float\d\d \[\d\], expected fp32 \[2\]"):
            pack_rollouts([rollout(), rollout(**{name: wrong})])


def test_a_rollout_is_pickled_bit_for_bit() -> None:
    """As processes send them to one another: -0, NaN with its bits, no tokens, no numbers."""
    prompt = Prompt(3, "x", [1, 2], {"answer": [1, None]})
    odd = torch.tensor([-0.0, float("nan"), -1e-45])
    one = Rollout(prompt, 5, [1, 2, 3], odd, True, rewards={"a": 0.5}, reward=0.5, extra={"b": "c"}, ref_logprob=-odd)
    none = Rollout(prompt, 6, [], torch.zeros(0), False)
    back, empty = pickle.loads(pickle.dumps([one, none]))
    assert back.prompt is empty.prompt
    for name in ("prompt", "group", "token_ids", "finished", "rewards", "reward", "extra", "old_logprob"):
        assert getattr(back, name) == getattr(one, name), name
    for name in ("sampling_logprob", "ref_logprob"):
        assert torch.equal(getattr(back, name).view(torch.int32), getattr(one, name).view(torch.int32))
    assert empty.sampling_logprob.shape == (0,)
    back.sampling_logprob.zero_()  # its own memory
    assert one.sampling_logprob.isnan().any()
