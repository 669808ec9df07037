# mypy: disable-error-code="no-untyped-def"
"""`swiglu` in Triton: a program takes a block of a row. Not measured on a GPU yet."""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specs import KernelSpec

BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def swiglu_kernel(p_gate, p_up, p_out, stride_gate, stride_up, F: tl.constexpr, BLOCK: tl.constexpr):
    """gate, up [T, F] -> out [T, F], contiguous. Grid: (T * cdiv(F, BLOCK),)."""
    dtype: tl.constexpr = p_out.dtype.element_ty
    BLOCKS: tl.constexpr = (F + BLOCK - 1) // BLOCK
    i_row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(p_gate + i_row * stride_gate + o, mask=o < F, other=0.0).to(tl.float32)
    up = tl.load(p_up + i_row * stride_up + o, mask=o < F, other=0.0).to(tl.float32)
    # One quotient, as PyTorch's silu. An exact one (div_rn) would make the kernel wait for arithmetic, not memory.
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(p_out + i_row * F + o, (silu * up).to(dtype), mask=o < F)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As the op; fp16, bf16 or fp32. One launch."""
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    rows, size = gate.shape
    out = torch.empty(rows, size, dtype=gate.dtype, device=gate.device)
    if out.numel():
        with torch.cuda.device_of(gate):
            swiglu_kernel[(rows * triton.cdiv(size, BLOCK),)](
                gate, up, out, gate.stride(0), up.stride(0), F=size, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return out


def _spec(dtype: str, size: int) -> KernelSpec:
    return KernelSpec(
        name=f"swiglu_{dtype}_{size}",
        kernel=swiglu_kernel,
        signature={
            **dict.fromkeys(("p_gate", "p_up", "p_out"), f"*{dtype}:16"),
            **dict.fromkeys(("stride_gate", "stride_up"), "i32:16"),
        },
        constexprs={"F": size, "BLOCK": BLOCK},
        num_warps=NUM_WARPS,
        wide=True,
    )


SIZES = (3072, 4864, 8960, 9728, 12288, 14336, 18944)
"""Qwen3-0.6B, Qwen2.5-0.5B, 1.5B, Qwen3-4B and 8B, Llama-3-8B, Qwen2.5-7B."""

KERNELS = [_spec(*variant) for variant in product(("bf16", "fp32"), SIZES)]
