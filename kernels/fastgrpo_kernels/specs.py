"""What a Triton kernel is compiled for: read by the table of compiled kernels, never at run time.

A `kernel.py` lists its kernels in `KERNELS`, one `KernelSpec` for each variant and configuration that is launched.
This module imports neither torch nor triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel as it is launched.

    `signature` gives each argument that is no constexpr its type as Triton writes it: "*bf16", "i32", "fp32". A ":16"
    behind it promises that the value (of a pointer: the address) divides by 16, as Triton's launcher finds out by
    itself; without the promise no access is wider than one element. Tensor descriptors are written
    "tensordesc<bf16[128,64]>", with the shape of their blocks. `constexprs` also holds arguments that are always None,
    or specialized to 1. `num_stages` is None where the launch names none. `options` are further compiler options of the
    launch, as {"maxnreg": 128}. `wide` demands 128-bit accesses of the main loop. `archs` are the architectures it is
    launched on, as "sm_90"; None: all.
    """

    name: str
    kernel: Any  # a `triton.jit` function, autotuned or not
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    wide: bool = False
    archs: tuple[str, ...] | None = None
