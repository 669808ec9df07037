"""The LM head's GEMM with exp in its epilogue, in Triton's interpreter: every mode and option against float64."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import relative_error

pytestmark = pytest.mark.interpreter

CONFIGS = ("WIDE", "TWIN", "NARROW", "POINTERS")
UNTOUCHED = -77.0


def config(name: str) -> Any:
    from fastgrpo_kernels.head.exp_gemm import config

    return getattr(config, name)


class Case:
    """Random operands, and what float64 makes of them."""

    def __init__(
        self,
        c: int = 5,
        v: int = 300,
        d: int = 72,
        *,
        bias: bool = False,
        r: int = 0,
        input_scale: float = 1.0,
        ceiling: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        g = torch.Generator().manual_seed(c + v + d + r)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        self.hidden, self.weight = normal(c, d), normal(v, d) * (2 / math.sqrt(d))
        self.bias = normal(v) if bias else None
        self.low_rank = (normal(c, r), normal(v, r) * (1 / math.sqrt(r))) if r else None
        self.input_scale, self.ceiling = input_scale, ceiling
        self.shift = 4 + torch.randn(c, generator=g)
        tiles = -(-v // 128)
        self.sums, self.moments = torch.full((2, tiles, c), UNTOUCHED)
        self.stride = -(-v // 64) * 64 + 64
        self.buffer = torch.full((c + 2, self.stride), UNTOUCHED, dtype=torch.bfloat16)
        offset = -self.buffer.data_ptr() % 128 // 2
        self.buffer = self.buffer.view(-1)[offset : offset + (c + 1) * self.stride].view(c + 1, self.stride)
        self.out = self.buffer[:c, :v]

    def run(self, mode: str, config_name: str | None = None, flags: Tensor | None = None, out: bool = True) -> None:
        from fastgrpo_kernels.head.exp_gemm.kernel import exp_gemm

        exp_gemm(
            self.hidden,
            self.weight,
            self.shift,
            self.sums,
            self.moments,
            mode=mode,  # type: ignore[arg-type]
            input_scale=self.input_scale,
            bias=self.bias,
            low_rank=self.low_rank,
            ceiling=self.ceiling,
            out=self.out if out and mode in ("exp", "rescue") else None,
            flags=flags,
            config=config_name and config(config_name),
        )

    def logits(self) -> tuple[Tensor, Tensor]:
        """z and the derivative of a softcap, float64."""
        x = self.hidden.double() @ self.weight.double().T
        if self.bias is not None:
            x += self.bias.double()
        if self.low_rank is not None:
            x += self.low_rank[0].double() @ self.low_rank[1].double().T
        x *= self.input_scale
        if self.ceiling is None:
            return x, torch.ones_like(x)
        return self.ceiling * x.tanh(), 1 - x.tanh() ** 2

    def want(self) -> tuple[Tensor, Tensor, Tensor]:
        z, slope = self.logits()
        t = z - self.shift.double()[:, None]
        e = t.exp()
        return e * slope, tiled(e).sum(-1).T, tiled(torch.where(e == 0, 0.0, e * t)).sum(-1).T

    def check(self, rows: Any = slice(None), out: bool = True) -> None:
        e, s, u = self.want()
        # exp2 and products in fp32; U sums terms of both signs, so its error is that of sum |E t|.
        torch.testing.assert_close(self.sums[:, rows].double(), s[:, rows], rtol=1e-5, atol=1e-30)
        assert relative_error(self.moments[:, rows], u[:, rows]) <= 1e-5
        if out:
            # bf16's rounding; and 1 - tanh^2 cancels, in fp32 to 1e-6.
            full = (self.logits()[0] - self.shift.double()[:, None]).exp() if self.ceiling else torch.zeros_like(e)
            bound = e * (2**-8 + 2e-5) + full * 1e-6 + 1e-30
            assert ((self.out.double() - e).abs() <= bound)[rows].all()
            self.check_padding()

    def check_padding(self) -> None:
        c, v = self.out.shape
        assert (self.buffer[:, v:] == UNTOUCHED).all()
        assert (self.buffer[c:] == UNTOUCHED).all()


def tiled(x: Tensor) -> Tensor:
    """[C, V] -> [C, tiles, 128], zeros behind the last column."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 128)).unflatten(1, (-1, 128))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("c", [1, 100, 300])
@pytest.mark.parametrize(("v", "d"), [(1000, 72), (1001, 200), (256, 64), (1, 8)])
def test_shapes(c: int, v: int, d: int, name: str) -> None:
    case = Case(c, v, d)
    case.run("exp", name)
    case.check()


