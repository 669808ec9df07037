"""What a user writes under `reward_funcs` -> `RewardFunction`s.

A spec is a callable; a built-in's name; `"package.module:function"`; a reward model's hub name or local folder; a
mapping `{"name": <one of these>, "weight": ..., "timeout": ..., **options}`; or a `RewardFunction`, taken as it is.
Options go to a built-in's factory, to a class's or reward model's constructor, or are bound to a function by keyword.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.importing import import_object
from fastgrpo.rewards.builtin import exact_match, overlong_penalty, regex_format
from fastgrpo.rewards.math_equivalence import math_equivalence
from fastgrpo.rewards.runner import RewardFunction

BUILTINS: dict[str, Callable[..., Callable[..., Any]]] = {
    "exact_match": lambda: exact_match,
    "math": math_equivalence,
    "regex_format": regex_format,
    "overlong_penalty": overlong_penalty,
}
"""Name -> factory: called with the spec's options, it returns the reward function."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class RewardDefaults:
    """What applies where a spec is silent.

    weight, timeout:       see `RewardFunction`.
    max_completion_length: the longest completion in tokens, for `overlong_penalty`.
    """

    weight: float = 1.0
    timeout: float | None = None
    max_completion_length: int | None = None


def resolve(spec: Any, *, index: int = 0, defaults: RewardDefaults | None = None) -> RewardFunction:
    """One spec -> its `RewardFunction`. Reward models are loaded here, so that a wrong name fails early.

    index: the spec's place in the list, for messages.

    Raises ValueError, in one line that begins with `reward_funcs[index]`, for anything that is not a spec, an unknown
    name or option (with the nearest right spelling) or an impossible value; ImportError without a needed extra.
    """
    if isinstance(spec, RewardFunction):
        return spec
    defaults = defaults or RewardDefaults()
    where = f"reward_funcs[{index}]"
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    if "name" not in options:
        raise ValueError(f"{where}: a mapping needs a 'name', got the keys {sorted(options)}")
    target = options.pop("name")
    weight = options.pop("weight", defaults.weight)
    timeout = options.pop("timeout", defaults.timeout)
    try:
        seconds = None if timeout is None else float(timeout)
        name, fn = _build(target, options, seconds, defaults.max_completion_length)
        return RewardFunction(name, fn, float(weight), seconds)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def resolve_all(specs: Iterable[Any], *, defaults: RewardDefaults | None = None) -> list[RewardFunction]:
    """All specs of a run, names made unique: `reward`, `reward_2`, ..."""
    functions: list[RewardFunction] = []
    taken: set[str] = set()
    for index, spec in enumerate(specs):
        function = resolve(spec, index=index, defaults=defaults)
        name, count = function.name, 1
        while name in taken:
            count += 1
            name = f"{function.name}_{count}"
        taken.add(name)
        functions.append(dataclasses.replace(function, name=name))
    return functions


def _build(
    target: Any, options: dict[str, Any], timeout: float | None, max_completion_length: int | None
) -> tuple[str, Callable[..., Any]]:
    if not isinstance(target, str):
        if not callable(target):
            raise ValueError(f"expected a callable, a name or a mapping with a 'name', got {type(target).__name__}")
        return _callable_name(target), _bind(target, options)
    if target in BUILTINS:
        factory = BUILTINS[target]
        parameters = inspect.signature(factory).parameters
        if "max_completion_length" in parameters:
            options.setdefault("max_completion_length", max_completion_length)
            if options["max_completion_length"] is None:
                raise ValueError(f"{target} needs max_completion_length")
        if "call_timeout" in parameters and timeout is not None:
            # Before the runner gives up the whole call, what is done comes back.
            options.setdefault("call_timeout", 0.8 * timeout)
        return target, _call(factory, options, target)
    if ":" in target:
        return target.rpartition(":")[2].rpartition(".")[2], _bind(import_object(target), options)
    if Path(target).is_dir() or _HUB_NAME.fullmatch(target):
        from fastgrpo.rewards.model import RewardModel

        return Path(target).resolve().name, _call(RewardModel, {"model": target, **options}, target)
    near = difflib.get_close_matches(target, BUILTINS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"built-in are {', '.join(BUILTINS)}."
    raise ValueError(
        f"there is no reward {target!r}; {hint} Your own is named 'package.module:function', "
        "a reward model by its hub name 'org/name' or an existing folder"
    )


def _bind(fn: Any, options: dict[str, Any]) -> Callable[..., Any]:
    if not callable(fn):
        raise ValueError(f"expected a reward function, got {type(fn).__name__}")
    if isinstance(fn, type):
        return _call(fn, options, fn.__name__)
    if not options:
        return fn
    _check_options(fn, options, _callable_name(fn))
    return functools.partial(fn, **options)


def _call(factory: Callable[..., Any], options: dict[str, Any], name: str) -> Callable[..., Any]:
    _check_options(factory, options, name)
    return factory(**options)


def _check_options(fn: Callable[..., Any], options: dict[str, Any], name: str) -> None:
    parameters = inspect.signature(fn).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option in options:
        if option not in parameters:
            near = difflib.get_close_matches(option, ["weight", "timeout", *parameters], n=1)
            if takes_any and not difflib.get_close_matches(option, ["weight", "timeout"], cutoff=0.8):
                continue
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} has no option {option!r}{hint}")


def _callable_name(fn: Any) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__name__", type(fn).__name__)
    return "reward" if name == "<lambda>" else name
