"""The GPU suite in its small form on the CPU: every stage runs, faults are found, and a dead stage is told."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu.bench import Bench


@pytest.mark.parametrize("name", [s.name for s in gpu_suite.STAGES if s.name not in ("environment", "tests", "limits")])
def test_stage_gives_right_rows(name: str, tmp_path: Path) -> None:
    gpu_suite.run_stage(name, tmp_path, "cpu", small=True)
    rows = json.loads((tmp_path / f"{name}.json").read_text())
    ours = [row for row in rows if row["peer"] == "fastgrpo"]
    assert ours
    assert all(row["correct"] is not False and not isinstance(row["error"], str) for row in ours), ours
    assert all(row["ms"] > 0 for row in ours if name != "numerics")
    assert "ms" in gpu_suite.table(rows)


def test_suite_runs_stages_in_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["environment", "limits"]
    assert gpu_suite.main(["--out", str(tmp_path), "--device", "cpu", "--small", "--stages", *stages]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["stage"] for row in found["results"]] == ["environment", *["limits"] * 4]
    assert found["versions"]["torch"] == torch.__version__
    assert "gemm_rate" in capsys.readouterr().out


def test_a_stage_that_does_not_end_is_stopped(tmp_path: Path) -> None:
    args = argparse.Namespace(out=tmp_path, device="cpu", small=True)
    assert gpu_suite.launch(gpu_suite.STAGES[0], args, 0.05, []) == "stopped after 0 s"


def _found(row: dict[str, Any]) -> dict[str, Any]:
    return {"stages": {"head": {"fault": None}}, "results": [row]}


def test_faults(tmp_path: Path) -> None:
    bench = Bench("head", tmp_path, torch.device("cpu"), small=True)
    good = bench.add("head", "op", "fastgrpo", {}, ms=1.0, required=1.1, reached=True, correct=True)
    assert gpu_suite.faults(_found(good)) == []
    assert gpu_suite.faults(_found({**good, "reached": False}))
    wrong = bench.add("head", "op", "fastgrpo", {}, ms=1.0, p20=1.0, correct=False, error={"loss": float("nan")})
    assert wrong["ms"] is None
    assert wrong["p20"] is None
    assert gpu_suite.faults(_found(wrong))
    assert gpu_suite.faults({"stages": {"head": {"fault": "exit 1"}}, "results": []}) == ["head: exit 1"]
