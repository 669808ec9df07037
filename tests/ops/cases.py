"""Random loss calls and configurations, and how to compare what comes out of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import LossConfig

from .oracle import Case

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "reinforce")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
SPREADS = {"near": 0.15, "far": 1.5, "extreme": 30.0}
"""Standard deviation of the log-ratios: within the clip range, mostly outside it, often beyond the clamps at +-20."""


def make_config(loss_type: str, **options: Any) -> LossConfig:
    """A config that is valid for the loss type, options given winning."""
    defaults: dict[str, Any] = {"loss_type": loss_type, "max_completion_length": 16}
    if loss_type == "cispo":
        defaults["epsilon_high"] = 1.3
    return LossConfig(**{**defaults, **options})


def make_case(
    seed: int,
    lengths: list[int],
    *,
    spread: str = "far",
    old: bool = True,
    ref: bool = True,
    sampling: bool = True,
    masked: float = 0.0,
    missing: float = 0.0,
    per_token: bool = False,
) -> Case:
    """masked: share of tokens that do not train. missing: share of sampling log-probs that are NaN."""
    g = torch.Generator().manual_seed(seed)
    N, S = sum(lengths), len(lengths)

    def normal(size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, generator=g, dtype=torch.float64)

    def share(p: float) -> Tensor:
        return torch.rand(N, generator=g) < p

    logprob = -normal(N, 2.0).abs() - 0.1
    samp = logprob + normal(N, SPREADS[spread] / 2)
    samp[share(missing)] = math.nan
    advantage = normal(N if per_token else S)
    advantage[torch.rand(advantage.numel(), generator=g) < 0.15] = 0.0
    return Case(
        logprob=logprob,
        advantage=advantage,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        entropy=normal(N).abs() + 0.01,
        old_logprob=logprob + normal(N, SPREADS[spread]) if old else None,
        ref_logprob=logprob + normal(N, SPREADS[spread]) if ref else None,
        sampling_logprob=samp if sampling else None,
        mask=~share(masked) if masked else None,
    )


@st.composite
def configs(draw: st.DrawFn) -> LossConfig:
    """Any valid configuration."""
    loss_type = draw(st.sampled_from(LOSS_TYPES))
    corrections = CORRECTIONS[:3] if loss_type == "vespo" else CORRECTIONS
    clip_min = draw(st.sampled_from([None, 0.0, 0.5]))
    return make_config(
        loss_type,
        importance_sampling_level=draw(st.sampled_from(["token", "sequence"])),
        epsilon=draw(st.sampled_from([0.0, 0.1, 0.2])),
        epsilon_high=draw(st.sampled_from([0.28, 1.3, 5.0] + [None] * (loss_type != "cispo"))),
        delta=draw(st.sampled_from([None, 0.9, 1.5, 4.0])),
        beta=draw(st.sampled_from([0.0, 0.05, 1.0])),
        kl_estimator=draw(st.sampled_from(["k1", "k2", "k3"])),
        kl_bias_correction=draw(st.booleans()),
        entropy_coef=draw(st.sampled_from([0.0, 0.01, 0.5])),
        top_entropy_quantile=draw(st.sampled_from([1.0, 0.8, 0.33, 0.0])),
        off_policy_mask_threshold=draw(st.sampled_from([None, 0.05, 1.0, -0.5])),
        sampling_correction=draw(st.sampled_from(corrections)),
        sampling_clip_max=draw(st.sampled_from([0.7, 3.0])),
        sampling_clip_min=clip_min,
        sapo_temperature_pos=draw(st.sampled_from([1.0, 2.5])),
        vespo_k_pos=draw(st.sampled_from([2.0, 0.0])),
        vespo_lambda_neg=draw(st.sampled_from([2.0, 0.5])),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any loss call with a few short sequences, empty ones included."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5]), max_size=4))
    case = make_case(
        draw(st.integers(0, 2**31)),
        lengths,
        spread=draw(st.sampled_from(list(SPREADS))),
        old=draw(st.booleans()),
        ref=True,
        sampling=True,
        masked=draw(st.sampled_from([0.0, 0.3, 1.0])),
        missing=draw(st.sampled_from([0.0, 0.3, 1.0])),
        per_token=draw(st.booleans()),
    )
    case.entropy_threshold = draw(st.sampled_from([None, 0.5]))
    case.num_sequences = draw(st.sampled_from([None, 0, 1, 7]))
    case.num_tokens = draw(st.sampled_from([None, 0, 1, 29]))
    return case


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude of the wanted tensor; NaN in either is infinitely wrong."""
    if got.shape != want.shape or bool(got.isnan().any()) or bool(want.isnan().any()):
        return math.inf
    if want.numel() == 0:
        return 0.0
    scale = max(float(want.detach().double().abs().max()), 1e-30)
    return float((got.detach().double() - want.detach().double()).abs().max()) / scale
