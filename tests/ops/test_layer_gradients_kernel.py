"""Gradients of a decoder layer's small ops in Triton's interpreter: against float64, sizes, layouts, rows, programs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels.add_rms_norm import kernel as norm_kernel
from fastgrpo_kernels.rotate_heads import kernel as heads_kernel
from fastgrpo_kernels.swiglu import kernel as gates_kernel

from .layer_cases import DTYPES, OPS, numbers, their_gates
from .layer_gradients import (
    assert_gradients_as_exact,
    assert_gradients_spoil_their_row,
    assert_same,
    differentiable,
    gradients,
    upstream_of,
)
from .test_layer_ops_kernel import GATE_SIZES, HEADS, NORM_SIZES, far_apart, spread

pytestmark = [
    pytest.mark.interpreter,
    # numpy says so where a GPU makes inf or NaN without a word.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]
ALL = pytest.mark.parametrize("name", OPS)
NORMED = pytest.mark.parametrize("name", ["add_rms_norm", "add_rms_norm of x", "rotate_heads with norms"])


def check(name: str, rows: int, dtype: torch.dtype, **size: Any) -> None:
    assert_gradients_as_exact(OPS[name], OPS[name].make(rows, dtype, **size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", NORM_SIZES)
@pytest.mark.parametrize("name", ["add_rms_norm", "add_rms_norm of x"])
def test_add_rms_norm(name: str, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two sizes are read twice, and add to sums in memory."""
    if size > 2000:  # hundreds of programs would add five rows
        monkeypatch.setattr(norm_kernel, "SUM_TILE", {"STEP": 8, "BLOCK": 1024})
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


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three share the rows, as a thousand would thousands."""
    monkeypatch.setattr(norm_kernel, "programs", lambda block: 3)
    monkeypatch.setattr(heads_kernel, "PROGRAMS", 3)
    monkeypatch.setattr(norm_kernel, "SUM_TILE", {"STEP": 2, "BLOCK": 32})


@NORMED
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 3, 8, 13])
def test_runs_of_rows(rows: int, dtype: torch.dtype, name: str) -> None:
    """Runs of 1, 3 and 5 rows, the last shorter; of two rows only two programs."""
    check(name, rows, dtype)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("name", ["add_rms_norm", "add_rms_norm of x"])
def test_runs_of_rows_with_sums_in_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_kernel, "MAX_BLOCK", 32)
    check(name, 20, torch.bfloat16, size=97)
    check(name, 7, torch.float32, size=64)


@settings(max_examples=16, deadline=None, derandomize=True)
@drawn(data=st.data())
def test_any_size(data: st.DataObject) -> None:
    """Odd sizes, any number of rows, upstream gradients missing, only some inputs trained."""
    name, dtype, rows = (data.draw(st.sampled_from(x)) for x in ([*OPS], DTYPES, range(1, 7)))
    if name.startswith("rotate"):
        heads = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
        size: dict[str, Any] = {"heads": heads, "size": 2 * data.draw(st.integers(1, 20))}
    else:
        size = {"size": data.draw(st.integers(1, 300))}
    op = OPS[name]
    given = op.make(rows, dtype, **size)
    upstream = upstream_of(op, given)
    used = data.draw(st.lists(st.booleans(), min_size=len(upstream), max_size=len(upstream)).filter(any))
    above = [g if use else None for g, use in zip(upstream, used, strict=True)]
    assert_gradients_as_exact(op, given, above)
    names = differentiable(given)
    wanted = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    full = gradients(op.run, given, [*upstream])
    assert_same(gradients(op.run, given, [*upstream], wanted), {n: full[n] for n in names if n in wanted})


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(name: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    given = op.make(2, dtype)
    upstream = upstream_of(op, given)
    want = gradients(op.run, given, [*upstream])
    for argument, x in given.items():
        if isinstance(x, Tensor):
            for layout in spread(x) if x.ndim > 1 else (x.repeat_interleave(2)[::2],):
                assert_same(gradients(op.run, given | {argument: layout}, [*upstream]), want)
    for i, g in enumerate(upstream):
        for layout in spread(g):
            assert_same(gradients(op.run, given, [*upstream[:i], layout, *upstream[i + 1 :]]), want)
    ones = [torch.ones((), dtype=dtype).expand(g.shape) for g in upstream]
    assert_same(gradients(op.run, given, [*ones]), gradients(op.run, given, [x.clone() for x in ones]))


@ALL
def test_rows_do_not_depend_on_one_another(name: str) -> None:
    op = OPS[name]
    given = op.make(6, torch.float32)
    upstream = upstream_of(op, given)
    whole = gradients(op.run, given, [*upstream])
    for i in (0, 3, 5):
        alone = {n: x[i : i + 1] if isinstance(x, Tensor) and x.ndim > 1 else x for n, x in given.items()}
        for n, gradient in gradients(op.run, alone, [g[i : i + 1] for g in upstream]).items():
            if given[n].ndim > 1:
                assert torch.equal(gradient[0], whole[n][i])  # type: ignore[index]


@ALL
@pytest.mark.usefixtures("few_programs")
def test_repeats_bitwise(name: str) -> None:
    op = OPS[name]
    given = op.make(7, torch.bfloat16)
    upstream: list[Tensor | None] = [*upstream_of(op, given)]
    assert_same(gradients(op.run, given, upstream), gradients(op.run, given, upstream))


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_spoils_its_row(bad: float, name: str) -> None:
    assert_gradients_spoil_their_row(OPS[name], bad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates(dtype: torch.dtype) -> None:
    """Where the exponential is 0, infinite, or nearly so."""
    gate = torch.tensor(
        [0.0, -0.0, 1e-7, 20, -20, 87, -87, 88.5, -88.5, -104, 3e4, -3e4, math.inf, -math.inf, math.nan]
    )
    given = {"gate": gate.to(dtype)[None], "up": torch.full_like(gate, 0.75).to(dtype)[None]}
    upstream: list[Tensor | None] = [torch.full_like(given["gate"], 0.5)]
    want = gradients(their_gates, given, upstream)
    for n, got in gradients(OPS["swiglu"].run, given, upstream).items():
        rtol = max(1e-4, 2 * torch.finfo(dtype).eps)  # where the exponential is large, and its error, too
        torch.testing.assert_close(got, want[n], rtol=rtol, atol=1e-7, equal_nan=True)


@NORMED
def test_heads_and_rows_of_zeros_without_eps(name: str) -> None:
    """Heads that a block has beyond those there are do not make their weight's gradient NaN; those there are do."""
    op = OPS[name]
    given = op.make(3, torch.float32) | {"eps": 0.0}
    upstream: list[Tensor | None] = [*upstream_of(op, given)]
    assert all(x is not None and x.isfinite().all() for x in gradients(op.run, given, upstream).values())
    zeros = {n: torch.zeros_like(x) if isinstance(x, Tensor) and x.ndim > 1 else x for n, x in given.items()}
    assert all(x is not None and x.isnan().all() for x in gradients(op.run, zeros, upstream).values())


