"""`sample_tokens` in Triton's interpreter: against the float64 reference, ties, chunks, layouts, -inf, NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from fastgrpo_kernels import sample_tokens
from fastgrpo_kernels.sample_tokens.reference import filtered_weights

from .test_sample_tokens import BROKEN, OPTIONS, assert_drawn, grid, make

pytestmark = [
    pytest.mark.interpreter,
    # numpy says so where a GPU makes inf or NaN without a word.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [7, 9001])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_number_lies_in_the_token_s_interval(v: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_drawn(*make(3, v, dtype), options)


@pytest.mark.parametrize("v", [1, 4095, 4096, 4097, 8192])
@pytest.mark.parametrize("name", ["plain", "greedy", "min_p"])
def test_edges_of_chunks(v: int, name: str) -> None:
    assert_drawn(*make(4, v), OPTIONS[name])
    logits = torch.full((2, v), -math.inf)
    logits[0, -1] = 1.0
    logits[1, min(4096, v - 1)] = -2.0
    token, logprob = sample_tokens(logits, torch.tensor([0.0, 0.999]), **OPTIONS[name])
    assert token.tolist() == [v - 1, min(4096, v - 1)]
    assert not logprob.any()


@pytest.mark.parametrize("options", [OPTIONS[name] for name in ("plain", "top_k", "top_p")])
def test_a_grid_of_numbers_gives_every_token_its_share(options: dict[str, Any]) -> None:
    """Within one of the tokens' expected counts: closer than any random sample comes."""
    n, v = 30 if options else 120, 20
    row, _ = make(1, v, torch.bfloat16, scale=1.0)
    token, _ = sample_tokens(row.expand(n, v), grid(n), **options)
    weight = filtered_weights(row, **options)[0]
    assert (token.bincount(minlength=v) - n * weight / weight.sum()).abs().max() <= 1 + 1e-3
    assert torch.equal(token, token.sort().values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_at_the_cut(dtype: torch.dtype) -> None:
    """Three values in all three chunks. top-p ends among equals of one chunk or another; top-k takes all of them."""
    v = 9001
    values = torch.tensor([-0.0, 0.0, 1.0, 3.0, -2.0], dtype=dtype)
    row = values[torch.randint(0, 5, (v,), generator=torch.Generator().manual_seed(5))]
    uniform = torch.tensor([0.31, 1 - 1e-6])  # the second draws the last tokens that are kept
    for options in ({"top_p": 0.1}, {"top_p": 0.93}, {"top_k": 2500}, {"top_k": 2500, "top_p": 0.97}):
        assert_drawn(row.expand(2, v), uniform, options)


def test_equal_logits_are_cut_by_their_ids() -> None:
    """Weights of 1, whose sums are exact: so is every token."""
    logits, uniform = torch.full((5, 8200), -3.5), torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2.0**-24])
    token, logprob = sample_tokens(logits, uniform, top_p=0.5)
    assert token.tolist() == [0, 1025, 2050, 3075, 4099]
    torch.testing.assert_close(logprob, torch.full((5,), -math.log(4100)))
    token, _ = sample_tokens(logits, uniform, top_p=0.75)
    assert token.tolist() == [0, 1537, 3075, 4612, 6149]
    assert sample_tokens(logits, uniform, top_k=3)[0].tolist() == sample_tokens(logits, uniform)[0].tolist()
    assert not sample_tokens(logits, uniform, temperature=0.0)[0].any()


