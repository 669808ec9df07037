"""Continuous batching by transformers: what is drawn, ends, seeds, fresh caches, memory, and what happens on errors."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.config import GRPOConfig
from fastgrpo.errors import RunError
from fastgrpo.packing import pack
from fastgrpo.policy import Policy, load_policy
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout import transformers as module
from fastgrpo.rollout.transformers import TransformersEngine

pytest.importorskip("transformers", module.OLDEST)


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return load_policy(str(tiny_model_dir), None, GRPOConfig())


@pytest.fixture(scope="module")
def engine(policy: Policy) -> TransformersEngine:
    return _engine(policy)


def _engine(policy: Policy, batch_size: int = 32, **options: Any) -> TransformersEngine:
    return TransformersEngine(policy.model, policy.tokenizer, batch_size=batch_size, **options)


def _prompts(policy: Policy, *texts: str) -> list[Prompt]:
    return [Prompt(i, t, policy.tokenizer(t).input_ids) for i, t in enumerate(texts)]


def _tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [r.token_ids for r in rollouts]


def _assert_logprobs(policy: Policy, rollouts: list[Rollout], temperature: float = 1.0) -> None:
    for batch in pack(rollouts, max_tokens=2000):
        expected = policy.logprobs(batch, temperature)[0]
        torch.testing.assert_close(batch.sampling_logprob, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("temperature", "n"), [(1.0, 1), (0.7, 16)])
def test_logprobs_are_those_of_a_full_forward(
    policy: Policy, engine: TransformersEngine, temperature: float, n: int
) -> None:
    """Prompts of one token to several pages and more than a step's; more completions than are decoded at once."""
    prompts = [*_prompts(policy, "a", "12+34=", "xyz" * 30, "0123456789" * 30), Prompt(4, "", [7])]
    rollouts = engine.generate(prompts, n, Sampling(9, temperature, seed=3))
    assert [r.group for r in rollouts] == [g for g in range(5) for _ in range(n)]
    assert all(r.prompt is prompts[r.group] for r in rollouts)
    assert len({tuple(r.token_ids) for r in rollouts}) > 4 * n
    _assert_logprobs(policy, rollouts, temperature)


def test_a_group_larger_than_the_batch_goes_together(policy: Policy) -> None:
    rollouts = _engine(policy, batch_size=1).generate(_prompts(policy, "ab", "c"), 5, Sampling(3))
    assert len(rollouts) == 10
    _assert_logprobs(policy, rollouts)


def test_a_prompt_of_one_token_alone(policy: Policy, engine: TransformersEngine) -> None:
    rollouts = engine.generate([Prompt(0, "", [7])], 4, Sampling(5))
    assert [r.group for r in rollouts] == [0] * 4
    _assert_logprobs(policy, rollouts)


