"""The loop engine's GPU path, all but the kernels and the capture: slots, the rows' state, bursts, static batches.

The ops' PyTorch paths stand in for their kernels, and bursts are short. Kernels and CUDA graphs need a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.packing import pack
from fastgrpo.policy import Policy, load_policy
from fastgrpo.policy.attention import register
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout.loop import LoopEngine, burst, slots
from fastgrpo.rollout.loop import engine as loop_engine
from fastgrpo.rollout.loop.slabs import KeyShape


@pytest.fixture(autouse=True)
def _slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU too; short bursts, so that rows end in the middle of one and between two. Memory reads as NaN."""
    for module in (slots, burst):
        monkeypatch.setattr(module, "BURST", 3)
    monkeypatch.setattr(loop_engine, "why_not_slots", lambda shape: None)
    make = slots.SlotCache.__init__

    def poisoned(self: slots.SlotCache, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        self.pool.fill_(float("nan"))

    monkeypatch.setattr(slots.SlotCache, "__init__", poisoned)


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return load_policy(str(tiny_model_dir), None, GRPOConfig())


def _prompts(policy: Policy, *texts: str) -> list[Prompt]:
    return [Prompt(i, t, policy.tokenizer(t).input_ids) for i, t in enumerate(texts)]


def _engine(policy: Policy, batch_size: int) -> LoopEngine:
    return LoopEngine(policy.model, policy.tokenizer, batch_size=batch_size)


def _assert_true_logprobs(policy: Policy, rollouts: list[Rollout], temperature: float = 1.0) -> None:
    for batch in pack(rollouts, max_tokens=1000):
        expected = policy.logprobs(batch, temperature)[0]
        torch.testing.assert_close(batch.sampling_logprob, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_same_tokens_as_over_slabs(policy: Policy, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = _prompts(policy, "ab", "abc", "abcd", "x" * 15, "y" * 33)
    sampling = Sampling(21, 1.4, seed=3, stop_token_ids=(5, 6, 7, 8))
    engine = _engine(policy, batch_size)
    rollouts = engine.generate(prompts, 6, sampling)
    assert engine.reason is None
    assert engine.unslotted is None
    assert engine.uncaptured == "CUDA graphs are for GPUs"
    assert len({r.num_tokens for r in rollouts}) > 5
    _assert_true_logprobs(policy, rollouts, 1.4)
    monkeypatch.setattr(loop_engine, "why_not_slots", lambda shape: "not now")
    plain = _engine(policy, batch_size)
    assert [r.token_ids for r in plain.generate(prompts, 6, sampling)] == [r.token_ids for r in rollouts]
    assert plain.unslotted == "not now"


def test_limits_within_a_burst(policy: Policy) -> None:
    for max_tokens in (1, 2, 3, 4, 5):
        rollouts = _engine(policy, 4).generate(_prompts(policy, "abc", "d"), 3, Sampling(max_tokens, seed=1))
        assert all(r.num_tokens == max_tokens or r.finished for r in rollouts)
        _assert_true_logprobs(policy, rollouts)


def test_a_seed_repeats_bit_for_bit(policy: Policy) -> None:
    prompts = _prompts(policy, "ab", "cdefg")
    first, again = (_engine(policy, 5).generate(prompts, 4, Sampling(12, seed=2)) for _ in range(2))
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert all(torch.equal(a.sampling_logprob, b.sampling_logprob) for a, b in zip(first, again, strict=True))


def test_prompts_wait_for_room(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt at a time: slots of completions stay empty rather than a prompt's being taken twice."""
    monkeypatch.setattr(burst, "groups_at_once", lambda rows, n: 1)
    prompts = _prompts(policy, *("z" * n for n in (9, 9, 8, 9, 7, 9)))
    rollouts = _engine(policy, 8).generate(prompts, 3, Sampling(9, 1.4, seed=1, stop_token_ids=(5, 6, 7, 8)))
    _assert_true_logprobs(policy, rollouts, 1.4)


def test_sliding_windows_and_softcaps(tiny_tokenizer: Any) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "sliding_window": 6,
        "eos_token_id": None,
    }
    for config in (tf.MistralConfig(**sizes), tf.Gemma2Config(**sizes, head_dim=8, attn_logit_softcapping=3.0)):
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config).eval()
        model.set_attn_implementation(register())
        prompts = [Prompt(i, "", [(7 * i + j * j) % 90 for j in range(n)]) for i, n in enumerate((3, 17, 1))]
        engine = LoopEngine(model, tiny_tokenizer, batch_size=4)
        rollouts = engine.generate(prompts, 3, Sampling(14, seed=1))
        assert engine.unslotted is None
        for r in rollouts:
            ids = torch.tensor([r.prompt.token_ids + r.token_ids])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, -r.num_tokens - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, ids[0, -r.num_tokens :, None]).squeeze(1)
            torch.testing.assert_close(r.sampling_logprob, expected, rtol=0, atol=1e-5)


def test_a_session_lives_on_while_it_fits(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(policy, 6)
    prompts = _prompts(policy, "ab", "cdefg", "h" * 9)
    first = engine.generate(prompts, 4, Sampling(12, seed=2))
    session = engine._session
    again = engine.generate(prompts, 4, Sampling(12, seed=2))
    assert engine._session is session is not None
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert all(torch.equal(a.sampling_logprob, b.sampling_logprob) for a, b in zip(first, again, strict=True))
    for fewer in (engine.generate(prompts[:1], 2, Sampling(5, seed=2)), engine.generate(prompts[1:], 2, Sampling(12))):
        _assert_true_logprobs(policy, fewer)
        assert engine._session is session
    _assert_true_logprobs(policy, engine.generate(prompts, 4, Sampling(12, 0.7)), 0.7)
    assert engine._session is not session  # another temperature is another graph
    session = engine._session
    _assert_true_logprobs(policy, engine.generate(prompts, 4, Sampling(13, 0.7)), 0.7)
    assert engine._session is not session  # more tokens need more room
    engine.sleep()
    assert engine._session is None  # a CPU keeps nothing
    engine.generate(prompts, 4, Sampling(12))
    monkeypatch.setattr(loop_engine, "_kept_bytes", lambda device: 1 << 40)
    engine.sleep()
    assert engine._session is not None
    engine.close()
    assert engine._session is None


def test_what_was_generated_before_changes_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither how paths are split nor which prompts wait: a run that goes on begins with an empty session."""
    launches: list[tuple[int, int]] = []
    attend = slots.decode_attention

    def spy(q: Tensor, *args: Any, longest: int, **options: Any) -> Tensor:
        launches.append((len(q), longest))
        return attend(q, *args, longest=longest, **options)

    monkeypatch.setattr(slots, "decode_attention", spy)
    prompts = [Prompt(i, "", [5 + (7 * i + j) % 90 for j in range(20)]) for i in range(12)]
    sampling = Sampling(30, 1.2, seed=5, stop_token_ids=(11, 12))

    def generate(engine: LoopEngine) -> tuple[list[tuple[int, int]], list[Rollout]]:
        launches.clear()
        rollouts = engine.generate(prompts, 4, sampling)
        return launches[-2000:], rollouts

    fresh = _engine(policy, 16)
    fresh.generate(prompts[:1], 1, Sampling(1, 0.5))  # finds out how the model is decoded
    want, expected = generate(fresh)
    want = list(want)
    used = _engine(policy, 16)
    used.generate([Prompt(0, "", [5] * 300)], 2, sampling)  # longer prompts
    used.generate(prompts * 2, 1, sampling)  # more prompts at once, as an evaluation has them
    session = used._session
    got, rollouts = generate(used)
    assert used._session is session
    assert got == want
    assert all(torch.equal(a.sampling_logprob, b.sampling_logprob) for a, b in zip(rollouts, expected, strict=True))


def test_memory_that_is_short(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows, fewer prompts, the same session every time; room for another `generate` is given up first."""
    shape = KeyShape(2, 2, 8, torch.float32, torch.device("cpu"))
    plan = burst.Plan(256, slots.groups_at_once(256, 1), 1024, 1024, (1.0, 0, 1.0, 0.0), ())
    whole = slots.slot_bytes(shape, 256, 256, 1024, 1024)
    assert plan.within(None, shape, 1) is plan.within(whole, shape, 1) is plan
    half = plan.within(whole - 1, shape, 1)
    assert (half.rows, half.groups) == (128, 128)
    assert plan.within(1, shape, 1).rows == 1
    small = burst.Plan(8, 5, 128, 16, plan.drawing, ())
    free = slots.slot_bytes(shape, 8, 5, 128, 16)
    monkeypatch.setattr(
        burst.Plan, "within", lambda p, _, shape, n, within=burst.Plan.within: within(p, free, shape, n)
    )
    assert burst.Session.make(small, shape, 4, before=plan).plan == small
    assert burst.Session.make(plan, shape, 1, before=small).asked == plan

    engine = _engine(policy, 64)
    prompts = _prompts(policy, *("z" * n for n in (9, 2, 8, 9, 7, 9)))
    rollouts = engine.generate(prompts, 4, Sampling(12, 1.4, seed=1))
    session = engine._session
    assert session is not None
    assert session.plan.rows < session.asked.rows == 24
    _assert_true_logprobs(policy, rollouts, 1.4)
    engine.generate(prompts, 4, Sampling(12, 1.4, seed=2))
    assert engine._session is session


def test_the_split_is_tried_before_it_is_used(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = slots.decode_attention

    def wrong_when_split(*args: Any, longest: int, **options: Any) -> Tensor:
        return attend(*args, longest=longest, **options) * (1.5 if longest >= 4096 else 1.0)

    monkeypatch.setattr(slots, "decode_attention", wrong_when_split)
    engine = _engine(policy, 4)
    engine.generate(_prompts(policy, "ab"), 2, Sampling(3))
    assert "differ from a full forward's" in str(engine.unslotted)


class _Graph:
    """Stands in for `torch.cuda.graph`: what its end raises hides what went wrong inside."""

    def __init__(self, *_: Any, **options: Any) -> None:
        assert options["capture_error_mode"] == "thread_local"

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_capture_that_fails_says_why_and_the_rest_goes_on(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []

    class Stream:
        def wait_stream(self, _: Any) -> None: ...

    @contextlib.contextmanager
    def use(stream: Any) -> Iterator[None]:
        entered.append(stream)
        yield
        entered.append(stream)

    side, current = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "graph", _Graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    shape = KeyShape(2, 2, 8, torch.float32, torch.device("cpu"))
    plan = burst.Plan.of(policy.model, 2, 2, 5, Sampling(4))
    session = burst.Session.make(plan, shape, 2)
    session.stream, session.reason = side, None
    calls = []

    def advance(self: burst.Burst) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("a tensor was asked for its value")

    monkeypatch.setattr(burst.Burst, "advance", advance)
    made = session.burst(policy.model, Sampling(4), 2, plan.longest)
    assert made.graph is None
    assert session.reason == "ValueError: a tensor was asked for its value"
    assert entered == [side, side, current]
    assert session.burst(policy.model, Sampling(4), 1, plan.longest).graph is None
    assert len(calls) == 3  # nothing more is captured


def test_captured_steps_are_of_the_adapters_that_were_on(tiny_model_dir: Path) -> None:
    """Switched, merged or others, they take none of the weights elsewhere, but other kernels run."""
    peft = pytest.importorskip("peft")
    model = load_policy(str(tiny_model_dir), None, GRPOConfig(use_peft=True)).model
    plans = [burst.Plan.of(model, 2, 2, 5, Sampling(4))]

    def told_apart() -> bool:
        plans.append(burst.Plan.of(model, 2, 2, 5, Sampling(4)))
        return not plans[0].serves(plans[-1])

    assert not told_apart()
    with model.disable_adapter():
        assert told_apart()
    assert not told_apart()
    model.merge_adapter()
    assert told_apart()
    assert plans[-1].addresses == plans[0].addresses
    model.unmerge_adapter()
    assert not told_apart()
    model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM"))
    model.set_adapter("other")
    assert told_apart()


def test_a_session_is_not_gone_on_with_after_an_error(policy: Policy) -> None:
    engine = _engine(policy, 6)
    prompts = _prompts(policy, "ab", "cdefg")
    want = engine.generate(prompts, 4, Sampling(12, seed=2))

    def stop(_: list[Rollout]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, 4, Sampling(12, seed=2), stop)
    assert engine._session is None
    assert [r.token_ids for r in engine.generate(prompts, 4, Sampling(12, seed=2))] == [r.token_ids for r in want]


def test_other_weights_in_other_places_end_a_session(tiny_model_dir: Path) -> None:
    """Captured steps read addresses: weights that move would be read where they were."""
    policy = load_policy(str(tiny_model_dir), None, GRPOConfig())
    engine = _engine(policy, 6)
    prompts = _prompts(policy, "ab", "cdefg")
    engine.generate(prompts, 4, Sampling(12))
    session = engine._session
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)  # in place, as the optimizer does it
    _assert_true_logprobs(policy, engine.generate(prompts, 4, Sampling(12)))
    assert engine._session is session
    parameter = next(iter(policy.model.parameters()))
    parameter.data = parameter.data.clone()
    _assert_true_logprobs(policy, engine.generate(prompts, 4, Sampling(12)))
    assert engine._session is not session


def test_a_kernel_that_disagrees_is_not_used(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "decode_attention", lambda q, *_, **__: q)
    engine = _engine(policy, 4)
    rollouts = engine.generate(_prompts(policy, "ab", "c"), 3, Sampling(6))
    assert engine.unslotted is not None
    assert "differ from a full forward's" in engine.unslotted
    _assert_true_logprobs(policy, rollouts)


def test_a_kernel_that_fails_is_not_used(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(slots, "decode_attention", broken)
    engine = _engine(policy, 4)
    rollouts = engine.generate(_prompts(policy, "ab", "c"), 3, Sampling(6))
    assert engine.unslotted == "RuntimeError: no kernel image"
    _assert_true_logprobs(policy, rollouts)


def test_what_slots_are_not_for() -> None:
    shape = KeyShape(2, 2, 64, torch.bfloat16, torch.device("cpu"))
    assert "not cpu" in str(slots.why_not_slots(shape))
    for size, dtype in ((512, torch.bfloat16), (64, torch.float64)):
        assert "heads of up to 256" in str(slots.why_not_slots(KeyShape(2, 2, size, dtype, torch.device("cuda"))))
    assert slots.why_not_slots(KeyShape(2, 2, 64, torch.bfloat16, torch.device("cuda"))) is None


def test_bursts_fill_up_a_third_at_most() -> None:
    assert [burst.bucket(n) for n in range(1, 10)] == [1, 2, 3, 4, 6, 6, 8, 8, 12]
    assert all(n <= burst.bucket(n) <= max(n + 1, 1.5 * n) for n in range(1, 3000))
