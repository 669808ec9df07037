"""The head's default schedule on a GPU under pytest-benchmark; the whole table is `benchmarks.gpu_suite`'s."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu.head_cases import LENGTH, SIZES, Yardstick, fused, make_inputs, make_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
_N = 32768


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize(("D", "V"), SIZES)
def test_gpu_head(benchmark: Any, D: int, V: int, trainable: bool) -> None:
    x = make_inputs(0, _N, make_weight(V, D, torch.device("cuda")), trainable=trainable, length=LENGTH)
    yardstick = Yardstick.of(x)
    found = yardstick.errors(x, *fused(x))
    assert yardstick.within(found), (found, yardstick.plain)

    def run() -> None:
        fused(x)
        torch.cuda.synchronize()

    benchmark.extra_info["errors"] = found
    benchmark.pedantic(run, setup=x.clear, rounds=9, warmup_rounds=2)
