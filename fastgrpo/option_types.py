"""The annotations of options: does a value fit one, and what would, in words."""

from __future__ import annotations

import math
from typing import Any, get_args

_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    type(None): ("null", "null"),
    Any: ("anything", "anything"),
}
"""Type -> (one of it, several)."""


def matches(value: Any, hint: Any) -> bool:
    """Does a plain value fit the annotation? Covers what the options use: scalars, Literal, unions, list and dict."""
    origin = getattr(hint, "__origin__", None)
    args = get_args(hint)
    if hint is Any:
        return True
    if hint is type(None) or hint is None:
        return value is None
    if origin is list:
        return isinstance(value, list) and all(matches(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(matches(k, args[0]) and matches(v, args[1]) for k, v in value.items())
    if choices(hint):
        return isinstance(value, str) and value in args
    if args:
        return any(matches(value, a) for a in args)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def choices(hint: Any) -> list[str]:
    """The strings a Literal allows, a list's or a union's members' too; empty where others are allowed."""
    args = get_args(hint)
    if args and not isinstance(hint, type) and all(isinstance(a, str) for a in args):
        return list(args)
    return [c for a in args for c in choices(a)] if getattr(hint, "__origin__", None) is not dict else []


def describe(hint: Any, value: Any = None) -> str:
    """What the annotation allows, for people: "a whole number or null". `value`: what was given, where that matters."""
    origin, args = getattr(hint, "__origin__", None), get_args(hint)
    if origin is list:
        return f"a list of {_several(args[0])}"
    if origin is dict:
        return "a mapping" if args[1] is Any else f"a mapping of {_several(args[0])} to {_several(args[1])}"
    if args and all(isinstance(a, str) for a in args):
        return f"one of {', '.join(args)}"
    if args:
        return " or ".join(describe(a, value) for a in args)
    if hint is float and str(value).lower().lstrip("+-.") in ("nan", "inf", "infinity"):
        return "a finite number"
    return _WORDS[hint][0]


def _several(hint: Any) -> str:
    args = get_args(hint)
    if args and all(isinstance(a, str) for a in args):
        return f"any of {', '.join(args)}"
    if getattr(hint, "__origin__", None) is dict:
        return "mappings"
    return " or ".join(_several(a) for a in args) if args else _WORDS[hint][1]
