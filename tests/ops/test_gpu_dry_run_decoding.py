"""The launch code of decoding, attention, sampling and a layer's small ops, on fake tensors; see gpu_dry_run.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

import fastgrpo_kernels as fk
from fastgrpo_kernels.shared_prefix_attention import kernel as merge_kernel

from .gpu_dry_run import install
from .test_gpu_dry_run import BF16, FP16, FP32, floats, run_clean

pytestmark = pytest.mark.usefixtures("fake_gpu")


@pytest.fixture(scope="module")
def fake_gpu() -> None:
    install()


def attend(
    rows: int, heads: int, repeat: int, size: int, dtype: torch.dtype, *, by_head: bool = False, **options: Any
) -> None:
    q = floats(rows, heads * repeat, size, dtype=dtype)
    if by_head:  # as a model's rotation leaves them
        q = floats(heads * repeat, rows, size, dtype=dtype).transpose(0, 1)
    k, v = (floats(rows, heads, size, dtype=dtype) for _ in range(2))
    keys, values = (floats(5000, heads, size, dtype=dtype) for _ in range(2))
    where = torch.empty(4, rows, dtype=torch.int64, device="cuda")
    fk.decode_attention(q, k, v, keys, values, where, **options)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("heads", "repeat", "size"), [(2, 7, 64), (8, 4, 128), (4, 2, 256)])
def test_decode_attention(heads: int, repeat: int, size: int, dtype: torch.dtype) -> None:
    for rows, by_head, capturing in product((1, 3, 24, 513), (False, True), (False, True)):
        run = run_clean(lambda: attend(rows, heads, repeat, size, dtype, by_head=by_head), capturing=capturing)  # noqa: B023
        assert run.names == (["attend_path"] if rows == 513 else ["attend_path", "merge_pieces"])
    assert run_clean(lambda: attend(0, heads, repeat, size, dtype)).launches == []


def test_decode_attention_s_options() -> None:
    for window, softcap in product((None, 4096), (None, 30.0)):
        for rows in (1, 512):
            run_clean(lambda: attend(rows, 4, 2, 256, BF16, window=window, softcap=softcap))  # noqa: B023
    run_clean(lambda: attend(3, 32, 1, 80, BF16, window=300, longest=4000))
    run_clean(lambda: attend(512, 8, 2, 128, FP32))
    assert run_clean(lambda: attend(3, 8, 2, 128, FP32, longest=256)).names == ["attend_path"]


FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.9},
    "all": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("V", [64, 151_936, 32_001])
def test_sample_tokens(V: int, name: str, dtype: torch.dtype) -> None:
    filtered = name not in ("plain", "greedy")
    for capturing in (False, True):
        run = run_clean(
            lambda: fk.sample_tokens(floats(33, V, dtype=dtype), floats(33, dtype=torch.float64), **FILTERS[name]),
            capturing=capturing,
        )
        assert run.names == ["chunk_sums", *["filter_sums"] * filtered, "draw"]


ROWS = (1, 3, 512, 1000)


def run_all(call: Callable[[int], Any], kernel: str) -> None:
    for rows, capturing in product(ROWS, (False, True)):
        assert run_clean(lambda: call(rows), capturing=capturing).names == [kernel]  # noqa: B023
    assert run_clean(lambda: call(0)).names == []


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("heads", "size"), [(14, 64), (12, 128), (8, 256), (1, 80)])
def test_merge_parts(heads: int, size: int, dtype: torch.dtype) -> None:
    def call(rows: int) -> None:
        out, lse = floats(rows + 24, heads, size, dtype=dtype), floats(heads, rows + 24)
        merge_kernel.merge_parts(out[24:], lse[:, 24:], floats(rows, heads, size, dtype=dtype), floats(heads, rows))

    for rows in (1, 2, 333, 4096):
        assert run_clean(lambda: call(rows)).names == ["merge_parts_kernel"]  # noqa: B023
    assert run_clean(lambda: call(0)).names == []


def in_dtypes(sizes: Sequence[Any], fp32: Sequence[Any]) -> list[tuple[Any, torch.dtype]]:
    """All sizes in 16 bits; in fp32, in which models are trained on small GPUs if at all, those that are listed."""
    return [*product(sizes, (BF16, FP16)), *product(fp32, (FP32,))]


ROTATED = pytest.mark.parametrize(
    ("heads", "dtype"),
    in_dtypes(
        [(14, 2, 64, False), (12, 2, 128, False), (28, 4, 128, False), (32, 8, 128, False), (16, 8, 128, True)],
        fp32=[(14, 2, 64, False), (32, 8, 128, False), (16, 8, 128, True)],
    ),
)
"""Heads of the queries and of the keys, their size, and are they normed?"""


@pytest.mark.parametrize(("size", "dtype"), in_dtypes([896, 1536, 3584, 4096, 8192, 16_384], fp32=[896, 4096, 16_384]))
def test_add_rms_norm(size: int, dtype: torch.dtype) -> None:
    def call(rows: int, residual: bool) -> None:
        x, more = floats(rows, size, dtype=dtype), floats(rows, 2 * size, dtype=dtype)[:, :size]
        fk.add_rms_norm(x, more if residual else None, floats(size, dtype=dtype), eps=1e-6)

    for residual in (False, True):
        run_all(partial(call, residual=residual), "add_rms_norm_kernel")


@ROTATED
def test_rotate_heads(heads: tuple[int, int, int, bool], dtype: torch.dtype) -> None:
    queries, keys, size, norm = heads

    """Slices of one product."""

    def call(rows: int) -> None:
        heads = floats(rows, queries + 2 * keys, size, dtype=dtype)
        q, k = heads[:, :queries], heads[:, queries : queries + keys]
        cos, sin = (floats(rows, size, dtype=dtype) for _ in range(2))
        given: dict[str, Any] = {
            "q_weight": floats(size, dtype=dtype),
            "k_weight": floats(size, dtype=dtype),
            "eps": 1e-6,
        }
        fk.rotate_heads(q, k, cos, sin, **(given if norm else {}))

    run_all(call, "rotate_heads_kernel")


@pytest.mark.parametrize(("size", "dtype"), in_dtypes([3072, 4864, 8960, 14_336, 18_944], fp32=[4864, 18_944]))
def test_swiglu(size: int, dtype: torch.dtype) -> None:
    run_all(lambda rows: fk.swiglu(*floats(rows, 2 * size, dtype=dtype).chunk(2, 1)), "swiglu_kernel")
