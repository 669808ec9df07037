"""What differs between the algorithms, and nothing else: a file each.

They share the trainer, the data and the losses. An algorithm says how rewards become advantages (`advantages.py`
computes them) and whether a critic learns beside the policy; `loss_type` says what becomes of advantages.
docs/algorithms.md has the maths. No torch here: the options are checked against these before anything loads.
"""

from fastgrpo.algorithms.algorithm import Algorithm
from fastgrpo.algorithms.grpo import GRPO
from fastgrpo.algorithms.ppo import PPO
from fastgrpo.algorithms.reinforce import REINFORCE, REINFORCE_BASELINE
from fastgrpo.algorithms.reinforce_pp import REINFORCE_PP
from fastgrpo.algorithms.rloo import RLOO

ALGORITHMS = {a.name: a for a in (GRPO, RLOO, REINFORCE, REINFORCE_BASELINE, REINFORCE_PP, PPO)}
"""By the value of the option `algorithm`."""

__all__ = ["ALGORITHMS", "Algorithm"]
