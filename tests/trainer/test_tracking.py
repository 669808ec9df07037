"""Files and trackers of a run: what is written survives a crash and reads back bit for bit."""

from __future__ import annotations

import io
import json
import math
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.completions import write_completions
from fastgrpo.records import Prompt, Rollout
from fastgrpo.tracking import MetricsWriter, Tracker, write_summary


def rollout(
    text: str, reward: float, content: str | list = "2+2=", rewards: dict | None = None, group: int = 0
) -> Rollout:
    tokens = list(range(len(text)))
    return Rollout(
        prompt=Prompt(index=0, content=content, token_ids=[1, 2]),
        group=group,
        token_ids=tokens,
        sampling_logprob=torch.zeros(len(tokens)),
        finished=True,
        text=text,
        rewards=rewards if rewards is not None else {"exact": reward},
        reward=reward,
        advantage=0.5,
    )


def strict(line: str) -> dict:
    """json.loads that refuses NaN and Infinity."""

    def refuse(token: str) -> float:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(line, parse_constant=refuse)


# ------------------------------------------------------------------------------------------------------ metrics.jsonl


def test_a_line_per_step_with_the_step_first(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "new" / "metrics.jsonl")
    writer.write(1, {"reward": 0.5, "loss": math.nan, "kl": math.inf, "count": 3, "step": 1})
    writer.write(2, {"reward": np.float32(0.1), "loss": torch.tensor(0.25), "kl": None, "lr": np.float64(1e-6)})
    writer.sync()
    writer.close()
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 1, "count": 3, "kl": null, "loss": null, "reward": 0.5}'
    assert strict(lines[1]) == {"step": 2, "kl": None, "loss": 0.25, "lr": 1e-6, "reward": float(np.float32(0.1))}


def test_a_line_is_visible_before_sync_and_close(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"reward": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    writer.close()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_read_back_to_the_same_bits(value: float) -> None:
    # A plain file object in place of the path keeps hypothesis fast.
    writer = MetricsWriter(os.devnull)
    writer.close()
    writer._file = io.StringIO()
    writer.write(1, {"x": value})
    assert struct.pack("d", strict(writer._file.getvalue())["x"]) == struct.pack("d", value)


def test_what_is_no_scalar_is_refused_and_leaves_no_torn_line(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(TypeError):
        writer.write(1, {"a": 1.0, "reward": object()})
    writer.write(2, {"a": 1.0})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2, "a": 1.0}\n'


def test_truncate_after_cuts_what_is_torn_or_newer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "reward": 0.1}\n{"step": 2, "reward": 0.30000000000000004}\n'
    bad = b'{"step": 2, "rew\n\x00\x00\x00\n[1]\n{"reward": 1.0}\n\xff\xfe\n{"step": 3, "reward": 0.5}\n{"step": 2}'
    path.write_bytes(whole + bad)
    assert MetricsWriter.truncate_after(path, 2) == 7
    assert path.read_bytes() == whole
    assert "metrics.jsonl: 5 lines could not be read and left out" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    writer = MetricsWriter(path)
    writer.write(3, {"reward": 1.0})
    writer.close()
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_what_a_kill_leaves_is_cut_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert MetricsWriter.truncate_after(tmp_path / "metrics.jsonl", 1) == 2
    assert not caplog.records


def test_truncate_after_a_missing_file_and_step_zero(tmp_path: Path) -> None:
    assert MetricsWriter.truncate_after(tmp_path / "metrics.jsonl", 5) == 0
    assert not (tmp_path / "metrics.jsonl").exists()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert MetricsWriter.truncate_after(tmp_path / "metrics.jsonl", 0) == 1
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_crash_while_truncating_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def crash(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space"):
        MetricsWriter.truncate_after(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_killed_process_loses_no_line(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from fastgrpo.tracking import MetricsWriter; w = MetricsWriter(sys.argv[1]);"
        "[w.write(s, {'reward': s / 7}) for s in range(1, 101)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.jsonl")], check=False)
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert [strict(line)["reward"] for line in lines] == [s / 7 for s in range(1, 101)]


def test_summary_is_strict_json_with_nested_values(tmp_path: Path) -> None:
    path = tmp_path / "run" / "summary.json"
    write_summary(path, {"accuracy_after": np.float64(0.92), "bad": math.nan, "deep": {"list": [1, math.inf, "x"]}})
    assert strict(path.read_text()) == {"accuracy_after": 0.92, "bad": None, "deep": {"list": [1, None, "x"]}}
    write_summary(path, {"steps": 80})
    assert strict(path.read_text()) == {"steps": 80}
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


