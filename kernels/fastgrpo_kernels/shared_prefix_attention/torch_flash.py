"""PyTorch's own variable-length flash kernels as `VarlenKernels`: fp16 and bf16, any window, no softcap."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .options import Options


class TorchFlash:
    """`aten::_flash_attention_forward` and `_backward`."""

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
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=options.scale, **_window(options)
        )
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
        # Without dropout the random state is looked at by nobody; the schema wants one.
        state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.zeros(0, device=q.device)
        with _strictly_deterministic():
            return torch.ops.aten._flash_attention_backward(
                dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, state, unused,
                scale=options.scale, **_window(options),
            )  # fmt: skip


def _window(options: Options) -> dict[str, int]:
    """Rows that a row sees to its left and right, itself not counted; absent = all that `causal` leaves."""
    return {} if options.window is None else {"window_size_left": options.window - 1, "window_size_right": 0}


@contextlib.contextmanager
def _strictly_deterministic() -> Iterator[None]:
    """Where deterministic algorithms are asked for, if only with warnings: the kernel's dq without atomics.

    The kernel does not count `warn_only`; and what it allocates need not be filled first, it is written whole.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
