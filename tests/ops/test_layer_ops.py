"""A decoder layer's small ops on the PyTorch path: bitwise what transformers computes, and near float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from fastgrpo_kernels import add_rms_norm, rotate_heads, swiglu

from .fuzz import rms_error
from .layer_cases import DTYPES, OPS, assert_spoils_its_row, make_gates, make_heads, make_norm, numbers

ALL = pytest.mark.parametrize("name", OPS)
PUBLIC = {"add_rms_norm": add_rms_norm, "rotate_heads": rotate_heads, "swiglu": swiglu}


@ALL
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_bitwise_what_transformers_computes(rows: int, dtype: torch.dtype, name: str) -> None:
    op = OPS[name]
    given = op.make(rows, dtype)
    for got, want in zip(op.run(**given), op.theirs(**given), strict=True):
        assert (got.dtype, got.is_contiguous()) == (dtype, True)
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_at_the_size_of_a_model(dtype: torch.dtype) -> None:
    """Qwen2.5-0.5B and Qwen3, and sizes with remainders that a vector register does not hold."""
    for name, sizes in {
        "add_rms_norm": ({"size": 896}, {"size": 1001}),
        "rotate_heads": ({"heads": (14, 2), "size": 64}, {"heads": (3, 1), "size": 80}, {"heads": (1, 3), "size": 26}),
        "rotate_heads with norms": ({"heads": (16, 8), "size": 128}, {"heads": (2, 1), "size": 2}),
        "swiglu": ({"size": 4864}, {"size": 1001}),
    }.items():
        for size in sizes:
            given = OPS[name].make(5, dtype, **size)
            for got, want in zip(OPS[name].run(**given), OPS[name].theirs(**given), strict=True):
                assert torch.equal(got, want), (name, size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_a_whole_mlp(dtype: torch.dtype) -> None:
    """Its two products as one, which is why views are taken."""
    config = Qwen2Config(hidden_size=32, intermediate_size=72, num_attention_heads=1, num_key_value_heads=1)
    torch.manual_seed(0)
    mlp = Qwen2MLP(config).to(dtype)
    x = numbers(0, 5, 32, dtype=dtype)
    with torch.no_grad():
        fused = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], 1)
        assert torch.equal(mlp.down_proj(swiglu(*fused.chunk(2, -1))), mlp(x))


@ALL
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_near_float64(dtype: torch.dtype, name: str) -> None:
    """To a unit in the last place on average; norms are fp32 inside whatever the dtype, as transformers' are."""
    op = OPS[name]
    given = op.make(17, dtype)
    inside = torch.float32 if dtype == torch.float64 and "norm" in name else dtype
    for got, want in zip(op.run(**given), op.exact(**given), strict=True):
        assert rms_error([got], [want], dtype) <= torch.finfo(inside).eps


@ALL
def test_no_rows(name: str) -> None:
    given = OPS[name].make(0, torch.bfloat16)
    for got, want in zip(OPS[name].run(**given), OPS[name].theirs(**given), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


def test_the_sum_of_nothing_is_x_itself() -> None:
    given = make_norm(3, torch.bfloat16, residual=False)
    assert add_rms_norm(**given)[1] is given["x"]


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_spoils_what_depends_on_it(bad: float, name: str) -> None:
    assert_spoils_its_row(OPS[name], bad)


def test_opcheck() -> None:
    tests = ("test_schema", "test_faketensor")
    norm, heads, gates = (
        make_norm(3, torch.float32),
        make_heads(3, torch.float32, norm=True),
        make_gates(3, torch.float32),
    )
    ops = torch.ops.fastgrpo
    torch.library.opcheck(ops.add_rms_norm.default, tuple(norm.values()), test_utils=tests)
    norm.pop("residual")
    torch.library.opcheck(ops.rms_norm.default, tuple(norm.values()), test_utils=tests)
    torch.library.opcheck(ops.rotate_heads.default, tuple(heads.values()), test_utils=tests)
    torch.library.opcheck(ops.swiglu.default, tuple(gates.values()), test_utils=tests)


def f32(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


HALF = f32(16).half()


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("add_rms_norm", {"x": f32(3, 4, 96)}, ValueError, r"x: expected shape \[T, D\]"),
        ("add_rms_norm", {"x": f32(3, 0)}, ValueError, "x: expected shape .* D >= 1"),
        ("add_rms_norm", {"x": [1.0]}, TypeError, "x: expected a tensor"),
        ("add_rms_norm", {"x": f32(3, 96).long()}, TypeError, "x: expected dtype"),
        ("add_rms_norm", {"residual": f32(3, 96).half()}, TypeError, "residual: expected dtype float32"),
        ("add_rms_norm", {"residual": f32(2, 96)}, ValueError, r"residual: expected shape \[T, D\]"),
        ("add_rms_norm", {"weight": f32(95)}, ValueError, r"weight: expected shape \[D\]"),
        ("add_rms_norm", {"weight": f32(96).double()}, TypeError, "weight: expected dtype float32"),
        ("add_rms_norm", {"eps": -1e-6}, ValueError, "eps: expected a finite number >= 0"),
        ("rotate_heads", {"q": f32(3, 7)}, ValueError, r"q: expected shape \[T, Hq, d\]"),
        ("rotate_heads", {"q": f32(3, 7, 15)}, ValueError, "q: expected an even head size of 2 to 256, got 15"),
        ("rotate_heads", {"q": f32(3, 7, 258)}, ValueError, "q: expected an even head size of 2 to 256, got 258"),
        ("rotate_heads", {"k": f32(3, 2, 14)}, ValueError, r"k: expected shape \[T, Hkv, d\]"),
        ("rotate_heads", {"k": f32(3, 2, 16).half()}, TypeError, "k: expected dtype float32"),
        ("rotate_heads", {"cos": f32(3, 8)}, ValueError, r"cos: expected shape \[T, d\]"),
        ("rotate_heads", {"sin": f32(3, 16).double()}, TypeError, "sin: expected dtype float32"),
        ("rotate_heads", {"q_weight": f32(16)}, ValueError, "k_weight: expected q_weight, k_weight and eps together"),
        ("rotate_heads", {"eps": 1e-6}, ValueError, "q_weight: expected q_weight, k_weight and eps together"),
        ("rotate_heads", {"q_weight": f32(16), "k_weight": HALF, "eps": 1e-6}, TypeError, "k_weight: expected dtype"),
        ("rotate_heads", {"q_weight": f32(8), "k_weight": f32(16), "eps": 1e-6}, ValueError, "q_weight: expected sh"),
        ("rotate_heads", {"q_weight": f32(16), "k_weight": f32(16), "eps": math.nan}, ValueError, "eps: expected"),
        ("swiglu", {"gate": f32(72)}, ValueError, r"gate: expected shape \[T, F\]"),
        ("swiglu", {"up": f32(3, 71)}, ValueError, r"up: expected shape \[T, F\]"),
        ("swiglu", {"up": f32(3, 72).half()}, TypeError, "up: expected dtype float32"),
    ],
)  # fmt: skip
def test_wrong_arguments(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PUBLIC[name](**{**OPS[name].make(3, torch.float32), **change})
