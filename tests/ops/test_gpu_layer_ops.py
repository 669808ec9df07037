"""On a GPU: a layer's small ops against transformers' eager steps and float64; captured, compiled, without waiting."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from .layer_cases import (
    DTYPES,
    OPS,
    assert_as_exact,
    assert_extreme_gates,
    assert_near_theirs,
    assert_spoils_its_row,
    make_gates,
    make_heads,
    make_norm,
)
from .layer_gradients import assert_gradients_as_exact, assert_gradients_spoil_their_row, gradients, upstream_of
from .test_gpu_ops import assert_equal, assert_repeats, compilations, no_sync, replayed

pytestmark = pytest.mark.gpu
ALL = pytest.mark.parametrize("name", OPS)
SIZES: dict[str, list[dict[str, Any]]] = {
    "add_rms_norm": [{"size": n} for n in (1, 37, 896, 1536, 3584, 4096, 8192, 16_384, 20_001)],
    "rotate_heads": [
        {"heads": heads, "size": size}
        for heads, size in (((14, 2), 64), ((12, 2), 128), ((28, 4), 128), ((8, 4), 256), ((32, 32), 80), ((3, 1), 26))
    ],
    "swiglu": [{"size": n} for n in (1, 1001, 4864, 8960, 18_944)],
}


def sizes(name: str) -> list[dict[str, Any]]:
    return next(found for op, found in SIZES.items() if name.startswith(op))


def run(name: str, given: dict[str, Any]) -> list[Tensor]:
    return list(OPS[name].run(**given))


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 33, 1024])
def test_as_transformers_and_float64(rows: int, dtype: torch.dtype, name: str) -> None:
    """Rotation is bitwise that of eager PyTorch, in every dtype."""
    for size in sizes(name):
        given = OPS[name].make(rows, dtype, "cuda", **size)
        assert_as_exact(OPS[name], given, slack=1e-6)
        for got, want in zip(OPS[name].run(**given), OPS[name].theirs(**given), strict=True):
            if dtype != torch.float32 or name == "rotate_heads":
                assert_near_theirs(name, got, want)


@ALL
def test_repeats_bitwise(name: str) -> None:
    given = OPS[name].make(512, torch.bfloat16, "cuda", **sizes(name)[2])
    assert_repeats(lambda: run(name, given))


@ALL
def test_nothing_waits(name: str) -> None:
    given = OPS[name].make(33, torch.bfloat16, "cuda")
    run(name, given)
    with no_sync():
        run(name, given)


@ALL
def test_captured_in_a_graph(name: str) -> None:
    given = OPS[name].make(33, torch.bfloat16, "cuda")
    graph, outputs = replayed(lambda: run(name, given))
    for _ in range(2):
        for x in given.values():
            if isinstance(x, Tensor):
                x.copy_(x.flip(0) * 0.9)
        graph.replay()
        assert_equal(outputs, run(name, given))


@ALL
def test_rows_change_without_compiling(name: str) -> None:
    run(name, OPS[name].make(64, torch.bfloat16, "cuda"))
    with compilations() as seen:
        for rows in (1, 2, 17, 512, 1000):
            run(name, OPS[name].make(rows, torch.bfloat16, "cuda"))
    assert not seen


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_spoils_what_depends_on_it(bad: float, name: str) -> None:
    assert_spoils_its_row(OPS[name], bad, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates(dtype: torch.dtype) -> None:
    assert_extreme_gates(dtype, "cuda")


@pytest.mark.parametrize("name", ["add_rms_norm", "rotate_heads", "swiglu"])
def test_rows_past_2_to_the_31(name: str) -> None:
    """Rows of gates, heads and states until an int32 offset would have wrapped round; the last are as those alone."""
    make: Any = {"add_rms_norm": make_norm, "rotate_heads": make_heads, "swiglu": make_gates}[name]
    small = make(16, torch.bfloat16, "cuda", **sizes(name)[2])
    size = next(iter(small.values()))[0].numel()
    rows = (1 << 31) // size + 16
    given = {n: x if not isinstance(x, Tensor) or x.ndim == 1 else large(rows, x) for n, x in small.items()}
    for got, want in zip(OPS[name].run(**given), OPS[name].run(**small), strict=True):
        assert torch.equal(got[-16:], want)
        del got


def large(rows: int, last: Tensor) -> Tensor:
    x = torch.zeros(rows, *last.shape[1:], dtype=last.dtype, device=last.device)
    x[-len(last) :] = last
    return x


@ALL
def test_compiled_whole(name: str) -> None:
    given = OPS[name].make(33, torch.bfloat16, "cuda")
    assert_equal(list(torch.compile(OPS[name].run, fullgraph=True)(**given)), run(name, given))


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 33, 3000])
def test_gradients_against_float64(rows: int, dtype: torch.dtype, name: str) -> None:
    """Of 3,000 rows each program takes several, of 33 one."""
    for size in sizes(name):
        assert_gradients_as_exact(OPS[name], OPS[name].make(rows, dtype, "cuda", **size))


def gradient_case(name: str, rows: int) -> tuple[dict[str, Any], list[Tensor | None]]:
    given = OPS[name].make(rows, torch.bfloat16, "cuda", **sizes(name)[2])
    return given, [*upstream_of(OPS[name], given)]


def found(name: str, given: dict[str, Any], upstream: list[Tensor | None], run: Any = None) -> list[Tensor]:
    gradient = gradients(run or OPS[name].run, given, upstream)
    return [x for x in gradient.values() if x is not None]


@ALL
def test_gradients_repeat_bitwise(name: str) -> None:
    given, upstream = gradient_case(name, 5000)
    assert_repeats(lambda: found(name, given, upstream))


@ALL
def test_gradients_do_not_wait(name: str) -> None:
    given, upstream = gradient_case(name, 33)
    found(name, given, upstream)
    with no_sync():
        found(name, given, upstream)


@ALL
def test_gradients_of_other_rows_compile_nothing(name: str) -> None:
    found(name, *gradient_case(name, 64))
    with compilations() as seen:
        for rows in (1, 2, 17, 512, 1000, 5000):
            found(name, *gradient_case(name, rows))
    assert not seen


@ALL
def test_gradients_captured_in_a_graph(name: str) -> None:
    given, upstream = gradient_case(name, 1500)
    graph, outputs = replayed(lambda: found(name, given, upstream))
    for _ in range(2):
        for x in (*given.values(), *upstream):
            if isinstance(x, Tensor):
                x.copy_(x.flip(0) * 0.9)
        graph.replay()
        assert_equal(outputs, found(name, given, upstream))


@ALL
def test_gradients_compiled_whole(name: str) -> None:
    given, upstream = gradient_case(name, 33)
    compiled = torch.compile(OPS[name].run, fullgraph=True)
    assert_equal(found(name, given, upstream, compiled), found(name, given, upstream))


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_spoils_its_row_s_gradients(bad: float, name: str) -> None:
    assert_gradients_spoil_their_row(OPS[name], bad, "cuda")


@pytest.mark.parametrize("name", ["add_rms_norm", "rotate_heads", "swiglu"])
def test_gradients_of_rows_past_2_to_the_31(name: str) -> None:
    """Backwards' ops alone: the gradients of the last rows are those of the last rows alone."""
    small, above = gradient_case(name, 16)
    rows = (1 << 31) // next(iter(small.values()))[0].numel() + 16
    given = {n: x if not isinstance(x, Tensor) or x.ndim == 1 else large(rows, x) for n, x in small.items()}
    wide = [None if g is None else large(rows, g) for g in above]
    wanted = [n for n in ("x", "q", "k", "gate", "up") if n in given]
    want = gradients(OPS[name].run, small, above, wanted)
    for n, got in gradients(OPS[name].run, given, wide, wanted).items():
        assert torch.equal(got[-16:], want[n])  # type: ignore[index, arg-type]
