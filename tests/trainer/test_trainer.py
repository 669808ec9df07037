"""Whole runs with a tiny model: what they write, what they refuse, how they end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import yaml
from runs import ROWS, digits, make_trainer, read_lines
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fastgrpo import ConfigError
from fastgrpo.errors import RunError
from fastgrpo.records import Rollout
from fastgrpo.rewards import AllRewardsFailed
from fastgrpo.state import CheckpointError
from fastgrpo.trainer import NonFiniteGradients


class TestWhatARunWrites:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        trainer = make_trainer(
            tiny_model_dir,
            folder,
            eval_dataset=ROWS[:5],
            eval_steps=2,
            eval_num_generations=2,
            report_to=["tensorboard"],
        )
        state = trainer.train()
        assert state.step == 4
        return folder

    def test_metrics_have_the_names_users_know(self, run: Path) -> None:
        lines = read_lines(run)
        assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
        assert all(next(iter(line)) == "step" for line in lines)
        expected = [
            "loss",
            "policy_loss",
            "entropy",
            "grad_norm",
            "lr",
            "reward",
            "reward_std",
            "frac_reward_zero_std",
            "rewards/digits/mean",
            "rewards/digits/std",
            "rewards/digits/failed",
            "completions/mean_length",
            "completions/min_length",
            "completions/max_length",
            "completions/clipped_ratio",
            "clip_ratio/low_mean",
            "clip_ratio/high_mean",
            "clip_ratio/region_mean",
            "sampling/sampling_logp_difference/mean",
            "sampling/sampling_logp_difference/max",
            "sampling/importance_sampling_ratio/min",
            "sampling/importance_sampling_ratio/mean",
            "sampling/importance_sampling_ratio/max",
            "num_tokens",
            "perf/tokens_per_second",
            "perf/step_time",
            "perf/rollout_time",
            "perf/reward_time",
            "perf/update_time",
            "perf/peak_memory_gb",
            "perf/skipped_token_fraction",
        ]
        for line in lines[1:]:
            assert not [name for name in expected if name not in line]
        assert {"eval/reward", "eval/accuracy", "eval/avg@2", "eval/pass@2"} <= lines[0].keys()
        assert ["eval/reward" in line for line in lines] == [True, False, True, False, True]
        # The loop samples from the model that trains: its log-probs are the trainer's.
        assert all(line["sampling/sampling_logp_difference/max"] < 1e-5 for line in lines[1:])

    def test_the_checkpoint_is_a_model_folder(self, run: Path) -> None:
        folder = run / "run" / "checkpoints" / "step-00000004" / "model"
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.generate(torch.tensor([tokenizer("1+1=").input_ids]), max_new_tokens=2).shape[0] == 1
        assert not list((run / "run" / "checkpoints").rglob("*.bin"))
        assert not list((run / "run" / "checkpoints").rglob("*.pt"))

    def test_completions(self, run: Path) -> None:
        files = sorted((run / "run" / "completions").iterdir())
        assert [f.name for f in files] == [f"step-{s:08d}.parquet" for s in range(1, 5)]
        rows = pyarrow.parquet.read_table(files[0]).to_pylist()
        assert len(rows) == 16
        assert {"prompt", "completion", "reward", "rewards/digits", "advantage"} <= rows[0].keys()

    def test_summary_config_report_tensorboard(self, run: Path) -> None:
        summary = json.loads((run / "run" / "summary.json").read_text())
        assert {"accuracy_before", "accuracy_after", "seconds", "steps", "num_tokens", "model"} <= summary.keys()
        assert Path(summary["model"]).is_dir()
        config = yaml.safe_load((run / "run" / "config.yaml").read_text())
        assert config["max_steps"] == 4
        assert config["reward_funcs"] == ["<digits>"]
        assert "<svg" in (run / "run" / "report.html").read_text()
        assert list((run / "run" / "tensorboard").glob("events*"))

    def test_the_reward_rises_over_a_longer_run(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_trainer(tiny_model_dir, tmp_path, max_steps=25, learning_rate=1e-2, num_generations=8).train()
        rewards = [line["reward"] for line in read_lines(tmp_path)]
        assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2

    def test_running_it_again_changes_nothing(self, run: Path, tiny_model_dir: Path) -> None:
        before = {p: p.read_bytes() for p in (run / "run").rglob("*") if p.is_file() and "tensorboard" not in str(p)}
        trainer = make_trainer(
            tiny_model_dir, run, eval_dataset=ROWS[:5], eval_steps=2, eval_num_generations=2, report_to=["tensorboard"]
        )
        assert trainer.train().step == 4
        after = {p: p.read_bytes() for p in (run / "run").rglob("*") if p.is_file() and "tensorboard" not in str(p)}
        assert before == after


class TestRewards:
    def test_failed_samples_leave_the_step_and_are_counted(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        def sometimes(completions: list[str], **_: Any) -> list[float | None]:
            return [None if i % 4 == 0 else float(i % 2) for i in range(len(completions))]

        make_trainer(tiny_model_dir, tmp_path, sometimes).train()
        for line in read_lines(tmp_path):
            assert line["rewards/sometimes/failed"] == 4
            assert line["reward"] == pytest.approx(2 / 3)

    def test_all_failing_stops_the_run_with_what_happened(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        def broken(**_: Any) -> list[float]:
            raise KeyError("no such thing")

        with pytest.raises(AllRewardsFailed, match=r"broken.*no such thing"):
            make_trainer(tiny_model_dir, tmp_path, broken).train()

    def test_columns_state_and_metrics_reach_the_reward(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        seen: list[Any] = []

        async def reward(
            prompts: Any,
            completions: Any,
            completion_ids: Any,
            answer: Any,
            trainer_state: Any,
            log_metric: Any,
            **columns: Any,
        ) -> list[float]:
            seen.append((prompts[0], answer[0], trainer_state.global_step, sorted(columns)))
            log_metric("mine", 7.0)
            return [float(len(ids)) for ids in completion_ids]

        make_trainer(tiny_model_dir, tmp_path, reward).train()
        assert [s[2] for s in seen] == [0, 1, 2, 3]
        assert all(eval(p.removesuffix("=")) == int(a) for p, a, _, _ in seen)
        assert all(line["mine"] == 7.0 for line in read_lines(tmp_path))

    def test_weights(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        def one(completions: list[str], **_: Any) -> list[float]:
            return [1.0] * len(completions)

        def two(completions: list[str], **_: Any) -> list[float]:
            return [2.0] * len(completions)

        make_trainer(tiny_model_dir, tmp_path, [one, two], reward_weights=[1.0, 0.25]).train()
        assert {line["reward"] for line in read_lines(tmp_path)} == {1.5}
        with pytest.raises(ConfigError, match="reward_weights has 1 entries, reward_funcs 2"):
            make_trainer(tiny_model_dir, tmp_path, [one, two], reward_weights=[1.0])


class TestSampling:
    def test_dynamic_sampling_fills_up_with_groups_that_carry_a_signal(
        self, tiny_model_dir: Path, tmp_path: Path
    ) -> None:
        def rare(completions: list[str], **_: Any) -> list[float]:
            return [float("1" in text) for text in completions]

        fractions = {}
        for dynamic in (False, True):
            folder = tmp_path / str(dynamic)
            make_trainer(tiny_model_dir, folder, rare, dynamic_sampling=dynamic, dynamic_sampling_max_rounds=6).train()
            files = sorted((folder / "run" / "completions").iterdir())
            tables = [pyarrow.parquet.read_table(f).to_pylist() for f in files]
            assert all(len(t) == 16 for t in tables)
            assert all(len({r["group"] for r in t}) == 4 for t in tables)
            fractions[dynamic] = sum(r["advantage"] == 0 for t in tables for r in t)
        assert fractions[True] < fractions[False]
        assert all(1 <= line["dynamic_sampling/rounds"] <= 6 for line in read_lines(tmp_path / "True"))

    def test_dynamic_sampling_is_bounded(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        def constant(completions: list[str], **_: Any) -> list[float]:
            return [0.5] * len(completions)

        make_trainer(tiny_model_dir, tmp_path, constant, dynamic_sampling=True, dynamic_sampling_max_rounds=3).train()
        assert all(line["dynamic_sampling/rounds"] == 3 for line in read_lines(tmp_path))
        assert all(line["grad_norm"] == 0 for line in read_lines(tmp_path))

    def test_long_prompts_are_skipped_and_counted_or_an_error(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        rows = [{"prompt": "y" * (40 if i % 3 == 0 else 4)} for i in range(12)]
        make_trainer(tiny_model_dir, tmp_path, train_dataset=rows, max_prompt_length=20).train()
        assert read_lines(tmp_path)[-1]["data/skipped_prompts"] == 4
        with pytest.raises(ValueError, match="more than max_prompt_length=20"):
            make_trainer(
                tiny_model_dir, tmp_path / "b", train_dataset=rows, max_prompt_length=20, long_prompts="error"
            ).train()
        # The tiny model's context is 512; a limit that nobody set is not called by an option's name.
        for name, options in (("c", {}), ("d", {"max_prompt_length": 100})):
            with pytest.raises(
                ValueError, match="more than the 12 that max_completion_length=500 leaves of the model's"
            ):
                make_trainer(
                    tiny_model_dir,
                    tmp_path / name,
                    train_dataset=rows,
                    max_completion_length=500,
                    long_prompts="error",
                    **options,
                ).train()

    def test_completions_longer_than_the_context(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="leaves no room for a prompt in the model's context of 512"):
            make_trainer(tiny_model_dir, tmp_path, max_completion_length=512).train()


class TestGradients:
    def test_non_finite_gradients_skip_then_stop(
        self, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fastgrpo.optim import Optimizer

        norm = Optimizer.norm
        calls = []

        def poisoned(self: Optimizer) -> Tensor:
            calls.append(self)
            if len(calls) != 2:
                self._masters[0].grad.fill_(math.nan)  # type: ignore[union-attr]
            return norm(self)

        monkeypatch.setattr(Optimizer, "norm", poisoned)
        with pytest.raises(NonFiniteGradients, match=r"3 steps in a row.*step 5"):
            make_trainer(tiny_model_dir, tmp_path, max_steps=9, max_skipped_steps=3).train()
        lines = read_lines(tmp_path)
        assert [line["skipped_steps"] for line in lines] == [1, 1, 2, 3]
        assert lines[0]["grad_norm"] is None
        kept = sorted(p.name for p in (tmp_path / "run" / "failed").iterdir())
        assert kept == ["step-00000005.parquet", "step-00000005.safetensors"]


class TestCallbacks:
    def test_events_and_control(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        events: list[str] = []

        class Recorder(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                events.append("begin")

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
                assert kwargs["model"] is not None
                events.append(f"step {state.global_step}")
                control.should_training_stop = state.global_step == 3
                control.should_evaluate = state.global_step == 1
                return control

            def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
                assert "eval/reward" in metrics
                events.append("evaluate")

            def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
                assert "reward" in logs

            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                events.append("save")

            def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                events.append("end")

        options = {"eval_dataset": ROWS[:3], "eval_on_end": False, "save_steps": 0}
        state = make_trainer(tiny_model_dir, tmp_path, callbacks=[Recorder], **options).train()
        assert state.step == 3
        assert events == ["begin", "step 1", "evaluate", "step 2", "step 3", "save", "end"]


class TestBadInput:
    def test_no_reward_no_data(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="reward_funcs is required"):
            make_trainer(tiny_model_dir, tmp_path, [])
        with pytest.raises(ConfigError, match="train_dataset is required"):
            make_trainer(tiny_model_dir, tmp_path, train_dataset=None).train()
        with pytest.raises(ValueError, match=r"empty|no rows"):
            make_trainer(tiny_model_dir, tmp_path, train_dataset=[]).train()
        with pytest.raises(ValueError, match="prompt"):
            make_trainer(tiny_model_dir, tmp_path, train_dataset=[{"question": "x"}]).train()

    def test_a_row_without_a_prompt(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="row"):
            make_trainer(tiny_model_dir, tmp_path, train_dataset=[{"prompt": None}, {"prompt": "x"}]).train()

    def test_processes_of_several_machines_are_refused(
        self, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        with pytest.raises(RunError, match="several machines"):
            make_trainer(tiny_model_dir, tmp_path)

    def test_errors_of_a_run_are_run_errors(self) -> None:
        assert all(issubclass(e, RunError) for e in (AllRewardsFailed, CheckpointError, NonFiniteGradients))


def test_evaluate_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    metrics = make_trainer(tiny_model_dir, tmp_path, eval_dataset=ROWS[:4], eval_num_generations=3).evaluate()
    assert 0 <= metrics["eval/reward"] <= 1
    assert metrics["eval/pass@3"] >= metrics["eval/avg@3"]
    assert not (tmp_path / "run").exists()


def test_a_loaded_model_and_chat_prompts(helpers: Any, tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(8)]
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        seen.append((prompts[0], completions[0]))
        return digits([c[0]["content"] for c in completions])

    trainer = make_trainer(
        helpers.make_model(),
        tmp_path,
        reward,
        train_dataset=rows,
        processing_class=helpers.make_tokenizer(),
        max_steps=2,
    )
    trainer.train()
    assert seen[0][0][0]["role"] == "user"
    assert seen[0][1][0]["role"] == "assistant"


def test_rollout_record_knows_when_it_failed() -> None:
    from fastgrpo.records import Prompt

    rollout = Rollout(Prompt(0, "x", [1]), 0, [2], torch.zeros(1), True)
    assert rollout.failed
    rollout.reward = 0.0
    assert not rollout.failed


def test_what_a_reward_logs_stands_in_the_table(tiny_model_dir: Path, tmp_path: Path) -> None:
    def reward(completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        log_extra("first", [text[:1] for text in completions])
        return digits(completions)

    make_trainer(tiny_model_dir, tmp_path, reward, max_steps=1).train()
    [file] = (tmp_path / "run" / "completions").iterdir()
    for row in pyarrow.parquet.read_table(file).to_pylist():
        assert row["first"] == row["completion"][:1]
