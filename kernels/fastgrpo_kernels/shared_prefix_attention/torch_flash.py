"""PyTorch's own variable-length flash kernels as `VarlenKernels`: fp16 and bf16, any window, no softcap."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from .options import Options, Part
from .packages import capability, gpu


class TorchFlash:
    """`aten::_flash_attention_forward` and `_backward`."""

    def unavailable(self, device: torch.device) -> str | None:
        """Ampere and later; on AMD PyTorch decides itself when it is called."""
        amd = device.type == "cuda" and torch.version.hip is not None
        return None if amd or capability(device) >= (8, 0) else f"needs compute capability 8.0 or later, {gpu(device)}"

    def unsupported(self, q: Tensor, options: Options) -> str | None:
        return None if options.softcap is None else "no softcap"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, options: Options) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, part.cu_q, part.cu_k, part.max_q, part.max_k, 0.0, part.causal, False,
            scale=options.scale, **_window(options),
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
        part: Part,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Without dropout the random state is looked at by nobody; the schema wants one.
        state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.zeros(0, device=q.device)
        with _repeatable():
            return torch.ops.aten._flash_attention_backward(
                dout, q, k, v, out, lse, part.cu_q, part.cu_k, part.max_q, part.max_k, 0.0, part.causal, state, unused,
                scale=options.scale, **_window(options),
            )  # fmt: skip


def _window(options: Options) -> dict[str, int]:
    """Rows that a row sees to its left and right, itself not counted; absent = all that `causal` leaves."""
    return {} if options.window is None else {"window_size_left": options.window - 1, "window_size_right": 0}


_one_at_a_time = threading.Lock()  # backward passes of several GPUs run in threads of one process


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """The kernel's dq without atomics: a flag of the process, not an argument, is what asks for it.

    Set for the launch alone. The kernel does not count `warn_only`; and what it allocates need not be filled first, it
    is written whole. `torch.use_deterministic_algorithms` would do, but also turns a knob of the compiler.
    """
    with _one_at_a_time:
        mode = torch.get_deterministic_debug_mode()
        fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