# -------------------------------------------------------------------------------------------------------- completions


def test_completions_columns_types_and_nulls(tmp_path: Path) -> None:
    import pyarrow.parquet

    chat = [{"role": "user", "content": "Wie viel ist 2+2? é"}]
    rows = [
        rollout("4", 1.0, rewards={"exact": 1.0, "format": math.nan}),
        rollout("</script>\x00\u202e", math.nan, content=chat, rewards={"exact": math.nan}, group=1),
        rollout("", 0.0, group=1),
    ]
    path = write_completions(tmp_path / "completions", 123, rows)
    assert path == tmp_path / "completions" / "step-00000123.parquet"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    table = pyarrow.parquet.read_table(path)
    assert {name: str(kind) for name, kind in zip(table.schema.names, table.schema.types, strict=True)} == {
        "step": "int64",
        "group": "int64",
        "prompt": "string",
        "completion": "string",
        "reward": "double",
        "rewards/exact": "double",
        "rewards/format": "double",
        "advantage": "double",
        "num_tokens": "int64",
        "finished": "bool",
    }
    read = table.to_pydict()
    assert read["reward"] == [1.0, None, 0.0]
    assert read["rewards/format"] == [None, None, None]
    assert read["completion"] == ["4", "</script>\x00\u202e", ""]
    assert json.loads(read["prompt"][1]) == chat
    assert read["num_tokens"] == [1, 11, 0]


def test_completions_with_half_a_surrogate_pair_and_without_rows(tmp_path: Path) -> None:
    import pyarrow.parquet

    path = write_completions(tmp_path, 1, [rollout("a\ud83d", 1.0)])
    assert pyarrow.parquet.read_table(path)["completion"].to_pylist() == ["a?"]
    empty = pyarrow.parquet.read_table(write_completions(tmp_path, 2, []))
    assert empty.num_rows == 0
    assert str(empty.schema.field("reward").type) == "double"


# ----------------------------------------------------------------------------------------------------------- trackers


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    tracker = Tracker(["tensorboard"], tmp_path, {"seed": 1, "odd": math.nan}, "first")
    for step in range(1, 6):
        tracker.log(step, {"step": step, "reward": step / 10, "kl": None, "loss": math.nan, "note": "text"})
    tracker.close()
    tracker.close()
    resumed = Tracker(["tensorboard"], tmp_path, {"seed": 1}, "first", resume_step=3)
    resumed.log(4, {"reward": 9.0})
    resumed.close()
    found = scalars(tmp_path / "tensorboard", "reward")
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert found[-1][1] == 9.0
    assert scalars(tmp_path / "tensorboard", "kl") == scalars(tmp_path / "tensorboard", "loss") == []


def test_no_tracker_leaves_nothing(tmp_path: Path) -> None:
    for names in ([], ["none"]):
        tracker = Tracker(names, tmp_path)
        tracker.log(1, {"reward": 1.0})
        tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_missing_trackers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown tracker 'mlflow'; known: tensorboard, wandb"):
        Tracker(["mlflow"], tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"fastgrpo\[wandb\]"):
        Tracker(["wandb"], tmp_path)


def test_a_tracker_that_fails_closes_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    closed = []
    monkeypatch.setattr(SummaryWriter, "close", lambda self: closed.append(self))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError):
        Tracker(["tensorboard", "wandb"], tmp_path)
    assert len(closed) == 1


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        def __init__(self, **options: object) -> None:
            self.options, self.logged, self.finished = options, [], 0
            self.id = options["id"] or f"run-{len(runs)}"
            runs.append(self)

        def log(self, metrics: dict, step: int) -> None:
            self.logged.append((step, metrics))

        def finish(self) -> None:
            self.finished += 1

    runs: list[Run] = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: Run(**options)))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for resume_step in (0, 3, 0):
        tracker = Tracker(["wandb"], tmp_path / "run", {"seed": 1}, "name", resume_step=resume_step)
        tracker.log(resume_step + 1, {"reward": 0.5, "kl": None})
        tracker.close()
    assert [run.id for run in runs] == ["run-0", "run-0", "run-2"]
    assert runs[1].logged == [(4, {"reward": 0.5})]
    assert [run.finished for run in runs] == [1, 1, 1]
    assert {key: runs[0].options[key] for key in ("project", "name", "config")} == {
        "project": "fastgrpo",
        "name": "name",
        "config": {"seed": 1},
    }
