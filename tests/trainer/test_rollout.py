"""The loop engine: log-probs of the true sampling distribution, ends, seeds, groups, refilling, bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.config import GRPOConfig
from fastgrpo.errors import RunError
from fastgrpo.packing import pack
from fastgrpo.policy import Policy, load_policy
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout import make_engine
from fastgrpo.rollout.engine import choose_engine
from fastgrpo.rollout.loop import LoopEngine


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return load_policy(str(tiny_model_dir), None, GRPOConfig())


def _prompts(policy: Policy, *texts: str) -> list[Prompt]:
    return [Prompt(i, t, policy.tokenizer(t).input_ids) for i, t in enumerate(texts)]


def _engine(policy: Policy, batch_size: int = 64) -> LoopEngine:
    return LoopEngine(policy.model, policy.tokenizer, batch_size=batch_size)


def _plain_engine(policy: Policy, batch_size: int = 64) -> LoopEngine:
    engine = _engine(policy, batch_size)
    engine.reason = "asked for"
    return engine


def _tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [r.token_ids for r in rollouts]


def _assert_true_logprobs(policy: Policy, rollouts: list[Rollout], temperature: float = 1.0) -> None:
    for batch in pack(rollouts, max_tokens=1000):
        expected = policy.logprobs(batch, temperature)[0]
        torch.testing.assert_close(batch.sampling_logprob, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [_engine, _plain_engine])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_full_forward(policy: Policy, temperature: float, make: Any) -> None:
    engine = make(policy)
    prompts = _prompts(policy, "a", "hello there", "12+34=", "xyz")
    rollouts = engine.generate(prompts, 5, Sampling(24, temperature, seed=3))
    assert engine.reason == (None if make is _engine else "asked for")
    _assert_true_logprobs(policy, rollouts, temperature)


@pytest.mark.parametrize("make", [_engine, _plain_engine])
def test_a_group_stands_together_in_the_prompts_order(policy: Policy, make: Any) -> None:
    prompts = _prompts(policy, "a long prompt comes first", "b", "middle one")
    rollouts = make(policy, batch_size=4).generate(prompts, 3, Sampling(6))
    assert [r.group for r in rollouts] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [r.prompt for r in rollouts[::3]] == prompts
    assert all(1 <= r.num_tokens <= 6 for r in rollouts)
    _assert_true_logprobs(policy, rollouts)


@pytest.mark.parametrize("make", [_engine, _plain_engine])
def test_a_completion_ends_with_its_end_token_or_at_the_limit(policy: Policy, make: Any) -> None:
    eos = policy.tokenizer.eos_token_id
    rollouts = make(policy).generate(_prompts(policy, "ab", "cdef"), 32, Sampling(40, 1.5, seed=1))
    finished = [r for r in rollouts if r.finished]
    cut = [r for r in rollouts if not r.finished]
    assert finished
    assert cut
    assert all(r.token_ids[-1] == eos and eos not in r.token_ids[:-1] for r in finished)
    assert all(r.num_tokens == 40 and eos not in r.token_ids for r in cut)
    assert all(torch.isfinite(r.sampling_logprob).all() and len(r.sampling_logprob) == r.num_tokens for r in rollouts)
    assert all(r.text == policy.tokenizer.decode(r.token_ids, skip_special_tokens=True) for r in rollouts)


def test_further_stop_tokens(policy: Policy) -> None:
    stops = tuple(range(5, 60))
    rollouts = _engine(policy).generate(_prompts(policy, "ab"), 16, Sampling(50, stop_token_ids=stops))
    assert all(r.finished == (r.token_ids[-1] in (*stops, policy.tokenizer.eos_token_id)) for r in rollouts)
    assert any(r.token_ids[-1] in stops for r in rollouts)
    assert not any(t in stops for r in rollouts for t in r.token_ids[:-1])


@pytest.mark.parametrize("make", [_engine, _plain_engine])
def test_a_seed_repeats_bit_for_bit_and_another_differs(policy: Policy, make: Any) -> None:
    prompts = _prompts(policy, "ab", "cdef", "g")
    first, again, other = (make(policy, 7).generate(prompts, 8, Sampling(12, seed=s)) for s in (5, 5, 6))
    assert _tokens(first) == _tokens(again)
    assert all(torch.equal(a.sampling_logprob, b.sampling_logprob) for a, b in zip(first, again, strict=True))
    assert _tokens(first) != _tokens(other)


def test_tokens_do_not_depend_on_the_batch(policy: Policy) -> None:
    """Whatever is decoded beside a sample, and by whichever path, its random numbers are its own."""
    prompts = _prompts(policy, "ab", "cdef", "a longer one", "z")
    sampling = Sampling(20, 1.3, seed=5, stop_token_ids=(5, 6))
    reference = _tokens(_engine(policy, 64).generate(prompts, 6, sampling))
    assert len({len(t) for t in reference}) > 3
    for batch_size in (1, 5, 9):
        assert _tokens(_engine(policy, batch_size).generate(prompts, 6, sampling)) == reference
    assert _tokens(_plain_engine(policy).generate(prompts, 6, sampling)) == reference
    assert _tokens(_engine(policy).generate(prompts[:2], 6, sampling)) == reference[:12]


@pytest.mark.parametrize("make", [_engine, _plain_engine])
def test_greedy_tokens_are_those_of_generate(policy: Policy, make: Any) -> None:
    prompts = _prompts(policy, "ab", "cdefgh", "1+2=")
    for temperature in (0.0, 1e-4):
        rollouts = make(policy).generate(prompts, 2, Sampling(10, temperature))
        for prompt, pair in zip(prompts, zip(rollouts[::2], rollouts[1::2], strict=True), strict=True):
            ids = torch.tensor([prompt.token_ids])
            expected = policy.model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :].tolist()
            assert pair[0].token_ids == pair[1].token_ids == expected
            if temperature == 0:
                assert torch.equal(pair[0].sampling_logprob, torch.zeros(len(expected)))


def test_rows_that_end_are_replaced_at_once(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 96 samples in 8 slots few decode alone, and a long prompt fits beside short ones."""
    from fastgrpo.rollout.loop import decoder

    sizes = []
    forward = decoder.forward
    monkeypatch.setattr(
        decoder,
        "forward",
        lambda body, step, tokens: (sizes.append(len(tokens)), forward(body, step, tokens))[1],
    )
    prompts = _prompts(policy, "ab", "c" * 90, "defg")
    rollouts = _engine(policy, 8).generate(prompts, 32, Sampling(80, 1.5, 2, (5, 6, 7)))
    assert len({r.num_tokens for r in rollouts}) > 10
    assert max(sizes) == 8
    total = sum(r.num_tokens for r in rollouts) - len(rollouts)  # every sample's first token comes from its prompt
    assert sum(sizes) == total
    assert sum(s for s in sizes if s >= 7) > 0.8 * total
    _assert_true_logprobs(policy, rollouts, 1.5)


