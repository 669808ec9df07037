"""Uninitialised memory reads as NaN in every test here: an op that forgets to write shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels.backend import INTERPRETED

from .interpreter import repair


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    assert torch.empty(2).isnan().all()
    assert torch.zeros(1).new_empty(2).isnan().all()


def pytest_configure() -> None:
    if INTERPRETED:
        repair()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of Triton kernels belong to a process that interprets them; test_interpreter.py starts one."""
    if INTERPRETED:
        return
    elsewhere = [item for item in items if item.get_closest_marker("interpreter")]
    items[:] = [item for item in items if item not in elsewhere]
    config.hook.pytest_deselected(items=elsewhere)
