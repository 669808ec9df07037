"""Packing: budgets, indices, denominators, minibatches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.packing import denominators, pack, select, split_minibatches
from fastgrpo.records import PackedBatch, Prompt, Rollout, Work


def _rollout(i: int, prompt: int, completion: int, **fields: object) -> Rollout:
    ids = list(range(100 * i, 100 * i + prompt + completion))
    made = Rollout(
        Prompt(i, "", ids[:prompt]),
        i // 2,
        ids[prompt:],
        -torch.arange(1.0, completion + 1) - i,
        finished=True,
        reward=1.0,
    )
    for name, value in fields.items():
        setattr(made, name, value)
    return made


lengths = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=12)


def _check_rows(batch: PackedBatch, rollouts: list[Rollout]) -> None:
    """Every member's path through the row, from its predictors, targets and positions, is its prompt and completion."""
    positions = batch.layout.position_ids
    assert len(batch.input_ids) == len(positions) == batch.layout.num_tokens
    for k, member in enumerate(batch.members):
        r = rollouts[member]
        prompt = len(r.prompt.token_ids)
        rows = slice(int(batch.cu_seqlens[k]), int(batch.cu_seqlens[k + 1]))
        assert batch.target[rows].tolist() == r.token_ids
        predictor = batch.predictor_index[rows].tolist()
        assert batch.input_ids[predictor].tolist() == [r.prompt.token_ids[-1], *r.token_ids[:-1]]
        assert positions[predictor].tolist() == list(range(prompt - 1, prompt + r.num_tokens - 1))
        first = predictor[0] - prompt + 1
        assert batch.input_ids[first : predictor[0] + 1].tolist() == r.prompt.token_ids
        assert positions[first : predictor[0] + 1].tolist() == list(range(prompt))
        if r.num_tokens > 1:  # its last token is in the row too, though it predicts nothing
            assert batch.input_ids[predictor[-1] + 1] == r.token_ids[-1]
        assert batch.sampling_logprob is not None
        assert torch.equal(batch.sampling_logprob[rows], r.sampling_logprob)
        assert batch.advantage[k] == r.advantage


@settings(max_examples=150, deadline=None)
@given(lengths=lengths, budget=st.integers(1, 120))
def test_every_token_once_in_its_place_within_the_budget(lengths: list[tuple[int, int]], budget: int) -> None:
    rollouts = [_rollout(i, p, c, advantage=float(i)) for i, (p, c) in enumerate(lengths)]
    seen = []
    for batch in pack(rollouts, max_tokens=budget):
        assert len(batch.input_ids) <= budget or len(batch.members) == 1
        sequences = [[*rollouts[m].prompt.token_ids, *rollouts[m].token_ids] for m in batch.members]
        assert batch.input_ids.tolist() == [t for s in sequences for t in s]
        assert batch.layout.position_ids.tolist() == [k for s in sequences for k in range(len(s))]
        assert batch.layout.prompt_lengths == tuple(len(s) for s in sequences)
        assert not batch.layout.shares
        _check_rows(batch, rollouts)
        seen += list(batch.members)
    assert sorted(seen) == list(range(len(rollouts)))


groups = st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 12), min_size=1, max_size=6)), max_size=5)


def _groups(lengths: list[tuple[int, list[int]]]) -> list[Rollout]:
    """Completions of each prompt length; groups interleaved, as after a selection of rollouts by other marks."""
    made: list[Rollout] = []
    for g, (prompt, completions) in enumerate(lengths):
        ids = list(range(1000 * g, 1000 * g + prompt))
        for c in completions:
            r = _rollout(len(made), 1, c, advantage=float(len(made)), group=g)
            r.prompt = Prompt(g, "", list(ids))
            made.append(r)
    return made[::2] + made[1::2]


