"""`LossConfig` refuses what cannot be; the loss ops refuse arguments that do not fit, naming them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from fastgrpo_kernels import GroupRewards, LossConfig, grpo_loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type: expected one of grpo, bnpo, .* got 'ppo'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level: expected one of token, sequence"),
        ({"kl_estimator": "k4"}, "kl_estimator: expected one of k1, k2, k3, got 'k4'"),
        ({"sampling_correction": "on"}, "sampling_correction: expected one of none, token_truncate"),
        ({"kl_bias_correction": 1}, "kl_bias_correction: expected True or False, got 1"),
        ({"epsilon": -0.1}, "epsilon: expected a finite number >= 0, got -0.1"),
        ({"epsilon_high": math.nan}, "epsilon_high: expected a finite number >= 0, got nan"),
        ({"delta": 0.0}, "delta: expected a finite number > 0, got 0.0"),
        ({"beta": math.inf}, "beta: expected a finite number >= 0, got inf"),
        ({"entropy_coef": "0.1"}, "entropy_coef: expected a finite number, got '0.1'"),
        ({"top_entropy_quantile": 1.1}, "top_entropy_quantile: expected a finite number >= 0 and <= 1, got 1.1"),
        ({"off_policy_mask_threshold": math.nan}, "off_policy_mask_threshold: expected a finite number, got nan"),
        ({"sampling_clip_max": 0}, "sampling_clip_max: expected a finite number > 0, got 0"),
        ({"sampling_clip_min": 3.5}, "sampling_clip_min: expected a finite number >= 0 and <= 3, got 3.5"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg: expected a finite number > 0"),
        ({"vespo_lambda_pos": -1.0}, "vespo_lambda_pos: expected a finite number >= 0"),
        ({"max_completion_length": 0}, "max_completion_length: expected an int >= 1 or None, got 0"),
        ({"loss_type": "cispo"}, "epsilon_high: expected a number with loss_type='cispo'"),
        (
            {"loss_type": "vespo", "sampling_correction": "sequence_mask"},
            "sampling_correction: expected none, token_truncate or token_mask with loss_type='vespo', got 'seq",
        ),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)


def test_defaults_and_frozen() -> None:
    config = LossConfig()
    assert (config.loss_type, config.epsilon, config.epsilon_high, config.beta) == ("dapo", 0.2, None, 0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 0.1  # type: ignore[misc]
    assert hash(config) == hash(LossConfig())


def call(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "logprob": torch.zeros(4),
        "advantage": torch.ones(2),
        "cu_seqlens": torch.tensor([0, 1, 4], dtype=torch.int32),
        **changes,
    }
    grpo_loss(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logprob": torch.zeros(4, 1)}, ValueError, r"logprob: expected shape \[N\] = \[any\], got \[4, 1\]"),
        ({"logprob": torch.zeros(4).long()}, TypeError, "logprob: expected dtype float16, .* got int64"),
        (
            {"advantage": torch.zeros(3)},
            ValueError,
            r"advantage: expected shape \[S\] = \[2\] or \[N\] = \[4\], got \[3\]",
        ),
        ({"advantage": torch.zeros(2, 2)}, ValueError, r"advantage: expected shape .* got \[2, 2\]"),
        (
            {"advantage": 1.0},
            TypeError,
            r"advantage: expected a tensor of shape .* and dtype .*, got float",
        ),
        ({"advantage": torch.zeros(2).int()}, TypeError, "advantage: expected dtype float16, .* got int32"),
        (
            {"advantage": torch.zeros(2, device="meta")},
            ValueError,
            "advantage: expected a tensor on cpu, got one on meta",
        ),
        (
            {"advantage": GroupRewards(torch.zeros(3), torch.zeros(3, dtype=torch.int64))},
            ValueError,
            r"advantage.rewards: expected shape \[S\] = \[2\], got \[3\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 1, 4])}, TypeError, "cu_seqlens: expected dtype int32, got int64"),
        (
            {"cu_seqlens": [0, 1, 4]},
            TypeError,
            "cu_seqlens: expected a tensor .* and dtype int32, got list",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 1, 5]).int()},
            ValueError,
            "cu_seqlens: expected values rising from 0 to N = 4",
        ),
        ({"old_logprob": torch.zeros(3)}, ValueError, r"old_logprob: expected shape \[N\] = \[4\], got \[3\]"),
        ({"mask": torch.ones(4)}, TypeError, "mask: expected dtype bool, got float32"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask: expected shape \[N\] = \[4\], got \[2\]"),
        ({"entropy": torch.zeros(5)}, ValueError, r"entropy: expected shape \[N\] = \[4\], got \[5\]"),
        ({"entropy_threshold": 0.5}, ValueError, "entropy: expected a tensor"),
        ({"config": LossConfig(entropy_coef=0.1)}, ValueError, "entropy: expected a tensor"),
        ({"config": LossConfig(top_entropy_quantile=0.5)}, ValueError, "entropy: expected a tensor"),
        ({"entropy_threshold": "high"}, TypeError, "entropy_threshold: expected a number or a 0-d tensor, got str"),
        ({"config": LossConfig(beta=0.1)}, ValueError, "ref_logprob: expected a tensor with beta=0.1, got None"),
        (
            {"config": LossConfig(sampling_correction="token_mask")},
            ValueError,
            "sampling_logprob: expected a tensor with sampling_correction='token_mask', got None",
        ),
        ({"config": LossConfig(loss_type="dr_grpo")}, ValueError, "max_completion_length: expected an int >= 1"),
        ({"config": {"beta": 0.1}}, TypeError, "config: expected a LossConfig, got dict"),
        ({"num_sequences": -1}, ValueError, "num_sequences: expected an int >= 0 or a 0-d tensor, got -1"),
        ({"num_tokens": 1.5}, TypeError, "num_tokens: expected an int >= 0 or a 0-d tensor, got float"),
        (
            {"num_tokens": torch.ones(1)},
            ValueError,
            r"num_tokens: expected an int >= 0 or a 0-d tensor, got shape \[1\]",
        ),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)
    call()  # and the call is fine without the change
