"""What a loss needs to know of every token besides its log-prob and entropy: checks, then one record of [N] tensors.

Advantages (per sequence, per token or from rewards) become per-token ones, and the aggregation with its denominators
becomes one weight per token. The loss is then a plain weighted sum, however the tokens are cut into chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_cu_seqlens, check_tensor
from ..group_advantages.op import GroupRewards
from ..segments import segment_ids, segment_sum
from .config import LossConfig


@dataclass(frozen=True)
class LossArguments:
    """The arguments that `grpo_loss` and `linear_grpo_loss` share, as the caller gave them."""

    advantage: Tensor | GroupRewards
    cu_seqlens: Tensor
    old_logprob: Tensor | None
    ref_logprob: Tensor | None
    sampling_logprob: Tensor | None
    mask: Tensor | None
    entropy_threshold: float | Tensor | None
    config: LossConfig
    num_sequences: int | Tensor | None
    num_tokens: int | Tensor | None

    def check(self, num_rows: int, device: torch.device) -> None:
        """Raise TypeError or ValueError, naming the argument, unless they fit N = num_rows rows on `device`."""
        if not isinstance(self.config, LossConfig):
            raise TypeError(f"config: expected a LossConfig, got {type(self.config).__name__}")
        check_cu_seqlens(self.cu_seqlens, num_rows, device)
        self._check_advantage(num_rows, device)
        for name in ("old_logprob", "ref_logprob", "sampling_logprob"):
            if getattr(self, name) is not None:
                check_tensor(name, getattr(self, name), (num_rows,), "[N]", device=device)
        if self.mask is not None:
            check_tensor("mask", self.mask, (num_rows,), "[N]", torch.bool, device)
        if self.entropy_threshold is not None:
            _check_scalar("entropy_threshold", self.entropy_threshold, float)
        for name in ("num_sequences", "num_tokens"):
            if getattr(self, name) is not None:
                _check_scalar(name, getattr(self, name), int)
        self._check_needs()

    def _check_advantage(self, num_rows: int, device: torch.device) -> None:
        num_sequences = self.cu_seqlens.numel() - 1
        if isinstance(self.advantage, GroupRewards):
            check_tensor("advantage.rewards", self.advantage.rewards, (num_sequences,), "[S]", device=device)
        elif isinstance(self.advantage, Tensor) and self.advantage.shape not in ((num_sequences,), (num_rows,)):
            raise ValueError(
                f"advantage: expected shape [S] = [{num_sequences}] or [N] = [{num_rows}], "
                f"got {list(self.advantage.shape)}"
            )
        else:
            check_tensor("advantage", self.advantage, (None,), "[S] or [N]", device=device)

    def _check_needs(self) -> None:
        config = self.config
        if config.beta > 0 and self.ref_logprob is None:
            raise ValueError(f"ref_logprob: expected a tensor with beta={config.beta}, got None")
        if config.sampling_correction != "none" and self.sampling_logprob is None:
            raise ValueError(
                f"sampling_logprob: expected a tensor with sampling_correction={config.sampling_correction!r}, got None"
            )
        if config.loss_type == "dr_grpo" and config.max_completion_length is None:
            raise ValueError("max_completion_length: expected an int >= 1 with loss_type='dr_grpo', got None")

    def needs_entropy(self) -> bool:
        """The loss looks at the tokens' entropies."""
        masks = self.entropy_threshold is not None or self.config.top_entropy_quantile < 1
        return masks or self.config.entropy_coef != 0

    def prepare(self, num_rows: int, dtype: torch.dtype) -> LossInputs:
        """The checked arguments as one record in `dtype`; NaN in masked rows is gone after it. Not differentiable."""
        cu_seqlens, device = self.cu_seqlens, self.cu_seqlens.device
        sequence = segment_ids(cu_seqlens, num_rows)
        trained = torch.ones(num_rows, dtype=torch.bool, device=device) if self.mask is None else self.mask
        num_sequences: int | Tensor = cu_seqlens.numel() - 1
        if isinstance(self.advantage, GroupRewards):
            advantage = self.advantage.advantages()
            failed = self.advantage.rewards.isnan()
            trained = trained & ~failed[sequence]
            num_sequences = num_sequences - failed.sum()
        else:
            advantage = self.advantage.detach()
        if advantage.shape == (cu_seqlens.numel() - 1,):
            advantage = advantage[sequence]
        if self.num_sequences is not None:
            num_sequences = self.num_sequences
        num_tokens = trained.sum() if self.num_tokens is None else self.num_tokens
        sequences = torch.as_tensor(num_sequences, dtype=torch.float64, device=device)
        tokens = torch.as_tensor(num_tokens, dtype=torch.float64, device=device).clamp(min=1)
        lengths = segment_sum(trained, cu_seqlens).clamp(min=1)[sequence]
        divisor = _divisor(self.config, torch.where(sequences > 0, sequences, 1), tokens, lengths)

        def clean(values: Tensor | None) -> Tensor | None:
            return None if values is None else torch.where(trained, values.detach().to(dtype), 0)

        return LossInputs(
            advantage=torch.where(trained, advantage.to(dtype), 0),
            weight=torch.where(trained, 1 / divisor, 0).to(dtype),
            trained=trained,
            old=clean(self.old_logprob),
            ref=clean(self.ref_logprob),
            sampling=clean(self.sampling_logprob),
            cu_seqlens=cu_seqlens,
            entropy_weight=(self.config.entropy_coef / tokens).to(dtype),
            entropy_threshold=self.entropy_threshold,
        )


@dataclass(frozen=True)
class LossInputs:
    """N tokens as the loss sees them; everything [N] is 0 where `trained` is False.

    advantage: [N]. weight: [N], what a token's term counts in the loss, all denominators inside. trained: [N] bool.
    old, ref, sampling: [N] log-probs or None. cu_seqlens: [S+1] integers, of whole sequences.
    entropy_weight: 0-d, what a trained token's entropy counts in the loss. entropy_threshold: None = not given.
    """

    advantage: Tensor
    weight: Tensor
    trained: Tensor
    old: Tensor | None
    ref: Tensor | None
    sampling: Tensor | None
    cu_seqlens: Tensor
    entropy_weight: Tensor
    entropy_threshold: float | Tensor | None

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


def _check_scalar(name: str, value: Any, kind: type[int] | type[float]) -> None:
    """Raise unless `value` is a 0-d tensor or a number of the kind; int means a count >= 0."""
    expected = "an int >= 0" if kind is int else "a number"
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"{name}: expected {expected} or a 0-d tensor, got shape {list(value.shape)}")
    elif isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise TypeError(f"{name}: expected {expected} or a 0-d tensor, got {type(value).__name__}")
    elif value != value or (kind is int and value < 0):
        raise ValueError(f"{name}: expected {expected} or a 0-d tensor, got {value!r}")
