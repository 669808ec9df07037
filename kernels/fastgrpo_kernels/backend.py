"""Which implementation an op runs: Triton kernels, or memory-bounded PyTorch."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# Read once: Triton itself decides at import whether its kernels are interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Triton for tensors on a GPU, and for CPU tensors under `TRITON_INTERPRET=1`; float64 always takes PyTorch."""
    return (tensor.is_cuda or INTERPRETED) and tensor.dtype != torch.float64