@settings(max_examples=150, deadline=None)
@given(lengths=groups, budget=st.integers(1, 120))
def test_shared_prompts_stand_once_in_a_micro_batch(lengths: list[tuple[int, list[int]]], budget: int) -> None:
    rollouts = _groups(lengths)
    seen = []
    packed = pack(rollouts, max_tokens=budget, share=True)
    for batch in packed:
        assert len(batch.input_ids) <= budget or len(batch.members) == 1
        prompts = [tuple(rollouts[m].prompt.token_ids) for m in batch.members]
        scored = sum(rollouts[m].num_tokens for m in batch.members)
        assert len(batch.input_ids) == scored + sum(len(p) for p in set(prompts))
        _check_rows(batch, rollouts)
        if all(batch.layout.completion_lengths):  # where all prompts are shared, the indices are the layout's
            assert torch.equal(batch.layout.predictor_index, batch.predictor_index)
            assert torch.equal(batch.layout.cu_seqlens, batch.cu_seqlens)
        assert all(len(group) != 1 for group in batch.layout.completion_lengths)
        seen += list(batch.members)
    assert sorted(seen) == list(range(len(rollouts)))
    assert [b.members for b in packed] == [b.members for b in pack(rollouts, max_tokens=budget, share=True)]


def test_a_group_over_the_budget_is_parted_and_one_within_it_is_not() -> None:
    rollouts = _groups([(10, [5, 5, 5, 5]), (4, [3, 3])])
    sizes = {n: [len(b.input_ids) for b in pack(rollouts, max_tokens=n, share=True)] for n in (40, 30, 29, 20, 9)}
    assert sizes == {40: [40], 30: [30, 10], 29: [25, 25], 20: [20, 20, 10], 9: [15, 15, 15, 15, 7, 7]}
    [first, second] = pack(rollouts, max_tokens=20, share=True)[:2]
    assert {rollouts[m].group for m in first.members} == {rollouts[m].group for m in second.members} == {0}


def test_sharing_goes_by_the_prompts_tokens_not_by_the_groups_number() -> None:
    rollouts = _groups([(5, [2, 3])])
    rollouts[1].prompt = Prompt(0, "", [9, 9, 9, 9, 9])
    [batch] = pack(rollouts, max_tokens=100, share=True)
    assert not batch.layout.shares
    assert len(batch.input_ids) == 15


def test_without_shared_prompts_sharing_changes_nothing() -> None:
    rollouts = [_rollout(i, 3 + i, 9 - i) for i in range(6)]
    for plain, shared in zip(*(pack(rollouts, max_tokens=30, share=share) for share in (False, True)), strict=True):
        for a, b in zip(plain.tensors(), shared.tensors(), strict=True):
            assert torch.equal(a, b)
        assert plain.members == shared.members
        assert not shared.layout.shares


_WORK = Work(per_token=1.0, per_scored=0.0, attention=((None, 0.2), (4, 0.1)))


def test_work_counts_what_each_query_sees() -> None:
    """Against a sum over every pair of positions."""

    def pairs(length: int, window: int) -> int:
        return sum(1 for q in range(length) for k in range(q + 1) if q - k < window)

    for prompt, completions in ((1, [1]), (5, [3, 2]), (2, [9, 1, 4])):
        seen = {
            w: pairs(prompt, w) + sum(pairs(prompt + c, w) - pairs(prompt, w) for c in completions) for w in (4, 99)
        }
        expected = prompt + sum(completions) + 0.2 * seen[99] + 0.1 * seen[4]
        assert _WORK.of(prompt, completions) == pytest.approx(expected)
    assert Work(0.0, 2.0, ()).of(7, [3, 4]) == 14.0


@settings(max_examples=150, deadline=None)
@given(lengths=groups, budget=st.integers(1, 120), share=st.booleans())
def test_balancing_by_work_costs_no_micro_batch(lengths: list[tuple[int, list[int]]], budget: int, share: bool) -> None:
    rollouts = _groups(lengths)
    by_tokens = pack(rollouts, max_tokens=budget, share=share)
    balanced = pack(rollouts, max_tokens=budget, share=share, work=_WORK)
    assert len(balanced) <= len(by_tokens)
    assert sorted(m for b in balanced for m in b.members) == list(range(len(rollouts)))
    assert all(len(b.input_ids) <= budget or len(b.members) == 1 for b in balanced)
    for batch in (*balanced, *by_tokens):
        plain = batch.layout.prompt_lengths, batch.layout.completion_lengths
        assert batch.layout.num_tokens == len(batch.input_ids), plain
    assert all(b.work == len(b.input_ids) for b in by_tokens)


