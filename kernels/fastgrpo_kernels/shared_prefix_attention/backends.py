"""Which implementation runs: chosen by device, dtype and what the layout and options ask for, before any launch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..layout import AttentionRanges
from . import cpu, dense, flash_attn_package, torch_flash, varlen
from .options import Options

_KERNELS: dict[str, varlen.VarlenKernels] = {
    "flash_attn": flash_attn_package.FlashAttnPackage(),
    "torch": torch_flash.TorchFlash(),
}

PLAINLY = (
    "pack each sequence plainly instead: PackedLayout with the lengths of the whole sequences as prompt_lengths "
    "and empty completion_lengths"
)


def choose(q: Tensor, ranges: AttentionRanges, options: Options) -> str:
    """`cpu`, `flash_attn`, `torch` or `dense`.

    dense: float64 and fp32 on a GPU, head sizes or devices that flash attention does not know, a softcap on the CPU.
    Errors: ValueError for a window over shared prompts, or a softcap, that the GPU's flash kernels cannot express.
    """
    if q.device.type == "cpu":
        return "cpu" if options.softcap is None else "dense"
    if not _flash_can(q):
        return "dense"
    if options.window is not None and ranges.num_queries:
        raise ValueError(
            f"window: flash attention cannot describe a window of {options.window} over the completions of a prompt "
            f"that share it; {PLAINLY}"
        )
    if flash_attn_package.installed():
        return "flash_attn"
    if options.softcap is not None:
        raise ValueError(
            f"softcap: PyTorch's flash attention has none, got {options.softcap}; the flash-attn package 2.7 or later "
            f"has (pip install flash-attn)"
        )
    return "torch"


def _flash_can(q: Tensor) -> bool:
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    return fits and q.device.type == "cuda" and _has_flash(q.device)


@functools.cache
def _has_flash(device: torch.device) -> bool:
    """Ampere and later; on AMD PyTorch decides itself when it is called."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def forward(q: Tensor, k: Tensor, v: Tensor, ranges: AttentionRanges, options: Options) -> tuple[Tensor, Tensor]:
    """out [T, Hq, d] in q's dtype, the scores' log-sum-exp [Hq, T] in fp32 (float64 for float64), contiguous."""
    name = choose(q, ranges, options)
    q, k, v = (_rows(x) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):  # what is rounded is rounded on purpose
        if name in _KERNELS:
            out, lse = varlen.forward(_KERNELS[name], q, k, v, ranges, options)
        else:
            out, lse = (cpu if name == "cpu" else dense).forward(q, k, v, ranges, options)
    return out.contiguous(), lse.contiguous()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ranges: AttentionRanges, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in q's dtype, contiguous."""
    name = choose(q, ranges, options)
    dout, q, k, v = (_rows(x) for x in (dout, q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        if name in _KERNELS:
            dq, dk, dv = varlen.backward(_KERNELS[name], dout, q, k, v, out, lse, ranges, options)
        else:
            dq, dk, dv = (cpu if name == "cpu" else dense).backward(dout, q, k, v, out, lse, ranges, options)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _rows(x: Tensor) -> Tensor:
    """Flash kernels read views of any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()
