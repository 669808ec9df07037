"""vLLM itself, in this process, against the model's own forward."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastgrpo.errors import RunError
from fastgrpo.records import Rollout, Sampling
from fastgrpo.rollout.vllm.engine import VLLMEngine

from .cases import EOS, logprob_error, make_policy, make_prompts, optimizer_step

pytestmark = pytest.mark.vllm
LENGTHS = (3, 300, 41, 1)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def engine(request: pytest.FixtureRequest) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(make_policy(tied=request.param), max_length=384)
    yield engine
    engine.close()


@pytest.fixture
def policy(engine: VLLMEngine) -> Any:
    """Fresh weights, synced."""
    fresh = make_policy(tied=engine._policy.causal_lm.config.tie_word_embeddings, seed=1)
    engine.sync(fresh)
    return fresh


def test_greedy_tokens_are_those_of_generate(engine: VLLMEngine, policy: Any) -> None:
    prompts = make_prompts(*LENGTHS)
    rollouts = engine.generate(prompts, 1, Sampling(max_tokens=24, temperature=0.0))
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids = torch.tensor([prompt.token_ids])
        expected = policy.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert rollout.token_ids == expected[0, len(prompt.token_ids) :].tolist()
        assert rollout.sampling_logprob.tolist() == [0.0] * rollout.num_tokens


@pytest.mark.parametrize("n", [1, 16])
def test_logprobs_are_those_of_a_full_forward(engine: VLLMEngine, policy: Any, n: int) -> None:
    prompts = make_prompts(*LENGTHS)
    rollouts = engine.generate(prompts, n, Sampling(max_tokens=20, temperature=0.7, seed=3))
    assert [r.group for r in rollouts] == [i for i in range(len(prompts)) for _ in range(n)]
    assert all(r.prompt is prompts[r.group] for r in rollouts)
    assert all(r.sampling_logprob.shape == (r.num_tokens,) for r in rollouts)
    assert logprob_error(policy.model, rollouts, 0.7) <= 1e-5
    if n > 1:
        assert len({tuple(r.token_ids) for r in rollouts}) > len(rollouts) // 2


def test_a_sync_is_exact_and_leaves_no_stale_prefix(engine: VLLMEngine, policy: Any) -> None:
    """The same long prompts before and after: their blocks of the cache hold the old weights' keys and values."""
    prompts, sampling = make_prompts(300, 290), Sampling(max_tokens=8, seed=1)
    before = engine.generate(prompts, 2, sampling)
    for step in range(2):
        optimizer_step(policy.model, step)
        engine.sync(policy)
        after = engine.generate(prompts, 2, sampling)
        assert logprob_error(policy.model, after, 1.0) <= 1e-5
    assert logprob_error(policy.model, before, 1.0) > 0.1
    assert {r.weights_version for r in after} == {engine.version}
    assert {r.weights_version for r in before} == {engine.version - 2}


def test_more_prompts_than_one_step_takes(engine: VLLMEngine, policy: Any) -> None:
    """13,000 tokens, several times what vLLM computes at once; requests with seeds must not be cut there on a CPU."""
    rollouts = engine.generate(make_prompts(*[300, 47, 310] * 20), 2, Sampling(max_tokens=4))
    assert len(rollouts) == 120
    assert logprob_error(policy.model, rollouts, 1.0) <= 1e-5


def test_an_interrupted_call_leaves_nothing_behind(
    engine: VLLMEngine, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, sampling = make_prompts(*LENGTHS), Sampling(max_tokens=12, seed=2)
    expected = engine.generate(prompts, 3, sampling)
    step, steps = engine._llm.llm_engine.step, iter(range(4))

    def interrupted() -> Any:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine._llm.llm_engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, 3, Sampling(max_tokens=100))
    monkeypatch.undo()
    assert not engine._llm.llm_engine.has_unfinished_requests()
    engine.sync(policy)
    assert [r.token_ids for r in engine.generate(prompts, 3, sampling)] == [r.token_ids for r in expected]


def test_a_failure_or_a_limit_is_one_line(engine: VLLMEngine, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, sampling = make_prompts(*LENGTHS), Sampling(max_tokens=50)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_step_timeout", 1e-6)
        with pytest.raises(RunError, match="rollouts took more than 0 s: 0 of 4 prompts were done"):
            engine.generate(prompts, 2, sampling)
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm.llm_engine, "step", lambda: 1 // 0)
        with pytest.raises(RunError, match="vLLM failed while it generated: ZeroDivisionError"):
            engine.generate(prompts, 2, sampling)
    assert len(engine.generate(prompts, 2, sampling)) == 8


def test_groups_are_told_of_as_soon_as_they_are_complete(engine: VLLMEngine, policy: Any) -> None:
    prompts = make_prompts(3, 4, 5, 6)
    seen: list[tuple[int, int]] = []

    def note(group: list[Rollout]) -> None:
        seen.append((group[0].group, threading.get_ident()))
        assert len(group) == 2
        assert {r.group for r in group} == {group[0].group}

    sampling = Sampling(max_tokens=60, seed=3, stop_token_ids=tuple(range(0, 105, 9)))
    rollouts = engine.generate(prompts, 2, sampling, note)
    assert sorted(group for group, _ in seen) == [0, 1, 2, 3]
    lengths = [max(r.num_tokens for r in rollouts[2 * group : 2 * group + 2]) for group, _ in seen]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 1
    assert {thread for _, thread in seen} == {threading.get_ident()}


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.4}], ids=str)
def test_logprobs_are_those_of_the_filtered_distribution(
    engine: VLLMEngine, policy: Any, filters: dict[str, float]
) -> None:
    from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ((name, value),) = filters.items()
    warper = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}[name](value)
    rollouts = engine.generate(make_prompts(9), 16, Sampling(max_tokens=6, temperature=0.8, **filters))
    for r in rollouts:
        with torch.no_grad():
            logits = policy.model(torch.tensor([r.prompt.token_ids + r.token_ids])).logits[0, 8:-1] / 0.8
        expected = torch.log_softmax(warper(None, logits), -1).gather(1, torch.tensor(r.token_ids)[:, None])[:, 0]
        assert (expected - r.sampling_logprob).abs().max() <= 1e-5


