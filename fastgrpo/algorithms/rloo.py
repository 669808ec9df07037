"""RLOO (Kool et al. 2019; Ahmadian et al., arXiv 2402.14740): each sample less the mean of its prompt's others."""

from __future__ import annotations

from fastgrpo.algorithms.algorithm import Algorithm

RLOO = Algorithm(
    name="rloo",
    decides={
        "advantage_baseline": "leave_one_out",
        "scale_rewards": "none",
        "multi_objective_aggregation": "sum_then_normalize",
    },
)
