"""What ends a completion before its limit: tokens, and strings in its text.

A completion ends with the first token after which its text holds one of the strings. That token is kept whole, even
where it goes on behind the string: log-probs are those of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

# Tokens that may have no text of their own, beside one for each byte of the longest string.
_SPARE = 16


class Stopping:
    """tokens: ids that end a completion. strings: pieces of text that do, as `tokenizer` decodes it.

    candidates: the ids after which a string may just have become complete; all others need no look at the text.
    tail: how many of the newest tokens the text of a string may be spread over.

    Raises ValueError for a string that is a special token, which has no text.
    """

    def __init__(self, tokenizer: Any, tokens: set[int], strings: Sequence[str] = ()) -> None:
        self.tokens = tokens
        self.strings = tuple(strings)
        if special := sorted(set(self.strings) & set(tokenizer.all_special_tokens)):
            raise ValueError(
                f"stop_strings={special} are special tokens, which have no text: put them in stop_token_ids"
            )
        self.candidates = _candidates(tokenizer, self.strings) if strings else frozenset()
        self.tail = max((len(s.encode()) for s in self.strings), default=0) + _SPARE
        self._tokenizer = tokenizer

    def ended(self, completion: Sequence[int]) -> bool:
        """Has its newest token ended it? Asked after each of them; only the `tail` is looked at."""
        newest = completion[-1]
        if newest in self.tokens:
            return True
        if newest not in self.candidates:
            return False
        text = self._tokenizer.decode(list(completion[-self.tail :]), skip_special_tokens=True)
        return any(string in text for string in self.strings)

    def end_of(self, completion: Sequence[int]) -> int | None:
        """How many of the tokens there are up to its end, of one that was sampled on behind it; None without an end."""
        for i, token in enumerate(completion, 1):
            if token in self.tokens:
                return i
            if token in self.candidates and self.ended(completion[max(0, i - self.tail) : i]):
                return i
        return None


@functools.lru_cache(maxsize=4)  # it looks at the whole vocabulary
def _candidates(tokenizer: Any, strings: tuple[str, ...]) -> frozenset[int]:
    """Of the whole vocabulary: a token's text as it stands behind another token, which may put a space before it."""
    size = 1 + max([len(tokenizer) - 1, *tokenizer.get_vocab().values()])  # there may be holes
    alone = tokenizer.batch_decode([[i] for i in range(size)], skip_special_tokens=True)
    anchor = next((i for i, text in enumerate(alone) if text.strip() and "\ufffd" not in text), 0)
    before = alone[anchor]
    texts = tokenizer.batch_decode([[anchor, i] for i in range(size)], skip_special_tokens=True)
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
