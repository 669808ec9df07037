"""The record an algorithm is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """How rewards become advantages.

    name:      the value of the option `algorithm`.
    decides:   options that make it what it is; any other value is an error.
    defaults:  what other options become when they are left to the algorithm.
    per_token: each token gets what is rewarded from there on; otherwise a completion has one advantage.
    critic:    a value model learns beside the policy and is the baseline of each token.
    """

    name: str
    decides: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    per_token: bool = True
    critic: bool = False
