"""From the rows of a data set to prompts, in the order a run draws them.

`load_rows` (of `fastgrpo.rows`) brings any source into one `datasets.Dataset` with a `prompt` column; `PromptSource`
turns its rows into `Prompt`s when they are drawn, so that nothing is tokenized in advance. The order of the draws is an
endless shuffled stream that depends on a seed and a position alone: a run resumes from one integer.

Not done here: streaming data sets (the stream needs random access) and images.
"""

from __future__ import annotations

import logging
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from fastgrpo.records import Message, Prompt
from fastgrpo.rows import load_rows

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptSource", "PromptTooLong", "load_rows"]

logger = logging.getLogger(__name__)


class PromptTooLong(ValueError):
    """A row whose prompt has more than `max_prompt_length` tokens."""


class PromptSource:
    """The prompts of a data set, made when asked for, and the order in which a run draws them.

    rows:              what `load_rows` returns; `len(source)` counts all of them.
    max_prompt_length: longest prompt in tokens. limit: what messages call it, where it is not the option's own value.
    vocab_size:        rows of the model's embedding; a token id beyond it is a ValueError.
    system_prompt:     put before every prompt as a system message; makes the prompt a chat.
    prompt_template:   `str.format` template over the row's columns that replaces a plain-text prompt.
    chat:              "always" wraps a plain-text prompt as a user's message, "never" refuses chats, "auto" wraps when
                       there is a system prompt. True and False mean "always" and "never".
    long_prompts:      "skip" passes over longer prompts and counts them, "error" raises at the first.
    shuffle, seed:     epoch e is the permutation given by (seed, e), or the data set's own order.

    `Prompt.content` keeps the row's form, so a reward sees the same types whatever `chat` says: text stays text (after
    `prompt_template`), messages stay messages (a system prompt in front). A chat that ends with an assistant's message
    is continued, not answered.
    """

    def __init__(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_length: int,
        limit: str | None = None,
        vocab_size: int,
        system_prompt: str | None = None,
        prompt_template: str | None = None,
        chat: Literal["auto", "always", "never"] | bool = "auto",
        long_prompts: Literal["skip", "error"] = "skip",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if isinstance(chat, bool):
            chat = "always" if chat else "never"
        if chat not in ("auto", "always", "never") or long_prompts not in ("skip", "error"):
            raise ValueError(f"chat={chat!r}, long_prompts={long_prompts!r}: expected auto/always/never and skip/error")
        if system_prompt is not None and chat == "never":
            raise ValueError("system_prompt makes every prompt a chat, chat='never' forbids it: leave one of them out")
        if prompt_template is not None:
            _check_template(prompt_template, rows.column_names)
        self._rows = rows
        self._tokenizer = tokenizer
        self._max_prompt_length = max_prompt_length
        self._limit = limit or f"max_prompt_length={max_prompt_length}"
        self._vocab_size = vocab_size
        self._system_prompt = system_prompt
        self._prompt_template = prompt_template
        self._wrap = chat == "always" or system_prompt is not None
        self._refuse_chat = chat == "never"
        self._skip_long = long_prompts == "skip"
        self._chat_template_kwargs = dict(chat_template_kwargs or {})
        self._shuffle = shuffle
        self._seed = seed
        self._too_long: set[int] = set()
        self._epoch_order: tuple[int, np.ndarray] | None = None
        # A row that can never be a prompt is found now, not hours later when it is drawn. Nothing is tokenized here.
        for index, prompt in enumerate(rows["prompt"]):
            self._check_prompt(prompt, index)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def too_long(self) -> list[int]:
        """Rows found too long so far, in order. Only a record: setting it (on resume) decides nothing."""
        return sorted(self._too_long)

    @too_long.setter
    def too_long(self, rows: Iterable[int]) -> None:
        self._too_long = set(rows)

    def __getitem__(self, index: int) -> Prompt:
        """Row `index` as a prompt. Raises PromptTooLong, or ValueError naming the row and what is wrong with it."""
        if not 0 <= index < len(self._rows):
            raise IndexError(f"row {index} of {len(self._rows)}")
        row = self._rows[index]
        content = self._content(row, index)
        token_ids = self._tokenize(content, index)
        if len(token_ids) > self._max_prompt_length:
            raise PromptTooLong(f"row {index}: the prompt has {len(token_ids)} tokens, more than {self._limit}")
        if max(token_ids) >= self._vocab_size:
            raise ValueError(
                f"row {index}: token id {max(token_ids)} is outside the model's vocabulary of {self._vocab_size}: "
                "tokenizer and model do not belong together"
            )
        columns = {name: value for name, value in row.items() if name != "prompt"}
        return Prompt(index=index, content=content, token_ids=token_ids, columns=columns)

    def usable(self, limit: int | None = None) -> Iterator[Prompt]:
        """The prompts in the data set's order, too long ones skipped, at most `limit`. ValueError if there is none."""
        given = 0
        for index in range(len(self)):
            if given == limit:
                return
            if prompt := self._get_usable(index):
                given += 1
                yield prompt
        if given == 0:
            raise self._nothing_usable()

    def draw(self, position: int, count: int) -> tuple[list[Prompt], int]:
        """The next `count` prompts of the endless stream from `position` on, and the position after them.

        Depends on the arguments alone, never on earlier draws. Positions go on past skipped rows. No row comes twice
        in one call unless the data set has fewer usable rows than `count`; then every one comes once before any comes
        again. Raises ValueError when no row is usable.
        """
        prompts: list[Prompt] = []
        drawn: dict[int, Prompt] = {}
        fresh: set[int] = set()  # since all usable rows had their turn; everything below is local to stay stateless
        too_long: set[int] = set()
        while len(prompts) < count:
            index = self._row_at(position)
            position += 1
            if index in fresh or index in too_long:
                continue
            prompt = drawn.get(index) or self._get_usable(index)
            if prompt is None:
                too_long.add(index)
            else:
                drawn[index] = prompt
                fresh.add(index)
                prompts.append(prompt)
            if len(too_long) == len(self):
                raise self._nothing_usable()
            if len(fresh) + len(too_long) == len(self):
                fresh.clear()
        return prompts, position

    def _row_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self))
        if not self._shuffle:
            return offset
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            import numpy as np

            # Sorting raw bits: numpy promises them for ever, while `permutation` may change between versions.
            bits = np.random.PCG64([self._seed, epoch]).random_raw(len(self))
            self._epoch_order = (epoch, np.argsort(bits, kind="stable"))
        return int(self._epoch_order[1][offset])

    def _get_usable(self, index: int) -> Prompt | None:
        try:
            prompt = self[index]
        except PromptTooLong as error:
            if not self._skip_long:
                raise
            if not self._too_long:
                logger.warning("%s; such rows are skipped and counted (said once)", error)
            self._too_long.add(index)
            return None
        self._too_long.discard(index)  # a resumed run may allow longer ones than it did
        return prompt

    def _nothing_usable(self) -> ValueError:
        return ValueError(f"all {len(self)} prompts are longer than {self._limit}")

    def _content(self, row: dict[str, Any], index: int) -> str | list[Message]:
        """What the user wrote, in the row's form."""
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return prompt if self._prompt_template is None else self._fill_in(row, index)
        # Arrow gives every message the keys of all others, as None; templates test for their presence.
        messages = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in prompt]
        if self._system_prompt is None:
            return messages
        return [{"role": "system", "content": self._system_prompt}, *messages]

    def _fill_in(self, row: dict[str, Any], index: int) -> str:
        assert self._prompt_template is not None
        try:
            return self._prompt_template.format(**row)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"row {index}: prompt_template {self._prompt_template!r} cannot be filled in: {error}"
            ) from error

    def _check_prompt(self, prompt: Any, index: int) -> None:
        """Raises ValueError, naming the row, for what is no text and no chat, or does not fit the options."""
        if not isinstance(prompt, (str, list)) or not prompt:
            raise ValueError(
                f"row {index}: the prompt must be a text or chat messages, and not empty; it is {prompt!r}"
            )
        if isinstance(prompt, str):
            return
        if self._prompt_template is not None:
            raise ValueError(f"row {index}: prompt_template needs a plain-text prompt, this one is a chat")
        if self._refuse_chat:
            raise ValueError(f"row {index}: the prompt is a chat, and chat='never'")
        for message in prompt:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise ValueError(
                    f"row {index}: a chat message must be {{'role': ..., 'content': ...}}, not {message!r}"
                )
        if self._system_prompt is not None and prompt[0]["role"] == "system":
            raise ValueError(f"row {index}: the chat has a system message of its own, and system_prompt is set too")

    def _tokenize(self, content: str | list[Message], index: int) -> list[int]:
        if isinstance(content, str) and not self._wrap:
            token_ids = self._tokenizer(content, add_special_tokens=True).input_ids
        else:
            token_ids = self._apply_chat_template(content, index)
        if not token_ids:
            raise ValueError(f"row {index}: the prompt {content!r} has no tokens")
        return list(token_ids)

    def _apply_chat_template(self, content: str | list[Message], index: int) -> list[int]:
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"row {index}: the prompt is a chat, and the tokenizer has no chat template: "
                "use one that has, or plain-text prompts with chat='never' and no system_prompt"
            )
        messages = content
        if isinstance(content, str):
            messages = [{"role": "user", "content": content}]
            if self._system_prompt is not None:
                messages.insert(0, {"role": "system", "content": self._system_prompt})
        continued = messages[-1]["role"] == "assistant"  # type: ignore[index]
        try:
            token_ids: Any = self._tokenizer.apply_chat_template(
                messages,  # type: ignore[arg-type]
                tokenize=True,
                return_dict=False,
                add_generation_prompt=not continued,
                continue_final_message=continued,
                **self._chat_template_kwargs,
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(f"row {index}: the chat template refused the prompt: {error}") from error
        return token_ids


def _check_template(template: str, columns: list[str]) -> None:
    """Raises ValueError for a template that no row with `columns` can fill in."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"prompt_template {template!r}: {error}; braces meant as text are doubled: {{{{}}}}"
        ) from error
    for name in fields:
        if re.split(r"[.\[]", name)[0] not in columns:
            raise ValueError(
                f"prompt_template {template!r}: no column {name!r} in {columns}; braces meant as text are doubled: "
                "\\boxed{{}}"
            )
