"""Several processes as one run: on two CPU processes it is the run of one, and all that can happen to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import ENVIRONMENT, Runs, assert_alike, assert_same_run, config_of, lines

from fastgrpo import packing
from fastgrpo.distributed import Ranks
from fastgrpo.records import Prompt, Rollout

pytestmark = pytest.mark.timeout(600)


_VARIANTS: dict[str, dict[str, Any]] = {
    "off-policy, a reference": {
        "num_minibatches": 2,
        "num_iterations": 2,
        "beta": 0.05,
        "max_tokens_per_microbatch": 40,
    },
    "ppo": {"algorithm": "ppo", "num_minibatches": 2, "critic_learning_rate": 1e-3},
    "entropies": {"top_entropy_quantile": 0.5, "loss_type": "grpo", "entropy_coef": 0.01},
    "drawn again": {"dynamic_sampling": True, "overlap_rewards": True, "scale_rewards": "batch"},
    "adapters": {"use_peft": True, "lora_dropout": 0.0, "beta": 0.05},
    "moving": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "share_prompts": False},
}


@pytest.mark.parametrize("options", _VARIANTS.values(), ids=_VARIANTS.keys())
def test_two_processes_are_one_run(options: dict[str, Any], runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    runs.train(config_of(tmp_path / "one", tiny_model_dir, **options), 1)
    outputs = runs.train(config_of(tmp_path / "two", tiny_model_dir, **options), 2)
    assert_alike(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "weights-0").read_text() == (tmp_path / "two" / "weights-1").read_text()
    assert "step" not in outputs[1]  # one of them speaks
    assert "step 6/6" in outputs[0]


@pytest.fixture(scope="module")
def whole(runs: Runs, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that nobody disturbs; rewards draw from each process's global generators."""
    folder = tmp_path_factory.mktemp("whole")
    runs.train(_noisy(folder, tiny_model_dir))
    return folder


