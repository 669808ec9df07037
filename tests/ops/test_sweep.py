"""The stage `sweep` in Triton's interpreter: each family's kernels with another configuration compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sweep import sweep

pytestmark = pytest.mark.interpreter


def test_other_configurations_compute_the_same(tmp_path: Path) -> None:
    from benchmarks.config_space import FAMILIES

    bench = Bench("sweep", tmp_path, torch.device("cpu"), small=True)
    sweep(bench)
    for family in FAMILIES:
        launched, other = (row for row in bench.rows if (row["case"], row["op"]) == ("sweep", family.name))
        assert launched["correct"], launched
        assert other["correct"], other
        named = [{name: row["params"][name] for name in family.options} for row in (launched, other)]
        assert named[0] == family.launched("sm_90") != named[1]
        assert any((row["case"], row["op"]) == ("best", family.name) for row in bench.rows)
