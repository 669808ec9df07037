"""A decoder layer's small ops in Triton's interpreter: against transformers' roundings and float64, sizes, layouts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import add_rms_norm, rotate_heads, swiglu
from fastgrpo_kernels.add_rms_norm import kernel as norm_kernel
from fastgrpo_kernels.rotate_heads import kernel as heads_kernel
from fastgrpo_kernels.swiglu import kernel as gates_kernel

from .layer_cases import (
    DTYPES,
    EPS,
    OPS,
    assert_as_exact,
    assert_extreme_gates,
    assert_near_theirs,
    assert_spoils_its_row,
    make_gates,
    make_heads,
    make_norm,
    numbers,
    their_norm,
)

pytestmark = [
    pytest.mark.interpreter,
    # numpy says so where a GPU makes inf or NaN without a word.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]
ALL = pytest.mark.parametrize("name", OPS)
HALF = (torch.bfloat16, torch.float16)
NORM_SIZES = (1, 7, 96, 896, 1001, 3584, 8192, 8193, 20_000)
HEADS = (((1, 1), 2), ((3, 1), 26), ((14, 2), 64), ((3, 3), 80), ((28, 4), 128), ((9, 8), 256), ((33, 40), 64))
GATE_SIZES = (1, 72, 1001, 2048, 2049, 4864)


def check(name: str, rows: int, dtype: torch.dtype, **size: Any) -> None:
    op = OPS[name]
    given = op.make(rows, dtype, **size)
    assert_as_exact(op, given)
    for got, want in zip(op.run(**given), op.theirs(**given), strict=True):
        assert got.is_contiguous()
        if dtype in HALF:
            assert_near_theirs(name, got, want)
        elif name == "rotate_heads":
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", NORM_SIZES)
@pytest.mark.parametrize("name", ["add_rms_norm", "add_rms_norm of x"])
def test_add_rms_norm(name: str, size: int, dtype: torch.dtype) -> None:
    """The last two sizes are read twice."""
    check(name, 5, dtype, size=size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), HEADS)
@pytest.mark.parametrize("name", ["rotate_heads", "rotate_heads with norms"])
def test_rotate_heads(name: str, heads: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    check(name, 4, dtype, heads=heads, size=size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", GATE_SIZES)
def test_swiglu(size: int, dtype: torch.dtype) -> None:
    check("swiglu", 5, dtype, size=size)


@ALL
def test_many_rows(name: str) -> None:
    check(name, 40, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates(dtype: torch.dtype) -> None:
    assert_extreme_gates(dtype)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e3])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1e30])
def test_extreme_rows(scale: float, eps: float) -> None:
    """Squares that vanish or overflow, and a row of zeros, which without eps is NaN."""
    given: dict[str, Any] = make_norm(3, torch.bfloat16) | {"eps": eps}
    given |= {name: given[name] * scale for name in ("x", "residual")}
    for got, want in zip(add_rms_norm(**given), their_norm(**given), strict=True):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=0, equal_nan=True)


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_spoils_what_depends_on_it(bad: float, name: str) -> None:
    assert_spoils_its_row(OPS[name], bad)


def spread(x: Tensor) -> list[Tensor]:
    """The same numbers laid out in other ways: rows apart, at an odd place, numbers apart, rows and numbers swapped."""
    rows = torch.stack([x, x], 1)[:, 0]
    odd = torch.cat([x.reshape(-1)[:3], x.reshape(-1)])[3:].view(x.shape)
    apart = x.repeat_interleave(2, -1)[..., ::2]
    return [rows, odd, apart, x.transpose(0, -1).contiguous().transpose(0, -1)]


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(name: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    given = op.make(4, dtype)
    want = op.run(**given)
    for argument, x in given.items():
        if isinstance(x, Tensor):
            for layout in spread(x) if x.ndim > 1 else (x.repeat_interleave(2)[::2],):
                assert torch.equal(layout, x)
                got = op.run(**given | {argument: layout})
                assert all(map(torch.equal, got[:1] if layout is got[-1] else got, want)), argument


@ALL
def test_rows_do_not_depend_on_one_another(name: str) -> None:
    op = OPS[name]
    given = op.make(6, torch.float32)
    whole = op.run(**given)
    for i in (0, 3, 5):
        alone = {n: x[i : i + 1] if isinstance(x, Tensor) and x.ndim > 1 else x for n, x in given.items()}
        for got, want in zip(op.run(**alone), whole, strict=True):
            assert torch.equal(got[0], want[i])


def far_apart(path: Path, x: Tensor) -> Tensor:
    """The third row, of bfloat16, begins where an int32 offset has wrapped round; in a sparse file."""
    size, stride = x[0].numel(), (1 << 30) + 8
    file = torch.from_file(str(path), shared=True, size=2 * stride + size, dtype=torch.bfloat16)
    view = file.as_strided(x.shape, (stride, *x[0].contiguous().stride()))
    return view.copy_(x)


@ALL
def test_rows_past_two_to_the_31_elements(tmp_path: Path, name: str) -> None:
    op = OPS[name]
    given = op.make(3, torch.bfloat16)
    far = {n: far_apart(tmp_path / n, x) for n, x in given.items() if isinstance(x, Tensor) and x.ndim > 1}
    for got, want in zip(op.run(**given | far), op.run(**given), strict=True):
        assert torch.equal(got, want)


def test_heads_past_two_to_the_31_elements(tmp_path: Path) -> None:
    """Heads before rows: it is heads that lie far apart."""
    given = make_heads(2, torch.bfloat16, heads=(3, 3))
    far = {n: far_apart(tmp_path / n, given[n].transpose(0, 1)).transpose(0, 1) for n in "qk"}
    for got, want in zip(rotate_heads(**given | far), rotate_heads(**given), strict=True):
        assert torch.equal(got, want)


@ALL
def test_no_rows_and_float64_launch_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuse:
        def __getitem__(self, grid: Any) -> NoReturn:
            raise AssertionError(f"a launch of {grid}")

    for module in (norm_kernel, heads_kernel, gates_kernel):
        kernel = next(n for n in vars(module) if n.endswith("_kernel"))
        monkeypatch.setattr(module, kernel, Refuse())
    op = OPS[name]
    for got, want in zip(op.run(**(given := op.make(0, torch.bfloat16))), op.theirs(**given), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
    for got, want in zip(op.run(**(given := op.make(2, torch.float64))), op.theirs(**given), strict=True):
        assert torch.equal(got, want)


def test_no_heads_and_no_numbers() -> None:
    q, k = rotate_heads(**make_heads(3, torch.bfloat16, heads=(2, 0)))
    assert (q.shape, k.shape) == ((3, 2, 16), (3, 0, 16))
    assert swiglu(**make_gates(3, torch.bfloat16, size=0)).shape == (3, 0)


def test_opcheck() -> None:
    norm, heads, gates = make_norm(2, torch.bfloat16), make_heads(2, torch.bfloat16), make_gates(2, torch.bfloat16)
    ops, tests = torch.ops.fastgrpo, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.add_rms_norm.default, tuple(norm.values()), test_utils=tests)
    torch.library.opcheck(ops.rms_norm.default, (norm["x"], norm["weight"], EPS), test_utils=tests)
    torch.library.opcheck(ops.rotate_heads.default, (*heads.values(), None, None, 0.0), test_utils=tests)
    torch.library.opcheck(ops.swiglu.default, tuple(gates.values()), test_utils=tests)


def test_the_sum_is_rounded_before_it_is_normalised() -> None:
    """As the next layer reads it, and as transformers does: 1 + 2^-9 is 1 in bfloat16."""
    x, residual = torch.tensor([[2.0**-9, 3.0]]).bfloat16(), torch.tensor([[1.0, 0.0]]).bfloat16()
    weight = numbers(0, 2, dtype=torch.bfloat16)
    normed, total = add_rms_norm(x, residual, weight, eps=0.0)
    assert total.tolist() == [[1.0, 3.0]]
    assert torch.equal(normed, add_rms_norm(total, None, weight, eps=0.0)[0])


def test_every_kernel_is_listed_once() -> None:
    for module in (norm_kernel, heads_kernel, gates_kernel):
        assert len({spec.name for spec in module.KERNELS}) == len(module.KERNELS)