@pytest.mark.parametrize("name", ["WIDE", "POINTERS"])
def test_more_tiles_than_a_group(name: str) -> None:
    """Every tile once, in the order of groups: 10 and 19 row blocks are more than GROUP_M."""
    case = Case(2400, 140, 8)
    case.run("exp", name)
    case.check()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("bias", "r", "ceiling", "v"), list(product([False, True], [0, 8, 72], [None, 5.0], [256, 261]))
)
def test_options(name: str, bias: bool, r: int, ceiling: float | None, v: int) -> None:
    case = Case(9, v, 72, bias=bias, r=r, ceiling=ceiling, input_scale=0.7 if ceiling is None else 0.3)
    case.run("exp", name)
    case.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [0, 16])
def test_statistics_need_no_room_for_e(dtype: torch.dtype, r: int) -> None:
    case = Case(5, 300, 72, r=r, dtype=dtype)
    case.run("statistics")
    case.check(out=False)
    assert (case.buffer == UNTOUCHED).all()


@pytest.mark.parametrize("name", [None, "POINTERS"])
@pytest.mark.parametrize("ceiling", [None, 6.0])
@pytest.mark.parametrize(("c", "v"), [(5, 300), (300, 256)])
def test_flagged_rows_only(c: int, v: int, ceiling: float | None, name: str | None) -> None:
    """`max`, then `rescue` with and without E: other rows keep everything, row blocks without a flag too."""
    case = Case(c, v, bias=True, r=8, ceiling=ceiling)
    flags = torch.zeros(c, dtype=torch.int32)
    flags[[1, c - 2]] = torch.tensor([1, -3], dtype=torch.int32)
    live = flags != 0
    case.run("max", name, flags)
    z, _ = case.logits()
    peak = torch.stack([x.amax(1) for x in z.split(128, 1)])
    torch.testing.assert_close(case.sums[:, live].double(), peak[:, live], rtol=1e-5, atol=2e-6)
    assert (case.moments == UNTOUCHED).all()
    case.run("rescue", name, flags, out=False)
    case.check(live, out=False)
    assert (case.buffer == UNTOUCHED).all()
    case.run("rescue", name, flags)
    case.check(live)
    for kept in (case.sums[:, ~live], case.moments[:, ~live], case.out[~live]):
        assert (kept == UNTOUCHED).all()