@pytest.mark.parametrize("name", ["plain", "greedy", "top_k", "top_p", "all"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_row_that_is_no_distribution(kind: str, name: str) -> None:
    logits, uniform = make(3, 4200, torch.bfloat16)
    clean = sample_tokens(logits, uniform, **OPTIONS[name])
    logits[1, 0 if kind == "nothing" else 4150 :] = BROKEN[kind]
    token, logprob = sample_tokens(logits, uniform, **OPTIONS[name])
    assert token[1] == 0
    assert logprob[1].isnan()
    assert torch.equal(token[::2], clean[0][::2])
    assert torch.equal(logprob[::2], clean[1][::2])


@pytest.mark.parametrize("name", ["plain", "top_k", "top_p", "all"])
def test_extreme_logits(name: str) -> None:
    v = 4500
    logits, _ = make(6, v)
    logits[0] += 1e4
    logits[1] = torch.finfo(torch.float32).min  # what masks are filled with: equal, and all of the row
    logits[2, 1::2] = -math.inf
    logits[3] = -math.inf
    logits[3, 4400] = -5.0
    logits[4] *= 1e4
    logits[5, :4096] = torch.finfo(torch.float32).min
    assert_drawn(logits, grid(6), OPTIONS[name])


def test_the_ends_of_the_unit_interval() -> None:
    """No token without probability. The kernel clamps what the host would have to wait for to refuse."""
    from fastgrpo_kernels.sample_tokens import kernel

    logits = torch.full((1, 9000), -math.inf)
    logits[0, 4200:4300] = 0.0
    logits[0, 100] = -85.0  # a share of 1e-39: less than fp32's sums or a GPU's exponential can hold
    uniform = torch.tensor([5e-17, 1 - 2.0**-53, 1.0, 7.0, -1.0, math.nan], dtype=torch.float64)
    token, logprob = kernel.sample(logits.expand(6, -1), uniform, 1.0, 0, 1.0, 0.0)
    assert token[:4].tolist() == [4200, 4299, 4299, 4299]
    assert set(token[4:].tolist()) <= {100, 4200}
    assert logprob.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    logits, _ = make(1, 64)
    logits[0, 5] = -math.inf
    for filters in ({}, {"top_p": 0.999, "top_k": 63}):
        token, logprob = sample_tokens(logits.expand(4, -1), grid(4), temperature=temperature, **filters)
        if temperature < 1:
            assert (token == logits.argmax()).all()
            assert not logprob.any()
        else:
            assert token.tolist() == [8, 24, 40, 56]
            torch.testing.assert_close(logprob, torch.full((4,), -math.log(63)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_any_layout(name: str, dtype: torch.dtype) -> None:
    n, v = 3, 40
    logits, uniform = make(n, v, dtype)
    layouts = {"every other row": torch.full((2 * n, v), math.nan, dtype=dtype)[::2]}
    layouts |= {f"columns from {i}": torch.full((n, v + 17), math.nan, dtype=dtype)[:, i : i + v] for i in (0, 3, 16)}
    layouts |= {"transposed": torch.empty(v, n, dtype=dtype).t()}
    want = sample_tokens(logits, uniform, **OPTIONS[name])
    for layout, view in layouts.items():
        view.copy_(logits)
        got = sample_tokens(view, torch.stack([uniform, uniform], 1)[:, 0], **OPTIONS[name])
        assert all(map(torch.equal, got, want)), layout
    alone = sample_tokens(logits[1:2], uniform[1:2], **OPTIONS[name])
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone, want, strict=True))
    as_float = sample_tokens(logits, uniform.float().double(), **OPTIONS[name])
    assert all(map(torch.equal, sample_tokens(logits, uniform.float(), **OPTIONS[name]), as_float))


def test_rows_past_two_to_the_31_elements(tmp_path: Path) -> None:
    """Three rows 2^30 + 8 apart in a sparse file: the third begins where an int32 offset has wrapped round."""
    v, stride = 40, (1 << 30) + 8
    base = torch.from_file(str(tmp_path / "logits"), shared=True, size=2 * stride + v, dtype=torch.bfloat16)
    view = base.as_strided((3, v), (stride, 1))
    logits, uniform = make(3, v, torch.bfloat16)
    view.copy_(logits)
    got, want = (sample_tokens(x, uniform, **OPTIONS["all"]) for x in (view, logits))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(("v", "name"), [(151_936, "plain"), (151_936, "all"), (530_000, "plain"), (530_000, "min_p")])
def test_large_vocabularies(v: int, name: str) -> None:
    """The last two have more chunks than kernels are listed for; they are compiled when they come."""
    assert_drawn(*make(1, v, torch.bfloat16), OPTIONS[name])


def test_no_rows_and_float64_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgrpo_kernels.sample_tokens import kernel

    class Refuse:
        def __getitem__(self, grid: Any) -> NoReturn:
            raise AssertionError(f"a launch of {grid}")

    for name in ("chunk_sums", "filter_sums", "draw"):
        monkeypatch.setattr(kernel, name, Refuse())
    token, logprob = sample_tokens(torch.zeros(0, 11, dtype=torch.bfloat16), torch.zeros(0))
    assert token.shape == logprob.shape == (0,)
    assert (token.dtype, logprob.dtype) == (torch.int64, torch.float32)
    assert sample_tokens(torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2))[1].dtype == torch.float64


def test_opcheck() -> None:
    logits, uniform = make(2, 9)
    torch.library.opcheck(torch.ops.fastgrpo.sample_tokens.default, (logits, uniform, 0.7, 3, 0.9, 0.01))


def test_ranks_order_numbers_and_are_theirs() -> None:
    """Through a search that must find each of some numbers: the k-th largest of them is the cut of top-k."""
    for dtype in DTYPES:
        tiny, large = torch.finfo(dtype).smallest_normal, min(torch.finfo(dtype).max, 1e30)
        logits = torch.tensor([[large, 1.5, 1.0, tiny, 0.0, -tiny, -1.0, -7.25, -large]], dtype=dtype)
        for k in range(1, logits.shape[1]):
            # At this temperature all that is left is equally likely; the largest number draws the last of it.
            token, logprob = sample_tokens(logits, torch.tensor([0.9999]), temperature=1e300, top_k=k)
            assert token.item() == k - 1
            assert logprob.item() == pytest.approx(-math.log(k), abs=1e-3)


def test_every_launched_variant_is_listed() -> None:
    from fastgrpo_kernels.sample_tokens import kernel

    assert len({spec.name for spec in kernel.KERNELS}) == len(kernel.KERNELS)
    assert {kernel._chunk_slots(v) for v in (1, 4096, 151_936, 262_208, 524_288)} == {kernel.MIN_CHUNKS}
    assert all(spec.constexprs.get("CHUNKS", 128) == kernel.MIN_CHUNKS for spec in kernel.KERNELS)
