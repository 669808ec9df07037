"""Built-in rewards that need nothing but the standard library: exact match, format, length.

Mathematical equivalence is in `math_equivalence.py`, reward models in `model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

THINK_PATTERN = r"<think>[^<]*(?:<(?!/?think>)[^<]*)*</think>\s*[^\s<][^<]*(?:<(?!/?think>)[^<]*)*"
"""`<think>...</think>` and then an answer, each tag once; unrolled so that matching takes linear time."""

Completion = str | list[dict[str, Any]]


def completion_text(completion: Completion) -> str:
    """The text of a completion: the string itself, or the content of its last assistant message ("" if none).

    Content in parts (`[{"type": "text", "text": ...}]`) is joined; parts that are not text are left out.
    """
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role") == "assistant":
            content = message.get("content") or ""
            return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return ""


def exact_match(completions: Sequence[Completion], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 where the completion's text equals the `answer` column, both stripped; else 0.0.

    Of an answer that holds "####" (GSM8K) only what follows the last one counts. A missing answer (None) fails the
    sample.
    """
    golds = [None if gold is None else str(gold).rpartition("####")[2].strip() for gold in answer]
    return [
        None if gold is None else float(completion_text(completion).strip() == gold)
        for completion, gold in zip(completions, golds, strict=True)
    ]


def regex_format(*, pattern: str = THINK_PATTERN) -> Callable[..., list[float]]:
    """A reward: 1.0 where the whole stripped text matches `pattern` (`re.fullmatch`, `.` matches newlines); else 0.0.

    To search instead, write `.*pattern.*`. The default wants `<think>...</think>` and then an answer; when the chat
    template already opens the thinking, the completion lacks `<think>` and needs a pattern of its own.

    Beware of patterns with nested repetition such as `(a+)+b`: they can take exponential time, and because `re` keeps
    Python's global lock the whole process stands still meanwhile; no timeout helps.

    Raises ValueError when `pattern` is not a regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"regex_format: pattern {pattern!r} is not a regular expression: {error}") from error

    def regex_format_reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
        return [float(compiled.fullmatch(completion_text(c).strip()) is not None) for c in completions]

    return regex_format_reward


def overlong_penalty(*, max_completion_length: int, buffer_length: int | None = None) -> Callable[..., list[float]]:
    """A reward: DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), in [-1, 0].

    0 up to `max_completion_length - buffer_length` tokens, from there linearly down to -1 at `max_completion_length`.

    buffer_length: default `max_completion_length // 5`, the paper's proportion (4096 of 20480).

    Raises ValueError unless 1 <= buffer_length <= max_completion_length.
    """
    buffer = max(1, max_completion_length // 5) if buffer_length is None else buffer_length
    if not 1 <= buffer <= max_completion_length:
        raise ValueError(
            f"overlong_penalty: buffer_length must be between 1 and max_completion_length={max_completion_length}, "
            f"got {buffer}"
        )
    free = max_completion_length - buffer

    def overlong_penalty_reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [-min(1.0, max(0, len(ids) - free) / buffer) for ids in completion_ids]

    return overlong_penalty_reward
