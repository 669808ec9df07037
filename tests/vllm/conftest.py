"""Set-up of the vLLM tests: those marked `vllm` need vLLM itself and are skipped, with the reason, where it is missing.

The others (weights, the server engine against servers made up here) run everywhere.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="needs vLLM, which is not installed here"))
