"""What ends a completion before its limit: tokens, and strings in its text.

A completion ends with the first token after which its text holds one of the strings. That token is kept whole, even
where it goes on behind the string: log-probs are those of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

# Tokens that may have no text of their own, beside one for each character of the longest string.
_SPARE = 16


class Stopping:
    """tokens: ids that end a completion. strings: pieces of text that do. A tokenizer of `tokenizer`'s kind decodes.

    candidates: the ids after which a string may just have become complete; all others need no look at the text.
    """

    def __init__(self, tokenizer: Any, tokens: set[int], strings: Sequence[str] = ()) -> None:
        self.tokens = tokens
        self.strings = tuple(strings)
        self.candidates = _candidates(tokenizer, self.strings) if strings else frozenset()
        self._tokenizer = tokenizer
        self._tail = max(map(len, self.strings), default=0) + _SPARE

    def ended(self, completion: Sequence[int]) -> bool:
        """Has its newest token ended it? Asked after each of them."""
        newest = completion[-1]
        if newest in self.tokens:
            return True
        if newest not in self.candidates:
            return False
        text = self._tokenizer.decode(list(completion[-self._tail :]), skip_special_tokens=True)
        return any(string in text for string in self.strings)

    def end_of(self, completion: Sequence[int]) -> int | None:
        """How many of the tokens there are up to its end, of one that was sampled on behind it; None without an end."""
        return next((i for i in range(1, len(completion) + 1) if self.ended(completion[:i])), None)


@functools.lru_cache(maxsize=4)  # it looks at the whole vocabulary
def _candidates(tokenizer: Any, strings: tuple[str, ...]) -> frozenset[int]:
    """Of the whole vocabulary: a token's text as it stands behind another token, which may put a space before it."""
    [anchor] = tokenizer("a", add_special_tokens=False).input_ids[:1] or [0]
    before = tokenizer.decode([anchor], skip_special_tokens=True)
    texts = tokenizer.batch_decode([[anchor, i] for i in range(len(tokenizer))], skip_special_tokens=True)
    found = set()
    for i, text in enumerate(texts):
        piece = text[len(before) :]
        # Bytes of a character that is not whole yet, or text that changes what stands before it, may be anything.
        if not text.startswith(before) or "\ufffd" in piece or any(_may_complete(s, piece) for s in strings):
            found.add(i)
    return frozenset(found)


def _may_complete(string: str, piece: str) -> bool:
    """Does the piece hold the string, or begin with an end of it?"""
    return string in piece or any(
        string.endswith(piece[:count]) for count in range(1, min(len(string), len(piece)) + 1)
    )
