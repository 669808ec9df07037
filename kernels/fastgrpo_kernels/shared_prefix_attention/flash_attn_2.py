"""FlashAttention-2, package flash-attn 2.7 and later, as `VarlenKernels`: any window, softcap, head sizes up to 256.

Earlier versions have one `window_size` argument, and are told apart by that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .options import Options, Part
from .packages import Arguments, PackageKernels
from .torch_flash import TorchFlash


class FlashAttn2(PackageKernels):
    """`flash_attn.flash_attn_interface`."""

    module = "flash_attn.flash_attn_interface"
    install = "pip install flash-attn"
    functions = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")

    def unavailable(self, device: torch.device) -> str | None:
        """The GPUs of PyTorch's flash attention, which is this one's copy."""
        return TorchFlash().unavailable(device) or self.problem()

    def unsupported(self, q: Tensor, options: Options) -> str | None:
        return None

    def forward_only(self, part: Part, options: Options) -> Arguments:
        return {"causal": part.causal, "dropout_p": 0.0, "softcap": options.softcap or 0.0}

    def backward_only(self, lse: Tensor, part: Part, options: Options) -> Arguments:
        return {**self.forward_only(part, options), "softmax_lse": lse, "alibi_slopes": None}
