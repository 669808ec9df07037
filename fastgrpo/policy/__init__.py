"""The model side: loading, packed attention, the LM head, the reference model, the critic."""

from fastgrpo.policy.critic import Critic, make_critic
from fastgrpo.policy.loading import is_factory, load_policy
from fastgrpo.policy.policy import Policy, Reference

__all__ = ["Critic", "Policy", "Reference", "is_factory", "load_policy", "make_critic"]
