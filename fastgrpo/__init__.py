"""fastgrpo: GRPO for language models on one node.

Names are loaded when they are used: importing this package loads neither torch nor transformers nor datasets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgrpo.config import ConfigError, GRPOConfig
    from fastgrpo.trainer import GRPOTrainer

__all__ = ["ConfigError", "GRPOConfig", "GRPOTrainer", "__version__"]
__version__ = "0.1.0"

_HOME = {"GRPOConfig": "fastgrpo.config", "ConfigError": "fastgrpo.config", "GRPOTrainer": "fastgrpo.trainer"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
