"""What ends a completion: strings in the text of any kind of tokenizer, the same in every engine of this process."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastgrpo.config import ConfigError, GRPOConfig
from fastgrpo.policy import Policy, load_policy
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout.loop import LoopEngine
from fastgrpo.rollout.loop import engine as loop_engine
from fastgrpo.rollout.stopping import Stopping

_TEXT = [
    "The answer is 42.\n\nQuestion: what is <answer>12</answer>?",
    "Über naïve café — 日本語のテキスト。\n\n### End\n",
    "aaa aab abab </answer> answer answers\n\n\n",
] * 5


def _byte_level() -> Any:
    """Bytes merged into pieces, as of Qwen and Llama 3: a character may be spread over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _metaspace() -> Any:
    """Words that carry the space before them, as of Llama 2: the first one's is not decoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=200))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _words() -> Any:
    """Decoded with spaces between them."""
    words = sorted({w for text in _TEXT for w in text.split()})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [_byte_level, _metaspace, _words])
def test_the_end_is_where_the_text_first_holds_a_string(make: Any) -> None:
    """Against decoding every prefix, of texts that hold the strings and of random tokens."""
    tokenizer, rng = make(), random.Random(0)
    strings = ("</answer>", "\n\n", "日本", "is 42", "s a", "é")
    written = [tokenizer(text, add_special_tokens=False).input_ids for text in _TEXT[:3]]
    drawn = [[rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 60))] for _ in range(150)]
    mixed = [rng.choice(written)[rng.randrange(9) :] + d for d in drawn[:50]]
    found = 0
    for k in range(len(strings)):
        stopping = Stopping(tokenizer, set(), strings[k : k + 2])
        assert 0 < len(stopping.candidates) < len(tokenizer)
        for ids in written + drawn + mixed:
            prefixes = (tokenizer.decode(ids[:i], skip_special_tokens=True) for i in range(1, len(ids) + 1))
            end = next((i for i, t in enumerate(prefixes, 1) if any(s in t for s in strings[k : k + 2])), None)
            assert stopping.end_of(ids) == end, (strings[k : k + 2], tokenizer.decode(ids))
            found += end is not None
    assert found > 50


def test_a_character_may_take_several_tokens() -> None:
    tokenizer = _byte_level()
    for string in ("🎉" * 6, "คำตอบสุดท้าย", "###한국어답변끝"):
        ids = tokenizer(f"hello {string} world", add_special_tokens=False).input_ids
        prefixes = (tokenizer.decode(ids[:i]) for i in range(1, len(ids) + 1))
        want = next(i for i, text in enumerate(prefixes, 1) if string in text)
        assert Stopping(tokenizer, set(), (string,)).end_of(ids) == want


def test_tokenizers_with_holes_and_without_letters() -> None:
    """The last id is beyond the number of tokens; "a" is unknown here."""
    words = {"<unk>": 0, "12": 1, "+": 2, "34": 3, "=": 4, "46": 9}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    for string, want in (("46", 5), ("= 4", 5), ("12 + ", 3), ("never", None)):
        assert Stopping(fast, set(), (string,)).end_of([1, 2, 3, 4, 9, 1]) == want


def test_special_tokens_have_no_text(tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"stop_strings=\['<\|im_end\|>'\] are special tokens.*stop_token_ids"):
        Stopping(tiny_tokenizer, set(), ("a", "<|im_end|>"))


def test_tokens_end_it_too(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("abcab", add_special_tokens=False).input_ids
    assert Stopping(tiny_tokenizer, {ids[2]}).end_of(ids) == 3
    assert Stopping(tiny_tokenizer, {ids[2]}, ("b",)).end_of(ids) == 2
    assert Stopping(tiny_tokenizer, set()).end_of(ids) is None
    assert Stopping(tiny_tokenizer, set(), ("ca",)).end_of(ids) == 4


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return load_policy(str(tiny_model_dir), None, GRPOConfig())


def _loop(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Any:
    return LoopEngine(policy.model, policy.tokenizer, batch_size=13)


def _plain(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Any:
    engine = LoopEngine(policy.model, policy.tokenizer)
    engine.reason = "asked for"
    return engine


def _slots(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(loop_engine, "why_not_slots", lambda shape: None)
    return LoopEngine(policy.model, policy.tokenizer, batch_size=13)


def _transformers(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Any:
    from fastgrpo.rollout.transformers import OLDEST, TransformersEngine

    pytest.importorskip("transformers", OLDEST)
    return TransformersEngine(policy.model, policy.tokenizer)


def _common_pair(rollouts: list[Rollout]) -> str:
    """Two characters that several of the texts hold, not at their beginning."""
    pairs: dict[str, int] = {}
    for r in rollouts:
        for pair in {r.text[i : i + 2] for i in range(2, len(r.text) - 2)}:
            pairs[pair] = pairs.get(pair, 0) + 1
    return max(sorted(pairs), key=lambda pair: pairs[pair])


@pytest.mark.parametrize("make", [_loop, _plain, _slots, _transformers])
def test_engines_stop_at_strings(policy: Policy, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sampled is what would have been without, up to the end."""
    engine = make(policy, monkeypatch)
    prompts = [Prompt(i, t, policy.tokenizer(t).input_ids) for i, t in enumerate(("ab", "hello", "x"))]
    free = engine.generate(prompts, 12, Sampling(30, seed=4))
    string = _common_pair(free)
    rollouts = engine.generate(prompts, 12, Sampling(30, seed=4, stop_strings=(string, "never so")))
    stopped = 0
    for r, long in zip(rollouts, free, strict=True):
        assert r.text == policy.tokenizer.decode(r.token_ids, skip_special_tokens=True)
        assert string not in policy.tokenizer.decode(r.token_ids[:-1], skip_special_tokens=True)
        assert r.finished == (string in r.text or r.token_ids[-1] in policy_ends(policy))
        assert r.finished or r.num_tokens == 30
        assert len(r.sampling_logprob) == r.num_tokens
        if make is not _transformers:  # whose generator serves all rows
            assert r.token_ids == long.token_ids[: r.num_tokens]
        stopped += string in r.text
    assert stopped >= 2


def policy_ends(policy: Policy) -> set[int]:
    from fastgrpo.rollout.loop import end_tokens_of

    return end_tokens_of(policy.model, policy.tokenizer)


def test_empty_strings_are_refused() -> None:
    with pytest.raises(ConfigError, match="stop_strings"):
        GRPOConfig(stop_strings=["a", ""])
    assert GRPOConfig(stop_strings=["\n\n"]).stop_strings == ["\n\n"]
