"""The plain loop: log-probs of the true sampling distribution, ends, seeds, groups, compaction."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.config import GRPOConfig
from fastgrpo.packing import pack
from fastgrpo.policy import Policy, load_policy
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout import make_engine
from fastgrpo.rollout.loop import LoopEngine, sample


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return load_policy(str(tiny_model_dir), None, GRPOConfig())


def _prompts(policy: Policy, *texts: str) -> list[Prompt]:
    return [Prompt(i, t, policy.tokenizer(t).input_ids) for i, t in enumerate(texts)]


def _engine(policy: Policy, batch_size: int = 64) -> LoopEngine:
    return LoopEngine(policy.model, policy.tokenizer, batch_size=batch_size)


def _tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [r.token_ids for r in rollouts]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_full_forward(policy: Policy, temperature: float) -> None:
    prompts = _prompts(policy, "a", "hello there", "12+34=", "xyz")
    rollouts = _engine(policy).generate(prompts, 5, Sampling(24, temperature, seed=3))
    for batch in pack(rollouts, max_tokens=200):
        expected = policy.logprobs(batch, temperature)[0]
        torch.testing.assert_close(batch.sampling_logprob, expected, rtol=0, atol=1e-5)


def test_a_group_stands_together_in_the_prompts_order(policy: Policy) -> None:
    prompts = _prompts(policy, "a long prompt comes first", "b", "middle one")
    rollouts = _engine(policy, batch_size=4).generate(prompts, 3, Sampling(6))
    assert [r.group for r in rollouts] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [r.prompt for r in rollouts[::3]] == prompts
    assert all(1 <= r.num_tokens <= 6 for r in rollouts)


def test_a_completion_ends_with_its_end_token_or_at_the_limit(policy: Policy) -> None:
    eos = policy.tokenizer.eos_token_id
    rollouts = _engine(policy).generate(_prompts(policy, "ab", "cdef"), 32, Sampling(40, 1.5, seed=1))
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


def test_a_seed_repeats_and_another_differs(policy: Policy) -> None:
    prompts = _prompts(policy, "ab", "cdef")
    first, again, other = (_tokens(_engine(policy).generate(prompts, 8, Sampling(12, seed=s))) for s in (5, 5, 6))
    assert first == again
    assert first != other


def test_cold_sampling_gives_the_greedy_tokens_of_generate(policy: Policy) -> None:
    prompts = _prompts(policy, "ab", "cdefgh", "1+2=")
    rollouts = _engine(policy).generate(prompts, 2, Sampling(10, temperature=1e-4))
    for prompt, pair in zip(prompts, zip(rollouts[::2], rollouts[1::2], strict=True), strict=True):
        ids = torch.tensor([prompt.token_ids])
        expected = policy.model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :].tolist()
        assert pair[0].token_ids == pair[1].token_ids == expected


def test_sampled_tokens_follow_the_distribution() -> None:
    """Chi-square of 40,000 draws against softmax(logits / T), at the 0.1 % level."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1])
    tokens, logprob = sample(logits.expand(40_000, 5), 0.8, torch.Generator().manual_seed(0))
    expected = torch.softmax(logits / 0.8, 0)
    counts = torch.bincount(tokens, minlength=5)
    chi_square = ((counts - 40_000 * expected) ** 2 / (40_000 * expected)).sum().item()
    assert chi_square < 18.47  # 99.9 % quantile for 4 degrees of freedom
    torch.testing.assert_close(logprob.exp(), expected[tokens])


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((2000, 4), -math.inf)
    logits[:, 2] = 0.0
    tokens, logprob = sample(logits, 1.0, torch.Generator().manual_seed(0))
    assert (tokens == 2).all()
    assert (logprob == 0).all()


def test_rows_that_ended_leave_without_changing_the_others(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs of the survivors are still those of a full forward after the batch has shrunk."""
    from fastgrpo.rollout import loop

    shrunk = []
    compact = loop._Rows.compact
    monkeypatch.setattr(loop._Rows, "compact", lambda rows: (shrunk.append(len(rows.index)), compact(rows))[1])
    rollouts = _engine(policy).generate(_prompts(policy, "ab", "c"), 32, Sampling(60, 1.5, 2, (5, 6, 7)))
    assert shrunk
    for batch in pack(rollouts, max_tokens=1000):
        torch.testing.assert_close(batch.sampling_logprob, policy.logprobs(batch, 1.5)[0], rtol=0, atol=1e-5)


def test_training_mode_is_left_and_restored(tiny_model_dir: Path) -> None:
    """Under train() with checkpointing, transformers drops the cache and samples from the wrong distribution."""
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig(gradient_checkpointing=True))
    policy.model.train()
    rollouts = _engine(policy).generate(_prompts(policy, "ab", "cdefg"), 4, Sampling(16))
    assert policy.model.training
    [batch] = pack(rollouts, max_tokens=1000)
    torch.testing.assert_close(batch.sampling_logprob, policy.logprobs(batch, 1.0)[0], rtol=0, atol=1e-5)


def test_sampling_follows_the_weights(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    engine = make_engine("auto", policy, batch_size=8)
    prompts = _prompts(policy, "ab")
    before = _tokens(engine.generate(prompts, 4, Sampling(12)))
    with torch.no_grad():
        for _, p in policy.trainable():
            p.mul_(-1)
    engine.sync(policy)
    assert _tokens(engine.generate(prompts, 4, Sampling(12))) != before


def test_unknown_engine(policy: Policy) -> None:
    with pytest.raises(ValueError, match="rollout_engine='fast' must be"):
        make_engine("fast", policy, batch_size=1)


def test_single_completions_and_single_prompts(policy: Policy) -> None:
    engine: Any = _engine(policy, batch_size=1)
    assert len(engine.generate(_prompts(policy, "ab", "c"), 1, Sampling(1))) == 2
    assert len(engine.generate(_prompts(policy, "ab"), 64, Sampling(3))) == 64
