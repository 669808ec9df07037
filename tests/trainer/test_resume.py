"""A run in parts is the run in one piece, bit for bit; and what may not be continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROWS, assert_same_run, make_trainer, read_lines, timeless
from transformers import TrainerCallback

from fastgrpo import ConfigError
from fastgrpo.rewards import AllRewardsFailed
from fastgrpo.state import CheckpointError


class TestResume:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_iterations": 2, "num_minibatches": 2, "save_steps": 3, "beta": 0.05},
            {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
            {"use_peft": True, "lora_r": 2, "lora_dropout": 0.2, "beta": 0.1},
            {"dtype": "bfloat16", "save_steps": 1},
            {"dynamic_sampling": True, "dynamic_sampling_max_rounds": 2, "lr_scheduler_type": "cosine"},
            {"algorithm": "ppo", "num_iterations": 2, "num_minibatches": 2, "save_steps": 3},
            {"algorithm": "ppo", "dtype": "bfloat16", "sync_ref_model": True, "ref_model_sync_steps": 1},
            {"algorithm": "ppo", "use_peft": True, "lora_r": 2, "lora_dropout": 0.2, "num_generations": 1},
            {"algorithm": "reinforce_pp", "num_minibatches": 2, "save_steps": 3},
            {"algorithm": "ppo", "fused_layers": True, "beta": 0.05, "num_iterations": 2},
        ],
        ids=[
            *("plain", "pending-rollouts", "moving-reference", "lora-dropout", "bf16", "dynamic"),
            *("ppo-pending-rollouts", "ppo-bf16-moving-reference", "ppo-lora-dropout", "reinforce_pp-pending-rollouts"),
            "fused-layers",
        ],
    )
    def test_a_run_in_two_parts_is_bitwise_the_run_in_one(
        self, options: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
    ) -> None:
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        make_trainer(tiny_model_dir, whole, **options).train()

        class StopAt(TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            make_trainer(tiny_model_dir, parts, callbacks=[StopAt()], **options).train()
        torch.manual_seed(999)  # whatever happened in between must not matter
        assert make_trainer(tiny_model_dir, parts, **options).train().step == 4
        if "use_peft" in options:
            assert timeless(read_lines(whole)) == timeless(read_lines(parts))
        else:
            assert_same_run(whole, parts)
        if options.get("algorithm") == "ppo":
            last = Path("run", "checkpoints", "step-00000004", "critic.safetensors")
            assert (whole / last).read_bytes() == (parts / last).read_bytes()

    def test_the_same_seed_gives_the_same_run_and_another_seed_another(
        self, tiny_model_dir: Path, tmp_path: Path
    ) -> None:
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            make_trainer(tiny_model_dir, tmp_path / name, seed=seed).train()
        assert_same_run(tmp_path / "a", tmp_path / "b")
        assert timeless(read_lines(tmp_path / "a")) != timeless(read_lines(tmp_path / "c"))

    def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
        self, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole, damaged = tmp_path / "whole", tmp_path / "damaged"
        make_trainer(tiny_model_dir, whole).train()
        make_trainer(tiny_model_dir, damaged).train()
        victim = damaged / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors"
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(bytes(data))
        assert make_trainer(tiny_model_dir, damaged).train().step == 4
        assert "step-00000004" in caplog.text
        assert "optimizer.safetensors" in caplog.text
        assert_same_run(whole, damaged)

    def test_from_a_given_checkpoint(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_trainer(tiny_model_dir, tmp_path / "a").train()
        start = tmp_path / "a" / "run" / "checkpoints" / "step-00000002"
        make_trainer(tiny_model_dir, tmp_path / "b").train(resume=str(start))
        assert timeless(read_lines(tmp_path / "b")) == timeless(read_lines(tmp_path / "a"))[2:]
        with pytest.raises(CheckpointError, match="does not exist"):
            make_trainer(tiny_model_dir, tmp_path / "c").train(resume=str(tmp_path / "nowhere"))

    def test_more_steps_go_on_and_another_config_is_refused(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_trainer(tiny_model_dir, tmp_path).train()
        assert make_trainer(tiny_model_dir, tmp_path, max_steps=6).train().step == 6
        assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
        with pytest.raises(ConfigError, match=r"holds another run \(learning_rate: 0.001 -> 0.002\)"):
            make_trainer(tiny_model_dir, tmp_path, max_steps=6, learning_rate=2e-3).train()
        with pytest.raises(ConfigError, match="holds a run"):
            make_trainer(tiny_model_dir, tmp_path).train(resume="never")
        assert len(read_lines(tmp_path)) == 6
        make_trainer(tiny_model_dir, tmp_path, max_steps=8, learning_rate=2e-3, allow_config_change=True).train()
        assert len(read_lines(tmp_path)) == 8
        make_trainer(tiny_model_dir, tmp_path, max_steps=2, overwrite_output_dir=True).train(resume="never")
        assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]

    def test_other_data_under_pending_rollouts_is_refused(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        options = {"num_iterations": 2, "save_steps": 1, "max_steps": 1}
        make_trainer(tiny_model_dir, tmp_path, **options).train()
        rows = [{"prompt": "x" + r["prompt"], "answer": r["answer"]} for r in ROWS]
        with pytest.raises(CheckpointError, match="is not what it was"):
            make_trainer(tiny_model_dir, tmp_path, **{**options, "max_steps": 4}, train_dataset=rows).train()

    def test_a_critic_cannot_come_from_nowhere(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_trainer(tiny_model_dir, tmp_path).train()
        with pytest.raises(CheckpointError, match="holds no critic, but algorithm=ppo trains one"):
            make_trainer(tiny_model_dir, tmp_path, algorithm="ppo", allow_config_change=True, max_steps=6).train()

    @pytest.mark.parametrize(
        "options",
        [{"beta": 0.1}, {"use_peft": True, "lora_r": 2, "beta": 0.1}, {"algorithm": "ppo"}],
        ids=["full", "lora", "ppo"],
    )
    def test_one_trainer_trained_twice_is_the_run_in_one(
        self, options: dict[str, Any], helpers: Any, tmp_path: Path
    ) -> None:
        """With a model that was handed over loaded: the second call keeps it, its adapters and its reference."""
        given = {"processing_class": helpers.make_tokenizer(), **options}
        make_trainer(helpers.make_model(), tmp_path / "whole", **given).train()
        trainer = make_trainer(helpers.make_model(), tmp_path / "parts", **given)
        trainer.config.max_steps = 2
        trainer.train()
        trainer.config.max_steps = 4
        trainer.train()
        assert timeless(read_lines(tmp_path / "whole")) == timeless(read_lines(tmp_path / "parts"))

    def test_killed_between_the_last_checkpoint_and_the_summary(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_trainer(tiny_model_dir, tmp_path).train()
        for name in ("summary.json", "report.html"):
            (tmp_path / "run" / name).unlink()
        assert make_trainer(tiny_model_dir, tmp_path).train().step == 4
        assert (tmp_path / "run" / "summary.json").exists()
        assert (tmp_path / "run" / "report.html").exists()

    def test_rewards_that_fail_late_lose_nothing(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        """The step before is saved, and with the reward mended the run is the one that never failed."""
        broken = [True]

        def digits(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
            if trainer_state.global_step == 3 and broken[0]:
                raise ValueError("late")
            return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]

        with pytest.raises(AllRewardsFailed):
            make_trainer(tiny_model_dir, tmp_path / "a", digits).train()
        assert (tmp_path / "a" / "run" / "checkpoints" / "step-00000003").is_dir()
        broken[0] = False
        make_trainer(tiny_model_dir, tmp_path / "a", digits).train()
        make_trainer(tiny_model_dir, tmp_path / "b", digits).train()
        assert_same_run(tmp_path / "a", tmp_path / "b")
