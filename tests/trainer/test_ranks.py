"""Several processes that are not alike, or are not there: what `Ranks` and those who use it make of that."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from distributed_runs import Runs, assert_alike, config_of

from fastgrpo.distributed import Ranks
from fastgrpo.errors import RunError
from fastgrpo.rewards import RewardReport, merged

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("probe", ["probe_values", "probe_tensors"])
def test_ranks(probe: str, runs: Runs, tmp_path: Path) -> None:
    codes, outputs = runs.run(tmp_path, 3, probe=probe)
    assert codes == [0, 0, 0], outputs
    assert sorted(p.name for p in tmp_path.glob("passed-*")) == ["passed-0", "passed-1", "passed-2"]


def test_they_end_together(runs: Runs, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    codes, outputs = runs.run(tmp_path, 3, probe="probe_end")
    assert codes == [0, 0, 0], outputs


def test_each_takes_a_gpu(runs: Runs, tmp_path: Path) -> None:
    codes, outputs = runs.run(tmp_path, 3, probe="probe_gpus")
    assert codes == [0, 0, 0], outputs


def test_scripts(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    config_of(tmp_path, tiny_model_dir)
    codes, outputs = runs.run(tmp_path, probe="probe_script")
    assert codes == [0, 0], outputs
    assert "saved at step 2" in outputs[0]


def test_asked_to_stop_while_all_are_stopping(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    config_of(tmp_path, tiny_model_dir)
    codes, outputs = runs.run(tmp_path, probe="probe_asked_later")
    assert codes == [0, 0], outputs
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").exists()


def test_eval(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    config_of(tmp_path, tiny_model_dir, eval_num_generations=2)
    [_, [alone]] = runs.run(tmp_path, 1, probe="probe_eval")
    codes, [first, *others] = runs.run(tmp_path, 3, probe="probe_eval")
    assert codes == [0, 0, 0], (first, others)
    assert json.loads(first) == json.loads(alone)
    assert others == ["", ""]


@pytest.mark.parametrize("missing", [["RANK"], ["MASTER_ADDR", "MASTER_PORT"]])
def test_a_number_of_processes_that_nobody_started(missing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cluster software sets WORLD_SIZE for its own ends."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    for name in missing:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RunError, match=f"WORLD_SIZE=4 without {', '.join(missing)}: start with torchrun"):
        Ranks.join()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Ranks.join().alone
    assert os.environ["WORLD_SIZE"] == "1"


def test_machines_that_share_prompts_and_one_that_does_not(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    """They cut the batch alike, or completions would be trained on twice, or never."""
    runs.train(config_of(tmp_path / "one", tiny_model_dir, share_prompts=False), 1)
    two = config_of(tmp_path / "two", tiny_model_dir)
    codes, outputs = runs.run(two.parent, config=str(two), fault="sharing")
    assert codes == [0, 0], outputs
    assert_alike(tmp_path / "one", tmp_path / "two")


def test_batches_cut_differently(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, tiny_model_dir, eval_dataset=None, eval_steps=0, check_sampling=False)
    codes, outputs = runs.run(tmp_path, config=str(config), fault="selection")
    assert codes == [2, 2], outputs
    assert "have cut the batch into different micro-batches" in outputs[0]


@pytest.mark.parametrize("dataset", ["train_dataset", "eval_dataset"])
def test_rows_in_another_order(dataset: str, runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, tiny_model_dir, **{dataset: "distributed_run:rows_in_another_order"})
    codes, outputs = runs.run(tmp_path, config=str(config))
    assert codes == [2, 2], outputs
    assert f"different prompts, by {dataset} or its order: " in outputs[0]


def test_what_rewards_log_is_averaged_over_samples() -> None:
    reports = [RewardReport({"a": 1.0, "rewards/x/mean": 5.0}, ["f"]), RewardReport({"a": 4.0, "b": 2.0}, ["f", "g"])]
    assert merged(reports) == RewardReport({"a": 2.5, "b": 2.0}, ["f", "g"])
    assert merged([*reports, RewardReport()], [2, 1, 0]) == RewardReport({"a": 2.0, "b": 2.0}, ["f", "g"])