def test_adapters_are_merged_and_the_policy_is_not_touched(engine: VLLMEngine, policy: Any) -> None:
    from peft import LoraConfig, get_peft_model

    from fastgrpo.policy import Policy

    adapted = Policy(
        get_peft_model(policy.model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)),
        policy.tokenizer,
    )
    weights = {n: p.detach().clone() for n, p in adapted.model.named_parameters()}
    engine.sync(adapted)
    rollouts = engine.generate(make_prompts(*LENGTHS), 2, Sampling(max_tokens=12))
    assert logprob_error(adapted.model, rollouts, 1.0) <= 1e-5
    with adapted.model.disable_adapter():
        assert logprob_error(adapted.model, rollouts, 1.0) > 0.1
    assert all(torch.equal(p, weights[n]) for n, p in adapted.model.named_parameters())


def test_the_end_of_a_completion(engine: VLLMEngine, policy: Any) -> None:
    prompts = make_prompts(5, 6)
    free = engine.generate(prompts, 8, Sampling(max_tokens=40, seed=5))
    stop = next(r.token_ids[4] for r in free if r.num_tokens > 5 and r.token_ids[4] > 5)
    rollouts = engine.generate(prompts, 64, Sampling(max_tokens=40, seed=5, stop_token_ids=(stop,)))
    ends = {EOS, stop}
    for r in rollouts:
        assert not ends & set(r.token_ids[:-1])
        assert r.finished == (r.token_ids[-1] in ends)
        assert r.finished or r.num_tokens == 40
        assert r.text == policy.tokenizer.decode(r.token_ids, skip_special_tokens=True)
    assert {r.token_ids[-1] for r in rollouts} >= ends
    assert not all(r.finished for r in rollouts)
    last = engine.generate(prompts, 4, Sampling(max_tokens=1, stop_token_ids=tuple(range(105))))
    assert all(r.finished and r.num_tokens == 1 for r in last)  # the limit and an end at once: it ended by itself


def test_a_string_ends_a_completion(engine: VLLMEngine, policy: Any) -> None:
    prompts, sampling = make_prompts(5, 6), Sampling(max_tokens=40, seed=5)
    free = engine.generate(prompts, 16, sampling)
    string = next(r.text[4:6] for r in free if len(r.text) > 6)
    rollouts = engine.generate(prompts, 16, replace(sampling, stop_strings=(string, "never so")))
    for r, long in zip(rollouts, free, strict=True):
        assert r.token_ids == long.token_ids[: r.num_tokens]
        assert r.text == policy.tokenizer.decode(r.token_ids, skip_special_tokens=True)
        assert string not in policy.tokenizer.decode(r.token_ids[:-1], skip_special_tokens=True)
        assert r.finished == (string in r.text or r.token_ids[-1] == EOS)
        assert r.sampling_logprob.shape == (r.num_tokens,)
    assert any(string in r.text for r in rollouts)
    assert logprob_error(policy.model, rollouts, 1.0) <= 1e-5


def test_a_seed_repeats_and_leaves_the_process_alone(engine: VLLMEngine, policy: Any) -> None:
    prompts, sampling = make_prompts(*LENGTHS), Sampling(max_tokens=12, seed=9)
    state = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    first, again = (engine.generate(prompts, 3, sampling) for _ in range(2))
    other = engine.generate(prompts, 3, Sampling(max_tokens=12, seed=10))
    engine.sync(policy)
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert [r.token_ids for r in first] != [r.token_ids for r in other]
    alone = engine.generate(prompts[:1], 3, sampling)
    assert [r.token_ids for r in alone] == [r.token_ids for r in first[:3]]
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), str(np.random.get_state())) == state[1:]  # noqa: NPY002
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_the_first_token_has_the_models_distribution(engine: VLLMEngine, policy: Any) -> None:
    """Chi-square with the rare tokens pooled; the limit is the mean + 5 standard deviations."""
    (prompt,), count = make_prompts(7), 4000
    rollouts = engine.generate([prompt], count, Sampling(max_tokens=1, temperature=0.5, seed=11))
    with torch.no_grad():
        logits = policy.model(torch.tensor([prompt.token_ids])).logits[0, -1]
    expected = count * torch.softmax(logits.double() / 0.5, -1)
    seen = torch.bincount(torch.tensor([r.token_ids[0] for r in rollouts]), minlength=105).double()
    common = expected >= 5
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    seen = torch.cat([seen[common], seen[~common].sum()[None]])
    freedom = len(expected) - 1
    assert ((seen - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_sleep_and_wake_change_nothing_on_a_cpu(engine: VLLMEngine, policy: Any) -> None:
    engine.sleep()
    optimizer_step(policy.model)
    engine.sync(policy)
    engine.wake()
    rollouts = engine.generate(make_prompts(12), 2, Sampling(max_tokens=6))
    assert logprob_error(policy.model, rollouts, 1.0) <= 1e-5
    assert engine.generate([], 2, Sampling(max_tokens=6)) == []
