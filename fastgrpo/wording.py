"""Words that depend on numbers."""

from __future__ import annotations


def counted(count: int, thing: str) -> str:
    """ "1 step", "1,024 steps"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
