"""Specs that the table of kernels must refuse, one for each reason."""

from __future__ import annotations

from dataclasses import replace

from fastgrpo_kernels.specs import KernelSpec
from tests.ops.sample_kernels import KERNELS as SOUND
from tests.ops.sample_kernels import cast

_MATMUL, _CAST = SOUND

KERNELS = [
    KernelSpec(name="misspelt", kernel=cast, signature={"p_y": "*fp32", "p_out": "*bf16", "n": "i32"}),
    replace(_MATMUL, name="spilling", options={"maxnreg": 64}),
    replace(_MATMUL, name="too_much_shared", constexprs={"BM": 128, "BN": 128, "BK": 128}, num_stages=4, num_warps=8),
    replace(_CAST, name="narrow", signature={"p_x": "*fp32", "p_out": "*bf16", "n": "i32"}),
]
