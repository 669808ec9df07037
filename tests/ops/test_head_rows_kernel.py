"""The fused head's row kernels in Triton's interpreter: against float64, far-off shifts, NaN, padding, views."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import relative_error

pytestmark = pytest.mark.interpreter
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GUARD = 123.0


def make(n: int, v: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Random fp32 logits in rows a multiple of 4 apart, and targets, the first and the last token among them."""
    g = torch.Generator().manual_seed(v)
    logits = torch.full((n, -(-v // 4) * 4 + 4), math.nan)[:, :v]
    logits.copy_(scale * torch.randn(n, v, generator=g))
    target = torch.randint(0, v, (n,), generator=g)
    target[0], target[-1] = 0, v - 1
    return logits, target


def exact(logits: Tensor, target: Tensor, scale: float = 1.0, ceiling: float | None = None) -> dict[str, Tensor]:
    """In float64: z, z_y, log-sum-exp, log-prob, entropy, and R / S = (p - [j = y]) * (1 - tanh^2)."""
    z = scale * logits.double()
    slope = torch.ones_like(z)
    if ceiling is not None:
        tanh = torch.tanh(z)
        z, slope = ceiling * tanh, 1 - tanh**2
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    one_hot = torch.zeros_like(p).scatter_(1, target[:, None], 1.0)
    return {
        "z": z,
        "z_y": z.gather(1, target[:, None])[:, 0],
        "lse": torch.logsumexp(z, -1),
        "logprob": logp.gather(1, target[:, None])[:, 0],
        "entropy": -torch.where(p == 0, 0.0, p * logp).sum(-1),
        "ratio": (p - one_hot) * slope,
    }


def read(
    logits: Tensor,
    target: Tensor,
    c: Tensor,
    z_y: Tensor | None = None,
    dtype: torch.dtype = BF16,
    scale: float = 1.0,
    **options: Any,
) -> dict[str, Tensor]:
    """What `single_read` writes: R, log-prob, entropy, S, c. Everything around R must have stayed."""
    from fastgrpo_kernels.head.rows.kernel import single_read

    n, v = logits.shape
    buffer = torch.full((n + 2, -(-v // 8) * 8 + 16), GUARD, dtype=dtype)
    rows: dict[str, Any] = {name: torch.empty(n) for name in ("logprob", "entropy", "row_sum")}
    c = c.clone()
    single_read(logits, target, c, z_y, buffer[1:-1, :v], input_scale=scale, **rows, **options)
    assert (buffer[:, v:] == GUARD).all()
    assert (buffer[[0, -1]] == GUARD).all()
    return {"out": buffer[1:-1, :v].clone(), "c": c, **rows}


def check(got: dict[str, Tensor], want: dict[str, Tensor], rows: slice | list[int] = slice(None)) -> None:
    """Statistics to fp32's digits; gradient rows within half an ulp of their dtype and fp32's error of S."""
    total, shift = got["row_sum"].double()[rows], got["c"].double()[rows]
    scale = want["lse"][rows].abs().clamp(min=shift.abs()) + 1
    assert ((total.log() + shift - want["lse"][rows]).abs() <= 1e-6 * scale).all()
    torch.testing.assert_close(got["logprob"].double()[rows], want["logprob"][rows], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got["entropy"].double()[rows], want["entropy"][rows], rtol=1e-6, atol=1e-5)
    ratio = got["out"].double()[rows] / total[:, None]
    rounding = torch.finfo(got["out"].dtype).eps / 2
    torch.testing.assert_close(ratio, want["ratio"][rows], rtol=1.001 * rounding + 1e-5, atol=3e-7)


# --- target_logit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ceiling", [None, 4.0])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("d", [1, 7, 64, 1032])
def test_target_logit(d: int, dtype: torch.dtype, extras: bool, ceiling: float | None) -> None:
    from fastgrpo_kernels.head.rows.kernel import target_logit

    n, v, r = 5, 11, 3
    g = torch.Generator().manual_seed(d)
    hidden = torch.full((n, d + 5), math.nan, dtype=dtype)[:, 2 : 2 + d]
    hidden.copy_(torch.randn(n, d, generator=g))
    weight = torch.randn(v, d, generator=g).div(math.sqrt(d)).to(dtype)
    u, b = torch.randn(n, r, generator=g).to(dtype), torch.randn(v, r, generator=g)
    bias = torch.randn(v, generator=g).to(dtype)
    target = torch.tensor([0, v - 1, 3, 3, 7])
    options: dict[str, Any] = {"bias": bias, "low_rank": (u, b)} if extras else {}
    z, c = target_logit(hidden, weight, target, input_scale=0.7, ceiling=ceiling, **options)

    def formula(dtype: torch.dtype) -> Tensor:
        y = (hidden.to(dtype) * weight[target].to(dtype)).sum(-1)
        if extras:
            y += bias[target].to(dtype) + (u.to(dtype) * b[target].to(dtype)).sum(-1)
        return 0.7 * y if ceiling is None else ceiling * torch.tanh(0.7 * y)

    want = formula(torch.float64)
    assert z.dtype == c.dtype == FP32
    assert relative_error(z, want) <= 1.5 * relative_error(formula(FP32), want) + 1e-6
    assert torch.equal(c, z)


def test_the_first_guess_given_shifts_unless_it_is_absurd() -> None:
    from fastgrpo_kernels.head.rows.kernel import target_logit

    old = torch.tensor([-3.0, math.nan, math.inf, -math.inf, 0.5, -80.5, -80.0, 0.0])
    counted = torch.tensor([-3.0, 0, 0, 0, 0, 0, -80.0, 0])
    n = old.numel()
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, 16, generator=g), torch.randn(9, 16, generator=g)
    target = torch.arange(n)
    for guess, used in (((old, -old), counted), ((None, old), counted), ((None, None), 0 * counted)):
        z, c = target_logit(hidden, weight, target, input_scale=1.0, guess=guess)
        assert torch.equal(c, z - used)
    z, c = target_logit(hidden, weight, target, input_scale=1.0, guess=(old.to(BF16), None))
    assert torch.equal(c, z - counted.to(BF16).float())
    bias = torch.full((9,), -math.inf)
    z, c = target_logit(hidden, weight, target, input_scale=1.0, bias=bias, guess=(old, None))
    assert (z == -math.inf).all()
    assert not c.any()


def test_a_target_outside_the_vocabulary_is_nan() -> None:
    from fastgrpo_kernels.head.rows.kernel import target_logit

    hidden, weight = torch.ones(4, 8), torch.ones(3, 8)
    target = torch.tensor([-1, 0, 3, 1 << 40])
    low_rank = torch.ones(4, 2), torch.ones(3, 2)
    z, c = target_logit(hidden, weight, target, input_scale=1.0, bias=torch.ones(3), low_rank=low_rank)
    assert z.isnan().tolist() == c.isnan().tolist() == [True, False, True, True]
    assert z[1] == 11
    got = read(torch.zeros(4, 8), torch.tensor([-1, 0, 8, 1 << 40]), torch.full((4,), math.nan))
    assert got["logprob"].isnan().tolist() == [True, False, True, True]


# --- single_read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "ceiling"), [(1.0, None), (-0.7, None), (0.3, 5.0)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("v", [1, 7, 8, 16, 513, 4099, 8203])
def test_single_read(v: int, dtype: torch.dtype, scale: float, ceiling: float | None) -> None:
    logits, target = make(4, v)
    want = exact(logits, target, scale, ceiling)
    z_y = want["z_y"].float()
    got = read(logits, target, z_y + 2, z_y, dtype, scale, ceiling=ceiling)
    check(got, want)
    assert torch.equal(got["c"], z_y + 2)
    guess = want["logprob"].float() + torch.tensor([3.0, -3.0, 1.0, -20.0])
    from_row = read(logits, target, torch.empty(4), None, dtype, scale, ceiling=ceiling, guess=(None, guess))
    check(from_row, want)
    counted = torch.where(guess <= 0, guess, 0.0)
    torch.testing.assert_close(from_row["c"], z_y - counted, rtol=1e-6, atol=1e-6)


def test_the_largest_vocabulary() -> None:
    logits, target = make(2, 151_936)
    want = exact(logits, target)
    check(read(logits, target, want["z_y"].float(), guess=(None, None)), want)


@pytest.mark.parametrize("ceiling", [None, 300.0])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("off", [40.0, -40.0, 100.0, -100.0, 1000.0, -1000.0, math.nan, math.inf, -math.inf])
def test_a_shift_far_off_is_found_and_mended(off: float, gather: bool, ceiling: float | None) -> None:
    logits, target = make(3, 4109)
    scale = 1.0 if ceiling is None else 1 / ceiling
    want = exact(logits, target, scale, ceiling)
    shift = want["lse"].float() + torch.tensor([0.0, off, 0.0])
    z_y = None if gather else want["z_y"].float()
    got = read(logits, target, shift, z_y, scale=scale, ceiling=ceiling)
    check(got, want)
    if abs(off) == 40:
        assert torch.equal(got["c"], shift)
    else:
        mended = want["z"].amax(-1) if math.isfinite(off) else want["z_y"]
        torch.testing.assert_close(got["c"][1], mended[1].float(), rtol=1e-6, atol=0)
    assert torch.equal(got["c"][::2], shift[::2])


@pytest.mark.parametrize("ceiling", [None, 30.0])
def test_extreme_logits(ceiling: float | None) -> None:
    n, v = 6, 2057
    logits, target = make(n, v)
    logits[0] *= 1e4
    logits[1, 1::2] = -math.inf  # half the tokens ruled out, the target among them
    target[1] = 5
    logits[2] = -math.inf
    logits[2, target[2]] = -3.0  # certain
    logits[3] = 1e4
    logits[4, ::2], logits[4, 1::2] = 1e4, -1e4
    logits[5] = -1e4
    want = exact(logits, target, 1.0, ceiling)
    got = read(logits, target, torch.empty(n), ceiling=ceiling, guess=(None, None))
    check(got, want)
    if ceiling is None:
        assert got["logprob"][1] == -math.inf
        assert not got["out"][2].any()


def test_nan_and_infinity_stay_in_their_row() -> None:
    logits, target = make(6, 1037)
    clean = read(logits, target, torch.empty(6), guess=(None, None))
    logits[1, 517], logits[2, 1036], logits[3, 600], logits[4] = math.nan, math.nan, math.inf, -math.inf
    broken = read(logits, target, torch.empty(6), guess=(None, None))
    for name in ("out", "logprob", "entropy", "row_sum"):
        assert torch.equal(broken[name][[0, 5]], clean[name][[0, 5]]), name
        if name != "out":
            assert broken[name][1:5].isnan().all(), name
    assert broken["out"].isfinite().all()


def test_single_read_repeats_bit_for_bit() -> None:
    logits, target = make(3, 9001)
    shift = torch.tensor([0.0, 500.0, 1.0])
    first, second = (read(logits, target, shift) for _ in range(2))
    third = read(torch.zeros(3, 9024)[:, :9001].copy_(logits), target, shift)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value, third[name]), name


def test_single_read_past_two_to_the_31_elements(tmp_path: Path) -> None:
    """Three rows 2^30 + 8 apart in sparse files: the third begins where an int32 offset has wrapped round."""
    v, stride = 40, (1 << 30) + 8
    logits, target = make(3, v)
    want = read(logits, target, torch.empty(3), guess=(None, None))
    wide, out = (
        torch.from_file(str(tmp_path / name), shared=True, size=2 * stride + v, dtype=dtype).as_strided(
            (3, v), (stride, 1)
        )
        for name, dtype in (("logits", FP32), ("out", BF16))
    )
    wide.copy_(logits)
    from fastgrpo_kernels.head.rows.kernel import single_read

    rows: dict[str, Any] = {name: torch.empty(3) for name in ("logprob", "entropy", "row_sum")}
    single_read(wide, target, torch.empty(3), None, out, input_scale=1.0, guess=(None, None), **rows)
    assert torch.equal(out, want["out"])
    assert torch.equal(rows["logprob"], want["logprob"])


def test_rows_too_close_are_refused() -> None:
    from fastgrpo_kernels.head.rows.kernel import single_read

    rows: dict[str, Any] = {name: torch.empty(2) for name in ("logprob", "entropy", "row_sum")}
    target, c = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    good, bad = torch.zeros(2, 8), torch.zeros(2, 9)[:, :8]
    with pytest.raises(ValueError, match=r"logits: .* multiple of 4"):
        single_read(bad, target, c, None, good.to(BF16), input_scale=1.0, **rows)
    with pytest.raises(ValueError, match=r"out: .* multiple of 8"):
        single_read(good, target, c, None, torch.zeros(2, 12, dtype=BF16)[:, :8], input_scale=1.0, **rows)
    with pytest.raises(ValueError, match=r"out: .*side by side"):
        single_read(good, target, c, None, torch.zeros(8, 2, dtype=BF16).t(), input_scale=1.0, **rows)


# --- the whole chain ------------------------------------------------------------------------------------------------


def norm_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize(("scale", "ceiling"), [(1.0, None), (0.25, 6.0)])
def test_gradients_of_the_operands(scale: float, ceiling: float | None) -> None:
    """Error against float64 autograd at most 1.5 times that of fp32 logits, softmax and bf16 gradient rows.

    The weight's gradient from rounded f * h has a second rounding, which alone makes sqrt(2) of it on average.
    """
    from fastgrpo_kernels.head.rows.kernel import target_logit
    from fastgrpo_kernels.head.settle.kernel import row_factor, scale_rows

    n, d, v = 96, 32, 1003
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(n, d, generator=g).to(BF16)
    weight = torch.randn(v, d, generator=g).mul(0.6).to(BF16)
    target = torch.randint(0, v, (n,), generator=g)
    upstream = torch.randn(n, generator=g)
    upstream[3] = 0
    slope = scale if ceiling is None else scale * ceiling

    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    z = scale * h @ w.t() if ceiling is None else ceiling * torch.tanh(scale * h @ w.t())
    logp = torch.log_softmax(z, -1).gather(1, target[:, None])[:, 0]
    want_h, want_w = torch.autograd.grad((upstream.double() * logp).sum(), (h, w))

    logits = torch.zeros(n, 1024)[:, :v].copy_(hidden.double() @ weight.double().t())
    guess = logp.detach().float() + 0.1 * torch.randn(n, generator=g)
    z_y, c = target_logit(hidden, weight, target, input_scale=scale, ceiling=ceiling, guess=(guess, None))
    got = read(logits, target, c, z_y, scale=scale, ceiling=ceiling)
    factor = row_factor(upstream, got["row_sum"], slope)
    scaled = torch.empty_like(hidden)
    scale_rows(hidden, factor, scaled)
    grad_h = torch.empty(n, d)
    scale_rows(got["out"].float() @ weight.float(), factor, grad_h)
    grad_w = got["out"].float().t() @ (factor[:, None] * hidden.float())
    rounded_w = got["out"].float().t() @ scaled.float()

    plain = (scale * logits).requires_grad_()
    capped = plain if ceiling is None else ceiling * torch.tanh(plain)
    usual = torch.log_softmax(capped, -1).gather(1, target[:, None])[:, 0]
    rows = torch.autograd.grad((upstream * usual).sum(), plain)[0].mul(scale).to(BF16).float()
    torch.testing.assert_close(got["logprob"].double(), logp.detach(), rtol=1e-6, atol=1e-5)
    assert norm_error(grad_h, want_h) <= 1.5 * norm_error(rows @ weight.float(), want_h)
    assert norm_error(grad_w, want_w) <= 1.5 * norm_error(rows.t() @ hidden.float(), want_w)
    assert norm_error(rounded_w, want_w) <= 2.0 * norm_error(rows.t() @ hidden.float(), want_w)
    assert not grad_h[3].any()


# --- token_logprob.backward into a buffer -----------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("stride", [1088, 1040, 1043])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_backward_into_rows_of_another_dtype(dtype: torch.dtype, stride: int, softcap: float | None) -> None:
    from fastgrpo_kernels.token_logprob import kernel
    from fastgrpo_kernels.vocabulary import LogitHead

    n, v = 4, 1037
    logits, target = make(n, v)
    head = LogitHead(softcap=softcap, temperature=0.8)
    _, entropy, peak, log_sum = kernel.forward(logits, target, head)
    upstream, upstream_entropy = torch.tensor([1.0, 0.0, -2.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 1.0])
    arguments = (target, peak, log_sum, entropy, upstream, upstream_entropy, head)
    whole = kernel.backward(logits, *arguments)
    logits[1] = math.nan
    buffer = torch.full((n + 2, stride), GUARD, dtype=dtype)
    out = buffer[1:-1, :v]
    assert kernel.backward(logits, *arguments, out=out) is out
    assert torch.equal(out, whole.to(dtype))
    assert not out[1].any()
    assert out[[0, 2, 3]].any(1).all()
    assert (buffer[:, v:] == GUARD).all()
    assert (buffer[[0, -1]] == GUARD).all()
