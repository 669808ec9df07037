"""`python -m benchmarks.algorithms`: what it reads from its runs, and the figure it draws of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from benchmarks import algorithms
from benchmarks.algorithms import figure, read_row
from fastgrpo.config import GRPOConfig
from fastgrpo.errors import RunError


def _run(folder: Path, steps: int, seconds: float, critic: float | None) -> Path:
    folder.mkdir()
    config = GRPOConfig(num_prompts_per_step=3, num_generations=4).to_dict()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps({"accuracy_before": 0.25, "accuracy_after": 0.75}))
    lines: list[dict[str, float]] = [{"step": 0, "eval/accuracy": 0.25}]
    for step in range(1, steps + 1):
        line = {"step": step, "reward": step / steps, "perf/rollout_time": seconds, "perf/update_time": 2 * seconds}
        line["perf/skipped_token_fraction"] = 0.25 if step <= steps / 2 else 0.75
        line["perf/step_time"] = 99.0  # with an evaluation in it
        lines.append(line if critic is None else line | {"perf/critic_time": critic})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_row_is_what_the_run_wrote(tmp_path: Path) -> None:
    row = read_row(_run(tmp_path / "ppo", 20, 0.5, 0.25), "ppo", 7)
    assert (row["peer"], row["params"]["seed"], row["samples"]) == ("ppo", 7, 20 * 12)
    assert row["ms"]["median"] == 1750.0
    assert row["seconds"] == {
        "rollout": 10.0,
        "reward": 0.0,
        "prepare": 0.0,
        "update": 20.0,
        "critic": 5.0,
        "all": 35.0,
    }
    assert row["reward"] == [0.075, 0.975]  # means of two steps
    assert row["accuracy"] == [0.25, 0.75]
    assert row["skipped"] == 0.5
    assert row["curve"]["samples"][:2] == [12, 24]
    assert row["curve"]["seconds"][:2] == [1.75, 3.5]
    assert len(row["curve"]["reward"]) == 20


def test_the_command_trains_reads_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(folder: Path, model: Path, options: dict[str, Any]) -> None:
        trained.append((options["algorithm"], options["seed"], options["max_steps"]))
        _run(folder, 10, 1.0, None)

    monkeypatch.setattr(algorithms, "_warm_model", lambda folder: folder)
    monkeypatch.setattr(algorithms, "_train", train)
    algorithms.main(["--out", str(tmp_path), "--seeds", "0", "1", "--only", "grpo", "ppo", "--steps", "10"])
    assert trained == [("grpo", 0, 10), ("ppo", 0, 10), ("grpo", 1, 10), ("ppo", 1, 10)]
    written = json.loads((tmp_path / "algorithms.json").read_text())
    assert [(row["peer"], row["params"]["seed"]) for row in written["results"]] == [t[:2] for t in trained]
    assert {"commit", "date", "device", "versions"} <= written.keys()
    assert "against seconds" in (tmp_path / "algorithms.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "word"), [(["--steps", "0"], "above 0, got '0'"), (["--seeds", "0", "-1"], "0 or more, got '-1'")]
)
def test_numbers_that_are_none(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        algorithms.main(["--out", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RunError, match="its training ended with exit code 1"):
        algorithms._train(tmp_path, tmp_path, {"algorithm": "grpo"})


def test_the_figure_has_a_curve_of_the_seeds_mean_in_each_panel(tmp_path: Path) -> None:
    rows = [read_row(_run(tmp_path / f"a{i}", 20, [1.0, 9.0, 1.5][i], None), "grpo", i) for i in range(3)]
    rows.append(read_row(_run(tmp_path / "b", 20, 1.0, 2.0), "ppo", 0))
    root = ElementTree.fromstring(figure(rows))
    curves = [path.get("d", "") for path in root.findall(".//{*}path") if path.get("class", "").startswith("line")]
    assert len(curves) == 4
    samples, seconds = curves[:2], curves[2:]
    assert samples[0] == samples[1]
    # The axis ends at 100 seconds, where ppo's run did; grpo's took 60, 540 and 90.
    ends = [float(path.rsplit("L", 1)[1].split()[0]) for path in seconds]
    assert ends == pytest.approx([900.0, 1000.0])
    assert all(name in "".join(root.itertext()) for name in ("grpo", "ppo", "against samples", "against seconds"))