def test_first_tokens_follow_the_distribution(policy: Policy, engine: TransformersEngine) -> None:
    """Chi-square of 640 first tokens of 20 groups, in five classes of tokens, at the 0.1 % level."""
    [prompt] = _prompts(policy, "ab")
    rollouts = engine.generate([prompt] * 20, 32, Sampling(1, seed=1))
    with torch.no_grad():
        p = policy.model(torch.tensor([prompt.token_ids])).logits[0, -1].softmax(0)
    order = p.argsort(descending=True)
    kind = torch.empty_like(order)
    kind[order] = torch.arange(len(p)).clamp(max=4)
    expected = 640 * torch.zeros(5).index_add_(0, kind, p)
    counts = torch.bincount(kind[torch.tensor(_tokens(rollouts)).flatten()], minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 18.47  # 99.9 % quantile for 4 degrees of freedom


def test_a_completion_ends_with_its_end_token_or_at_the_limit(policy: Policy, engine: TransformersEngine) -> None:
    eos = policy.tokenizer.eos_token_id
    rollouts = engine.generate(_prompts(policy, "ab", "cdef"), 16, Sampling(30, 1.5, seed=1))
    finished = [r for r in rollouts if r.finished]
    cut = [r for r in rollouts if not r.finished]
    assert finished
    assert cut
    assert all(r.token_ids[-1] == eos and eos not in r.token_ids[:-1] for r in finished)
    assert all(r.num_tokens == 30 and eos not in r.token_ids for r in cut)
    assert all(len(r.sampling_logprob) == r.num_tokens and r.sampling_logprob.dtype == torch.float32 for r in rollouts)
    assert all(r.text == policy.tokenizer.decode(r.token_ids, skip_special_tokens=True) for r in rollouts)


def test_further_stop_tokens(policy: Policy, engine: TransformersEngine) -> None:
    stops = tuple(range(5, 60))
    rollouts = engine.generate(_prompts(policy, "ab"), 16, Sampling(30, stop_token_ids=stops))
    assert any(r.token_ids[-1] in stops for r in rollouts)
    assert all(r.finished == (r.token_ids[-1] in (*stops, policy.tokenizer.eos_token_id)) for r in rollouts)
    assert not any(t in stops for r in rollouts for t in r.token_ids[:-1])


def test_a_seed_repeats_whatever_came_before(policy: Policy, engine: TransformersEngine) -> None:
    """Completions end at different steps here, so that prompts enter at different steps."""
    prompts = _prompts(policy, "ab", "cdef", "g" * 40, "hi", "j", "kl")
    first = engine.generate(prompts, 12, Sampling(12, 1.5, seed=5))
    engine.generate(prompts[:1], 40, Sampling(90, seed=1))
    assert len({r.num_tokens for r in first}) > 3
    assert _tokens(engine.generate(prompts, 12, Sampling(12, 1.5, seed=5))) == _tokens(first)
    assert _tokens(_engine(policy).generate(prompts, 12, Sampling(12, 1.5, seed=5))) == _tokens(first)
    assert _tokens(engine.generate(prompts, 12, Sampling(12, 1.5, seed=6))) != _tokens(first)


def test_a_slow_caller_changes_nothing(
    policy: Policy, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = _prompts(policy, "ab", "cdef", "g" * 40, "hi")
    expected = _tokens(engine.generate(prompts, 4, Sampling(6, seed=5)))
    manager: Any = engine._session.manager if engine._session else None
    add = manager.add_request
    monkeypatch.setattr(manager, "add_request", lambda *args, **kwargs: (time.sleep(0.05), add(*args, **kwargs))[1])
    assert _tokens(engine.generate(prompts, 4, Sampling(6, seed=5))) == expected


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_cold_sampling_gives_the_greedy_tokens_of_generate(
    policy: Policy, engine: TransformersEngine, temperature: float
) -> None:
    prompts = _prompts(policy, "ab", "cdefgh", "1+2=" * 20)
    rollouts = engine.generate(prompts, 2, Sampling(10, temperature))
    for prompt, pair in zip(prompts, zip(rollouts[::2], rollouts[1::2], strict=True), strict=True):
        ids = torch.tensor([prompt.token_ids])
        expected = policy.model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :].tolist()
        assert pair[0].token_ids == pair[1].token_ids == expected
        assert temperature > 0 or not pair[0].sampling_logprob.any()


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}], ids=lambda f: next(iter(f)))
def test_filters_leave_a_renormalised_distribution(
    policy: Policy, engine: TransformersEngine, filters: dict[str, Any]
) -> None:
    [prompt] = _prompts(policy, "ab")
    rollouts = engine.generate([prompt], 24, Sampling(1, 1.5, seed=2, **filters))
    with torch.no_grad():
        p = (policy.model(torch.tensor([prompt.token_ids])).logits[0, -1] / 1.5).softmax(0)
    ranked = p.sort(descending=True)
    before = ranked.values.cumsum(0) - ranked.values
    keep = {
        "top_k": torch.arange(len(p)) < 3,
        "top_p": before < 0.6,
        "min_p": ranked.values >= 0.2 * ranked.values[0],
    }[next(iter(filters))]
    left = ranked.values * keep / ranked.values[keep].sum()
    expected = dict(zip(ranked.indices[keep].tolist(), left[keep].log().tolist(), strict=True))
    assert all(r.sampling_logprob.item() == pytest.approx(expected[r.token_ids[0]], abs=1e-5) for r in rollouts)


