"""What settles the fused head's rows, in Triton's interpreter: tile sums, flags and their rescue, factors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.interpreter
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GUARD = 123.0
TILE = 16


class Tiles:
    """Exponentials as a GEMM over tiles of TILE columns would leave them, for logits [C, V] = softcap(scaled input)."""

    def __init__(self, n: int, v: int, ceiling: float | None = None) -> None:
        g = torch.Generator().manual_seed(n + v)
        self.ceiling = ceiling
        self.tanh = torch.tanh(torch.randn(n, v, generator=g))
        self.z = 3 * torch.randn(n, v, generator=g) if ceiling is None else ceiling * self.tanh
        self.target = torch.randint(0, v, (n,), generator=g)
        self.target[0], self.target[-1] = 0, v - 1
        self.c = torch.logsumexp(self.z, 1) + torch.randn(n, generator=g)
        self.buffer = torch.full((n + 2, -(-v // 64) * 64 + 64), GUARD, dtype=BF16)
        self.out = self.buffer[1:-1, :v]
        self.rows: dict[str, Any] = {name: torch.empty(n) for name in ("logprob", "entropy", "row_sum")}
        self.flags = torch.full((n,), -7, dtype=torch.int32)

    @property
    def z_y(self) -> Tensor:
        return self.z.gather(1, self.target[:, None])[:, 0]

    def partial(self, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Write E * (1 - tanh^2) of these rows; the tiles' sums S and U of all, views with padded rows."""
        n, v = self.z.shape
        shifted = self.z - self.c[:, None]
        e = torch.exp(shifted)
        self.out[rows] = (e if self.ceiling is None else e * (1 - self.tanh**2)).to(BF16)[rows]
        count = -(-v // TILE)
        sums, moments = (torch.full((count, n + 3), math.nan)[:, :n] for _ in range(2))
        for i in range(count):
            tile = slice(i * TILE, (i + 1) * TILE)
            sums[i] = e[:, tile].sum(1)
            moments[i] = torch.where(e == 0, 0.0, e * shifted)[:, tile].sum(1)
        return sums, moments

    def settle(self, sums: Tensor, moments: Tensor, **options: Any) -> None:
        from fastgrpo_kernels.head.settle.kernel import settle

        options = {"out": self.out, **options}
        settle(
            sums, moments, self.z_y, self.c, self.target, **self.rows, flags=self.flags, ceiling=self.ceiling, **options
        )

    def check(self, rows: Tensor | slice = slice(None)) -> None:
        z = self.z.double()[rows]
        logp = torch.log_softmax(z, -1)
        target = self.target[rows, None]
        torch.testing.assert_close(
            self.rows["logprob"].double()[rows], logp.gather(1, target)[:, 0], rtol=1e-6, atol=1e-5
        )
        total = torch.exp(z - self.c.double()[rows, None]).sum(1)
        # log S - U / S: both are as large as the shift is off, and their digits go with it.
        entropy = -(logp.exp() * logp).sum(1)
        assert ((self.rows["entropy"].double()[rows] - entropy).abs() <= 4e-7 * (1 + entropy + total.log().abs())).all()
        # The exponentials' arguments were rounded to fp32, to within 6e-8 of their size.
        row_sum, size = self.rows["row_sum"].double()[rows], (z - self.c.double()[rows, None]).abs().amax(1)
        assert ((row_sum / total - 1).abs() <= 1e-6 + 6e-8 * size).all()
        want = torch.exp(z - self.c.double()[rows, None]).scatter_add(1, target, -total[:, None])
        if self.ceiling is not None:
            want *= 1 - (z / self.ceiling) ** 2
        got = self.out.double()[rows]
        torch.testing.assert_close(got / total[:, None], want / total[:, None], rtol=2**-8 + 1e-5, atol=3e-7)
        assert (self.buffer[:, self.z.shape[1] :] == GUARD).all()
        assert (self.buffer[[0, -1]] == GUARD).all()


@pytest.mark.parametrize("ceiling", [None, 5.0])
@pytest.mark.parametrize(("n", "v"), [(1, 1), (3, 17), (33, 40), (70, 1111)])
def test_settle(n: int, v: int, ceiling: float | None) -> None:
    tiles = Tiles(n, v, ceiling)
    tiles.settle(*tiles.partial())
    tiles.check()
    assert not tiles.flags.any()


def test_settle_without_gradient_rows() -> None:
    with_rows, without = Tiles(40, 50), Tiles(40, 50)
    with_rows.settle(*with_rows.partial())
    without.settle(*without.partial(), out=None)
    for name, value in with_rows.rows.items():
        assert torch.equal(value, without.rows[name]), name


@pytest.mark.parametrize("ceiling", [None, 300.0])
def test_rows_with_a_shift_far_off_are_flagged_and_mended(ceiling: float | None) -> None:
    from fastgrpo_kernels.head.settle.kernel import reshift

    tiles = Tiles(70, 100, ceiling)
    far = torch.tensor([2, 31, 32, 40, 69])
    near = torch.ones(70, dtype=torch.bool)
    near[far] = False
    tiles.c[far] += torch.tensor([52.0, -52.0, 1000.0, -1000.0, -100.0])
    tiles.c[[5, 6]] += torch.tensor([44.0, -44.0])
    before = tiles.c.clone()
    tiles.settle(*tiles.partial())
    assert torch.equal(tiles.flags, (~near).int())
    tiles.check(near.nonzero()[:, 0])
    settled = tiles.out.clone()

    maxima = torch.stack([tile.amax(1) for tile in tiles.z.split(TILE, 1)])
    maxima[:, near] = math.nan
    reshift(maxima, tiles.flags, tiles.c)
    assert torch.equal(tiles.c[far], tiles.z.amax(1)[far])
    assert torch.equal(tiles.c[near], before[near])
    sums, moments = tiles.partial(far)
    sums[:, near] = moments[:, near] = math.nan
    flags = tiles.flags.clone()
    tiles.settle(sums, moments, only_flagged=True)
    tiles.check()
    assert (tiles.rows["row_sum"][far] >= 1).all()
    assert torch.equal(tiles.out[near], settled[near])
    assert torch.equal(tiles.flags, flags)


def test_without_flags_a_rescue_writes_nothing() -> None:
    from fastgrpo_kernels.head.settle.kernel import reshift

    tiles = Tiles(40, 50)
    tiles.flags.zero_()
    before = tiles.c.clone()
    broken = torch.full((4, 40), math.nan)
    tiles.settle(broken, broken, only_flagged=True)
    reshift(broken, tiles.flags, tiles.c)
    assert all(value.isnan().all() for value in tiles.rows.values())  # as torch.empty left them
    assert torch.equal(tiles.c, before)
    assert (tiles.buffer == GUARD).all()


def test_which_sums_are_flagged() -> None:
    """Too small, too large, infinite, a moment not finite; but no NaN, which is the data's."""
    tiles = Tiles(8, 16)
    sums = torch.tensor([[0.9e-20, 1.1e-20, 0.9e20, 1.1e20, math.inf, 0.0, math.nan, 1.0]])
    moments = torch.tensor([[0.0, 0.0, 0.0, 0.0, math.nan, 0.0, math.nan, math.inf]])
    tiles.settle(sums, moments)
    assert tiles.flags.tolist() == [1, 0, 0, 1, 1, 1, 0, 1]
    written = tiles.out != GUARD
    assert written.any(1).tolist() == [False, True, True, False, False, False, True, False]
    assert (written.sum(1) <= 1).all()
    assert tiles.rows["logprob"].isnan().tolist() == [False] * 6 + [True, False]
    assert tiles.out[6, tiles.target[6]] == 0  # not NaN: see `not_nan`


def test_nan_rows_and_wrong_targets_stay_by_themselves() -> None:
    clean, broken = Tiles(35, 30), Tiles(35, 30)
    clean.settle(*clean.partial())
    broken.target[3], broken.target[4] = -1, 30
    sums, moments = broken.partial()
    sums[1, 7] = moments[1, 7] = math.nan
    z_y = clean.z_y.clone()
    z_y[[3, 4]] = math.nan
    from fastgrpo_kernels.head.settle.kernel import settle

    settle(sums, moments, z_y, broken.c, broken.target, **broken.rows, flags=broken.flags, out=broken.out)
    bad = torch.zeros(35, dtype=torch.bool)
    bad[[3, 4, 7]] = True
    assert broken.rows["logprob"].isnan().equal(bad)
    assert torch.equal(broken.out[~bad], clean.out[~bad])
    assert not broken.flags.any()
    assert (broken.buffer[[0, -1]] == GUARD).all()
    assert (broken.buffer[:, 30:] == GUARD).all()


def test_a_row_settles_alike_wherever_it_stands() -> None:
    tiles = Tiles(50, 1500)
    sums, moments = tiles.partial()
    tiles.settle(sums, moments)
    again = Tiles(50, 1500)
    again.settle(*again.partial())
    alone = Tiles(50, 1500)
    alone.partial()
    rows = slice(37, 50)
    from fastgrpo_kernels.head.settle.kernel import settle

    part: dict[str, Any] = {name: value[rows] for name, value in alone.rows.items()}
    arguments = (alone.z_y[rows], alone.c[rows], alone.target[rows])
    settle(sums[:, rows], moments[:, rows], *arguments, **part, flags=alone.flags[rows], out=alone.out[rows])
    for name, value in tiles.rows.items():
        assert torch.equal(value, again.rows[name]), name
        assert torch.equal(value[rows], part[name]), name
    assert torch.equal(tiles.out, again.out)
    assert torch.equal(tiles.out[rows], alone.out[rows])


@pytest.mark.parametrize("out_dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("d", [1, 63, 1100])
def test_scale_rows(d: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    from fastgrpo_kernels.head.settle.kernel import scale_rows

    g = torch.Generator().manual_seed(d)
    x = torch.full((6, d + 5), math.nan, dtype=dtype)[:, 1 : 1 + d]
    x.copy_(torch.randn(6, d, generator=g))
    factor = torch.tensor([1.5, 0.0, -2.3, -0.0, math.nan, 1e-3])
    buffer = torch.full((8, d + 3), GUARD, dtype=out_dtype)
    out = buffer[1:-1, 2 : 2 + d]
    want = (x.float() * factor[:, None]).to(out_dtype)
    x[1], x[3, 0] = math.nan, math.inf
    scale_rows(x, factor, out)
    assert torch.equal(out[[0, 2, 5]], want[[0, 2, 5]])
    assert not out[[1, 3]].any()
    assert out[4].isnan().all()
    buffer[1:-1, 2 : 2 + d] = GUARD
    assert (buffer == GUARD).all()


def test_scale_rows_in_place() -> None:
    from fastgrpo_kernels.head.settle.kernel import scale_rows

    x = torch.randn(3, 1300, generator=torch.Generator().manual_seed(0))
    factor = torch.tensor([2.0, 0.0, -1.0])
    want = x * factor[:, None]
    scale_rows(x, factor, x)
    assert torch.equal(x, want)


@pytest.mark.parametrize("n", [1, 256, 300])
def test_row_factor(n: int) -> None:
    from fastgrpo_kernels.head.settle.kernel import row_factor

    g = torch.Generator().manual_seed(n)
    grad, total = torch.randn(n, generator=g), torch.exp(20 * torch.randn(n, generator=g))
    want = -(grad.double() / total.double()) * 0.7
    torch.testing.assert_close(row_factor(grad, total, 0.7).double(), want, rtol=3e-7, atol=0)
    total[n // 2], total[-1] = math.nan, math.nan
    grad[-1] = 0
    factor = row_factor(grad, total, 0.7)
    assert factor[-1] == 0
    assert n == 1 or factor[n // 2].isnan()


def test_no_rows_no_launch() -> None:
    from fastgrpo_kernels.head.rows.kernel import single_read, target_logit
    from fastgrpo_kernels.head.settle.kernel import reshift, row_factor, scale_rows, settle

    none, ids, matrix = torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8)
    rows: dict[str, Any] = {"logprob": none, "entropy": none, "row_sum": none}
    z, c = target_logit(matrix, torch.zeros(5, 8), ids, input_scale=1.0)
    assert z.shape == c.shape == row_factor(none, none, 1.0).shape == (0,)
    single_read(matrix, ids, none, None, matrix, input_scale=1.0, **rows)
    settle(torch.zeros(3, 0), torch.zeros(3, 0), none, none, ids, **rows, flags=ids.int(), out=matrix)
    reshift(torch.zeros(3, 0), ids.int(), none)
    scale_rows(matrix, none, matrix)


@pytest.mark.parametrize("room", ["rows", "settle"])
def test_what_is_launched_is_listed(room: str) -> None:
    import importlib

    module = importlib.import_module(f"fastgrpo_kernels.head.{room}.kernel")
    specs = module.KERNELS
    assert len({spec.name for spec in specs}) == len(specs)
    launched = [value for name, value in vars(module).items() if name.endswith("TILING")]
    for spec in specs:
        assert len(spec.signature) + len(spec.constexprs) <= 25, spec.name
        blocks = {**spec.constexprs, "num_warps": spec.num_warps}
        constants = {k: v for k, v in blocks.items() if k.isupper() and isinstance(v, int) and not isinstance(v, bool)}
        if spec.name != "row_factor":
            assert any(constants | {"num_warps": spec.num_warps} == tiling for tiling in launched), spec.name
