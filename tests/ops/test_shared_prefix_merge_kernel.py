"""The merge of two attention parts in Triton's interpreter: against float64, sizes, layouts, parts without keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import PackedLayout
from fastgrpo_kernels.shared_prefix_attention import kernel, varlen
from fastgrpo_kernels.shared_prefix_attention.op import shared_prefix_attention
from fastgrpo_kernels.shared_prefix_attention.options import merge_

from .test_shared_prefix_varlen import aten  # noqa: F401

pytestmark = [
    pytest.mark.interpreter,
    # numpy says so where a GPU makes inf or NaN without a word.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def parts(rows: int, heads: int, size: int, dtype: torch.dtype, *, skip: int = 3) -> tuple[Tensor, ...]:
    """Both parts of the rows behind the first `skip`, as the op cuts them: slices of one packed output."""
    generator = torch.Generator().manual_seed(rows)
    out = torch.randn(rows + skip, heads, size, generator=generator).to(dtype)[skip:]
    lse = 8 * torch.randn(heads, rows + skip, generator=generator)[:, skip:]
    other = torch.randn(rows, heads, size, generator=generator).to(dtype)
    return out, lse, other, 8 * torch.randn(heads, rows, generator=generator)


def merged(function: Any, given: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    out, lse, other, other_lse = (x if dtype is None else x.to(dtype) for x in given)
    whole = torch.cat([torch.zeros_like(out[:1]), out]), torch.cat([torch.zeros_like(lse[:, :1]), lse], 1)
    function(whole[0][1:], whole[1][:, 1:], other, other_lse)
    assert not whole[0][0].any()  # nothing in front of the slice is touched
    assert not whole[1][:, 0].any()
    return whole[0][1:], whole[1][:, 1:]


def assert_exact(given: tuple[Tensor, ...]) -> None:
    """As near to float64 as PyTorch's own, to half a unit of the last place."""
    exact, theirs, ours = merged(merge_, given, torch.float64), merged(merge_, given), merged(kernel.merge_parts, given)
    for want, their, our in zip(exact, theirs, ours, strict=True):
        assert our.dtype == their.dtype
        error, allowed = (our - want).abs().max(), (their - want).abs().max()
        assert error <= 1.5 * allowed + 1e-6, (error, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (1, 14), (5, 3), (67, 2), (200, 1)])
def test_against_float64(rows: int, heads: int, size: int, dtype: torch.dtype) -> None:
    assert_exact(parts(rows, heads, size, dtype))


@pytest.mark.parametrize("nothing", [float("inf"), float("-inf")])
def test_a_part_without_keys_changes_nothing(nothing: float) -> None:
    """Flash attention 2 and 3 say +inf of it, 3 and 4 -inf."""
    given = parts(40, 4, 64, torch.bfloat16)
    given[3][:, ::2] = nothing
    given[2][::2] = 0
    out, lse = merged(kernel.merge_parts, given)
    assert torch.equal(out[::2], given[0][::2])
    assert torch.equal(lse[:, ::2], given[1][:, ::2])
    assert not torch.equal(out[1::2], given[0][1::2])
    assert_exact(given)


def test_far_apart_the_larger_part_is_all() -> None:
    given = parts(20, 2, 64, torch.bfloat16)
    given[3].copy_(given[1] + torch.tensor([[500.0], [-500.0]]))
    out, lse = merged(kernel.merge_parts, given)
    assert torch.equal(out[:, 0], given[2][:, 0])
    assert torch.equal(out[:, 1], given[0][:, 1])
    assert torch.equal(lse[0], given[3][0])
    assert torch.equal(lse[1], given[1][1])


def test_nan_spoils_its_own_head_and_row() -> None:
    given = parts(30, 3, 64, torch.bfloat16)
    given[1][1, 7] = torch.nan
    given[2][9, 2, 5] = torch.nan
    out, lse = merged(kernel.merge_parts, given)
    spoilt = torch.zeros(30, 3, 64, dtype=torch.bool)
    spoilt[7, 1] = spoilt[9, 2, 5] = True
    assert torch.equal(out.isnan(), spoilt)
    assert lse.isnan().sum() == 1


def test_other_layouts_take_pytorchs_merge() -> None:
    out, lse, other, other_lse = parts(10, 4, 64, torch.bfloat16)
    assert kernel.takes(out, lse, other, other_lse)
    assert not kernel.takes(out, lse, other.transpose(1, 2).contiguous().transpose(1, 2), other_lse)
    assert not kernel.takes(out, lse, other, other_lse.T.contiguous().T)
    assert not kernel.takes(out, lse.double(), other, other_lse)


def test_the_op_launches_it(aten: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    launched = []

    def counted(*given: Tensor) -> None:
        launched.append(given[0].shape)
        kernel_merge(*given)

    kernel_merge = kernel.merge_parts
    monkeypatch.setattr(kernel, "merge_parts", counted)
    layout = PackedLayout([9, 4], [[3, 5], []])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(21, heads, 64, generator=generator).bfloat16() for heads in (4, 2, 2))
    merged_here = shared_prefix_attention(q, k, v, layout)
    assert launched == [(8, 4, 64)]
    monkeypatch.setattr(varlen, "use_triton", lambda _: False)
    torch.testing.assert_close(merged_here, shared_prefix_attention(q, k, v, layout))
    assert len(launched) == 1
