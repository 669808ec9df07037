"""The arguments that `grpo_loss` and `linear_grpo_loss` share: checked on the way in, plain tensors inside the ops.

A custom op takes tensors, numbers and strings. `LossArguments` is what the caller gave; `operands()` flattens it, and
`LossOperands` is the same again within the op, where tensors are real and their values may be looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..checks import INT_LIMIT, check_cu_seqlens, check_cu_seqlens_values, check_tensor
from ..group_advantages.op import GroupRewards, check_group_rewards, group_advantages
from ..segments import segment_ids
from .config import LossConfig
from .reference import entropy_quantile


@dataclass(frozen=True)
class LossArguments:
    """The arguments as the caller gave them."""

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
        """Raise TypeError or ValueError, naming the argument, unless they fit N = num_rows rows on `device`.

        Looks at shapes, dtypes and devices only; the values are `LossOperands.check_values`'s.
        """
        if not isinstance(self.config, LossConfig):
            raise TypeError(f"config: expected a LossConfig, got {type(self.config).__name__}")
        check_cu_seqlens(self.cu_seqlens, device)
        self._check_advantage(num_rows, device)
        for name, value in (
            ("old_logprob", self.old_logprob),
            ("ref_logprob", self.ref_logprob),
            ("sampling_logprob", self.sampling_logprob),
        ):
            if value is not None:
                check_tensor(name, value, (num_rows,), "[N]", device=device)
        if self.mask is not None:
            check_tensor("mask", self.mask, (num_rows,), "[N]", torch.bool, device)
        if self.entropy_threshold is not None:
            _check_scalar("entropy_threshold", self.entropy_threshold, float, device)
        if self.num_sequences is not None:
            _check_scalar("num_sequences", self.num_sequences, int, device)
        if self.num_tokens is not None:
            _check_scalar("num_tokens", self.num_tokens, int, device)
        self._check_needs()

    def _check_advantage(self, num_rows: int, device: torch.device) -> None:
        num_sequences = self.cu_seqlens.numel() - 1
        if isinstance(self.advantage, GroupRewards):
            record = self.advantage
            check_tensor("advantage.rewards", record.rewards, (num_sequences,), "[S]", device=device)
            check_group_rewards(record.rewards, record.group_index, record.baseline, record.scale)
        else:
            check_tensor("advantage", self.advantage, (None,), "[S] or [N]", device=device)
            size = self.advantage.numel()
            if size != num_sequences and size != num_rows:
                raise ValueError(
                    f"advantage: expected shape [S] = [{num_sequences}] or [N] = [{num_rows}], "
                    f"got {list(self.advantage.shape)}"
                )

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

    def operands(self) -> tuple[Any, ...]:
        """The fields of a `LossOperands`, in their order: constants to autograd, numbers 0-d tensors on the device."""
        record = self.advantage
        if isinstance(record, GroupRewards):
            advantage, group_index, baseline, scale = record.rewards, record.group_index, record.baseline, record.scale
        else:
            advantage, group_index, baseline, scale = record, None, "none", "none"
        return (
            advantage.detach(),
            group_index,
            self.cu_seqlens,
            _detached(self.old_logprob),
            _detached(self.ref_logprob),
            _detached(self.sampling_logprob),
            self.mask,
            self._scalar(self.entropy_threshold),
            self._scalar(self.num_sequences),
            self._scalar(self.num_tokens),
            self.config.encoded,
            baseline,
            scale,
        )

    def _scalar(self, value: float | Tensor | None) -> Tensor | None:
        """0-d float64 on the device; a fill there, no copy from the host that the device would wait for."""
        device = self.cu_seqlens.device
        if value is None:
            return None
        if isinstance(value, Tensor):
            onto_gpu = device.type == "cuda"  # the other way, the host would read before the copy is done
            return value.detach().to(device=device, dtype=torch.float64, non_blocking=onto_gpu)
        return torch.full((), value, dtype=torch.float64, device=device)


@dataclass(frozen=True)
class LossOperands:
    """`LossArguments` within an op. `advantage` holds rewards when `group_index` is given; scalars are 0-d float64."""

    advantage: Tensor
    group_index: Tensor | None
    cu_seqlens: Tensor
    old: Tensor | None
    ref: Tensor | None
    sampling: Tensor | None
    mask: Tensor | None
    entropy_threshold: Tensor | None
    num_sequences: Tensor | None
    num_tokens: Tensor | None
    encoded_config: str
    baseline: str
    scale: str
    per_sequence: bool | None = None  # `advantage` is [S], and not [N]; None: by its size, [S] when S = N

    @cached_property
    def config(self) -> LossConfig:
        return LossConfig.decode(self.encoded_config)

    @property
    def per_token(self) -> bool:
        """`advantage` is [N]."""
        if self.group_index is not None:
            return False
        if self.per_sequence is not None:
            return not self.per_sequence
        return self.advantage.numel() != self.cu_seqlens.numel() - 1

    @property
    def own_quantile(self) -> bool:
        """The entropy threshold is the quantile of this call's tokens, known when all their entropies are."""
        return self.entropy_threshold is None and self.config.top_entropy_quantile < 1

    def check_values(self, num_rows: int) -> None:
        """On the CPU, where looking costs nothing: boundaries that rise from 0 to N = num_rows, counts, a threshold."""
        check_cu_seqlens_values(self.cu_seqlens, num_rows)
        if self.cu_seqlens.device.type != "cpu":
            return
        for name, value in (("num_sequences", self.num_sequences), ("num_tokens", self.num_tokens)):
            if value is not None and not 0 <= value.item() < torch.inf:
                raise ValueError(f"{name}: expected an int >= 0 or a 0-d tensor, got one of {value.item():g}")
        if self.entropy_threshold is not None and self.entropy_threshold.isnan():
            raise ValueError("entropy_threshold: expected a number or a 0-d tensor, got one of nan")

    def trained(self, num_rows: int) -> Tensor | None:
        """[N] bool, rows that train: the mask's, less those of failed samples; None = all."""
        if self.group_index is None:
            return self.mask
        lived = ~self.advantage.isnan()[segment_ids(self.cu_seqlens, num_rows)]
        return lived if self.mask is None else self.mask & lived

    def with_denominators(self, num_rows: int) -> LossOperands:
        """Both denominators present: by default S less the failed samples, and the number of trained tokens."""
        device = self.cu_seqlens.device
        num_sequences, num_tokens = self.num_sequences, self.num_tokens
        if num_sequences is None and self.group_index is not None:
            num_sequences = (~self.advantage.isnan()).sum(dtype=torch.float64)
        if num_sequences is None:
            num_sequences = torch.full((), self.cu_seqlens.numel() - 1, dtype=torch.float64, device=device)
        if num_tokens is None:
            trained = self.trained(num_rows)
            if trained is None:
                num_tokens = torch.full((), num_rows, dtype=torch.float64, device=device)
            else:
                num_tokens = trained.sum(dtype=torch.float64)
        return replace(self, num_sequences=num_sequences, num_tokens=num_tokens)

    def with_threshold(self, entropy: Tensor | None) -> LossOperands:
        """With the threshold present if there is one: the quantile of the trained tokens' `entropy`, if it is our own.

        A call without a trained token gets +inf.
        """
        if not self.own_quantile:
            return self
        assert entropy is not None
        trained = self.trained(entropy.numel())
        if trained is None:
            trained = torch.ones_like(entropy, dtype=torch.bool)
        quantile = entropy_quantile(entropy, trained, 1 - self.config.top_entropy_quantile)
        return replace(self, entropy_threshold=quantile.double())

    def with_advantages(self, num_rows: int) -> LossOperands:
        """Rewards in groups replaced by their advantages [S], and the failed samples by a mask."""
        assert self.group_index is not None
        advantage = group_advantages(self.advantage, self.group_index, baseline=self.baseline, scale=self.scale)
        return replace(self, advantage=advantage, mask=self.trained(num_rows), group_index=None, per_sequence=True)

    def in_fp32(self) -> LossOperands:
        """float64 tensors of rows and sequences rounded to fp32, all that the kernels compute in."""

        def narrow(x: Tensor | None) -> Tensor | None:
            return x.float() if x is not None and x.dtype == torch.float64 else x

        advantage = narrow(self.advantage)
        assert advantage is not None
        old, ref, sampling = (narrow(x) for x in (self.old, self.ref, self.sampling))
        return replace(self, advantage=advantage, old=old, ref=ref, sampling=sampling)

    def pick(self, rows: Tensor, trained: Tensor) -> LossOperands:
        """Only the rows that train, whose int64 indices these are; denominators must be present.

        Advantages are per token afterwards, rewards stay per sequence.
        """
        before = torch.cat([trained.new_zeros(1, dtype=torch.int32), trained.cumsum(0, dtype=torch.int32)])
        advantage = self.advantage
        if self.group_index is None:
            if not self.per_token:
                advantage = advantage[segment_ids(self.cu_seqlens, trained.numel())]
            advantage = advantage[rows]

        def rows_of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return replace(
            self,
            advantage=advantage,
            cu_seqlens=before[self.cu_seqlens.long()],
            old=rows_of(self.old),
            ref=rows_of(self.ref),
            sampling=rows_of(self.sampling),
            mask=None,
            per_sequence=False,
        )


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _check_scalar(name: str, value: Any, kind: type[int] | type[float], device: torch.device) -> None:
    """Raise unless `value` is a 0-d tensor of numbers or a number of the kind; int means a count >= 0.

    A tensor may be on another device than the op's, `device`, unless it has no value there.
    """
    expected = "an int >= 0" if kind is int else "a number"
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"{name}: expected {expected} or a 0-d tensor, got shape {list(value.shape)}")
        if value.dtype == torch.bool or value.is_complex():
            kind_of = str(value.dtype).removeprefix("torch.")
            raise TypeError(f"{name}: expected {expected} or a 0-d tensor of numbers, got dtype {kind_of}")
        if value.is_meta and device.type != "meta":
            raise ValueError(f"{name}: expected a tensor on {device}, got one on meta")
    elif isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise TypeError(f"{name}: expected {expected} or a 0-d tensor, got {type(value).__name__}")
    elif value != value or (kind is int and value < 0):
        raise ValueError(f"{name}: expected {expected} or a 0-d tensor, got {value!r}")
    elif isinstance(value, int) and not -INT_LIMIT <= value < INT_LIMIT:
        raise ValueError(f"{name}: expected {expected} within 64 bits or a 0-d tensor, got {value!r}")