@pytest.mark.parametrize("keep_asleep", [True, False])
def test_changed_weights_are_used_and_no_key_or_value_is_older(tiny_model_dir: Path, keep_asleep: bool) -> None:
    """The prompts share several pages; keys kept from before the change would show in the log-probs."""
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    engine = _engine(policy, keep_asleep=keep_asleep)
    prompts = _prompts(policy, "0123456789" * 12, "0123456789" * 12 + "a")
    before = engine.generate(prompts, 4, Sampling(12))
    engine.sleep()
    with torch.no_grad():
        for _, p in policy.trainable():
            p.mul_(-1)
    engine.sync(policy)
    engine.wake()
    after = engine.generate(prompts, 4, Sampling(12))
    assert _tokens(after) != _tokens(before)
    _assert_logprobs(policy, after)
    engine.close()


def test_memory_does_not_grow_with_the_number_of_prompts(policy: Policy) -> None:
    engine = _engine(policy, batch_size=8)
    sizes, most = [], 0
    for repeats in (4, 40):
        engine.generate(_prompts(policy, *["abc", "d"] * (repeats // 2)), 4, Sampling(4))
        session: Any = engine._session
        sizes.append(session.manager.batch_processor.cache.cache_tensor.nbytes)
        most = max(most, session.plan.rows)
    assert sizes[0] == sizes[1]
    assert most == 8
    engine.keep_asleep = False
    engine.sleep()
    assert engine._session is None


def test_the_caller_finds_everything_as_it_was(tiny_model_dir: Path) -> None:
    """Under train() with checkpointing, transformers drops the cache and samples from the wrong distribution."""
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig(gradient_checkpointing=True))
    policy.model.train()
    engine = _engine(policy)
    state = torch.get_rng_state()
    rollouts = engine.generate(_prompts(policy, "ab", "cdefg"), 4, Sampling(16))
    assert policy.model.training
    assert policy.causal_lm.config._attn_implementation == "fastgrpo"
    assert torch.equal(torch.get_rng_state(), state)
    _assert_logprobs(policy, rollouts)
    assert vars(copy.deepcopy(policy.model)).keys() == vars(policy.model).keys()
    assert not hasattr(policy.model, "_cached_continuous_batching_manager")
    assert engine.generate([], 4, Sampling(16)) == []


def test_an_error_in_the_generation_thread_is_raised_here(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    engine = _engine(policy)
    policy.model.train()
    prompts = _prompts(policy, "ab")
    expected = _tokens(engine.generate(prompts, 2, Sampling(6)))
    with monkeypatch.context() as patch:
        patch.setattr(policy.causal_lm.model, "forward", _after(policy.causal_lm.model.forward, 3, _fail))
        with pytest.raises(RunError, match="transformers' generation failed: no more today"):
            engine.generate(prompts, 2, Sampling(6))
    assert policy.model.training
    assert policy.causal_lm.config._attn_implementation == "fastgrpo"
    assert _tokens(engine.generate(prompts, 2, Sampling(6))) == expected


def test_a_hung_generation_thread_is_given_up(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    engine = _engine(policy, timeout=60.0)
    prompts, release = _prompts(policy, "ab"), threading.Event()
    engine.generate(prompts, 1, Sampling(2))
    monkeypatch.setattr(module, "_STOP_SECONDS", 0.1)
    monkeypatch.setattr(policy.causal_lm.model, "forward", _after(policy.causal_lm.model.forward, 1, release.wait))
    engine.timeout = 0.5
    before = set(threading.enumerate())
    with pytest.raises(RunError, match=r"takes too long: 2 completions missing after 0.5 s"):
        engine.generate(prompts, 2, Sampling(6))
    [hung] = set(threading.enumerate()) - before
    assert hung.daemon
    assert policy.causal_lm.config._attn_implementation == "fastgrpo"
    with pytest.raises(RunError, match="still hangs"):
        engine.generate(prompts, 2, Sampling(6))
    release.set()
    hung.join(20)
    assert not hung.is_alive()


def _after(forward: Callable[..., Any], calls: int, then: Callable[[], Any]) -> Callable[..., Any]:
    """`forward`, with `then` before every call after the first so many."""
    left = iter(range(calls))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            then()
        return forward(*args, **kwargs)

    return wrapped


def _fail() -> None:
    raise RuntimeError("no more today")


def test_adapters_are_part_of_what_is_sampled_from(tiny_model_dir: Path) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig(), peft_config=lora)
    engine = _engine(policy)
    prompts = _prompts(policy, "ab", "cdefgh")
    before = engine.generate(prompts, 4, Sampling(12))
    with torch.no_grad():
        for name, p in policy.trainable():
            p.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    after = engine.generate(prompts, 4, Sampling(12))
    assert _tokens(after) != _tokens(before)
    _assert_logprobs(policy, after)


def test_groups_are_handed_over_as_they_end(policy: Policy) -> None:
    """Two groups at once: the first is handed over while others still wait, and an error in `done` ends it all."""
    engine, seen = _engine(policy, batch_size=8), []
    prompts = _prompts(policy, "ab", "c", "de", "f", "gh", "i")
    rollouts = engine.generate(prompts, 4, Sampling(20, 1.5, seed=2), seen.append)
    assert sorted(group[0].group for group in seen) == list(range(6))
    assert all(a is b for group in seen for a, b in zip(group, rollouts[group[0].group * 4 :], strict=False))
    assert all(len(group) == 4 for group in seen)

    def refuse(group: list[Rollout]) -> None:
        raise KeyError(group[0].group)

    with pytest.raises(KeyError):
        engine.generate(prompts, 4, Sampling(20, 1.5, seed=2), refuse)
    assert _tokens(engine.generate(prompts, 4, Sampling(20, 1.5, seed=2))) == _tokens(rollouts)
    version = engine.version
    engine.sync(policy)
    assert engine.version == version + 1
    assert {r.weights_version for r in engine.generate(prompts[:1], 2, Sampling(2))} == {version + 1}


def test_sliding_windows(helpers: Any) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=105,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        initializer_range=0.2,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
    )
    model, tokenizer = Gemma3ForCausalLM(config).eval(), helpers.make_tokenizer()
    prompts = [Prompt(i, "", list(range(5, 5 + length))) for i, length in enumerate((3, 20, 90))]
    for r in TransformersEngine(model, tokenizer, batch_size=4).generate(prompts, 4, Sampling(20)):
        ids = torch.tensor(r.prompt.token_ids + r.token_ids)
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0, len(r.prompt.token_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(r.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(r.sampling_logprob, expected, rtol=0, atol=1e-5)


def _softcapped() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1))


def _recurrent() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4))


