"""`sample_tokens`: against the definition in loops, transformers' filters, what is drawn, ties, broken rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import sample_tokens, vocabulary
from fastgrpo_kernels.sample_tokens.reference import filtered_weights, sample_tokens_reference

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8, "temperature": 0.9},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7},
}
BROKEN = {"nan": math.nan, "inf": math.inf, "nothing": -math.inf}


def make(n: int, v: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Random logits and uniform numbers."""
    g = torch.Generator().manual_seed(v)
    logits = (scale * torch.randn(n, v, generator=g)).to(dtype)
    return logits, torch.rand(n, generator=g, dtype=torch.float64)


def grid(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def is_drawn(logits: Tensor, uniform: Tensor, token: Tensor, logprob: Tensor, options: dict[str, Any]) -> Tensor:
    """[N] bool: `uniform` lies within 1e-6 of the token's interval of the distribution function, and the log-prob is
    the token's to fp32's precision. In float64; a border of top-p or min-p counts on both sides if it is 1e-6 away.
    """
    top_p, min_p = options.get("top_p", 1.0), options.get("min_p", 0.0)
    right = torch.zeros(len(token), dtype=torch.bool)
    for slack in (0.0, -1e-6, 1e-6):
        nudged = {"top_p": top_p + slack if top_p < 1 else 1.0, "min_p": min_p * (1 + slack)}
        weight = filtered_weights(logits, **{**options, **nudged})
        probability = weight / weight.sum(-1, keepdim=True)
        own = probability.gather(1, token[:, None])[:, 0]
        up_to = probability.cumsum(-1).gather(1, token[:, None])[:, 0]
        inside = (own > 0) & (uniform >= up_to - own - 1e-6) & (uniform <= up_to + 1e-6)
        right |= inside & ((logprob.double() - own.log()).abs() <= 1e-6 + 1e-6 * own.log().abs())
    return right


def assert_drawn(logits: Tensor, uniform: Tensor, options: dict[str, Any]) -> None:
    token, logprob = sample_tokens(logits, uniform, **options)
    assert (token.dtype, logprob.dtype) == (torch.int64, torch.float32)
    assert token.shape == logprob.shape == (len(logits),)
    if options.get("temperature") == 0:
        assert torch.equal(token, logits.argmax(-1))
        assert not logprob.any()
    else:
        assert is_drawn(logits, uniform, token, logprob, options).all()


def by_definition(
    logits: list[float], uniform: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[int, float]:
    """Token and log-prob of one row, with Python's floats."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    peak = logits[order[0]]
    if temperature == 0:
        return order[0], 0.0
    weight = {i: math.exp((logits[i] - peak) / temperature) for i in order}
    if 0 < top_k < len(order):
        weight = {i: w for i, w in weight.items() if logits[i] >= logits[order[top_k - 1]]}
    if top_p < 1:
        limit, above, kept = top_p * sum(weight.values()), 0.0, {}
        for i, w in weight.items():
            if above < limit:
                kept[i] = w
            above += w
        weight = kept
    weight = {i: w for i, w in weight.items() if w >= min_p}
    total, up_to = sum(weight.values()), 0.0
    for i in sorted(weight):
        up_to += weight[i]
        if up_to > uniform * total:
            return i, math.log(weight[i] / total)
    raise AssertionError("unreachable")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    row=st.lists(st.sampled_from([-2.0, -1.3, 0.0, 0.4, 1.1, 3.0]), min_size=1, max_size=9),
    uniform=st.floats(0, 1, exclude_max=True),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.integers(0, 10),
    top_p=st.sampled_from([0.01, 0.37, 0.73, 0.951, 1.0]),
    min_p=st.sampled_from([0.0, 0.0917, 0.513, 1.0]),
)
def test_matches_the_definition(
    row: list[float], uniform: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Logits with many ties; the reference, the op in float64, and the op in float32 but for rounded borders."""
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    logits, u = torch.tensor([row], dtype=torch.float64), torch.tensor([uniform], dtype=torch.float64)
    want, want_logprob = by_definition(row, uniform, **options)
    for token, logprob in (sample_tokens(logits, u, **options), sample_tokens_reference(logits, u, **options)):
        if token.item() != want:  # the sums are rounded otherwise: then the number is on the border of both tokens
            assert is_drawn(logits, u, token, logprob, options).all()
        else:
            assert logprob.item() == pytest.approx(want_logprob, rel=1e-12, abs=1e-12)
    assert_drawn(logits.float(), u, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [1, 127, 128, 129, 5000])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_number_lies_in_the_token_s_interval(v: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_drawn(*make(40, v, dtype), options)


@pytest.mark.parametrize("options", [OPTIONS[name] for name in ("plain", "warm", "top_k", "top_p", "all")])
def test_chi_square(options: dict[str, Any]) -> None:
    n, v = 200_000, 40
    row, _ = make(1, v, scale=1.0)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(3))
    token, _ = sample_tokens(row.expand(n, v), uniform, **options)
    weight = filtered_weights(row, **options)[0]
    kept = weight > 0
    count = token.bincount(minlength=v)
    assert not count[~kept].any()
    expected = n * weight[kept] / weight.sum()
    statistic = float(((count[kept] - expected).square() / expected).sum())
    freedom = int(kept.sum()) - 1
    # Wilson and Hilferty: its cube root is nearly normal; 4 standard deviations.
    spread = 2 / (9 * freedom)
    assert ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 4


def test_filters_are_transformers() -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits, _ = make(30, 200)
    warped = warpers.TemperatureLogitsWarper(0.7)(None, logits)
    for warper in (warpers.TopKLogitsWarper(40), warpers.TopPLogitsWarper(0.93), warpers.MinPLogitsWarper(0.02)):
        warped = warper(None, warped)
    kept = filtered_weights(logits, 0.7, 40, 0.93, 0.02) > 0
    assert torch.equal(kept, warped > -math.inf)
    assert 1 < kept.sum(-1).double().mean() < 39
    uniform = grid(30)
    token, logprob = sample_tokens(logits, uniform, temperature=0.7, top_k=40, top_p=0.93, min_p=0.02)
    want = warped.log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_row_that_is_no_distribution(kind: str, options: dict[str, Any]) -> None:
    logits, uniform = make(3, 300)
    clean = sample_tokens(logits, uniform, **options)
    logits[1, 0 if kind == "nothing" else 200 :] = BROKEN[kind]
    for token, logprob in (
        sample_tokens(logits, uniform, **options),
        sample_tokens_reference(logits, uniform, **options),
    ):
        assert token[1] == 0
        assert logprob[1].isnan()
        assert torch.equal(token[::2], clean[0][::2])
        torch.testing.assert_close(logprob[::2], clean[1][::2])


def test_the_ends_of_the_unit_interval() -> None:
    """No token without probability, whatever is drawn."""
    logits, _ = make(1, 500)
    logits[0, :130], logits[0, 380:] = -math.inf, -math.inf
    ends = torch.tensor([0.0, 5e-324, 1 - 2.0**-24, 1 - 2.0**-53], dtype=torch.float64)
    for uniform in (ends, ends[[0, 2]].float()):
        token, logprob = sample_tokens(logits.expand(len(uniform), -1), uniform)
        assert token.tolist() == [130, 130, 379, 379][:: 1 if len(uniform) == 4 else 2]
        assert logprob.isfinite().all()


def test_row_blocks_and_layouts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, uniform = make(11, 70)
    want = sample_tokens(logits, uniform, **OPTIONS["all"])
    wide = torch.full((11, 80), math.nan)
    wide[:, 3:73] = logits
    for elements in (1, 210):
        monkeypatch.setattr(vocabulary, "BLOCK_ELEMENTS", elements)
        for view in (logits, wide[:, 3:73], logits.t().contiguous().t()):
            assert all(map(torch.equal, sample_tokens(view, uniform, **OPTIONS["all"]), want))
    assert torch.equal(sample_tokens(logits[4:5], uniform[4:5], **OPTIONS["all"])[0], want[0][4:5])


def test_no_rows_and_no_gradient() -> None:
    token, logprob = sample_tokens(torch.zeros(0, 5, requires_grad=True), torch.zeros(0))
    assert token.shape == logprob.shape == (0,)
    _, logprob = sample_tokens(torch.zeros(2, 5, requires_grad=True), torch.zeros(2))
    assert not logprob.requires_grad
    assert sample_tokens(torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2))[1].dtype == torch.float64


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    logits, _ = make(1, 64)
    logits[0, 5] = -math.inf
    token, logprob = sample_tokens(logits.expand(63, -1), grid(63), temperature=temperature)
    if temperature < 1:
        assert (token == logits.argmax()).all()
        assert not logprob.any()
    else:
        assert token.tolist() == [i for i in range(64) if i != 5]
        torch.testing.assert_close(logprob, torch.full((63,), -math.log(63)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, "logits: expected shape"),
        ({"logits": torch.zeros(3, 0)}, "V >= 1"),
        ({"uniform": torch.zeros(2)}, "uniform: expected shape"),
        ({"uniform": torch.zeros(3, dtype=torch.float16)}, "uniform: expected dtype"),
        ({"uniform": torch.ones(3)}, r"uniform: expected values in \[0, 1\)"),
        ({"uniform": torch.full((3,), math.nan)}, r"uniform: expected values in \[0, 1\)"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": None}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 2.0}, "min_p"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(3, 4), "uniform": torch.zeros(3), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        sample_tokens(arguments.pop("logits"), arguments.pop("uniform"), **arguments)


def test_opcheck_and_compile() -> None:
    logits, uniform = make(4, 9)
    torch.library.opcheck(torch.ops.fastgrpo.sample_tokens.default, (logits, uniform, 0.7, 3, 0.9, 0.01))

    def call(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        return sample_tokens(2 * logits, uniform, **OPTIONS["all"])

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(logits, uniform), call(logits, uniform)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_on_a_gpu(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Without waiting, captured in a CUDA graph, as the kernels are; bitwise the same again."""
    logits, uniform = (x.cuda() for x in make(33, 151_936, dtype))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        token, logprob = sample_tokens(logits, uniform, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if options.get("temperature") == 0:
        assert torch.equal(token, logits.argmax(-1))
    else:
        assert is_drawn(logits.cpu(), uniform.cpu(), token.cpu(), logprob.cpu(), options).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = sample_tokens(logits, uniform, **options)
    graph.replay()
    assert all(map(torch.equal, again, (token, logprob)))
