"""GEMMs with fp32 results from half operands, by cuBLAS; by PyTorch in fp32 where Triton's kernels are interpreted."""

from __future__ import annotations

import torch
from torch import Tensor


def mm(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out [m, n] fp32 = a [m, k] @ b [k, n], both of one dtype."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def add_mm(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into [m, n] fp32 += a [m, k] @ b [k, n]."""
    if a.dtype == torch.float32:
        into.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(into, a, b, out_dtype=torch.float32, out=into)
    else:
        into.addmm_(a.float(), b.float())
