"""GRPO (DeepSeekMath, arXiv 2402.03300): a completion against the others of its prompt, `A = (R - mean) / std`.

Dr. GRPO, GSPO, DAPO and the like are GRPO with other options. Its KL term stands in the loss (`beta`).
"""

from __future__ import annotations

from fastgrpo.algorithms.algorithm import Algorithm

GRPO = Algorithm(
    name="grpo",
    decides={"gamma": 1.0, "kl_coef": 0.0},
    defaults={"advantage_baseline": "mean", "scale_rewards": "group"},
    per_token=False,
)