def _hybrid() -> Any:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Lfm2ForCausalLM(Lfm2Config(**sizes, **heads, layer_types=["conv", "full_attention"]))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_softcapped, "Gemma2ForCausalLM: its attention is not one of sdpa"),
        (_recurrent, "MambaForCausalLM: "),
        (_hybrid, "Lfm2ForCausalLM: not all its layers are full or sliding attention"),
        (lambda: torch.nn.Linear(2, 2), "Linear: it has no continuous batching"),
    ],
    ids=["softcap", "recurrent", "hybrid", "other"],
)
def test_models_it_cannot_run_are_refused_in_one_line(
    helpers: Any, make: Callable[[], Any], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"rollout_engine 'transformers' cannot run {reason}") as caught:
        TransformersEngine(make(), helpers.make_tokenizer())
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_a_prompt_for_an_adapter_is_refused(tiny_model_dir: Path) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    model = get_peft_model(policy.model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="its adapter is a prompt"):
        TransformersEngine(model, policy.tokenizer)


def test_log_probs_that_do_not_agree_are_refused(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    sdpa: Any = AttentionInterface()["sdpa"]

    def wrong(*args: Any, scaling: float, **kwargs: Any) -> Any:
        return sdpa(*args, scaling=2 * scaling, **kwargs)  # the full forward's attention is this project's

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", wrong)
    with pytest.raises(ValueError, match=r"its log-probs over paged sdpa are .* off those of a full forward"):
        _engine(policy)
