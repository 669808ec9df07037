"""Set-up of all trainer tests: one thread (tiny models get slower with more), a tiny model.

Fixtures: `helpers` (the module helpers.py), `tiny_tokenizer`, `tiny_model_dir` (tied embeddings),
`tiny_untied_model_dir`, `runs` (of several processes). The folders are shared by all tests: copy before you write.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def helpers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trainer_test_helpers", Path(__file__).with_name("helpers.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_tokenizer(helpers: Any) -> Any:
    return helpers.make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.save_model_dir(tmp_path_factory.mktemp("tiny-tied"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_untied_model_dir(helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.save_model_dir(tmp_path_factory.mktemp("tiny-untied"), tie_word_embeddings=False)


@pytest.fixture(scope="session")
def runs() -> Iterator[Any]:
    from distributed_runs import Runs

    started = Runs()
    yield started
    started.close()
