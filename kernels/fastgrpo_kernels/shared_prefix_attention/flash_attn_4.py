"""FlashAttention-4, package flash-attn-4, as `VarlenKernels`: Hopper and data-center Blackwell, no softcap.

Read: 4.0.0b32 and 4.0.0b36. Not used, although it would run:
- earlier betas: before b13 gradients of grouped heads are not repeatable on Hopper, before b32 heads between 192 and
  256 do not compile there;
- softcap: its variable-length backward was wrong, then refused (pull request 2544), then came back, and a backward
  with it that never ends on Blackwell is open (issue 2466);
- heads of more than 128 on Blackwell: their backward was not repeatable up to b32, and takes no window.
The kernels are compiled when first called, for a head size and a kind of mask, not for lengths.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re

import torch
from torch import Tensor

from .options import Options, Part
from .packages import Arguments, PackageKernels, capability, gpu

_FIRST_BETA = 32

_HEAD_SIZES = {9: 256, 10: 128, 11: 128}
"""The largest, by major compute capability. 8.x has no backward, 12.x none that is repeatable."""


class FlashAttn4(PackageKernels):
    """`flash_attn.cute.interface`."""

    module = "flash_attn.cute.interface"
    install = "pip install --pre -U flash-attn-4"
    functions = ("_flash_attn_fwd", "_flash_attn_bwd")
    everything = None  # with -1, some betas take a causal mask for a window that hides everything

    def unavailable(self, device: torch.device) -> str | None:
        if capability(device)[0] not in _HEAD_SIZES:
            return f"needs compute capability 9.x, 10.x or 11.x, {gpu(device)}"
        return self.problem() or _too_old()

    def unsupported(self, q: Tensor, options: Options) -> str | None:
        if options.softcap is not None:
            return "its backward with a softcap is not trusted"
        if q.shape[2] > _HEAD_SIZES[capability(q.device)[0]]:
            return f"no repeatable backward for heads of {q.shape[2]} here"
        return None

    def forward_only(self, part: Part, options: Options) -> Arguments:
        return {"causal": part.causal, "num_splits": 1, "return_lse": True}

    def backward_only(self, lse: Tensor, part: Part, options: Options) -> Arguments:
        return {"causal": part.causal, "lse": lse}


@functools.cache
def _too_old() -> str | None:
    """Betas of different faults have the same signatures: here the version has to tell."""
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    beta = re.match(r"4\.0\.0b(\d+)", version)
    if (beta and int(beta[1]) >= _FIRST_BETA) or re.fullmatch(r"4\.\d+\.\d+(\.post\d+)?", version):
        return None
    return f"version {version}; known from 4.0.0b{_FIRST_BETA} on ({FlashAttn4.install})"
