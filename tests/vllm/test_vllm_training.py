"""Whole runs whose samples come from vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml
from runs import ROWS, assert_same_run, make_trainer, read_lines
from transformers import TrainerCallback

from fastgrpo.signals import StopRequested

from .cases import make_policy

pytestmark = pytest.mark.vllm


_VLLM: dict[str, Any] = {"rollout_engine": "vllm", "max_prompt_length": 40}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model for vLLM's attention."""
    make_policy().save(tmp_path / "model")
    return tmp_path / "model"


def test_a_resumed_run_is_the_run_that_was_never_stopped(model_folder: Path, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise StopRequested(15)

    make_trainer(model_folder, tmp_path / "whole", **_VLLM).train()
    with pytest.raises(StopRequested):
        make_trainer(model_folder, tmp_path / "halves", callbacks=[Stop()], **_VLLM).train()
    assert len(read_lines(tmp_path / "halves")) == 2
    make_trainer(model_folder, tmp_path / "halves", **_VLLM).train()
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_the_trainer_agrees_with_the_samples(model_folder: Path, tmp_path: Path) -> None:
    """Each step's samples have the log-probs that the trainer computes with the weights of that step."""
    make_trainer(model_folder, tmp_path, learning_rate=1e-2, **_VLLM).train()
    lines = read_lines(tmp_path)
    assert len(lines) == 4
    assert all(line["sampling/sampling_logp_difference/max"] <= 1e-5 for line in lines)
    assert all(line["grad_norm"] > 0 for line in lines)


def test_batches_sampled_ahead_by_a_server_are_one_step_old(model_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rollout_engine": "vllm_server", "vllm_server_devices": [""], "max_prompt_length": 40}
    options |= {"async_rollouts": True, "sampling_correction": "token_truncate", "overlap_rewards": True}
    make_trainer(model_folder, tmp_path, learning_rate=1e-2, **options).train()
    lines = read_lines(tmp_path)
    assert [line["sampling/staleness"] for line in lines] == [0.0, 1.0, 1.0, 1.0]
    assert lines[0]["sampling/sampling_logp_difference/max"] <= 1e-5
    assert lines[-1]["sampling/sampling_logp_difference/max"] > 1e-3  # the policy has moved on
    assert all(line["grad_norm"] > 0 for line in lines)
    assert (tmp_path / "run" / "vllm").is_dir()


def test_two_processes_and_a_server(model_folder: Path, tmp_path: Path) -> None:
    """The first process has the server; both train on its samples."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = {
        "model": str(model_folder),
        "train_dataset": str(rows),
        "reward_funcs": ["runs:digits"],
        "output_dir": str(tmp_path / "run"),
        "max_steps": 3,
        "num_prompts_per_step": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_prompt_length": 40,
        "learning_rate": 1e-2,
        "report_to": [],
        "rollout_engine": "vllm_server",
        "vllm_server_devices": [""],
        "num_threads": 1,
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(options))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastgrpo", "train", str(config)]
    path = os.pathsep.join(filter(None, [str(Path(runs.__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = read_lines(tmp_path)
    assert all(line["sampling/sampling_logp_difference/max"] <= 1e-5 for line in lines)
    assert all(line["grad_norm"] > 0 for line in lines)
    assert [p.name for p in (tmp_path / "run" / "vllm").iterdir()] != []