def test_long_sequences_do_not_stand_together() -> None:
    """By tokens alone the long ones fill one micro-batch and the short ones the other."""
    rollouts = [_rollout(i, 1, length) for i, length in enumerate((39, 39, 9, 9, 9, 9, 9, 9, 9, 9))]
    quadratic = Work(per_token=0.0, per_scored=0.0, attention=((None, 1.0),))
    sizes = [sorted(len(r.token_ids) for r in (rollouts[m] for m in b.members)) for b in pack(
        rollouts, max_tokens=80, work=quadratic)]  # fmt: skip
    assert sizes == [[9, 9, 9, 9, 39]] * 2
    work = [b.work for b in pack(rollouts, max_tokens=80, work=quadratic)]
    assert work == [40 * 41 / 2 + 4 * 10 * 11 / 2] * 2


def test_what_does_not_add_up_names_the_numbers() -> None:
    good = _rollout(0, 2, 3)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        pack([good], max_tokens=0)
    with pytest.raises(ValueError, match=r"rollouts\[1\]: a prompt of 2 tokens and a completion of 0"):
        pack([good, _rollout(1, 2, 0)], max_tokens=9)
    with pytest.raises(ValueError, match=r"rollouts\[0\]: a prompt of 0 tokens and a completion of 3"):
        pack([_rollout(0, 0, 3)], max_tokens=9)
    with pytest.raises(ValueError, match=r"rollouts\[0\].old_logprob: \[4\] numbers for 3 tokens"):
        pack([_rollout(0, 2, 3, old_logprob=torch.zeros(4))], max_tokens=9)


def test_dtypes_and_missing_logprobs() -> None:
    rollouts = [_rollout(0, 2, 3), _rollout(1, 1, 2)]
    [batch] = pack(rollouts, max_tokens=50)
    assert batch.input_ids.dtype == batch.target.dtype == batch.predictor_index.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.advantage.dtype == torch.float32
    assert batch.old_logprob is None
    assert batch.ref_logprob is None


def test_log_probs_of_some_completions_only_are_a_mistake() -> None:
    rollouts = [_rollout(0, 2, 3), _rollout(1, 1, 2, old_logprob=torch.zeros(2))]
    with pytest.raises(ValueError, match="old_logprob: 1 of 2 completions have it"):
        pack(rollouts, max_tokens=50)


def test_what_counts_and_what_is_computed() -> None:
    failed = _rollout(0, 2, 5, reward=math.nan)
    cut = _rollout(1, 2, 7, finished=False, advantage=1.0)
    dead = _rollout(2, 2, 3, advantage=0.0)
    alive = _rollout(3, 2, 4, advantage=-1.0)
    empty = _rollout(4, 2, 0, advantage=1.0)
    everything = [failed, cut, dead, alive, empty]

    whole = denominators(everything, mask_truncated=False)
    assert (whole.num_sequences, whole.num_tokens) == (4, 14)
    whole = denominators(everything, mask_truncated=True)
    assert (whole.num_sequences, whole.num_tokens) == (4, 7)
    assert select(everything, mask_truncated=False, skip_zero=False) == [cut, dead, alive]
    assert select(everything, mask_truncated=False, skip_zero=True) == [cut, alive]
    assert select(everything, mask_truncated=True, skip_zero=True) == [alive]
    assert pack([], max_tokens=10) == []


@given(groups=st.integers(1, 20), size=st.integers(1, 5), data=st.data())
def test_minibatches_hold_whole_groups_once(groups: int, size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, groups))
    rollouts = [_rollout(i, 1, 1, group=i // size) for i in range(groups * size)]
    parts = split_minibatches(rollouts, count)
    assert [r for part in parts for r in part] == rollouts
    assert len(parts) == count
    sizes = [len({r.group for r in part}) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == groups