@pytest.mark.parametrize("mode", ["max", "rescue"])
@pytest.mark.parametrize("c", [3, 2500])
def test_no_flags_no_work(mode: str, c: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads the flags and leaves: operands of NaN would show, and so would a product."""
    import triton.language as tl

    case = Case(c, 200, 8)
    monkeypatch.setattr(tl, "dot", None)
    case.run(mode, flags=torch.zeros(c, dtype=torch.int32))
    assert (case.sums == UNTOUCHED).all()
    assert (case.moments == UNTOUCHED).all()
    assert (case.buffer == UNTOUCHED).all()


def test_flags_beyond_the_first_block() -> None:
    case = Case(2500, 130, 8)
    flags = torch.zeros(2500, dtype=torch.int32)
    flags[2300] = 1
    case.run("rescue", flags=flags)
    case.check(flags != 0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("ceiling", [None, 5.0])
def test_nan_stays_in_its_row(name: str, ceiling: float | None) -> None:
    case = Case(200, 261, 72, r=8, ceiling=ceiling)
    case.run("exp", name)
    clean = [case.sums.clone(), case.moments.clone(), case.out.clone()]
    case.hidden[3, 5] = math.nan
    assert case.low_rank is not None
    case.low_rank[0][150, 0] = math.nan
    case.shift[170] = math.nan
    case.run("exp", name)
    broken = torch.zeros(200, dtype=torch.bool)
    broken[[3, 150, 170]] = True
    for got, want in zip((case.sums.T, case.moments.T, case.out), (clean[0].T, clean[1].T, clean[2]), strict=True):
        assert got[broken].isnan().all()
        assert torch.equal(got[~broken], want[~broken])
    case.check_padding()


@pytest.mark.parametrize("v", [256, 300])
def test_extreme_shifts(v: int) -> None:
    """E overflows to inf, or underflows to 0: then S and U are 0, not NaN."""
    case = Case(4, v)
    case.shift = torch.tensor([-200.0, 300.0, 1e30, 4.0])
    case.run("exp")
    assert (case.sums[:, 0] == math.inf).all()
    for x in (case.sums[:, 1:3], case.moments[:, 1:3], case.out[1:3]):
        assert not x.any()
    case.check(slice(3, 4))


def test_tokens_ruled_out_by_the_bias() -> None:
    case = Case(3, 300, bias=True)
    assert case.bias is not None
    case.bias[::2] = -math.inf
    case.bias[:128] = -math.inf
    case.run("exp")
    case.check()
    assert not case.out[:, ::2].any()
    assert not case.sums[0].any()


@pytest.mark.parametrize("x", [-1e4, 1e4])
def test_saturated_softcap(x: float) -> None:
    case = Case(2, 130, 8, ceiling=5.0)
    case.hidden.fill_(x)
    case.weight.fill_(1.0)
    case.run("exp")
    case.check()
    assert not case.out.any()


def test_large_shifts_keep_their_digits() -> None:
    """log S is right to 1e-6 where all of a row lies around its shift of 60."""
    case = Case(64, 256, 8, bias=True)
    case.bias = torch.full((256,), 60.0)
    case.shift = 60 + torch.rand(64, generator=torch.Generator().manual_seed(0))
    case.run("exp")
    case.check()


def test_views() -> None:
    """Rows apart, factors that are columns of something wider, vectors that begin anywhere."""
    wanted = Case(6, 261, 72, bias=True, r=8)
    wanted.run("exp")
    for name in ("NARROW", "POINTERS"):
        case = Case(6, 261, 72, bias=True, r=8)
        assert case.low_rank is not None
        case.hidden = torch.cat([case.hidden, case.hidden], 1)[:, :72]
        case.weight = torch.stack([case.weight, case.weight], 1)[:, 1]
        case.low_rank = tuple(torch.cat([x, x], 1)[:, 8:] for x in case.low_rank)  # type: ignore[assignment]
        case.shift = torch.cat([case.shift[:1], case.shift])[1:]
        case.run("exp", name)
        case.check()
        if name == "NARROW":
            for got, want in zip(
                (case.sums, case.moments, case.out), (wanted.sums, wanted.moments, wanted.out), strict=True
            ):
                assert torch.equal(got, want)


def test_no_rows() -> None:
    case = Case(5, 300)
    for name in ("hidden", "shift", "out"):
        setattr(case, name, getattr(case, name)[:0])
    case.sums, case.moments = case.sums[:, :0], case.moments[:, :0]
    case.run("exp")
    assert (case.buffer == UNTOUCHED).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(5, 72)}, "bf16 or fp16"),
        ({"hidden": torch.zeros(5, 76).bfloat16()[:, 4:]}, "16 bytes"),
        ({"weight": torch.zeros(72, 300).bfloat16().T}, "16 bytes"),
        ({"weight": torch.zeros(300, 80).bfloat16()}, r"weight: expected shape \[V, 72\]"),
        ({"shift": torch.zeros(4)}, "shift: expected torch.float32"),
        ({"sums": torch.zeros(2, 5)}, "sums: expected torch.float32"),
        ({"moments": torch.zeros(5, 3).T}, "moments: expected torch.float32"),
        ({"bias": torch.zeros(299)}, "bias: expected half or float"),
        ({"low_rank": (torch.zeros(5, 8).bfloat16(), torch.zeros(299, 8).bfloat16())}, "low_rank: expected"),
        ({"out": torch.zeros(5, 300, dtype=torch.bfloat16)}, "out: expected bfloat16"),
        ({"out": None}, "out: mode 'exp' needs out"),
    ],
)
def test_bad_operands(change: dict[str, Any], message: str) -> None:
    case = Case()
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(ValueError, match=message):
        case.run("exp")


def test_bad_modes() -> None:
    case = Case()
    flags = torch.zeros(5, dtype=torch.int32)
    with pytest.raises(ValueError, match="mode: expected one of statistics, exp, max, rescue"):
        case.run("sum")
    with pytest.raises(ValueError, match="flags: mode 'max' needs flags"):
        case.run("max")
    with pytest.raises(ValueError, match="flags: mode 'exp' takes no flags"):
        case.run("exp", flags=flags)
    with pytest.raises(ValueError, match=r"flags: expected torch\.int32"):
        case.run("max", flags=flags.bool())
    half = Case(dtype=torch.float16)
    with pytest.raises(ValueError, match="hidden: expected bfloat16"):
        half.run("exp")


def test_every_config_is_chosen_and_listed() -> None:
    """Whatever `config_for` gives for any options is in the table for its architecture."""
    from fastgrpo_kernels.head.exp_gemm import kernel
    from fastgrpo_kernels.head.exp_gemm.config import CONFIGS, config_for

    names = [spec.name for spec in kernel.KERNELS]
    assert len(set(names)) == len(names)
    chosen = set()
    for capability, arch in (((8, 0), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), (None, "gfx942")):
        flags = product((1, 128, 300, 16384), (64, 4096), *[(False, True)] * 4)
        for rows, d, bias, softcap, low_rank, flagged in flags:
            config = config_for(capability, rows, d, bias=bias, softcap=softcap, flagged=flagged)
            chosen.add(config)
            found = [
                spec
                for spec in kernel.KERNELS
                if config.constexprs.items() <= spec.constexprs.items()
                and (spec.num_warps, spec.num_stages) == (config.num_warps, config.num_stages)
                and ("p_bias" in spec.signature) >= bias  # what is listed with more options needs more registers
                and ("u" in spec.signature) >= low_rank
                and spec.constexprs["SOFTCAP"] >= softcap
                and ("p_flags" in spec.signature) == flagged
                and spec.archs is not None
                and arch in spec.archs
            ]
            assert found, (arch, rows, d, bias, softcap, low_rank, flagged)
    assert chosen == set(CONFIGS)