def test_completions_longer_than_the_smallest_class(policy: Policy) -> None:
    """Rows move from class to class while others leave, and prompts of several classes stand beside one another."""
    prompts = _prompts(policy, "ab", "x" * 70, "y" * 150, "q")
    rollouts = _engine(policy, 11).generate(prompts, 6, Sampling(200, 1.2, seed=4, stop_token_ids=(5,)))
    assert max(r.num_tokens for r in rollouts) > 128
    assert min(r.num_tokens for r in rollouts) < 64
    _assert_true_logprobs(policy, rollouts, 1.2)


def test_ten_times_the_prompts_take_the_same_memory(policy: Policy) -> None:
    few, many = _engine(policy, 6), _engine(policy, 6)
    sampling = Sampling(30, 1.5, seed=1)
    few.generate(_prompts(policy, *("abc" * (i + 1) for i in range(6))), 4, sampling)
    many.generate(_prompts(policy, *("abc" * (i % 6 + 1) for i in range(60))), 4, sampling)
    assert 0 < many.cache_bytes <= few.cache_bytes


def test_training_mode_is_left_and_restored(tiny_model_dir: Path) -> None:
    """Under train() with checkpointing, transformers drops the cache and samples from the wrong distribution."""
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig(gradient_checkpointing=True))
    policy.model.train()
    rollouts = _engine(policy).generate(_prompts(policy, "ab", "cdefg"), 4, Sampling(16))
    assert policy.model.training
    _assert_true_logprobs(policy, rollouts)


def test_sampling_follows_the_weights(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    engine, choice = make_engine(GRPOConfig(), policy)
    assert choice == "rollouts by loop (the fastest on a CPU)"
    prompts = _prompts(policy, "ab")
    before = _tokens(engine.generate(prompts, 4, Sampling(12)))
    with torch.no_grad():
        for _, p in policy.trainable():
            p.mul_(-1)
    engine.sync(policy)
    rollouts = engine.generate(prompts, 4, Sampling(12))
    assert _tokens(rollouts) != before
    _assert_true_logprobs(policy, rollouts)


def test_unknown_engine(policy: Policy) -> None:
    with pytest.raises(ValueError, match="rollout_engine='fast' must be auto, loop, transformers, vllm, vllm_server"):
        choose_engine("fast", "cpu")
    assert choose_engine("vllm_server", "cpu") == ("vllm_server", "as asked for")
    assert choose_engine("auto", "cpu")[0] == "loop"


@pytest.mark.parametrize("make", [_engine, _plain_engine])
def test_single_completions_single_prompts_single_tokens(policy: Policy, make: Any) -> None:
    engine = make(policy, batch_size=1)
    assert len(engine.generate(_prompts(policy, "ab", "c"), 1, Sampling(1))) == 2
    assert [r.num_tokens for r in engine.generate(_prompts(policy, "ab", "c"), 3, Sampling(1))] == [1] * 6
    rollouts = engine.generate(_prompts(policy, "ab"), 64, Sampling(3))
    assert len(rollouts) == 64
    _assert_true_logprobs(policy, rollouts)
    assert engine.generate([], 4, Sampling(3)) == []


@pytest.mark.parametrize("make", [_engine, _plain_engine])
def test_a_batch_that_takes_too_long_is_an_error_that_says_so(policy: Policy, make: Any) -> None:
    engine = make(policy)
    engine.timeout = 0.0
    with pytest.raises(RunError, match=r"longer than rollout_timeout=0 s: 0 of 2 prompts were done"):
        engine.generate(_prompts(policy, "ab", "c"), 2, Sampling(8))
    assert not policy.model.training
    engine.timeout = None
    assert len(engine.generate(_prompts(policy, "ab", "c"), 2, Sampling(8))) == 4


@pytest.mark.parametrize("make", [_engine, _plain_engine])
def test_groups_are_handed_over_as_they_are_complete(policy: Policy, make: Any) -> None:
    seen: list[list[Any]] = []
    engine = make(policy, 4)
    rollouts = engine.generate(_prompts(policy, "ab", "cde", "f"), 3, Sampling(12, 1.5), seen.append)
    assert sorted(group[0].group for group in seen) == [0, 1, 2]
    for group in seen:
        members = [r for r in rollouts if r.group == group[0].group]
        assert all(a is b for a, b in zip(group, members, strict=True))
        assert all(r.weights_version == engine.version for r in group)
