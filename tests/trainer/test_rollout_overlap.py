"""The loop engine's slots: what the host can put off it does behind the next launch, and nothing changes by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.config import GRPOConfig
from fastgrpo.errors import RunError
from fastgrpo.policy import Policy, load_policy
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout.loop import LoopEngine, burst, slots
from fastgrpo.rollout.loop import engine as loop_engine
from fastgrpo.rollout.loop.decoder import Decoder

_ENDING = Sampling(21, 1.4, seed=3, stop_token_ids=(5, 6, 7, 8))

Event = tuple[str, int]
"""What happened, and to which sample; 0 where it is to none."""


@pytest.fixture(autouse=True)
def _slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU too; short bursts."""
    for module in (slots, burst):
        monkeypatch.setattr(module, "BURST", 3)
    monkeypatch.setattr(loop_engine, "why_not_slots", lambda shape: None)


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return load_policy(str(tiny_model_dir), None, GRPOConfig())


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Launches of bursts and of prompts, tokens that have come, rows that end, rows told of."""
    seen: list[Event] = []

    def watch(owner: Any, name: str, what: str, sample: Callable[..., int] = lambda *_: 0) -> None:
        call = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            seen.append((what, sample(*args)))
            return call(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(burst.Burst, "run", "launch")
    watch(burst.SlotStep, "__init__", "step")
    watch(burst.SlotDecoder, "_keep", "tokens")
    watch(Decoder, "_end", "end", lambda _, row, by_itself: row.sample)
    watch(LoopEngine, "_rollout", "told", lambda self, prompt, group, row, by_itself: row.sample)
    return seen


def _prompts(*lengths: int) -> list[Prompt]:
    return [Prompt(i, "", [5 + (7 * i + j) % 90 for j in range(n)]) for i, n in enumerate(lengths)]


def _engine(policy: Policy, batch_size: int) -> LoopEngine:
    return LoopEngine(policy.model, policy.tokenizer, batch_size=batch_size)


def _same(a: list[Rollout], b: list[Rollout]) -> bool:
    return all(
        (x.token_ids, x.text, x.finished) == (y.token_ids, y.text, y.finished)
        and torch.equal(x.sampling_logprob, y.sampling_logprob)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_rows_are_told_of_behind_the_next_launch_in_the_order_of_their_ends(
    policy: Policy, batch_size: int, events: list[Event]
) -> None:
    _engine(policy, batch_size).generate(_prompts(2, 3, 15, 33), 6, _ENDING)
    told, ends = ([sample for what, sample in events if what == name] for name in ("told", "end"))
    assert told == ends
    assert sorted(told) == list(range(24))
    last = max(i for i, (what, _) in enumerate(events) if what == "tokens")
    waiting: set[int] = set()
    for i, (what, sample) in enumerate(events):
        if what == "end":
            waiting.add(sample)
        elif what == "told":
            # What came before is the launch and others that were told of, or all is over.
            before = next(name for name, _ in reversed(events[:i]) if name != "told")
            assert before in ("launch", "step") or i > last
            waiting.remove(sample)
        elif what == "tokens":
            assert not waiting  # nobody waits for another burst
    assert not waiting


def test_ends_in_the_last_burst(policy: Policy, events: list[Event]) -> None:
    """All rows at once: told of when nothing more is launched."""
    engine = _engine(policy, 64)
    engine.end_tokens = set()
    groups: list[list[Rollout]] = []
    rollouts = engine.generate(_prompts(2, 9), 3, Sampling(7, seed=1), groups.append)
    assert [what for what, _ in events[-13:]] == ["tokens", *["end"] * 6, *["told"] * 6]
    assert [r.num_tokens for r in rollouts] == [7] * 6
    assert groups == [rollouts[:3], rollouts[3:]]


def test_single_tokens(policy: Policy, events: list[Event]) -> None:
    """Rows that end with their first token, drawn from their prompt's logits, are told of, too."""
    rollouts = _engine(policy, 2).generate(_prompts(2, 9, 4), 3, Sampling(1, seed=1))
    assert [r.num_tokens for r in rollouts] == [1] * 9
    assert [sample for what, sample in events if what == "told"] == [s for what, s in events if what == "end"]
    assert "launch" not in dict(events)


class _Stop(Exception):
    """Raised on the way."""


@pytest.mark.parametrize("group", [1, 3, 4])
def test_an_error_of_whom_groups_are_handed_to(policy: Policy, group: int) -> None:
    """In the middle and with the last group, behind the last burst: the engine goes on as if it had not been asked."""
    engine = _engine(policy, 5)
    want = engine.generate(_prompts(2, 3, 15, 33), 6, _ENDING)
    seen: list[int] = []

    def stop(rollouts: list[Rollout]) -> None:
        seen.append(rollouts[0].group)
        if len(seen) == group:
            raise _Stop

    policy.model.train()
    with pytest.raises(_Stop):
        engine.generate(_prompts(2, 3, 15, 33), 6, _ENDING, stop)
    assert policy.model.training
    assert len(seen) == group  # and nobody after it
    assert engine._session is None
    assert _same(engine.generate(_prompts(2, 3, 15, 33), 6, _ENDING), want)


def test_an_error_of_the_deadline(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(policy, 5)
    want = engine.generate(_prompts(2, 3, 15, 33), 6, _ENDING)
    engine.timeout = 1000.0
    seconds = iter(range(0, 10**6, 100))
    monkeypatch.setattr(loop_engine.time, "monotonic", lambda: next(seconds))
    with pytest.raises(RunError, match="longer than rollout_timeout=1000 s"):
        engine.generate(_prompts(2, 3, 15, 33), 6, _ENDING)
    assert engine._session is None
    engine.timeout = None
    assert _same(engine.generate(_prompts(2, 3, 15, 33), 6, _ENDING), want)


def test_tables_of_tokens() -> None:
    for tokens in (set(), {0}, {3, 7}):
        found = burst._table(tokens).take([[0, 3, 7], [8, 9, 10**6]], mode="clip")
        assert found.tolist() == [[t in tokens for t in row] for row in ((0, 3, 7), (8, 9, 10**6))]