def _noisy(folder: Path, model: Path) -> Path:
    return config_of(folder, model, reward_funcs=["killed_run:reward"], num_iterations=2, beta=0.05, dtype="bfloat16")


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_and_resumed_it_is_bitwise_the_same_run(
    rank: int, runs: Runs, whole: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = _noisy(tmp_path, tiny_model_dir)
    for moment, at in [("reward", 3), ("optimizer", 3), ("save-half", 1)]:
        codes, _ = runs.run(tmp_path, config=str(config), moment=moment, at=at, rank=rank)
        assert codes[rank] == -signal.SIGKILL
        assert codes[1 - rank] not in (0, -signal.SIGKILL)
    runs.train(config)
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize("asked", [[0, 1], [0], [1]])
def test_asked_to_stop_they_all_save_and_go_on_as_if_nothing_had_been(
    asked: list[int], runs: Runs, whole: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = _noisy(tmp_path, tiny_model_dir)
    pids = runs.start(tmp_path, config=str(config))
    deadline = time.monotonic() + 200
    while '"step": 1,' not in (f.read_text() if (f := tmp_path / "run" / "metrics.jsonl").exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for rank in asked:
        os.kill(pids[rank], signal.SIGTERM)
    codes, outputs = runs.end()
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    done = lines(tmp_path)[-1]["step"]
    assert f"stopped by SIGTERM: saved at step {done}" in outputs[0]
    assert done < 6
    runs.train(config)
    assert_same_run(whole, tmp_path)


def test_a_run_goes_on_with_another_number_of_processes(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    runs.train(config_of(tmp_path / "whole", tiny_model_dir, eval_on_end=False), 1)
    for steps, processes in [(2, 2), (4, 3), (6, 1)]:
        runs.train(config_of(tmp_path / "changed", tiny_model_dir, eval_on_end=False, max_steps=steps), processes)
    assert_alike(tmp_path / "whole", tmp_path / "changed")


def test_what_one_callback_wishes_all_do(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    codes, outputs = runs.run(tmp_path, config=str(config_of(tmp_path, tiny_model_dir)), probe="probe_callback")
    assert codes == [0, 0], outputs
    assert lines(tmp_path)[-1]["step"] == 3
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json").exists()


_SERVERS: dict[str, Any] = {"rollout_engine": "vllm_server", "vllm_server_urls": ["http://nowhere"]}


def test_servers_are_the_first_processs(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    """It asks for all samples; the update is everybody's."""
    runs.train(config_of(tmp_path / "one", tiny_model_dir, num_minibatches=2), 1)
    config = config_of(tmp_path / "two", tiny_model_dir, num_minibatches=2, **_SERVERS)
    codes, outputs = runs.run(tmp_path / "two", config=str(config), server=True)
    assert codes == [0, 0], outputs
    assert_alike(tmp_path / "one", tmp_path / "two")


def test_rollouts_ahead(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {**_SERVERS, "async_rollouts": True, "sampling_correction": "token_truncate"}
    codes, outputs = runs.run(tmp_path, config=str(config_of(tmp_path, tiny_model_dir, **options)), server=True)
    assert codes == [0, 0], outputs
    assert [line["step"] for line in lines(tmp_path)] == list(range(7))


def test_more_processes_than_prompts(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    """One has nothing to sample, and its share of the work all the same."""
    options = {"num_prompts_per_step": 1, "num_generations": 8, "eval_max_prompts": 1}
    runs.train(config_of(tmp_path / "one", tiny_model_dir, **options), 1)
    runs.train(config_of(tmp_path / "two", tiny_model_dir, **options), 2)
    assert_alike(tmp_path / "one", tmp_path / "two")


class TestFaults:
    """What goes wrong in one process ends all of them, or none, and is said."""

    def test_rewards_that_fail_in_one_process(self, runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
        config = config_of(
            tmp_path,
            tiny_model_dir,
            reward_funcs=["distributed_run:digits_or_nothing"],
            eval_dataset=None,
            eval_steps=0,
        )
        runs.train(config)
        assert {line["rewards/digits_or_nothing/failed"] for line in lines(tmp_path)} == {12.0}  # 3 of 5 prompts

    def test_all_rewards_fail(self, runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
        config = config_of(
            tmp_path,
            tiny_model_dir,
            reward_funcs=["distributed_run:nothing"],
            eval_dataset=None,
            eval_steps=0,
            save_steps=0,
        )
        codes, outputs = runs.run(tmp_path, config=str(config))
        assert codes == [2, 2]
        assert "none of this step's 20 samples has a reward" in outputs[0]
        assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").exists()  # kept all the same

    def test_an_engine_that_fails(self, runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
        codes, outputs = runs.run(tmp_path, config=str(config_of(tmp_path, tiny_model_dir)), fault="engine")
        assert codes == [2, 1]
        assert "fastgrpo: error: process 1 failed: ZeroDivisionError" in outputs[0]
        assert "ZeroDivisionError" in outputs[1]

    def test_one_of_them_speaks_where_all_fail(self, runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
        codes, outputs = runs.run(tmp_path, config=str(config_of(tmp_path, tmp_path / "no-model")))
        assert codes == [2, 2]
        assert "no-model': no such folder" in outputs[0]
        assert "error" not in outputs[1]

    def test_weights_that_change_in_one_process_are_set_right_by_the_next_step(
        self, runs: Runs, tiny_model_dir: Path, tmp_path: Path
    ) -> None:
        config = config_of(tmp_path, tiny_model_dir, check_sampling=False)
        codes, outputs = runs.run(tmp_path, config=str(config), fault="drift")
        assert codes == [0, 0], outputs
        assert (tmp_path / "weights-0").read_text() == (tmp_path / "weights-1").read_text()

    def test_data_that_differ(self, runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
        config = config_of(tmp_path, tiny_model_dir, train_dataset="distributed_run:rows_by_rank")
        codes, outputs = runs.run(tmp_path, config=str(config))
        assert codes == [2, 2]
        assert "different numbers of rows in train_dataset: 3, 4" in outputs[0]

    def test_a_folder_in_use(self, runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
        config = config_of(tmp_path, tiny_model_dir)
        (tmp_path / "run").write_text("a file")
        codes, outputs = runs.run(tmp_path, config=str(config))
        assert codes == [2, 2]
        assert "is a file" in outputs[0]

    def test_one_device(self, runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
        codes, outputs = runs.run(tmp_path, config=str(config_of(tmp_path, tiny_model_dir, device="cpu:0")))
        assert codes == [2, 2]
        assert "device='cpu:0' is one, and there are 2 processes" in outputs[0]
        assert outputs[1] == ""

    def test_engines_of_one_process(self, runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
        codes, outputs = runs.run(tmp_path, config=str(config_of(tmp_path, tiny_model_dir, rollout_engine="vllm")))
        assert codes == [2, 2]
        assert "rollout_engine='vllm' is for runs of one process" in outputs[0]


def test_alone_nothing_is_divided() -> None:
    ranks = Ranks.join()
    assert ranks.alone
    assert ranks.first
    assert ranks.share([1, 2]) == (0, [1, 2])
    assert ranks.gather("x", {}) == [{}]
    gradient = torch.ones(2)
    ranks.add_up([gradient])
    assert gradient.tolist() == [1, 1]
    assert not torch.distributed.is_initialized()


def test_torchrun(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The command of the README."""
    config = config_of(tmp_path, tiny_model_dir, max_steps=2)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastgrpo", "train", str(config)]
    done = subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2") == 1
    assert (tmp_path / "run" / "report.html").exists()


class TestSharingTheWork:
    """Micro-batches are dealt out to the processes: all of them, once, and as evenly as they go."""

    def _rollouts(self, prompts: list[int], n: int, tokens: int) -> list[Rollout]:
        return [
            Rollout(Prompt(p, "", [p + 1] * length), p, [1] * (tokens + i), torch.zeros(tokens + i), True)
            for p, length in enumerate(prompts)
            for i in range(n)
        ]

    def _parts(self, rollouts: list[Rollout], ranks: int, max_tokens: int) -> list[list[Any]]:
        options: dict[str, Any] = {"max_tokens": max_tokens, "share": True}
        return [list(packing.pack_lazily(rollouts, **options, part=(r, ranks))) for r in range(ranks)]

    @pytest.mark.parametrize("ranks", [1, 2, 3, 8])
    @pytest.mark.parametrize("max_tokens", [10, 64, 10_000])
    def test_each_completion_is_somewhere_once(self, ranks: int, max_tokens: int) -> None:
        rollouts = self._rollouts([5, 9, 3, 30, 2], 6, 4)
        parts = self._parts(rollouts, ranks, max_tokens)
        assert sorted(m for part in parts for packed in part for m in packed.members) == list(range(30))

    def test_the_work_is_even(self) -> None:
        parts = self._parts(self._rollouts([20] * 8, 8, 10), 4, 100_000)
        work = [sum(packed.work for packed in part) for part in parts]
        assert max(work) <= 1.01 * min(work)
        assert [len(part) for part in parts] == [1] * 4

    def test_one_prompt_is_parted_where_others_would_be_idle(self) -> None:
        parts = self._parts(self._rollouts([10], 16, 50), 4, 100_000)
        assert [sum(len(packed.members) for packed in part) for part in parts] == [4] * 4

    def test_a_prompt_that_costs_more_than_it_saves_is_not_repeated(self) -> None:
        [first, second] = self._parts(self._rollouts([5000, 5000], 4, 5), 2, 100_000)
        assert [len(first[0].members), len(second[0].members)] == [4, 4]
