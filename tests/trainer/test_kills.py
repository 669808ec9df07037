"""Runs that are really killed: by SIGKILL at many moments, by SIGTERM, by Ctrl-C; and a disk that fills up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_run, read_lines, timeless, write_config

_SCRIPT = Path(__file__).with_name("killed_run.py")
_PATH = os.pathsep.join(filter(None, [str(_SCRIPT.parent), os.environ.get("PYTHONPATH")]))
_ENVIRONMENT = {**os.environ, "PYTHONPATH": _PATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

pytestmark = pytest.mark.timeout(600)


class Runs:
    """Starts runs in processes of their own, one at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(_SCRIPT)], env=_ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, moment: str, at: int, config: Path) -> int:
        """Process id of a run that will die at the `at`th such moment."""
        assert self._server.stdin is not None
        self.log = config.with_name("output.txt")
        self._server.stdin.write(json.dumps([moment, at, str(config), str(self.log)]) + "\n")
        self._server.stdin.flush()
        return self._read()

    def end(self, expected: int) -> str:
        """Wait for the run's end; its output."""
        code = self._read()
        assert code == expected, self.log.read_text()
        return self.log.read_text()

    def run(self, moment: str, at: int, config: Path, expected: int) -> str:
        self.start(moment, at, config)
        return self.end(expected)

    def _read(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    started = Runs()
    yield started
    started.close()


def _config(folder: Path, model: Path, **options: Any) -> Path:
    steps = {"max_steps": 8, "num_prompts_per_step": 3, "num_iterations": 2, "beta": 0.05, "eval_max_prompts": 4}
    return write_config(folder, model, reward_funcs=["killed_run:reward"], **{**steps, **options})


def _lines(folder: Path) -> list[dict[str, Any]]:
    return timeless(read_lines(folder))


def _assert_same_run(a: Path, b: Path) -> None:
    assert_same_run(a, b, step=8)


def _wait_for(file: Path, text: str) -> None:
    deadline = time.monotonic() + 200
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(runs: Runs, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    runs.run("never", 0, _config(folder, tiny_model_dir), 0)
    assert [line["step"] for line in _lines(folder)] == list(range(9))
    return folder


def test_killed_at_many_moments_and_resumed_it_is_bitwise_the_same_run(
    runs: Runs, whole: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path, tiny_model_dir)
    moments = [
        ("reward", 2),  # scoring the first rollouts, before there is any checkpoint (the first call is the evaluation)
        ("save-half", 1),  # the first checkpoint, half written
        ("save-published", 1),  # named, the old ones not yet gone
        ("optimizer", 2),  # between two checkpoints
        ("save-unpublished", 1),
        ("line", 3),  # a step's line is written, its checkpoint is not; the batch has a step to go
        ("save-written", 1),
        ("save-begins", 1),
    ]
    for moment, at in moments:
        runs.run(moment, at, config, -signal.SIGKILL)
    runs.run("never", 0, config, 0)
    _assert_same_run(whole, tmp_path)


def test_killed_while_rollouts_are_pending(runs: Runs, whole: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = _config(tmp_path, tiny_model_dir, save_steps=1, save_total_limit=8)
    for moment, at in [("save-published", 1), ("optimizer", 2), ("save-half", 4)]:
        runs.run(moment, at, config, -signal.SIGKILL)
    kept = tmp_path / "run" / "checkpoints"
    assert any((folder / "rollouts.safetensors").exists() for folder in kept.iterdir())
    runs.run("never", 0, config, 0)
    _assert_same_run(whole, tmp_path)


def test_ppo_killed_and_resumed(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Between a step of the policy and that of the critic, and while the critic is being saved."""
    runs.run("never", 0, _config(tmp_path / "whole", tiny_model_dir, algorithm="ppo"), 0)
    config = _config(tmp_path / "killed", tiny_model_dir, algorithm="ppo", save_steps=1)
    for moment, at in [("optimizer", 5), ("save-half", 3)]:
        runs.run(moment, at, config, -signal.SIGKILL)
    runs.run("never", 0, config, 0)
    _assert_same_run(tmp_path / "whole", tmp_path / "killed")
    last = Path("run", "checkpoints", "step-00000008", "critic.safetensors")
    assert (tmp_path / "whole" / last).read_bytes() == (tmp_path / "killed" / last).read_bytes()


def test_killed_from_outside(whole: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The plain command, started afresh each time."""
    config = _config(tmp_path, tiny_model_dir)
    command = [sys.executable, "-m", "fastgrpo", "train", str(config)]
    process = subprocess.Popen(command, env=_ENVIRONMENT, stdout=subprocess.DEVNULL)
    _wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 5,')
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, env=_ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    _assert_same_run(whole, tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_goes_on_as_if_nothing_had_been(
    signum: signal.Signals, runs: Runs, whole: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path, tiny_model_dir)
    pid = runs.start("never", 0, config)
    _wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 1,')
    os.kill(pid, signum)
    output = runs.end(128 + signum)
    done = _lines(tmp_path)[-1]["step"]
    assert f"stopped by {signum.name}: saved at step {done}" in output
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:08d}" / "manifest.json").is_file()
    assert done < 8
    runs.run("never", 0, config, 0)
    _assert_same_run(whole, tmp_path)


def test_a_second_ctrl_c_ends_at_once(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The first waits for the step to end, which takes for ever here; the second does not wait."""
    config = _config(tmp_path, tiny_model_dir)
    pid = runs.start("endless-step", 0, config)
    _wait_for(runs.log, "asleep")
    os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    os.kill(pid, 0)  # still there
    os.kill(pid, signal.SIGINT)
    runs.end(-signal.SIGINT)


def test_a_full_disk_is_said_and_the_last_checkpoint_is_intact(
    runs: Runs, tiny_model_dir: Path, tmp_path: Path
) -> None:
    runs.run("never", 0, _config(tmp_path, tiny_model_dir, max_steps=2), 0)
    config = _config(tmp_path, tiny_model_dir, max_steps=4)
    output = runs.run("full-disk", 0, config, 2)
    [message] = [line for line in output.splitlines() if line.startswith("fastgrpo: error:")]
    assert "no space left on the disk; the last checkpoint, step-00000002, is intact" in message
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    runs.run("never", 0, config, 0)
    assert [line["step"] for line in _lines(tmp_path)] == list(range(5))
