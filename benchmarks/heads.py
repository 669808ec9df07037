"""The LM head by others: log-probs [N] of targets from hidden [N, D] and weight [V, D], and whole losses beside.

Each is imported where it runs, called as its own trainer or documentation calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden, weight, target -> logprob [N], differentiable."""


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Full logits in fp32; no name holds on to a tensor of [N, V], so autograd may free what it does not need."""
    return torch.log_softmax(F.linear(hidden, weight).float(), -1).gather(1, target[:, None]).squeeze(1)


@cache
def _compiled(backend: str) -> Callable[..., Tensor]:
    return torch.compile(naive, backend=backend, dynamic=True)


def compiled(hidden: Tensor, weight: Tensor, target: Tensor, backend: str = "inductor") -> Tensor:
    return _compiled(backend)(hidden, weight, target)


def trl(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The chunked head of TRL 1.16 as its trainer calls it: tiles of 32,768 columns, the entropy beside."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 32768, None, 1.0, ("entropy",))[0]


def cut(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """cut-cross-entropy: its kernels without gradient filtering, which would not be the same gradient.

    They need a GPU; on a CPU it has a PyTorch path, full logits under torch.compile.
    """
    from cut_cross_entropy import linear_cross_entropy

    options: dict[str, Any] = {"filter_eps": None} if hidden.is_cuda else {"impl": "torch_compile"}
    return -linear_cross_entropy(hidden, weight, target, reduction="none", **options)


HEADS: dict[str, Head] = {"naive": naive, "torch_compile": compiled, "trl": trl, "cce": cut}
NEEDS = {"trl": "trl", "cce": "cut_cross_entropy", "liger": "liger_kernel"}
"""The packages of those peers that have one."""


def torch_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """torch's own chunked head: the mean negative log-prob and nothing else."""
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy with options")
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def liger_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, old_logprob: Tensor, length: int
) -> Tensor:
    """Liger's fused GRPO loss, dapo; advantage and old_logprob [N]. It wants rows of one length; eager on a CPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rows = (-1, length)
    op = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", compiled=hidden.is_cuda)
    found = op(
        hidden.view(*rows, hidden.shape[1]),
        weight,
        target.view(rows),
        torch.ones_like(target.view(rows)),
        advantage.view(rows)[:, 0].contiguous(),
        old_per_token_logps=old_logprob.view(rows),
    )
    return found[0] if isinstance(found, tuple) else found
