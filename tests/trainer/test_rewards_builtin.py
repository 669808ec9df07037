"""Exact match, format and length."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.rewards.builtin import completion_text, exact_match, overlong_penalty, regex_format


def chat(*messages):
    return [{"role": role, "content": content} for role, content in messages]


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        (chat(("assistant", "one")), "one"),
        (chat(("assistant", "one"), ("tool", "t"), ("assistant", "two"), ("tool", "u")), "two"),
        (chat(("tool", "t")), ""),
        (chat(("assistant", None)), ""),
        ([], ""),
        ([{"role": "assistant"}], ""),
        (chat(("assistant", [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}])), "ab"),
    ],
)
def test_completion_text(completion, text):
    assert completion_text(completion) == text


def test_exact_match():
    completions = [" 72\n", chat(("assistant", "72")), "73", "5 #### 72", "72", "72", "", "x"]
    answer = ["72", 72, "72", "72", "6*12\n#### 72 ", "1 #### 2 #### 72", "", None]
    assert exact_match(completions, answer) == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, None]


def test_exact_match_refuses_ragged_columns():
    with pytest.raises(ValueError, match="shorter"):
        exact_match(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think>b", 1.0),
        ("\n<think>a < b,\nso <b></think>\n\nit is 2 < 3\n", 1.0),
        ("<think></think>b", 1.0),
        ("<think>a</think>", 0.0),
        ("<think>a</think>  \n", 0.0),
        ("<think>a", 0.0),
        ("a</think>b", 0.0),
        ("x<think>a</think>b", 0.0),
        ("<think>a<think>a</think>b", 0.0),
        ("<think>a</think>b</think>c", 0.0),
        ("<think>a</think>b<think>", 0.0),
        ("b", 0.0),
        ("", 0.0),
    ],
)
def test_think_format(text, reward):
    assert regex_format()([text, chat(("assistant", text))]) == [reward, reward]


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "a", " ", "\n", ">"]), max_size=12).map("".join))
def test_think_format_is_the_plain_reading(text):
    stripped = text.strip()
    plain = re.fullmatch(r"<think>.*</think>(.*)", stripped, re.DOTALL)
    once = stripped.count("<think>") == stripped.count("</think>") == 1
    answered = plain is not None and plain[1].strip() != "" and not plain[1].strip().startswith("<")
    assert regex_format()([text]) == [float(once and answered)]


def test_think_format_is_linear():
    """100,000 characters that never match: exponential or quadratic matching would not come back."""
    for piece in ("<", "a", "<a", "< think>", " "):
        text = "<think>" + piece * 50_000 + "</think>" + piece * 50_000 + "<think>"
        assert regex_format()([text]) == [0.0]


def test_own_pattern_matches_the_whole_text():
    reward = regex_format(pattern=r"<answer>.+</answer>")
    assert reward(["<answer>a\nb</answer> ", "so <answer>a</answer>"]) == [1.0, 0.0]
    assert regex_format(pattern=r".*\d.*")(["a\n1\nb", "ab"]) == [1.0, 0.0]


def test_bad_pattern():
    with pytest.raises(ValueError, match=r"pattern '\(' is not a regular expression"):
        regex_format(pattern="(")


@pytest.mark.parametrize(
    ("length", "penalty"),
    [
        (0, 0),
        (16384, 0),
        (16385, -1 / 4096),
        (18432, -0.5),
        (20479, -4095 / 4096),
        (20480, -1),
        (20481, -1),
        (10**6, -1),
    ],
)
def test_overlong_penalty_with_the_papers_numbers(length, penalty):
    """DAPO, section 4.1: L_max = 20480 of which L_cache = 4096."""
    reward = overlong_penalty(max_completion_length=20480)
    assert reward(completion_ids=[range(length)]) == [penalty]
    assert overlong_penalty(max_completion_length=20480, buffer_length=4096)([range(length)]) == [penalty]


@pytest.mark.parametrize("buffer_length", [0, -1, 11])
def test_overlong_penalty_refuses(buffer_length):
    with pytest.raises(ValueError, match="buffer_length must be between 1 and max_completion_length=10"):
        overlong_penalty(max_completion_length=10, buffer_length=buffer_length)


def test_overlong_penalty_of_tiny_completions():
    assert overlong_penalty(max_completion_length=2)([[], [1], [1, 2], [1, 2, 3]]) == [0.0, 0.0, -1.0, -1.0]
