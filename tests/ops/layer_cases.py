"""Inputs of a decoder layer's small ops, and what transformers and plain float64 make of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from fastgrpo_kernels import add_rms_norm, rotate_heads, swiglu
from fastgrpo_kernels.add_rms_norm.reference import add_rms_norm_reference
from fastgrpo_kernels.rotate_heads.reference import rotate_heads_reference
from fastgrpo_kernels.swiglu.reference import swiglu_reference

from .fuzz import rms_error

EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Op:
    """make: (rows, dtype, device) -> keyword arguments. run, theirs, exact: the op, transformers' own, and float64."""

    make: Callable[..., dict[str, Any]]
    run: Callable[..., tuple[Tensor, ...]]
    theirs: Callable[..., tuple[Tensor, ...]]
    exact: Callable[..., tuple[Tensor, ...]]


def numbers(seed: int, *shape: int, dtype: torch.dtype, device: str = "cpu", scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g)).to(dtype).to(device)


def angles(rows: int, size: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """cos, sin [T, d] of positions up to 30000, of d frequencies: nothing says that both halves have the same."""
    position = torch.randint(30_000, (rows,), generator=torch.Generator().manual_seed(7)).double()
    angle = position[:, None] * 1e6 ** (-torch.arange(size).double() / size)
    return angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)


def make_norm(
    rows: int, dtype: torch.dtype, device: str = "cpu", *, size: int = 96, residual: bool = True
) -> dict[str, Any]:
    x, other = (numbers(i, rows, size, dtype=dtype, device=device, scale=2.0) for i in range(2))
    weight = 1 + numbers(2, size, dtype=dtype, device=device, scale=0.3)
    return {"x": x, "residual": other if residual else None, "weight": weight, "eps": EPS}


def make_heads(
    rows: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    heads: tuple[int, int] = (7, 2),
    size: int = 16,
    norm: bool = False,
) -> dict[str, Any]:
    """q and k as slices of one product, behind which the values lie."""
    queries, kept = heads
    fused = numbers(3, rows, queries + 2 * kept, size, dtype=dtype, device=device)
    cos, sin = angles(rows, size, dtype, device)
    given: dict[str, Any] = {"q": fused[:, :queries], "k": fused[:, queries : queries + kept], "cos": cos, "sin": sin}
    if norm:
        for i, name in enumerate(("q_weight", "k_weight")):
            given[name] = 1 + numbers(4 + i, size, dtype=dtype, device=device, scale=0.3)
        given["eps"] = EPS
    return given


def make_gates(rows: int, dtype: torch.dtype, device: str = "cpu", *, size: int = 72) -> dict[str, Any]:
    gate, up = numbers(6, rows, 2 * size, dtype=dtype, device=device, scale=4.0).chunk(2, -1)
    return {"gate": gate, "up": up}


def _norm_module(kind: type[torch.nn.Module], x: Tensor, weight: Tensor, eps: float) -> Tensor:
    module = kind(weight.numel(), eps=eps).to(x.device, x.dtype)
    normed: Tensor = torch.func.functional_call(module, {"weight": weight}, (x,))
    return normed


def their_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x if residual is None else residual + x
    return _norm_module(Qwen2RMSNorm, total, weight, eps), total


def their_heads(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, ...]:
    """Batches of one token: [T, heads, 1, d]."""
    by_head = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        x = x.contiguous()[:, None]
        x = x if weight is None or eps is None else _norm_module(Qwen3RMSNorm, x, weight, eps)
        by_head.append(x.transpose(1, 2))
    return tuple(x[:, :, 0] for x in apply_rotary_pos_emb(*by_head, cos[:, None], sin[:, None]))


def their_gates(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (torch.nn.SiLU()(gate.contiguous()) * up.contiguous(),)


def _norm_op(**given: Any) -> Op:
    return Op(lambda *at, **more: make_norm(*at, **{**given, **more}), add_rms_norm, their_norm, add_rms_norm_reference)


def _heads_op(**given: Any) -> Op:
    return Op(
        lambda *at, **more: make_heads(*at, **{**given, **more}), rotate_heads, their_heads, rotate_heads_reference
    )


OPS = {
    "add_rms_norm": _norm_op(),
    "add_rms_norm of x": _norm_op(residual=False),
    "rotate_heads": _heads_op(),
    "rotate_heads with norms": _heads_op(norm=True),
    "swiglu": Op(make_gates, lambda **x: (swiglu(**x),), their_gates, lambda **x: (swiglu_reference(**x),)),
}


def assert_spoils_its_row(op: Op, bad: float, device: str = "cpu") -> None:
    """A number of row 2 of the first tensor: what depends on it is as in transformers, and other rows are as before."""
    given = op.make(4, torch.bfloat16, device)
    clean = op.run(**given)
    first = next(iter(given))
    given[first] = given[first].clone()
    given[first][2].view(-1)[5] = bad
    out = op.run(**given)
    for got, want, before in zip(out, op.theirs(**given), clean, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got[[0, 1, 3]], before[[0, 1, 3]])
    assert not out[0][2].isfinite().all()


def units_apart(got: Tensor, want: Tensor) -> Tensor:
    """How many numbers of half precision lie between, +1; 0 where both are equal."""
    ordered = []
    for x in (got, want):
        bits = x.contiguous().view(torch.int16).int()
        ordered.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    return (ordered[0] - ordered[1]).abs()


def assert_near_theirs(name: str, got: Tensor, want: Tensor) -> None:
    """Half precision, kernel against transformers: few elements differ, by two units in the last place at most.

    Another order of sums or another exponential moves the first of two products by one unit; the second makes it two at
    most. Of rotated heads they are units of the head's largest number, since products are added up.
    """
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if name == "rotate_heads":
        assert torch.equal(got, want)
        return
    apart = units_apart(got, want)
    assert int((apart > 0).sum()) <= max(1, 2e-3 * apart.numel())
    if name == "rotate_heads with norms":
        unit = torch.finfo(want.dtype).eps * want.double().abs().amax(-1, keepdim=True)
        assert ((got.double() - want.double()).abs() <= 2 * unit).all()
    else:
        assert (apart <= 2).all()


def assert_as_exact(op: Op, given: dict[str, Any], slack: float = 1e-7) -> None:
    """Errors against float64 are at most 1.5 times those of transformers' own steps."""
    for got, theirs, want in zip(op.run(**given), op.theirs(**given), op.exact(**given), strict=True):
        allowed = 1.5 * rms_error([theirs], [want], got.dtype) + slack
        assert rms_error([got], [want], got.dtype) <= allowed


def assert_extreme_gates(dtype: torch.dtype, device: str = "cpu") -> None:
    """Where the exponential is 0, infinite, or nearly so."""
    gate = torch.tensor([0, -0.0, 1e-7, 20, -20, 80, -80, 88.5, -88.5, -104, 3e4, -3e4, math.inf, -math.inf, math.nan])
    gate = gate.to(dtype).to(device)[None]
    up = torch.full_like(gate, 0.75)
    want = their_gates(gate, up)[0]
    torch.testing.assert_close(
        swiglu(gate, up), want, rtol=1e-4 if dtype == torch.float32 else 2**-7, atol=1e-35, equal_nan=True
    )
