"""Which implementation runs: chosen by device, dtype and what the layout and options ask for, before any launch.

Of several flash attentions on a GPU the newest that takes the call. Their backward is always the repeatable one: it
adds up dq in a fixed order. Its authors measured 18 % (causal) to 32 % (not) more time in the backward with version 4
on Blackwell, 21 % with version 3 on Hopper (causal, heads of 128, 8192 tokens); version 2, and PyTorch's copy of it,
keep several fp32 copies of dq, as many as fill the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import AttentionRanges
from . import cpu, dense, varlen
from .flash_attn_2 import FlashAttn2
from .flash_attn_3 import FlashAttn3
from .flash_attn_4 import FlashAttn4
from .options import Options
from .torch_flash import TorchFlash

_KERNELS: dict[str, varlen.VarlenKernels] = {  # the best first
    "flash_attn_4": FlashAttn4(),
    "flash_attn_3": FlashAttn3(),
    "flash_attn_2": FlashAttn2(),
    "torch": TorchFlash(),
}

PLAINLY = (
    "pack each sequence plainly instead: PackedLayout with the lengths of the whole sequences as prompt_lengths "
    "and empty completion_lengths"
)


def choose(q: Tensor, ranges: AttentionRanges, options: Options) -> str:
    """`cpu`, `flash_attn_4`, `flash_attn_3`, `flash_attn_2`, `torch` or `dense`.

    dense: float64 and fp32 on a GPU, head sizes or devices that flash attention does not know, a softcap on the CPU.
    Errors: ValueError for a window over shared prompts, or a softcap, that the GPU's flash kernels cannot express.
    """
    name, reason = _decide(q, ranges, options)
    if name is None:
        raise ValueError(reason)
    return name


def why_not_flash(q: Tensor, ranges: AttentionRanges, options: Options) -> str | None:
    """None when fused flash kernels take the call, else why `choose` says dense or refuses."""
    return _decide(q, ranges, options)[1]


def describe(device: torch.device | str) -> list[tuple[str, str]]:
    """What there is for half precision on `device`: names as in `choose`, best first, and "used" or why not.

    Of the usable ones only the first is "used"; the others say what they stand behind, and take the head sizes and
    options that it refuses.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return [("cpu", "used")]
    rows: list[tuple[str, str]] = []
    used = None
    for name, kernels in _KERNELS.items():
        reason = kernels.unavailable(device)
        if reason is None:
            reason, used = ("used", name) if used is None else (f"for what {used} does not take", used)
        rows.append((name, reason))
    return [*rows, ("dense", "used" if used is None else "for dtypes and head sizes that no flash attention takes")]


def _decide(q: Tensor, ranges: AttentionRanges, options: Options) -> tuple[str | None, str | None]:
    """The name, None if all refuse; and why it is not a flash kernel's."""
    if q.device.type == "cpu":
        return ("cpu", None) if options.softcap is None else ("dense", "softcap: the CPU's flash attention has none")
    misfit = _misfit(q)
    if misfit:
        return "dense", misfit
    if options.window is not None and ranges.num_queries:
        return None, (
            f"window: flash attention cannot describe a window of {options.window} over the completions of a prompt "
            f"that share it; {PLAINLY}"
        )
    refusals = []
    for name, kernels in _KERNELS.items():
        refusal = kernels.unavailable(q.device) or kernels.unsupported(q, options)
        if refusal is None:
            return name, None
        refusals.append(f"{name}: {refusal}")
    return None, f"softcap: no flash attention here takes {options.softcap}; {'; '.join(refusals)}"


def _misfit(q: Tensor) -> str | None:
    """Why no flash attention of a GPU takes such rows."""
    if q.device.type != "cuda":
        return f"device: flash attention is for GPUs and the CPU, got {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype: flash attention takes float16 and bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    if q.shape[2] % 8 or q.shape[2] > 256:
        return f"head size: flash attention takes multiples of 8 up to 256, got {q.shape[2]}"
    reason = _KERNELS["torch"].unavailable(q.device)
    return f"device: flash attention {reason}" if reason else None


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
