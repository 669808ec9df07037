"""The model side: loading, packed attention, the LM head, the reference model."""

from fastgrpo.policy.loading import is_factory, load_policy
from fastgrpo.policy.policy import Policy, Reference

__all__ = ["Policy", "Reference", "is_factory", "load_policy"]
