"""What the PyTorch path of a loss needs to know of every token besides its log-prob and entropy: one record of [N].

Advantages (per sequence, per token or from rewards) become per-token ones, and the aggregation with its denominators
becomes one weight per token. The loss is then a plain weighted sum, however the tokens are cut into chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..segments import segment_ids, segment_sum
from .arguments import LossOperands
from .config import LossConfig


@dataclass(frozen=True)
class LossInputs:
    """N tokens as the loss sees them; everything [N] is 0 where `trained` is False.

    advantage: [N]. weight: [N], what a token's term counts in the loss, all denominators inside. trained: [N] bool.
    old, ref, sampling: [N] log-probs or None. cu_seqlens: [S+1] integers, of whole sequences.
    entropy_weight: 0-d, what a trained token's entropy counts in the loss. entropy_threshold: 0-d, None = no such mask.
    """

    advantage: Tensor
    weight: Tensor
    trained: Tensor
    old: Tensor | None
    ref: Tensor | None
    sampling: Tensor | None
    cu_seqlens: Tensor
    entropy_weight: Tensor
    entropy_threshold: Tensor | None

    def rows(self, rows: slice | Tensor, cu_seqlens: Tensor) -> LossInputs:
        """These rows only; `cu_seqlens` bounds their sequences, whole ones if `LossConfig.needs_sequences`."""

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return replace(
            self,
            advantage=self.advantage[rows],
            weight=self.weight[rows],
            trained=self.trained[rows],
            old=pick(self.old),
            ref=pick(self.ref),
            sampling=pick(self.sampling),
            cu_seqlens=cu_seqlens,
        )


def prepare(operands: LossOperands, num_rows: int, dtype: torch.dtype) -> LossInputs:
    """Operands with denominators and threshold -> one record in `dtype`, without NaN in rows that do not train."""
    cu_seqlens, device = operands.cu_seqlens, operands.cu_seqlens.device
    if operands.group_index is not None:
        operands = operands.with_advantages(num_rows)
    assert operands.num_sequences is not None
    assert operands.num_tokens is not None
    sequence = segment_ids(cu_seqlens, num_rows)
    trained = operands.trained(num_rows)
    if trained is None:
        trained = torch.ones(num_rows, dtype=torch.bool, device=device)
    advantage = operands.advantage
    if not operands.per_token:
        advantage = advantage[sequence]
    tokens = operands.num_tokens.clamp(min=1)
    lengths = segment_sum(trained, cu_seqlens).clamp(min=1)[sequence]
    divisor = _divisor(operands.config, operands.num_sequences.clamp(min=1), tokens, lengths)

    def clean(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(trained, values.to(dtype), 0)

    return LossInputs(
        advantage=torch.where(trained, advantage.to(dtype), 0),
        weight=torch.where(trained, 1 / divisor, 0).to(dtype),
        trained=trained,
        old=clean(operands.old),
        ref=clean(operands.ref),
        sampling=clean(operands.sampling),
        cu_seqlens=cu_seqlens,
        entropy_weight=(operands.config.entropy_coef / tokens).to(dtype),
        entropy_threshold=None if operands.entropy_threshold is None else operands.entropy_threshold.to(dtype),
    )


def _divisor(config: LossConfig, sequences: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """What a token's term is divided by, [N] or 0-d: the aggregation table of the loss types."""
    if config.loss_type in ("grpo", "sapo"):
        return sequences * lengths
    if config.loss_type == "luspo":
        return sequences
    if config.loss_type == "dr_grpo":
        assert config.max_completion_length is not None
        return sequences * config.max_completion_length
    return tokens
