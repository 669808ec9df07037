"""Seeds that follow from a run's seed and a purpose: nothing to store, the same after a resume."""

from __future__ import annotations

import hashlib
import random


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for e.g. `derive_seed(42, "rollout", 17)`; different purposes give independent streams."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_generators(seed: int) -> None:
    """Python's, numpy's and torch's global generators: user code may draw from them."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global one is what user code draws from
    torch.manual_seed(seed)
