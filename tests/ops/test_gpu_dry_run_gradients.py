"""The launch code of the gradients of a layer's small ops, on fake tensors; see gpu_dry_run.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

import fastgrpo_kernels as fk

from .gpu_dry_run import install
from .test_gpu_dry_run import BF16, floats, run_clean
from .test_gpu_dry_run_decoding import ROTATED, ROWS, in_dtypes

pytestmark = pytest.mark.usefixtures("fake_gpu")


@pytest.fixture(scope="module")
def fake_gpu() -> None:
    install()


def run_all(call: Callable[[int], Any], forward: str, *backward: str, backwards: int = 2) -> None:
    """backwards: with all upstream gradients, and with each alone that launches; they leave no kernel out."""
    for rows, capturing in product((*ROWS, 70_000), (False, True)):
        names = run_clean(lambda: call(rows), capturing=capturing).names  # noqa: B023
        assert names == [forward, *backwards * backward]
    assert run_clean(lambda: call(0)).names == []


@pytest.mark.parametrize(("size", "dtype"), in_dtypes([896, 1536, 3584, 4096, 8192, 16_384], fp32=[896, 4096, 16_384]))
def test_add_rms_norm(size: int, dtype: torch.dtype) -> None:
    """A sum whose norm is not used launches nothing; a weight that is frozen needs no sums."""

    def call(rows: int, residual: bool, frozen: bool) -> None:
        x = floats(rows, size, dtype=dtype, grad=True)
        more = floats(rows, 2 * size, dtype=dtype)[:, :size].requires_grad_() if residual else None
        fk.add_rms_norm(x, more, floats(size, dtype=dtype, grad=not frozen), eps=1e-6)

    for residual, frozen in product((False, True), repeat=2):
        back = ["rms_norm_backward_kernel", *["sum_parts_kernel"] * (not frozen)]
        run_all(partial(call, residual=residual, frozen=frozen), "add_rms_norm_kernel", *back)


@ROTATED
def test_rotate_heads(heads: tuple[int, int, int, bool], dtype: torch.dtype) -> None:
    queries, keys, size, norm = heads

    """Slices of one product."""

    def call(rows: int, frozen: bool) -> None:
        heads = floats(rows, queries + 2 * keys, size, dtype=dtype)
        q, k = heads[:, :queries].requires_grad_(), heads[:, queries : queries + keys].requires_grad_()
        cos, sin = (floats(rows, size, dtype=dtype) for _ in range(2))
        given: dict[str, Any] = {
            "q_weight": floats(size, dtype=dtype, grad=not frozen),
            "k_weight": floats(size, dtype=dtype, grad=not frozen),
            "eps": 1e-6,
        }
        fk.rotate_heads(q, k, cos, sin, **(given if norm else {}))

    for frozen in (False, True):
        back = ["rotate_heads_backward_kernel", *["sum_parts_kernel"] * (norm and not frozen)]
        run_all(partial(call, frozen=frozen), "rotate_heads_kernel", *back, backwards=3)


@pytest.mark.parametrize(("size", "dtype"), in_dtypes([3072, 4864, 8960, 14_336, 18_944], fp32=[4864, 18_944]))
def test_swiglu(size: int, dtype: torch.dtype) -> None:
    def call(rows: int) -> None:
        fk.swiglu(*(x.requires_grad_() for x in floats(rows, 2 * size, dtype=dtype).chunk(2, 1)))

    run_all(call, "swiglu_kernel", "swiglu_backward_kernel")


def test_lengths_compile_nothing_anew() -> None:
    """Rows and runs of them are no reason: 1, multiples of 16, and others."""

    def seen(rows: int) -> set[Any]:
        def call() -> None:
            x, weight = floats(rows, 896, dtype=BF16, grad=True), floats(896, dtype=BF16, grad=True)
            fk.add_rms_norm(x, x, weight, eps=1e-6)
            q, k = (floats(rows, heads, 128, dtype=BF16, grad=True) for heads in (16, 8))
            angle, weight = floats(rows, 128, dtype=BF16), floats(128, dtype=BF16, grad=True)
            fk.rotate_heads(q, k, angle, angle, q_weight=weight, k_weight=weight, eps=1e-6)

        return set(run_clean(call).launches)

    first = seen(1024)
    for rows in (1, 16, 1023, 16_384, 70_001):
        assert seen(rows) <= first, rows
