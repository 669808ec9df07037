"""FlashAttention-3, built from the hopper/ folder of its repository, as `VarlenKernels`: Hopper only.

Its backward is repeatable since September 2025 (pull request 1893); earlier builds take `deterministic` and ignore it,
or hang. They are told apart by their signatures: builds that name `is_causal` and `window_size_left` are later. Heads
of more than 192 have no repeatable backward at all. What else a build leaves out it lists in `flash_attn_config`.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from .options import Options, Part
from .packages import Arguments, PackageKernels, capability, gpu

_HEAD_SIZES = (64, 96, 128, 192)  # those between are padded within the kernel


class FlashAttn3(PackageKernels):
    """`flash_attn_interface`."""

    module = "flash_attn_interface"
    install = "build hopper/ of github.com/Dao-AILab/flash-attention"
    functions = ("_flash_attn_forward", "_flash_attn_backward")

    def unavailable(self, device: torch.device) -> str | None:
        if capability(device)[0] != 9:
            return f"needs compute capability 9.x, {gpu(device)}"
        return self.problem() or _left_out("BACKWARD", "VARLEN")

    def unsupported(self, q: Tensor, options: Options) -> str | None:
        if q.shape[2] > max((s for s in _HEAD_SIZES if not _left_out(f"HDIM{s}")), default=0):
            return f"no repeatable backward for heads of {q.shape[2]}"
        needed = {"LOCAL": options.window is not None, "SOFTCAP": options.softcap is not None}
        needed["FP16"] = q.dtype == torch.float16
        return _left_out(*(feature for feature, is_needed in needed.items() if is_needed))

    def forward_only(self, part: Part, options: Options) -> Arguments:
        return {"causal": part.causal, "softcap": options.softcap or 0.0, "num_splits": 1}

    def backward_only(self, lse: Tensor, part: Part, options: Options) -> Arguments:
        return {"is_causal": part.causal, "softcap": options.softcap or 0.0, "softmax_lse": lse}


def _left_out(*features: str) -> str | None:
    gone = [feature for feature in features if _build_flags().get(f"FLASHATTENTION_DISABLE_{feature}")]
    return f"built without {', '.join(gone)}" if gone else None


@functools.cache
def _build_flags() -> dict[str, bool]:
    """Of a build that does not say nothing is known to be missing: its kernels then refuse for themselves."""
    try:
        config = importlib.import_module("flash_attn_config").CONFIG
    except ModuleNotFoundError:
        return {}
    return dict(config.get("build_flags", {}))
