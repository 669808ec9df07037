"""From what a user writes to a reward function, and the messages when it is wrong."""

from __future__ import annotations

import functools
import re
import sys

import pytest

from fastgrpo.importing import import_object
from fastgrpo.rewards import RewardDefaults, RewardFunction, RewardRunner, resolve, resolve_all
from fastgrpo.rewards.builtin import exact_match
from fastgrpo.rewards.math_equivalence import MathEquivalence


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """`user_rewards.py` in the working directory, which is not on the path."""
    (tmp_path / "user_rewards.py").write_text(
        "def brevity(completions, scale=1.0, **_): return [scale * len(c) for c in completions]\n"
        "class Judge:\n"
        "    def __init__(self, model='small'): self.model = model\n"
        "    def __call__(self, completions, **_): return [0.0] * len(completions)\n"
        "    @staticmethod\n"
        "    def static(completions): return [1.0] * len(completions)\n"
        "CONSTANT = 3\n"
    )
    (tmp_path / "user_broken.py").write_text("import surely_not_installed\n")
    (tmp_path / "user_syntax.py").write_text("def (\n")
    (tmp_path / "user_raises.py").write_text("raise KeyError('two\\nlines')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("user_")]:
        del sys.modules[name]


# --- import_object --------------------------------------------------------------------------------------------------


def test_import_object(user_module):
    import os.path

    assert import_object("os.path:join") is os.path.join
    assert import_object("collections:OrderedDict.fromkeys")("ab") == {"a": None, "b": None}
    assert import_object("user_rewards:CONSTANT") == 3
    assert import_object("user_rewards:Judge.static")(["x"]) == [1.0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("json.dumps", "expected 'package.module:attribute'"),
        (":dumps", "expected 'package.module:attribute'"),
        ("json:", "expected 'package.module:attribute'"),
        ("surely_missing:f", "there is no module 'surely_missing'"),
        ("json.surely_missing:f", "there is no module 'json.surely_missing'"),
        ("surely_missing.sub:f", "there is no module 'surely_missing'"),
        ("json:dmps", "module 'json' has no attribute 'dmps'; did you mean 'dumps'?"),
        ("json:zzzzzz", "module 'json' has no attribute 'zzzzzz'"),
        ("json:JSONEncoder.encod", "'JSONEncoder' in 'json' has no attribute 'encod'; did you mean 'encode'?"),
        ("user_broken:f", "importing 'user_broken' failed: No module named 'surely_not_installed'"),
        ("user_syntax:f", "importing 'user_syntax' failed: SyntaxError"),
        ("user_raises:f", "importing 'user_raises' failed: KeyError"),
    ],
)
def test_import_object_says_what_is_missing(user_module, path, message):
    with pytest.raises(ValueError, match=re.escape(repr(path))) as caught:
        import_object(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- resolve --------------------------------------------------------------------------------------------------------


def test_builtins():
    defaults = RewardDefaults(weight=0.5, timeout=7.0, max_completion_length=100)
    assert resolve("exact_match", defaults=defaults) == RewardFunction("exact_match", exact_match, 0.5, 7.0)
    math = resolve("math", defaults=defaults)
    assert (math.name, math.weight, math.timeout) == ("math", 0.5, 7.0)
    assert isinstance(math.fn, MathEquivalence)
    assert math.fn.call_timeout < 7.0
    assert resolve("regex_format").fn(["<think>a</think>b"]) == [1.0]
    assert resolve("overlong_penalty", defaults=defaults).fn([range(90)]) == [-0.5]


def test_mappings():
    defaults = RewardDefaults(weight=2.0, timeout=7.0, max_completion_length=100)
    reward = resolve({"name": "regex_format", "weight": 1, "timeout": 10, "pattern": "a+"}, defaults=defaults)
    assert (reward.name, reward.weight, reward.timeout) == ("regex_format", 1.0, 10.0)
    assert reward.fn(["aa", "ab"]) == [1.0, 0.0]
    assert resolve({"name": "exact_match", "timeout": None}, defaults=defaults).timeout is None
    assert resolve({"name": "exact_match"}, defaults=defaults).weight == 2.0
    penalty = resolve({"name": "overlong_penalty", "max_completion_length": 10, "buffer_length": 10}, defaults=defaults)
    assert penalty.fn([range(5)]) == [-0.5]
    assert resolve({"name": "math", "sample_timeout": 3}).fn.sample_timeout == 3


def test_a_spec_is_not_changed():
    spec = {"name": "overlong_penalty", "weight": 2.0, "buffer_length": 5}
    copy = dict(spec)
    resolve(spec, defaults=RewardDefaults(max_completion_length=10))
    assert spec == copy


def test_callables_and_their_names():
    def mine(completions, scale):
        return [scale] * len(completions)

    class Judge:
        def __call__(self, completions):
            return [0.0] * len(completions)

    assert resolve(mine) == RewardFunction("mine", mine)
    assert resolve(functools.partial(mine, scale=2.0)).name == "mine"
    assert resolve(lambda completions: [0.0]).name == "reward"
    assert resolve(Judge()).name == "Judge"
    bound = resolve({"name": mine, "scale": 3.0, "weight": 2.0})
    assert (bound.name, bound.weight, bound.fn(completions=["a"])) == ("mine", 2.0, [3.0])
    ready = RewardFunction("x", mine, 4.0)
    assert resolve(ready, defaults=RewardDefaults(weight=9.0)) is ready


def test_module_functions(user_module):
    reward = resolve({"name": "user_rewards:brevity", "scale": -1.0, "weight": 0.1})
    assert (reward.name, reward.weight, reward.fn(completions=["abc"])) == ("brevity", 0.1, [-3.0])
    assert resolve("user_rewards:brevity").fn(completions=["abc"]) == [3.0]
    judge = resolve({"name": "user_rewards:Judge", "model": "big"})
    assert (judge.name, judge.fn.model) == ("Judge", "big")
    assert resolve("user_rewards:Judge").fn.model == "small"
    assert resolve("user_rewards:Judge.static").name == "static"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact_mach", "there is no reward 'exact_mach'; did you mean 'exact_match'?"),
        ("zzz", "built-in are exact_match, math, regex_format, overlong_penalty. Your own is named"),
        ("user_rewards.brevity", "'package.module:function'"),
        ("user_rewards:brevty", "did you mean 'brevity'?"),
        ("user_rewards:CONSTANT", "expected a reward function, got int"),
        ({"name": "user_rewards:Judge", "modle": 1}, "Judge has no option 'modle'; did you mean 'model'?"),
        ({"name": "regex_format", "patern": "a"}, "regex_format has no option 'patern'; did you mean 'pattern'?"),
        ({"name": "exact_match", "wieght": 1}, "exact_match has no option 'wieght'; did you mean 'weight'?"),
        ({"name": "user_rewards:brevity", "wieght": 1}, "brevity has no option 'wieght'; did you mean 'weight'?"),
        ({"name": "exact_match", "weight": "heavy"}, "heavy"),
        ({"name": "exact_match", "timeout": -1}, "timeout must be positive"),
        ({"name": "regex_format", "pattern": "("}, "not a regular expression"),
        ({"weight": 1.0}, "a mapping needs a 'name'"),
        ("overlong_penalty", "overlong_penalty needs max_completion_length"),
        (3, "expected a callable, a name or a mapping with a 'name', got int"),
        (None, "got NoneType"),
    ],
)
def test_wrong_specs_fail_in_one_line(user_module, spec, message):
    with pytest.raises(ValueError, match=r"^reward_funcs\[2\]: ") as caught:
        resolve(spec, index=2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_are_made_unique():
    def reward(completions):
        return [0.0] * len(completions)

    def reward_2(completions):
        return [0.0] * len(completions)

    functions = resolve_all([reward, reward, reward_2, "exact_match", reward])
    assert [f.name for f in functions] == ["reward", "reward_2", "reward_2_2", "exact_match", "reward_3"]
    RewardRunner(functions)
    with pytest.raises(ValueError, match=r"reward_funcs\[1\]"):
        resolve_all([reward, "exact_mach"])
