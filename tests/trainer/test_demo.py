"""`make demo`'s command: a model learns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.timeout(900)
def test_the_demo_learns_to_add(tmp_path: Path) -> None:
    """The whole of it, from nothing: sampled accuracy on problems nobody trained on."""
    command = [sys.executable, "-m", "fastgrpo", "train", str(_EXAMPLES / "arithmetic.yaml"), "--output_dir"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "run")], env=environment, check=True, cwd=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy_before"] <= 0.60
    assert summary["accuracy_after"] >= 0.95
    assert summary["steps"] == 100
    assert (tmp_path / "run" / "report.html").exists()
    assert (Path(summary["model"]) / "config.json").exists()


def test_the_three_parts_of_the_problems_are_disjoint_and_the_warm_up_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(_EXAMPLES))
    import arithmetic

    train, held_out = arithmetic.train_dataset(), arithmetic.eval_dataset()
    assert len(held_out) >= 500
    warm_up = {f"{a:02d}+{b:02d}=" for a, b in arithmetic._WARM_UP}
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert not warm_up & (set(train["prompt"]) | set(held_out["prompt"]))
    assert all(int(p[:2]) + int(p[3:5]) == int(a) for p, a in zip(train["prompt"], train["answer"], strict=True))

    monkeypatch.setattr(arithmetic, "_RIGHT_STEPS", 3)
    monkeypatch.setattr(arithmetic, "_WRONG_STEPS", 2)
    first, again, other = (arithmetic.model(seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert 250_000 <= sum(p.numel() for p in arithmetic.model(0)[0].parameters()) <= 400_000
