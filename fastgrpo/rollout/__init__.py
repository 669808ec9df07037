"""Rollout engines: one protocol, an engine a file."""

from fastgrpo.rollout.engine import Engine, make_engine

__all__ = ["Engine", "make_engine"]
