"""The GPU suite in its small form on the CPU: every stage runs, faults are found, and a dead stage is told."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu import checks, predictions, rollout, update, update_cases
from benchmarks.gpu.bench import Bench
from fastgrpo.errors import RunError
from fastgrpo.packing import pack

UNPREDICTED = {"numerics", "backends", "sweep", "best", "memory", "lasting", "peak", "run"}
"""Cases without a time, those that nothing is required of, and those that `fastgrpo plan` predicts."""


@pytest.mark.parametrize(
    "name", [s.name for s in gpu_suite.STAGES if s.name not in ("environment", "tests", "limits", "update")]
)
def test_stage_gives_right_rows(name: str, tmp_path: Path) -> None:
    right_rows(name, tmp_path)


def right_rows(name: str, out: Path) -> list[dict[str, Any]]:
    """Every row of the stage's small form; ours must be right and timed."""
    gpu_suite.run_stage(name, out, "cpu", small=True)
    rows: list[dict[str, Any]] = json.loads((out / f"{name}.json").read_text())
    ours = [row for row in rows if row["peer"] == "fastgrpo"]
    assert ours
    assert all(row["correct"] is not False and not isinstance(row["error"], str) for row in ours), ours
    assert all(row["ms"] > 0 for row in ours if row["case"] != "numerics")
    predicted = predictions.attach(rows, small=True)
    known = [row for row in predicted if row["case"] not in UNPREDICTED]
    assert all(row["predicted_ms"] or row["predicted_ratio"] for row in known), known
    assert "ms" in gpu_suite.table(predicted)
    return rows


def test_the_update_stage_says_what_it_compared(tmp_path: Path) -> None:
    rows = right_rows("update", tmp_path)
    assert {row["case"] for row in rows} >= {"update", "dead_groups", "sharing", "body", "growth", "checkpointing"}
    steps = {row["params"]["dead"]: row for row in rows if row["case"] == "update" and row["peer"] == "fastgrpo"}
    assert steps[1]["tokens"] < steps[0]["tokens"]
    if find_spec("trl"):
        assert all(row["error"]["gradient"] < 1e-5 for row in rows if row["case"] == "numerics")
        assert sum(row["case"] == "against" and row["speed_ratio"] > 0 for row in rows) == 2


def test_an_engine_that_cannot_run_here_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that says so, not one of wrong results: the GPU's transformers may be older than its engine needs."""
    monkeypatch.setattr("fastgrpo.rollout.transformers.OLDEST", "99")
    bench = Bench("rollout", tmp_path, torch.device("cpu"), small=True)
    shape, job = update_cases.shapes(bench)[0], rollout.JOBS[True]
    make = rollout._makers(bench)["transformers"]
    bench.attempt("generate", "rollout", "transformers", {}, lambda: rollout._generate(bench, shape, job, make, rows=4))
    assert bench.rows[-1]["error"].startswith("absent: ")
    assert "transformers 99 is needed" in bench.rows[-1]["error"]
    assert bench.rows[-1]["correct"] is None


def test_the_sizes_are_what_is_required(tmp_path: Path) -> None:
    """More than 16,384 tokens a micro-batch where the MFU is measured; the lengths' means; half the groups dead."""
    bench = Bench("update", tmp_path, torch.device("cuda"), small=False)
    work = update_cases.gsm8k(bench, 64)
    chosen = update_cases.rollouts(update_cases.SHAPES[1], work)
    batches = pack(chosen, max_tokens=update.MFU_BUDGET, share=True)
    assert all(len(batch.input_ids) >= 16384 for batch in batches)
    assert sum(r.num_tokens for r in chosen) / len(chosen) == pytest.approx(150, rel=0.03)
    assert all(r.advantage for r in chosen)
    work = update_cases.long_prompts(bench, 16)
    chosen = update_cases.rollouts(update_cases.SHAPES[0], work, dead=8)
    assert sum(r.num_tokens for r in chosen) / len(chosen) == pytest.approx(256, rel=0.1)  # the cap takes some
    assert [r.advantage != 0 for r in chosen] == [r.group >= 8 for r in chosen]


def test_suite_runs_stages_in_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["environment", "limits"]
    assert gpu_suite.main(["--out", str(tmp_path), "--device", "cpu", "--small", "--stages", *stages]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["stage"] for row in found["results"]] == ["environment", *["limits"] * 4]
    assert found["versions"]["torch"] == torch.__version__
    assert found["results"][1]["ms"]["p20"] <= found["results"][1]["ms"]["median"]
    assert all(row["predicted_ms"] for row in found["results"] if row["case"] in ("gemm_rate", "head_gemms"))
    assert "gemm_rate" in capsys.readouterr().out


def test_of_torch_the_build_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's package of the CUDA build is version 2.11.0, what it holds 2.11.0+cu130."""
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.11.0")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert checks.versions()["torch"] == "2.11.0+cu130"


def test_a_stage_that_does_not_end_is_stopped(tmp_path: Path) -> None:
    args = argparse.Namespace(out=tmp_path, device="cpu", small=True)
    assert gpu_suite.launch(gpu_suite.STAGES[0], args, 0.05, []) == "stopped after 0 s"


def test_a_stage_ends_with_the_suite_that_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in a session of its own, where Ctrl-C does not reach it."""
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if not started:
            started.append(process)
            raise KeyboardInterrupt
        return wait(process, timeout)

    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    args = argparse.Namespace(out=tmp_path, device="cpu", small=True)
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.launch(gpu_suite.STAGES[0], args, 60, [])
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--device", "cpu"], "--device cpu goes with --small"),
        (["--device", "cpu", "--small", "--minutes", "nan"], "--minutes: expected more than 0"),
        (["--device", "cpu", "--small", "--wheels", "nowhere"], "--wheels: no wheels in nowhere"),
        (["--device", "cuda"], "torch sees no GPU here"),
    ],
)
def test_mistakes_are_told_before_a_stage_runs(
    arguments: list[str],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main(["--out", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    assert word in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_wheels_that_pip_cannot_unpack(tmp_path: Path) -> None:
    (tmp_path / "no-wheel.whl").touch()
    with pytest.raises(RunError, match="pip could not unpack them"):
        gpu_suite.unpack(tmp_path, str(tmp_path / "site"))


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
