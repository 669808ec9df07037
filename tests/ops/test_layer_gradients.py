"""Gradients of a decoder layer's small ops on the PyTorch path: against float64, what is kept, modes, layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgrpo_kernels import add_rms_norm, rotate_heads, swiglu

from .layer_cases import DTYPES, OPS, make_gates, make_heads, make_norm, numbers
from .layer_gradients import (
    assert_gradients_as_exact,
    assert_gradients_spoil_their_row,
    assert_same,
    differentiable,
    gradients,
    saved_bytes,
    tracked,
    upstream_of,
)

ALL = pytest.mark.parametrize("name", OPS)


@ALL
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_against_float64_and_transformers(rows: int, dtype: torch.dtype, name: str) -> None:
    assert_gradients_as_exact(OPS[name], OPS[name].make(rows, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_size_of_a_model_in_several_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrpo_kernels.vocabulary.BLOCK_ELEMENTS", 4000)
    for name, size in {
        "add_rms_norm": {"size": 896},
        "rotate_heads": {"heads": (14, 2), "size": 64},
        "rotate_heads with norms": {"heads": (16, 8), "size": 128},
        "swiglu": {"size": 4864},
    }.items():
        assert_gradients_as_exact(OPS[name], OPS[name].make(21, dtype, **size))


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_outputs_that_are_not_used(dtype: torch.dtype, name: str) -> None:
    """Their gradients are undefined, and stay so."""
    op = OPS[name]
    given = op.make(5, dtype)
    upstream = upstream_of(op, given)
    for used in product((True, False), repeat=len(upstream)):
        if any(used):
            above = [g if use else None for g, use in zip(upstream, used, strict=True)]
            assert_gradients_as_exact(op, given, above)


@ALL
def test_only_what_wants_a_gradient_gets_one(name: str) -> None:
    op = OPS[name]
    given = op.make(5, torch.bfloat16)
    upstream: list[Tensor | None] = [*upstream_of(op, given)]
    full = gradients(op.run, given, upstream)
    names = differentiable(given)
    for needs in product((True, False), repeat=len(names)):
        wanted = [n for n, needed in zip(names, needs, strict=True) if needed]
        if wanted:
            assert_same(gradients(op.run, given, upstream, wanted), {n: full[n] for n in wanted})
    assert not any(x.requires_grad for x in op.run(**tracked(given, ())))


@ALL
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_keep_nothing(mode: Any, name: str) -> None:
    op = OPS[name]
    leaves = tracked(op.make(3, torch.bfloat16))
    want = [x.detach() for x in op.run(**leaves)]
    with mode():
        assert saved_bytes(op, leaves) == (0, [])
        for got, x in zip(op.run(**leaves), want, strict=True):
            assert torch.equal(got, x)
            assert not got.requires_grad or got is leaves["x"]
    assert saved_bytes(op, op.make(3, torch.bfloat16)) == (0, [])


def test_what_is_kept() -> None:
    """In bytes: of norms the sum and the weight; of rotation the angles, with norms the heads, too; of gates both."""
    T, D, d, F = 5, 96, 16, 72
    kept = {
        "add_rms_norm": T * D + D,
        "add_rms_norm of x": T * D + D,
        "rotate_heads": 2 * T * d,
        "rotate_heads with norms": 2 * T * d + T * (7 + 2) * d + 2 * d,
        "swiglu": 2 * T * F,
    }
    for name, numel in kept.items():
        leaves = tracked(OPS[name].make(T, torch.bfloat16))
        found, tensors = saved_bytes(OPS[name], leaves)
        assert found == 2 * numel, name
        if name != "add_rms_norm":  # whose sum is an output
            given = {x.data_ptr() for x in leaves.values() if isinstance(x, Tensor)}
            assert {x.data_ptr() for x in tensors} <= given, name


def test_what_transformers_has_kept() -> None:
    """In half precision, of a number: norms an fp32 copy and the normalised; gates, what comes of one, too."""
    T, D, F = 5, 96, 72
    for name, size in {"add_rms_norm": 6 * T * D + 4 * T + 2 * D, "swiglu": 6 * T * F}.items():
        op = OPS[name]
        _, tensors = saved_bytes(replace(op, run=op.theirs), tracked(op.make(T, torch.bfloat16)))
        assert sum({(x.data_ptr(), x.dtype): x.numel() * x.element_size() for x in tensors}.values()) == size, name


def test_one_tensor_serves_two() -> None:
    """That of x is that of the residual; those of gate and up are halves of a product's own."""
    given = make_norm(3, torch.bfloat16)
    found = gradients(add_rms_norm, given, [*upstream_of(OPS["add_rms_norm"], given)])
    x, residual = found["x"], found["residual"]
    assert x is not None
    assert residual is not None
    assert x.data_ptr() == residual.data_ptr()
    gates = make_gates(3, torch.bfloat16)
    by_gate, by_up = gradients(OPS["swiglu"].run, gates, [*upstream_of(OPS["swiglu"], gates)]).values()
    assert by_gate is not None
    assert by_up is not None
    assert by_gate.stride() == by_up.stride() == (144, 1)
    assert by_up.data_ptr() - by_gate.data_ptr() == 2 * 72


