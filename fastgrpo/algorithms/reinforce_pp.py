"""REINFORCE++ (arXiv 2501.03262): returns with the KL penalty in them, whitened over the tokens of the whole batch."""

from __future__ import annotations

from fastgrpo.algorithms.algorithm import Algorithm

REINFORCE_PP = Algorithm(
    name="reinforce_pp",
    decides={
        "advantage_baseline": "none",
        "scale_rewards": "none",
        "advantage_whitening": True,
        "multi_objective_aggregation": "sum_then_normalize",
    },
    defaults={"kl_coef": 0.01},
)
