"""`PackedLayout`: against the definition, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo_kernels import PackedLayout


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=4)), max_size=4))
def test_matches_the_definition(groups: list[tuple[int, list[int]]]) -> None:
    prompts, completions = [p for p, _ in groups], [c for _, c in groups]
    layout = PackedLayout(prompts, completions)
    positions = [i for p in prompts for i in range(p)]
    last_rows = [sum(prompts[: i + 1]) - 1 for i in range(len(prompts))]
    predictors, bounds, row = [], [0], len(positions)
    for prompt, last_row, lengths in zip(prompts, last_rows, completions, strict=True):
        for length in lengths:
            for j in range(length):
                predictors.append(last_row if j == 0 else row - 1)
                positions.append(prompt + j)
                row += 1
            bounds.append(bounds[-1] + length)
    assert layout.position_ids.tolist() == positions
    assert layout.predictor_index.tolist() == predictors
    assert layout.cu_seqlens.tolist() == bounds
    assert (layout.num_prompt_tokens, layout.num_completion_tokens) == (sum(prompts), bounds[-1])
    assert layout.num_tokens == row
    assert [x.dtype for x in (layout.position_ids, layout.predictor_index, layout.cu_seqlens)] == [
        torch.int64,
        torch.int64,
        torch.int32,
    ]


def test_an_example_by_hand() -> None:
    layout = PackedLayout([2, 3], [[2, 1], [3]])
    #                     p1    p2       c11   c12 c21
    assert layout.position_ids.tolist() == [0, 1, 0, 1, 2, 2, 3, 2, 3, 4, 5]
    assert layout.predictor_index.tolist() == [1, 5, 1, 4, 8, 9]
    assert layout.cu_seqlens.tolist() == [0, 2, 3, 6]
    assert repr(layout) == "PackedLayout([2, 3], [[2, 1], [3]])"


def test_device() -> None:
    layout = PackedLayout([1], [[2]], device="meta")
    assert {layout.position_ids.device.type, layout.predictor_index.device.type, layout.cu_seqlens.device.type} == {
        "meta"
    }


def test_bad_lengths() -> None:
    with pytest.raises(ValueError, match=r"prompt_lengths\[1\]: expected a length >= 1, got 0"):
        PackedLayout([2, 0], [[1], [1]])
    with pytest.raises(ValueError, match=r"completion_lengths\[1\]\[0\]: expected a length >= 0, got -1"):
        PackedLayout([2, 2], [[1], [-1]])
    with pytest.raises(ValueError, match=r"completion_lengths: expected one list per prompt, 2 in all, got 1"):
        PackedLayout([2, 2], [[1]])
    with pytest.raises(TypeError, match=r"prompt_lengths\[0\]: expected an int, got float"):
        PackedLayout([2.0], [[1]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"fewer than 2\^31 tokens"):
        PackedLayout([2**31], [[]])


def test_lengths_may_be_iterators() -> None:
    layout = PackedLayout(iter([3]), [iter([1, 2])])  # type: ignore[arg-type, list-item]
    assert (layout.prompt_lengths, layout.completion_lengths) == ((3,), ((1, 2),))
    assert layout.num_tokens == 6