@ALL
def test_no_rows(name: str) -> None:
    op = OPS[name]
    given = op.make(0, torch.bfloat16)
    for n, gradient in gradients(op.run, given, [*upstream_of(op, given)]).items():
        assert gradient is not None
        assert (gradient.shape, gradient.dtype) == (given[n].shape, torch.bfloat16)
        assert not gradient.any()


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_spoils_its_row(bad: float, name: str) -> None:
    assert_gradients_spoil_their_row(OPS[name], bad)


def layouts(x: Tensor) -> Iterator[Tensor]:
    """The same numbers laid out in other ways, and numbers that are one."""
    yield torch.stack([x, x], -1)[..., 0]
    yield torch.cat([x, x])[: len(x)]
    yield x.transpose(0, -1).contiguous().transpose(0, -1)


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_strides(dtype: torch.dtype, name: str) -> None:
    op = OPS[name]
    given = op.make(5, dtype)
    upstream = upstream_of(op, given)
    want = gradients(op.run, given, [*upstream])
    for i, g in enumerate(upstream):
        for other in layouts(g):
            assert_same(gradients(op.run, given, [*upstream[:i], other, *upstream[i + 1 :]]), want)
    for argument in differentiable(given):
        for other in layouts(given[argument]):
            assert_same(gradients(op.run, given | {argument: other}, [*upstream]), want)
    ones = [torch.ones((), dtype=dtype).expand(g.shape) for g in upstream]
    assert_same(gradients(op.run, given, [*ones]), gradients(op.run, given, [x.clone() for x in ones]))


@ALL
def test_gradcheck(name: str) -> None:
    """Not of norms, which are fp32 inside."""
    if "norm" not in name:
        given = tracked(OPS[name].make(3, torch.float64, size=6))
        names = differentiable(given)

        def run(*leaves: Tensor) -> tuple[Tensor, ...]:
            return OPS[name].run(**given | dict(zip(names, leaves, strict=True)))

        assert torch.autograd.gradcheck(run, tuple(given[n] for n in names), fast_mode=True)


@ALL
def test_repeats_bitwise_and_a_second_backward_is_the_same(name: str) -> None:
    op = OPS[name]
    leaves = tracked(op.make(5, torch.bfloat16))
    wanted = [leaves[n] for n in differentiable(leaves)]
    out, upstream = op.run(**leaves), upstream_of(op, leaves)
    first, second = (torch.autograd.grad(out, wanted, upstream, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@ALL
def test_a_penalty_on_the_gradient_raises_and_does_not_vanish(name: str) -> None:
    op = OPS[name]
    for wanted in differentiable(given := op.make(3, torch.float64)):
        leaves = tracked(given, [wanted])
        value = sum(x.square().sum() for x in op.run(**leaves) if x.requires_grad)
        assert isinstance(value, Tensor)
        (gradient,) = torch.autograd.grad(value, leaves[wanted], create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            (value + gradient.square().sum()).backward()


@ALL
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant: bool, name: str) -> None:
    op = OPS[name]
    given = op.make(5, torch.bfloat16)
    upstream: list[Tensor | None] = [*upstream_of(op, given)]
    want = gradients(op.run, given, upstream)
    leaves = tracked(given)
    out = checkpoint(
        lambda *x: op.run(**dict(zip(leaves, x, strict=True))), *leaves.values(), use_reentrant=use_reentrant
    )
    torch.autograd.backward(out, upstream)
    assert_same({n: leaves[n].grad for n in want}, want)


@ALL
def test_compiled(name: str) -> None:
    op = OPS[name]
    torch._dynamo.reset()
    compiled = torch.compile(op.run, backend="aot_eager", fullgraph=True)
    for rows in (5, 3, 8):
        given = op.make(rows, torch.bfloat16)
        upstream: list[Tensor | None] = [*upstream_of(op, given)]
        assert_same(gradients(compiled, given, upstream), gradients(op.run, given, upstream))


def test_opcheck() -> None:
    """The ops with what autograd needs of them, and those of their backwards."""
    ops = torch.ops.fastgrpo
    norm, heads, gates = (
        tracked(make(3, torch.float32, **options))
        for make, options in ((make_norm, {}), (make_heads, {"norm": True}), (make_gates, {}))
    )
    turned = rotate_heads(**heads)
    x, residual, weight, eps = norm.values()
    q, k, *rest = heads.values()
    for op, arguments in (
        (ops.add_rms_norm, (x, residual, weight, eps)),
        (ops.rms_norm, (x, weight, eps)),
        (ops.rms_norm_backward, (x, weight, numbers(9, 3, 96, dtype=torch.float32), None, eps, True)),
        (ops.rms_norm_backward, (x, weight, x, residual, eps, False)),
        (ops.rotate_heads, (q, k, *rest)),
        (ops.rotate_heads, (q, k, *rest[:2], None, None, 0.0)),
        (ops.rotate_heads_backward, (*turned, *rest[:2], q, k, *rest[2:], True)),
        (ops.rotate_heads_backward, (q, k, *rest[:2], *[None] * 4, 0.0, False)),
        (ops.swiglu, tuple(gates.values())),
        (ops.swiglu_backward, (*gates.values(), swiglu(**gates))),
    ):
        backward = "backward" in str(op)  # which has no derivative
        leaves = (x.detach() if backward and isinstance(x, Tensor) else x for x in arguments)
        torch.library.opcheck(op.default, tuple(leaves))
