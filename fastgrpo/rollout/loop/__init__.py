"""The loop engine: samples from the training model itself, with keys and values of its own."""

from fastgrpo.rollout.loop.engine import LoopEngine, end_tokens_of

__all__ = ["LoopEngine", "end_tokens_of"]
