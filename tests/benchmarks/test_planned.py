"""benchmarks/planned.py at a size that takes seconds: it runs every phase and sets it beside its plan."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import planned
from fastgrpo.config import ConfigError


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        (["--prompts", "0"], SystemExit, "2"),
        (["--group", "1"], ConfigError, "num_generations=1"),
        (["--json", "FILE/x.json"], FileExistsError, "FILE"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    arguments: list[str], error: type[BaseException], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["planned", *arguments])
    monkeypatch.setattr(planned, "measure", None)
    with pytest.raises(error, match=word):
        planned.main()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
def test_every_phase_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 16000, "intermediate_size": 512}
    monkeypatch.setitem(planned.SIZES, "100M", planned.SIZES["100M"] | small)
    written = tmp_path / "planned.json"
    words = "planned --prompts 2 --group 2 --prompt 30 --completion 20 --dtype float32 --reference --checkpoint --json"
    monkeypatch.setattr(sys, "argv", [*words.split(), str(written)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    planned.main()
    assert "MB, planned" in capsys.readouterr().out
    record = json.loads(written.read_text())
    rows = {row["phase"]: row for row in record["measured"]}
    assert rows.keys() == {"rollout", "update", "reference"}
    lasting = sum(sum(model.values()) for model in record["plan"]["models"].values())
    for row in rows.values():
        assert row["planned_bytes"] > lasting
        assert row["bytes"] > lasting / 2  # the system counts pages; tiny models hide in what libraries hold
        assert row["seconds"] > 0
        assert row["planned_seconds"] is None
