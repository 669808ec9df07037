"""`gae`: checks, then one Triton launch, or the PyTorch path (a handful of elementwise operations)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import use_triton
from ..checks import check_cu_seqlens, check_cu_seqlens_values, check_number, check_tensor, compute_dtype
from .reference import gae_reference


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016) over packed sequences.

    rewards, values: [N] float, per completion token; the value after a sequence's last token is 0.
    cu_seqlens:      [S+1] int32 on the same device.
    gamma, lam:      discount and trace decay, in [0, 1].

    Returns `advantages` [N] and `returns` [N] = advantages + values, fp32 (float64 if an input is). Both are
    constants to autograd, like every advantage. Errors: TypeError or ValueError naming the argument.
    """
    check_tensor("rewards", rewards, (None,), "[N]")
    check_tensor("values", values, (rewards.numel(),), "[N]", device=rewards.device)
    check_cu_seqlens(cu_seqlens, rewards.device)
    check_number("gamma", gamma, 0, 1)
    check_number("lam", lam, 0, 1)
    return _gae(rewards, values, cu_seqlens, gamma, lam)


@torch.library.custom_op("fastgrpo::gae", mutates_args=())
def _gae(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    check_cu_seqlens_values(cu_seqlens, rewards.numel())
    dtype = compute_dtype(rewards, values)
    if dtype == torch.float64 or not use_triton(rewards):
        return gae_reference(rewards.to(dtype), values.to(dtype), cu_seqlens, gamma, lam)
    from .kernel import gae_triton

    return gae_triton(rewards, values, cu_seqlens, gamma, lam)


@_gae.register_fake
def _(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantages = torch.empty(rewards.shape, dtype=compute_dtype(rewards, values), device=rewards.device)
    return advantages, torch.empty_like(advantages)
