"""Packing: budgets, indices, denominators, minibatches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.packing import denominators, pack, select, split_minibatches
from fastgrpo.records import Prompt, Rollout


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


@settings(max_examples=150, deadline=None)
@given(lengths=lengths, budget=st.integers(1, 120))
def test_every_token_once_in_its_place_within_the_budget(lengths: list[tuple[int, int]], budget: int) -> None:
    rollouts = [_rollout(i, p, c, advantage=float(i)) for i, (p, c) in enumerate(lengths)]
    seen = []
    for batch in pack(rollouts, max_tokens=budget):
        assert len(batch.input_ids) <= budget or len(batch.members) == 1
        assert len(batch.input_ids) == sum(batch.lengths)
        start = 0
        for k, member in enumerate(batch.members):
            r = rollouts[member]
            size = len(r.prompt.token_ids) + r.num_tokens
            assert batch.lengths[k] == size
            assert batch.input_ids[start : start + size].tolist() == [*r.prompt.token_ids, *r.token_ids]
            assert batch.position_ids[start : start + size].tolist() == list(range(size))
            rows = slice(int(batch.cu_seqlens[k]), int(batch.cu_seqlens[k + 1]))
            assert batch.target[rows].tolist() == r.token_ids
            # The row before each scored token predicts it.
            assert batch.input_ids[batch.predictor_index[rows] + 1].tolist() == r.token_ids
            assert batch.predictor_index[rows].tolist() == list(
                range(start + len(r.prompt.token_ids) - 1, start + size - 1)
            )
            assert batch.sampling_logprob is not None
            assert torch.equal(batch.sampling_logprob[rows], r.sampling_logprob)
            assert batch.advantage[k] == r.advantage
            start += size
        seen += list(batch.members)
    assert sorted(seen) == list(range(len(rollouts)))


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
    with pytest.raises(ValueError, match="1 of 2 completions have log-probs"):
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
