"""Real vLLM servers on this machine: started, synced, killed, replaced."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.errors import RunError
from fastgrpo.records import Rollout, Sampling
from fastgrpo.rollout.vllm.server import ServerOptions, VLLMServerEngine

from .cases import EOS, logprob_error, make_policy, make_prompts, optimizer_step

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
LENGTHS = (3, 300, 41, 1)


def options(**changes: Any) -> ServerOptions:
    return ServerOptions(**{"devices": [""], "max_length": 512, "start_timeout": 300.0} | changes)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def engine(request: pytest.FixtureRequest) -> Iterator[VLLMServerEngine]:
    engine = VLLMServerEngine(make_policy(tied=request.param), options())
    yield engine
    engine.close()


@pytest.fixture
def policy(engine: VLLMServerEngine) -> Any:
    """Fresh weights, synced."""
    fresh = make_policy(tied=engine._policy.causal_lm.config.tie_word_embeddings, seed=1)
    engine.sync(fresh)
    return fresh


def kill(engine: VLLMServerEngine, number: int = 0) -> None:
    """The server's own process, the hard way; its children are left behind."""
    process = engine._servers[number].process
    assert process is not None
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)


def in_background(engine: VLLMServerEngine, *arguments: Any) -> tuple[threading.Thread, list[list[Rollout]]]:
    answers: list[list[Rollout]] = []
    thread = threading.Thread(target=lambda: answers.append(engine.generate(*arguments)))
    thread.start()
    return thread, answers


@pytest.mark.parametrize("n", [1, 16])
def test_samples_are_the_models(engine: VLLMServerEngine, policy: Any, n: int) -> None:
    prompts = make_prompts(*LENGTHS)
    greedy = engine.generate(prompts, 1, Sampling(max_tokens=24, temperature=0.0))
    for prompt, rollout in zip(prompts, greedy, strict=True):
        ids = torch.tensor([prompt.token_ids])
        expected = policy.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert rollout.token_ids == expected[0, len(prompt.token_ids) :].tolist()
    sampling = Sampling(max_tokens=20, temperature=0.7, seed=3)
    rollouts = engine.generate(prompts, n, sampling)
    assert [r.group for r in rollouts] == [i for i in range(len(prompts)) for _ in range(n)]
    assert logprob_error(policy.model, rollouts, 0.7) <= 1e-5
    assert [r.token_ids for r in engine.generate(prompts, n, sampling)] == [r.token_ids for r in rollouts]
    assert engine.generate([], n, sampling) == []


def test_the_end_of_a_completion(engine: VLLMServerEngine, policy: Any) -> None:
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


def test_a_string_ends_a_completion(engine: VLLMServerEngine, policy: Any) -> None:
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


def test_a_sync_is_exact_and_leaves_no_stale_prefix(engine: VLLMServerEngine, policy: Any) -> None:
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


def test_weights_may_change_under_running_requests(engine: VLLMServerEngine, policy: Any) -> None:
    """What runs goes on; what is asked afterwards is the new weights' alone."""
    prompts = make_prompts(*LENGTHS * 8)
    thread, answers = in_background(engine, prompts, 8, Sampling(max_tokens=200, seed=2))
    time.sleep(0.5)
    assert thread.is_alive()
    version = engine.version
    optimizer_step(policy.model)
    engine.sync(policy)
    thread.join()
    assert len(answers[0]) == len(prompts) * 8
    assert {r.weights_version for r in answers[0]} <= {version, version + 1}
    rollouts = engine.generate(prompts[:4], 2, Sampling(max_tokens=8))
    assert logprob_error(policy.model, rollouts, 1.0) <= 1e-5


def test_a_killed_server_comes_back_with_nothing_lost(engine: VLLMServerEngine, policy: Any) -> None:
    """Killed in the middle of its work, with weights that it was not started with."""
    optimizer_step(policy.model)
    engine.sync(policy)
    prompts, sampling = make_prompts(*LENGTHS * 8), Sampling(max_tokens=200, seed=4)
    undisturbed = engine.generate(prompts, 8, sampling)
    lives = engine._servers[0].lives
    thread, answers = in_background(engine, prompts, 8, sampling)
    time.sleep(0.5)
    assert thread.is_alive()
    kill(engine)
    thread.join()
    assert engine._servers[0].lives == lives + 1
    assert [r.token_ids for r in answers[0]] == [r.token_ids for r in undisturbed]
    assert logprob_error(policy.model, answers[0][:64], 1.0) <= 1e-5
    assert {r.weights_version for r in answers[0]} == {engine.version}


def test_a_server_that_died_in_between_is_replaced(engine: VLLMServerEngine, policy: Any) -> None:
    kill(engine)
    optimizer_step(policy.model)
    engine.sync(policy)
    engine.wake()
    rollouts = engine.generate(make_prompts(12), 2, Sampling(max_tokens=6))
    assert logprob_error(policy.model, rollouts, 1.0) <= 1e-5


def test_a_given_server_is_used_and_its_work_goes_to_another(engine: VLLMServerEngine, policy: Any) -> None:
    """A second engine with the first one's server, by its address, and one of its own, which dies in mid-generation."""
    process = engine._servers[0].process
    assert process is not None
    both = VLLMServerEngine(policy, options(urls=[process.url], concurrency=4))
    try:
        prompts, sampling = make_prompts(*LENGTHS * 8), Sampling(max_tokens=200, seed=4)
        thread, answers = in_background(both, prompts, 8, sampling)
        time.sleep(0.5)
        assert thread.is_alive()
        kill(both, 1)
        thread.join()
        assert both._servers[0].lives == 0
        alone = engine.generate(prompts, 8, sampling)
        assert [r.token_ids for r in answers[0]] == [r.token_ids for r in alone]
    finally:
        both.close()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"ended while it started: .*unrecognized arguments: --no-such-option") as error:
        VLLMServerEngine(make_policy(), options(arguments=["--no-such-option"], log_folder=str(tmp_path)))
    assert "\n" not in str(error.value)
    assert "usage" in (tmp_path / "vllm-server-0.log").read_text()


def test_servers_end_with_the_process_that_started_them(engine: VLLMServerEngine) -> None:
    """Its death closes the pipe that they read from."""
    process = engine._servers[0].process
    assert process is not None
    assert process._process is not None
    assert process._process.stdin is not None
    group = process._process.pid
    process._process.stdin.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if process._process.poll() is not None:
            break
        time.sleep(0.2)
    assert process._process.poll() is not None
    engine.wake()
    assert process._process.pid != group
