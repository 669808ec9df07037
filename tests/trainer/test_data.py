"""Rows to prompts, and the endless stream of draws."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.data import PromptSource, PromptTooLong, load_rows

GSM8K = Path(__file__).parents[1] / "data" / "gsm8k_train.jsonl"
ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+3=", "answer": "5"}]
CHAT = [{"role": "user", "content": "hi"}]


def source_of(rows: Any, tokenizer: Any, **options: Any) -> PromptSource:
    options = {"max_prompt_length": 10_000, "vocab_size": 105, **options}
    return PromptSource(load_rows(rows), tokenizer, **options)


def test_gsm8k_lines_become_prompts(tiny_tokenizer: Any) -> None:
    lines = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    rows = load_rows(GSM8K, column_mapping={"question": "prompt"})
    source = PromptSource(rows, tiny_tokenizer, max_prompt_length=10_000, vocab_size=105)
    assert len(source) == len(lines) == 48
    for i, line in enumerate(lines):
        prompt = source[i]
        assert prompt.index == i
        assert prompt.content == line["question"]
        assert prompt.columns == {"answer": line["answer"]}
        assert prompt.token_ids == tiny_tokenizer(line["question"]).input_ids
        assert prompt.token_ids[0] == tiny_tokenizer.bos_token_id


def decode(tokenizer: Any, prompt: Any) -> str:
    return tokenizer.decode(prompt.token_ids)


def test_chat_prompts(tiny_tokenizer: Any) -> None:
    prompt = source_of([{"prompt": CHAT, "answer": "x"}], tiny_tokenizer)[0]
    assert decode(tiny_tokenizer, prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.content == CHAT
    assert prompt.columns == {"answer": "x"}


def test_messages_do_not_get_each_others_keys(tiny_tokenizer: Any) -> None:
    named = [{"role": "user", "content": "hi", "name": "Bo"}]
    source = source_of([{"prompt": CHAT}, {"prompt": named}], tiny_tokenizer)
    assert source[0].content == CHAT
    assert source[1].content == named
    silent = [*CHAT, {"role": "assistant", "content": None, "calls": ["f"]}, {"role": "tool", "content": "3"}]
    assert source_of([{"prompt": silent}], tiny_tokenizer)[0].content == silent


def test_assistants_message_is_continued(tiny_tokenizer: Any) -> None:
    prompt = source_of([{"prompt": [*CHAT, {"role": "assistant", "content": "So"}]}], tiny_tokenizer)[0]
    assert decode(tiny_tokenizer, prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nSo"


@pytest.mark.parametrize("chat", ["always", True])
def test_text_wrapped_as_chat_stays_text_for_the_rewards(tiny_tokenizer: Any, chat: Any) -> None:
    prompt = source_of([{"prompt": "hi"}], tiny_tokenizer, chat=chat)[0]
    assert decode(tiny_tokenizer, prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.content == "hi"


def test_system_prompt_makes_a_chat(tiny_tokenizer: Any) -> None:
    system = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for row in ("hi", CHAT):
        prompt = source_of([{"prompt": row}], tiny_tokenizer, system_prompt="Be brief.")[0]
        assert decode(tiny_tokenizer, prompt) == system
        assert prompt.content == (row if row == "hi" else [{"role": "system", "content": "Be brief."}, *CHAT])
    own = [{"role": "system", "content": "x"}, *CHAT]
    with pytest.raises(ValueError, match="row 0: the chat has a system message of its own"):
        source_of([{"prompt": own}], tiny_tokenizer, system_prompt="Be brief.")[0]
    with pytest.raises(ValueError, match="leave one of them out"):
        source_of([{"prompt": "hi"}], tiny_tokenizer, system_prompt="Be brief.", chat=False)


def test_prompt_template(tiny_tokenizer: Any) -> None:
    rows = [{"prompt": "1+1={}", "unit": {"name": "kg"}}]
    template = "{prompt} in {unit[name]}, in \\boxed{{}}"
    prompt = source_of(rows, tiny_tokenizer, prompt_template=template)[0]
    assert prompt.content == "1+1={} in kg, in \\boxed{}"
    assert decode(tiny_tokenizer, prompt) == "<bos>1+1={} in kg, in \\boxed{}"
    for bad in ("{prompt} \\boxed{}", "{promt}", "{prompt", "{prompt} {0}"):
        with pytest.raises(ValueError, match=r"prompt_template .*doubled"):
            source_of(rows, tiny_tokenizer, prompt_template=bad)
    with pytest.raises(ValueError, match="row 0: prompt_template needs a plain-text prompt"):
        source_of([{"prompt": CHAT}], tiny_tokenizer, prompt_template="{prompt}")[0]


def test_chat_template_kwargs(helpers: Any) -> None:
    tokenizer = helpers.make_tokenizer("{% if shout %}HEY{% else %}hey{% endif %}")
    assert decode(tokenizer, source_of([{"prompt": CHAT}], tokenizer, chat_template_kwargs={"shout": True})[0]) == "HEY"
    assert decode(tokenizer, source_of([{"prompt": CHAT}], tokenizer)[0]) == "hey"


def test_chat_without_a_template(helpers: Any) -> None:
    tokenizer = helpers.make_tokenizer(None)
    assert source_of([{"prompt": "hi"}], tokenizer)[0].content == "hi"
    for rows, options in (([{"prompt": CHAT}], {}), ([{"prompt": "hi"}], {"chat": "always"})):
        with pytest.raises(ValueError, match=r"row 0: .*the tokenizer has no chat template"):
            source_of(rows, tokenizer, **options)[0]
    with pytest.raises(ValueError, match="row 0: the prompt is a chat, and chat='never'"):
        source_of([{"prompt": CHAT}], tokenizer, chat="never")[0]


def test_template_that_refuses(helpers: Any) -> None:
    tokenizer = helpers.make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="row 0: the chat template refused the prompt: roles must alternate"):
        source_of([{"prompt": CHAT}], tokenizer)[0]


@pytest.mark.parametrize("bad", [None, "", []])
def test_rows_without_a_prompt(tiny_tokenizer: Any, bad: Any) -> None:
    """Found when the source is made, not hours later when the row is drawn."""
    rows = [{"prompt": CHAT if bad == [] else "hi"}, {"prompt": bad}]
    with pytest.raises(ValueError, match="row 1: the prompt must be a text or chat messages"):
        source_of(rows, tiny_tokenizer)


def test_prompts_of_another_type(tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="row 0: the prompt must be a text or chat messages, and not empty; it is 3"):
        source_of([{"prompt": 3}], tiny_tokenizer)[0]
    for bad in (["hi"], [{"content": "hi"}], [{"role": "user"}]):
        with pytest.raises(ValueError, match="row 0: a chat message must be"):
            source_of([{"prompt": bad}], tiny_tokenizer)[0]


def test_prompt_without_tokens(helpers: Any) -> None:
    tokenizer = helpers.make_tokenizer("{{ '' }}")
    with pytest.raises(ValueError, match=r"row 0: the prompt .* has no tokens"):
        source_of([{"prompt": CHAT}], tokenizer)[0]


def test_tokenizer_of_another_model(tiny_tokenizer: Any) -> None:
    largest = max(tiny_tokenizer("hi").input_ids)
    assert source_of([{"prompt": "hi"}], tiny_tokenizer, vocab_size=largest + 1)[0].content == "hi"
    with pytest.raises(ValueError, match=f"row 0: token id {largest} is outside the model's vocabulary of {largest}"):
        source_of([{"prompt": "hi"}], tiny_tokenizer, vocab_size=largest)[0]


def test_bad_options_and_indices(tiny_tokenizer: Any) -> None:
    for options in ({"chat": "maybe"}, {"long_prompts": "cut"}):
        with pytest.raises(ValueError, match="expected auto/always/never and skip/error"):
            source_of(ROWS, tiny_tokenizer, **options)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            source_of(ROWS, tiny_tokenizer)[index]


# -------------------------------------------------------------------------------------------------------- long prompts

MIXED = [{"prompt": "x" * (30 if i % 3 == 0 else 5), "i": i} for i in range(12)]


def test_long_prompts_are_skipped_and_counted(tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    source = source_of(MIXED, tiny_tokenizer, max_prompt_length=10)
    with caplog.at_level(logging.WARNING, "fastgrpo.data"):
        prompts = list(source.usable())
        again = list(source.usable(limit=3))
    assert [p.index for p in prompts] == [i for i in range(12) if i % 3]
    assert [p.index for p in again] == [1, 2, 4]
    assert source.too_long == [0, 3, 6, 9]
    assert [r.getMessage() for r in caplog.records] == [
        "row 0: the prompt has 31 tokens, more than max_prompt_length=10; such rows are skipped and counted (said once)"
    ]
    with pytest.raises(PromptTooLong, match="row 3: the prompt has 31 tokens"):
        source[3]


def test_record_of_long_prompts_is_restored_and_decides_nothing(tiny_tokenizer: Any) -> None:
    """A run resumed with a larger max_prompt_length draws the rows it could not draw before."""
    source = source_of(MIXED, tiny_tokenizer, max_prompt_length=100, shuffle=False)
    source.too_long = [0, 3]
    assert source.too_long == [0, 3]
    assert [prompt.index for prompt in source.draw(0, 3)[0]] == [0, 1, 2]
    assert source.too_long == [3]


def test_longest_allowed_prompt_passes(tiny_tokenizer: Any) -> None:
    assert len(source_of([{"prompt": "x" * 9}], tiny_tokenizer, max_prompt_length=10)[0].token_ids) == 10


def test_long_prompts_as_errors(tiny_tokenizer: Any) -> None:
    source = source_of(MIXED, tiny_tokenizer, max_prompt_length=10, long_prompts="error", shuffle=False)
    with pytest.raises(ValueError, match="row 0: the prompt has 31 tokens, more than max_prompt_length=10"):
        source.draw(0, 1)


def test_nothing_usable_ends(tiny_tokenizer: Any) -> None:
    source = source_of(MIXED, tiny_tokenizer, max_prompt_length=2)
    with pytest.raises(ValueError, match="all 12 prompts are longer than max_prompt_length=2"):
        source.draw(5, 1)
    with pytest.raises(ValueError, match="all 12 prompts"):
        list(source.usable())
    assert source.too_long == list(range(12))


# ---------------------------------------------------------------------------------------------------------- the stream


def indices(source: PromptSource, position: int, counts: list[int]) -> tuple[list[list[int]], int]:
    batches = []
    for count in counts:
        prompts, position = source.draw(position, count)
        batches.append([prompt.index for prompt in prompts])
    return batches, position


def test_an_epoch_has_every_row_once_and_epochs_differ(tiny_tokenizer: Any) -> None:
    rows = [{"prompt": str(i)} for i in range(50)]
    source = source_of(rows, tiny_tokenizer, seed=1)
    batches, position = indices(source, 0, [10] * 10)
    epochs = [[i for batch in half for i in batch] for half in (batches[:5], batches[5:])]
    assert position == 100
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(50))
    assert indices(source_of(rows, tiny_tokenizer, seed=2), 0, [50])[0][0] != epochs[0]


def test_the_order_is_the_same_for_ever(tiny_tokenizer: Any) -> None:
    """A checkpoint written by an earlier version must go on with the same data: these numbers must not change."""
    source = source_of([{"prompt": str(i)} for i in range(8)], tiny_tokenizer, seed=42)
    assert indices(source, 0, [8, 8]) == ([[4, 1, 3, 6, 0, 7, 2, 5], [1, 2, 5, 3, 6, 0, 4, 7]], 16)


def test_without_shuffling(tiny_tokenizer: Any) -> None:
    source = source_of(MIXED, tiny_tokenizer, max_prompt_length=10, shuffle=False)
    assert indices(source, 0, [3, 3, 4]) == ([[1, 2, 4], [5, 7, 8], [10, 11, 1, 2]], 15)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([2, 30]), min_size=1, max_size=12).filter(lambda lengths: 2 in lengths),
    counts=st.lists(st.integers(1, 15), min_size=1, max_size=6),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 100),
    shuffle=st.booleans(),
)
def test_stream(helpers: Any, lengths: list[int], counts: list[int], seed: int, start: int, shuffle: bool) -> None:
    tokenizer = helpers.make_tokenizer()
    rows = Dataset.from_dict({"prompt": ["x" * length for length in lengths]})

    def fresh() -> PromptSource:
        return PromptSource(rows, tokenizer, max_prompt_length=10, vocab_size=105, seed=seed, shuffle=shuffle)

    usable = {i for i, length in enumerate(lengths) if length == 2}
    source, position = fresh(), start
    for count in counts:
        prompts, after = source.draw(position, count)
        drawn = [prompt.index for prompt in prompts]
        # A source that has drawn before, and one that has not (a resumed run), agree.
        assert [prompt.index for prompt in fresh().draw(position, count)[0]] == drawn
        assert fresh().draw(position, count)[1] == after
        assert after >= position + count
        assert set(drawn) <= usable
        times = Counter(dict.fromkeys(usable, 0))
        times.update(drawn)
        assert max(times.values()) - min(times.values()) <= 1  # so no row twice unless count > usable rows
        assert sum(times.values()) == count
        position = after


def test_large_data_set_is_not_tokenized_in_advance(tiny_tokenizer: Any) -> None:
    calls = []

    class Counting:
        chat_template = None

        def __call__(self, text: str, **options: Any) -> Any:
            calls.append(text)
            return tiny_tokenizer(text, **options)

    source = PromptSource(
        Dataset.from_dict({"prompt": ["hi"] * 100_000}),
        Counting(),  # type: ignore[arg-type]
        max_prompt_length=10,
        vocab_size=105,
    )
    assert len(source.draw(70_000, 8)[0]) == 8
    assert len(calls) == 8
