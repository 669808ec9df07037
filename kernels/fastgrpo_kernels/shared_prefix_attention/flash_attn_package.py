"""The flash-attn package's variable-length kernels as `VarlenKernels`: fp16 and bf16, any window, softcap.

Version 2.7 and later 2.x only: they alone have these two functions with these keywords. Versions 3 and 4 are other
packages, which are not used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from .options import Options


@functools.cache
def installed() -> bool:
    """Is there a flash-attn that this file knows how to call?"""
    try:
        version = importlib.metadata.version("flash-attn")
        major, minor = (int(part) for part in version.split(".")[:2])
        _interface()
    except (ImportError, ValueError):  # not there, not a version, or built for another torch
        return False
    return major == 2 and minor >= 7


def _interface() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


class FlashAttnPackage:
    """`flash_attn.flash_attn_interface._flash_attn_varlen_forward` and `_backward`."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        causal: bool,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _interface()._flash_attn_varlen_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=options.scale, causal=causal,
            **_limits(options),
        )  # fmt: skip
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        causal: bool,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        _interface()._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=options.scale,
            causal=causal, alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
            **_limits(options),
        )  # fmt: skip
        return dq, dk, dv


def _limits(options: Options) -> dict[str, float]:
    """Rows seen to the left and right, -1 = all that `causal` leaves; softcap 0 = none."""
    left, right = (-1, -1) if options.window is None else (options.window - 1, 0)
    return {"window_size_left": left, "window_size_right": right, "softcap": options.softcap or 0.0}
