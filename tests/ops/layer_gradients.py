"""Gradients of a decoder layer's small ops: ours, those of transformers' autograd, and those of plain float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from fastgrpo_kernels.checks import compute_dtype

from .fuzz import rms_error
from .layer_cases import Op, numbers

CONSTANT = ("cos", "sin")
SHARED = ("weight", "q_weight", "k_weight")
"""Parameters, whose gradients are sums over tokens."""

Run = Callable[..., tuple[Tensor, ...]]


def differentiable(given: dict[str, Any]) -> list[str]:
    return [name for name, x in given.items() if isinstance(x, Tensor) and name not in CONSTANT]


def tracked(given: dict[str, Any], wanted: Collection[str] | None = None) -> dict[str, Any]:
    """The same, of which those wanted, by default all that can, want a gradient; views stay views."""
    names = differentiable(given) if wanted is None else wanted
    return {n: x.detach().requires_grad_(n in names) if isinstance(x, Tensor) else x for n, x in given.items()}


def upstream_of(op: Op, given: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        shapes = [(x.shape, x.dtype, x.device.type) for x in op.run(**given)]
    return [numbers(20 + i, *shape, dtype=dtype, device=device) for i, (shape, dtype, device) in enumerate(shapes)]


def gradients(
    run: Run, given: dict[str, Any], upstream: list[Tensor | None], wanted: Collection[str] | None = None
) -> dict[str, Tensor | None]:
    """Of those wanted, by default of all; an output whose upstream gradient is None is not used."""
    leaves = tracked(given, wanted)
    names = [n for n, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad]
    used = [(out, g) for out, g in zip(run(**leaves), upstream, strict=True) if g is not None and out.requires_grad]
    outputs, above = zip(*used, strict=True)
    found = torch.autograd.grad(outputs, [leaves[n] for n in names], above, allow_unused=True)
    return dict(zip(names, found, strict=True))


def exact_gradients(op: Op, given: dict[str, Any], upstream: list[Tensor | None]) -> dict[str, Tensor | None]:
    """By autograd of the reference, all in float64."""
    wide = {n: x.double() if isinstance(x, Tensor) else x for n, x in given.items()}
    return gradients(op.exact, wide, [None if g is None else g.double() for g in upstream])


def errors(got: dict[str, Tensor | None], want: dict[str, Tensor | None], given: dict[str, Any]) -> dict[str, float]:
    """Of each gradient, its root mean square error over the largest magnitude; both have the same that are None."""
    found = {}
    for name, wanted in want.items():
        gradient = got[name]
        assert (gradient is None) == (wanted is None), name
        if gradient is not None and wanted is not None:
            assert (gradient.shape, gradient.dtype) == (given[name].shape, given[name].dtype), name
            found[name] = rms_error([gradient], [wanted], gradient.dtype)
    return found


def assert_gradients_as_exact(op: Op, given: dict[str, Any], upstream: list[Tensor | None] | None = None) -> None:
    """Errors against float64 are at most 1.5 times those of transformers' autograd in the same dtype."""
    upstream = [*upstream_of(op, given)] if upstream is None else upstream
    want = exact_gradients(op, given, upstream)
    theirs = errors(gradients(op.theirs, given, upstream), want, given)
    for name, error in errors(gradients(op.run, given, upstream), want, given).items():
        # Norms are fp32's in float64, too: the errors of few numbers are then those of a few roundings.
        slack = torch.finfo(torch.float32 if given.get("eps") is not None else compute_dtype(given[name])).eps
        assert error <= 1.5 * theirs[name] + slack, f"{name} is off by {error:.2g}, transformers' by {theirs[name]:.2g}"


def assert_same(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    assert got.keys() == want.keys()
    for name, x in got.items():
        y = want[name]
        assert (x is None) == (y is None), name
        if x is not None and y is not None:
            assert torch.equal(x, y), name


def assert_gradients_spoil_their_row(op: Op, bad: float, device: str = "cpu") -> None:
    """A number of row 2 of an input or of an upstream gradient: that row is finite where transformers' is, others
    have the gradients that they had.
    """
    given = op.make(4, torch.bfloat16, device)
    upstream: list[Tensor | None] = [*upstream_of(op, given)]
    clean = gradients(op.run, given, upstream)
    first = next(iter(given))
    spoilt = {**given, first: given[first].clone()}
    for x, inputs, above in ((spoilt[first], spoilt, upstream), (g := _copy(upstream[0]), given, [g, *upstream[1:]])):
        x[2].view(-1)[5] = bad
        theirs = gradients(op.theirs, inputs, above)
        for name, gradient in gradients(op.run, inputs, above).items():
            before, want = clean[name], theirs[name]
            assert gradient is not None
            assert before is not None
            assert want is not None
            if name not in SHARED:
                assert torch.equal(gradient[2].isfinite(), want[2].isfinite()), name
                assert torch.equal(gradient[[0, 1, 3]], before[[0, 1, 3]]), name


def _copy(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.clone()


def saved_bytes(op: Op, leaves: dict[str, Any]) -> tuple[int, list[Tensor]]:
    """What autograd keeps for the backward: its bytes, and the tensors."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        op.run(**leaves)
    return sum(math.prod(x.shape) * x.element_size() for x in kept), kept
