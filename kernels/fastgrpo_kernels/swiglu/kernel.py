# mypy: disable-error-code="no-untyped-def"
"""`swiglu` and its backward in Triton: a program takes a block of a row. Not measured on a GPU yet."""

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


@triton.jit
def swiglu_backward_kernel(
    p_gate, p_up, p_grad, p_out, stride_gate, stride_up, stride_grad, F: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """gate, up, grad [T, F] -> out [T, 2F], contiguous: those of gate, then of up. Grid: (T * cdiv(F, BLOCK),)."""
    dtype: tl.constexpr = p_out.dtype.element_ty
    BLOCKS: tl.constexpr = (F + BLOCK - 1) // BLOCK
    i_row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(p_gate + i_row * stride_gate + o, mask=o < F, other=0.0).to(tl.float32)
    up = tl.load(p_up + i_row * stride_up + o, mask=o < F, other=0.0).to(tl.float32)
    grad = tl.load(p_grad + i_row * stride_grad + o, mask=o < F, other=0.0).to(tl.float32)
    sigmoid = tl.div_rn(1.0, 1.0 + tl.exp(-gate))
    p_out += i_row * (2 * F) + o
    tl.store(p_out, (grad * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))).to(dtype), mask=o < F)
    tl.store(p_out + F, (grad * (gate * sigmoid)).to(dtype), mask=o < F)


def backward(gate: Tensor, up: Tensor, grad: Tensor) -> Tensor:
    """As the backward's op; fp16, bf16 or fp32. One launch."""
    gate, up, grad = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up, grad))
    rows, size = gate.shape
    out = torch.empty(rows, 2 * size, dtype=gate.dtype, device=gate.device)
    if out.numel():
        with torch.cuda.device_of(gate):
            swiglu_backward_kernel[(rows * triton.cdiv(size, BLOCK),)](
                gate, up, grad, out, gate.stride(0), up.stride(0), grad.stride(0), F=size, BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return out


def _spec(dtype: str, size: int, back: bool) -> KernelSpec:
    more = ("p_grad",) if back else (), ("stride_grad",) if back else ()
    return KernelSpec(
        name=f"swiglu{'_backward' if back else ''}_{dtype}_{size}",
        kernel=swiglu_backward_kernel if back else swiglu_kernel,
        signature={
            **dict.fromkeys(("p_gate", "p_up", "p_out", *more[0]), f"*{dtype}:16"),
            **dict.fromkeys(("stride_gate", "stride_up", *more[1]), "i32:16"),
        },
        constexprs={"F": size, "BLOCK": BLOCK},
        num_warps=NUM_WARPS,
        wide=True,
    )


SIZES = (3072, 4864, 8960, 9728, 12288, 14336, 18944)
"""Qwen3-0.6B, Qwen2.5-0.5B, 1.5B, Qwen3-4B and 8B, Llama-3-8B, Qwen2.5-7B."""

_LISTED = [*product(("bf16",), SIZES), *product(("fp32",), (4864, 18944))]

KERNELS = [_spec(*variant, backward) for variant, backward in product(_LISTED, (False, True))]
