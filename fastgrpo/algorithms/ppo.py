"""PPO (Schulman et al., arXiv 1707.06347) as language models are trained by it (Ziegler et al., arXiv 1909.08593).

A critic of the policy's size says what each token's state is worth; GAE (arXiv 1506.02438) turns that and the rewards,
the KL penalty among them, into advantages, which are whitened. The critic's loss is clipped as the policy's is.
"""

from __future__ import annotations

from fastgrpo.algorithms.algorithm import Algorithm

PPO = Algorithm(
    name="ppo",
    decides={
        "advantage_baseline": "none",
        "scale_rewards": "none",
        "multi_objective_aggregation": "sum_then_normalize",
    },
    defaults={"advantage_whitening": True, "kl_coef": 0.05},
    critic=True,
)
