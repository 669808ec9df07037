"""The launch code of decoding, `decode_attention` and `sample_tokens`, on fake tensors; see gpu_dry_run.py."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import fastgrpo_kernels as fk

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
