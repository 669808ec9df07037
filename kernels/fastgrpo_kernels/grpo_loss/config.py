"""`LossConfig`: which loss, and every number in it."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from ..checks import check_bool, check_choice, check_int, check_number

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Loss types whose per-token term is the clipped surrogate."""

LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo", "reinforce")
LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
SAMPLING_CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class LossConfig:
    """A policy loss. Names and defaults follow TRL's GRPOConfig where the meaning is the same.

    loss_type: grpo, bnpo, dr_grpo, dapo, luspo (clipped surrogate, differing in the aggregation), cispo, sapo, vespo,
        reinforce.
    importance_sampling_level: `token`, or `sequence` (GSPO: one ratio per sequence, the mean log-ratio's exponential).
    epsilon, epsilon_high: the ratio's clip range [1 - epsilon, 1 + epsilon_high]; epsilon_high=None means epsilon.
        For cispo epsilon_high is the ratio's cap itself, and must be given.
    delta: cap of the ratio in the unclipped branch (two-sided clip); None for none.
    beta, kl_estimator, kl_bias_correction: weight of the KL term, k1, k2 or k3, and whether the ratio multiplies it.
    entropy_coef: weight of the entropy bonus.
    top_entropy_quantile: share of the tokens, those of the highest entropy, that keep their policy term; 1.0 = all.
    off_policy_mask_threshold: sequences with a negative advantage and a mean log-ratio (sampling - current policy)
        above it lose their policy term; None for none.
    sampling_correction: importance weights between the rollout engine and the trainer, per token or per sequence,
        clamped to (truncate) or dropped outside of (mask) [sampling_clip_min, sampling_clip_max].
    sapo_temperature_pos, sapo_temperature_neg: SAPO's tau by the sign of the advantage.
    vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: VESPO's exponents by the sign of the advantage.
    max_completion_length: dr_grpo's divisor in tokens; needed when that loss is called.

    Errors: ValueError naming the option, its value and what is allowed.
    """

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "reinforce"] = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_bias_correction: bool = False
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    sampling_correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    sampling_clip_max: float = 3.0
    sampling_clip_min: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    max_completion_length: int | None = None
    encoded: ClassVar[str]  # an attribute of each instance; as a ClassVar it is no field

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", self.importance_sampling_level, LEVELS)
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("sampling_correction", self.sampling_correction, SAMPLING_CORRECTIONS)
        check_bool("kl_bias_correction", self.kl_bias_correction)
        for name in ("epsilon", "beta", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            check_number(name, getattr(self, name), 0)
        for name in ("sampling_clip_max", "sapo_temperature_pos", "sapo_temperature_neg"):
            check_number(name, getattr(self, name), 0, open_low=True)
        check_number("entropy_coef", self.entropy_coef)
        check_number("top_entropy_quantile", self.top_entropy_quantile, 0, 1)
        if self.epsilon_high is not None:
            check_number("epsilon_high", self.epsilon_high, 0)
        if self.delta is not None:
            check_number("delta", self.delta, 0, open_low=True)
        if self.off_policy_mask_threshold is not None:
            check_number("off_policy_mask_threshold", self.off_policy_mask_threshold)
        if self.sampling_clip_min is not None:
            check_number("sampling_clip_min", self.sampling_clip_min, 0, self.sampling_clip_max)
        check_int("max_completion_length", self.max_completion_length, 1)
        self._check_combinations()
        # Made here and not when asked for, because torch.compile reads an attribute but does not trace json.
        object.__setattr__(self, "encoded", json.dumps(asdict(self)))

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def decode(encoded: str) -> LossConfig:
        """The config whose `encoded` this is: how it passes through a custom op, which takes no objects."""
        return LossConfig(**json.loads(encoded))

    def _check_combinations(self) -> None:
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError(
                "epsilon_high: expected a number with loss_type='cispo' (the ratio's cap, e.g. 5.0), got None"
            )
        if self.loss_type == "vespo" and self.sampling_correction.startswith("sequence"):
            raise ValueError(
                "sampling_correction: expected none, token_truncate or token_mask with loss_type='vespo', "
                f"got {self.sampling_correction!r}"
            )

    @property
    def clip_range(self) -> tuple[float, float]:
        """The ratios between which no clipping happens; for cispo [0, cap], for unclipped types the region's bounds."""
        if self.loss_type == "cispo":
            assert self.epsilon_high is not None
            return 0.0, self.epsilon_high
        return 1 - self.epsilon, 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)

    @property
    def needs_sequences(self) -> bool:
        """A token's gradient depends on the log-probs of its whole sequence, not on its own alone."""
        return (
            self.importance_sampling_level == "sequence"
            or self.loss_type == "vespo"
            or self.off_policy_mask_threshold is not None
            or self.sampling_correction.startswith("sequence")
        )
