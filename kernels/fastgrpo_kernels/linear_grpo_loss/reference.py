"""LM head and policy loss in plain differentiable PyTorch, logits of all rows at once: the maths to read first."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..grpo_loss.config import LossConfig
from ..grpo_loss.reference import grpo_loss_reference
from ..linear_logprob.reference import linear_logprob_reference


def linear_grpo_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    cu_seqlens: Tensor,
    config: LossConfig,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    **loss_arguments: Any,
) -> Tensor:
    """0-d loss: `grpo_loss_reference` (which takes `loss_arguments`) of `linear_logprob_reference`."""
    logprob, entropy = linear_logprob_reference(hidden, weight, target, bias, logit_scale, softcap, temperature)
    return grpo_loss_reference(logprob, advantage, cu_seqlens, config, entropy=entropy, **loss_arguments)
