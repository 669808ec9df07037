"""REINFORCE (Williams 1992): each token's advantage is the discounted return from there on, `A[t] = G[t]`.

Neither form needs a group: `num_generations=1` will do. The baseline is the mean reward of the batch's other samples,
which no token of the sample itself has touched, so the gradient stays unbiased.
"""

from __future__ import annotations

from fastgrpo.algorithms.algorithm import Algorithm

_PLAIN = {"scale_rewards": "none", "multi_objective_aggregation": "sum_then_normalize"}

REINFORCE = Algorithm(name="reinforce", decides={**_PLAIN, "advantage_baseline": "none"})
REINFORCE_BASELINE = Algorithm(name="reinforce_baseline", decides={**_PLAIN, "advantage_baseline": "batch"})