@ALL
def test_rows_past_two_to_the_31_elements(tmp_path: Path, name: str) -> None:
    op = OPS[name]
    given = op.make(3, torch.bfloat16)
    upstream = upstream_of(op, given)
    far = {n: far_apart(tmp_path / n, x) for n, x in given.items() if isinstance(x, Tensor) and x.ndim > 1}
    above = [far_apart(tmp_path / f"above {i}", g) for i, g in enumerate(upstream)]
    if name == "add_rms_norm":  # the sum, which is kept, is contiguous
        far = {}
    assert_same(gradients(op.run, given | far, [*above]), gradients(op.run, given, [*upstream]))


@ALL
def test_no_rows_and_float64_launch_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuse:
        def __getitem__(self, grid: Any) -> NoReturn:
            raise AssertionError(f"a launch of {grid}")

    for module in (norm_kernel, heads_kernel, gates_kernel):
        for kernel in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Refuse())
    op = OPS[name]
    given = op.make(0, torch.bfloat16)
    for n, gradient in gradients(op.run, given, [*upstream_of(op, given)]).items():
        assert gradient is not None
        assert gradient.shape == given[n].shape
        assert not gradient.any()
    check(name, 2, torch.float64)


def test_a_frozen_weight_costs_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("sums for a weight that is frozen")

    monkeypatch.setattr(norm_kernel, "sum_parts", refuse)
    monkeypatch.setattr(heads_kernel, "sum_parts", refuse)
    for name, wanted in (("add_rms_norm", ["x"]), ("add_rms_norm of x", ["x"]), ("rotate_heads with norms", ["k"])):
        given = OPS[name].make(3, torch.bfloat16)
        upstream: list[Tensor | None] = [*upstream_of(OPS[name], given)]
        gradients(OPS[name].run, given, upstream, wanted)
        with pytest.raises(AssertionError, match="frozen"):
            gradients(OPS[name].run, given, upstream)


def test_opcheck() -> None:
    ops, tests = torch.ops.fastgrpo, ("test_schema", "test_faketensor")
    x, grad, grad_x = (numbers(i, 3, 40, dtype=torch.bfloat16) for i in range(3))
    weight = numbers(3, 40, dtype=torch.bfloat16)
    heads = [numbers(i, 3, 2, 40, dtype=torch.bfloat16) for i in range(4)]
    for op, arguments in (
        (ops.rms_norm_backward, (x, weight, grad, grad_x, 1e-6, True)),
        (ops.rms_norm_backward, (x, weight, grad, None, 1e-6, False)),
        (ops.rotate_heads_backward, (*heads[:2], x, grad, *heads[2:], weight, weight, 1e-6, True)),
        (ops.rotate_heads_backward, (*heads[:2], x, grad, *[None] * 4, 0.0, False)),
        (ops.swiglu_backward, (x, grad, grad_x)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=tests)
