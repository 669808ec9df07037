"""Uninitialised memory reads as NaN in every test here: an op that forgets to write shows it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels.backend import INTERPRETED

from .interpreter import repair

DRY_RUN = os.environ.get("FASTGRPO_DRY_RUN", "0") == "1"
"""This process may be patched for good by gpu_dry_run.py."""


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        with torch.no_grad():
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    assert torch.empty(2, requires_grad=True).isnan().all()  # as torch 2.11's checkpoint asks for one
    assert torch.zeros(1).new_empty(2).isnan().all()


def pytest_configure() -> None:
    if INTERPRETED:
        repair()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of Triton kernels belong to a process that interprets them, those on fake GPU tensors to one that has them;
    test_interpreter.py and test_gpu_dry_run.py start these.
    """
    elsewhere = [
        item
        for item in items
        if (item.get_closest_marker("interpreter") and not INTERPRETED)
        or ("fake_gpu" in getattr(item, "fixturenames", ()) and not DRY_RUN)
    ]
    items[:] = [item for item in items if item not in elsewhere]
    config.hook.pytest_deselected(items=elsewhere)
