"""What the device can do, measured in the same run: the rates that times are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.clock import clock


@dataclass(frozen=True)
class Rates:
    """gemm: FLOP/s of a large square matrix product; copy: bytes/s of a large copy, read and written."""

    gemm: float
    copy: float

    def limit_ms(self, flops: float, moved: float) -> float | None:
        """The least time for that many operations and bytes, the two overlapped; None where nothing is known."""
        return 1e3 * max(flops / self.gemm, moved / self.copy) or None


def gemm(device: torch.device, n: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """An n x n x n product, 2 n^3 operations."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def copy(device: torch.device, size: int) -> Callable[[], Tensor]:
    """Reads and writes `size` bytes."""
    a = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return lambda: b.copy_(a)


def measure_rates(device: torch.device, *, n: int | None = None, size: int | None = None) -> Rates:
    """The best of some runs: fp32 on a CPU, bf16 on a GPU, and more bytes than caches hold."""
    on_gpu = device.type == "cuda"
    n, size = n or (8192 if on_gpu else 1536), size or 1 << (32 if on_gpu else 28)
    product = gemm(device, n, torch.bfloat16 if on_gpu else torch.float32)
    return Rates(2 * n**3 / _best(product, device), 2 * size / _best(copy(device, size), device))


def _best(run: Callable[[], Tensor], device: torch.device, rounds: int = 9) -> float:
    now = clock(device)
    run()
    seconds = []
    for _ in range(rounds):
        start = now()
        run()
        seconds.append(now() - start)
    return min(seconds)
