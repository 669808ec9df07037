"""A run that goes on otherwise than it was: other options, another algorithm, adapters for a model, a bad place."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import ROWS, make_trainer, read_lines

from fastgrpo import ConfigError
from fastgrpo.errors import RunError
from fastgrpo.state import CheckpointError

_LORA: dict[str, Any] = {"use_peft": True, "lora_r": 2}


def _checkpoint(folder: Path, step: int = 2) -> Path:
    return folder / "run" / "checkpoints" / f"step-{step:08d}"


class TestOtherOptions:
    def test_from_a_checkpoint_of_another_folder(
        self, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The same rule as in the run's own folder: refused, unless it is said to be meant; then it is told."""
        make_trainer(tiny_model_dir, tmp_path / "a").train()
        start = str(_checkpoint(tmp_path / "a"))
        with pytest.raises(ConfigError, match=r"of a run with other options \(learning_rate: 0.001 -> 0.002\)"):
            make_trainer(tiny_model_dir, tmp_path / "b", learning_rate=2e-3).train(resume=start)
        assert not (tmp_path / "b").exists()
        other = {"learning_rate": 2e-3, "allow_config_change": True, "disable_progress": False}
        make_trainer(tiny_model_dir, tmp_path / "b", **other).train(resume=start)
        assert f"going on from {start} with other options: learning_rate: 0.001 -> 0.002" in capsys.readouterr().out
        assert [line["step"] for line in read_lines(tmp_path / "b")] == [3, 4]

    def test_a_checkpoint_that_stands_alone_tells_nothing(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_trainer(tiny_model_dir, tmp_path / "a").train()
        alone = shutil.copytree(_checkpoint(tmp_path / "a"), tmp_path / "step-00000002")
        assert make_trainer(tiny_model_dir, tmp_path / "b", learning_rate=2e-3).train(resume=str(alone)).step == 4

    def test_a_critic_is_not_dropped_in_silence(
        self, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        make_trainer(tiny_model_dir, tmp_path / "a", algorithm="ppo").train()
        start = str(_checkpoint(tmp_path / "a"))
        with pytest.raises(ConfigError, match=r"other options \(algorithm: 'ppo' -> 'grpo'; "):
            make_trainer(tiny_model_dir, tmp_path / "b").train(resume=start)
        make_trainer(tiny_model_dir, tmp_path / "b", allow_config_change=True).train(resume=start)
        assert "holds a critic; algorithm=grpo has none: it is dropped" in caplog.text

    def test_nor_a_reference_that_moved(
        self, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        moving = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}
        make_trainer(tiny_model_dir, tmp_path, **moving).train()
        make_trainer(tiny_model_dir, tmp_path, beta=0.1, max_steps=5, allow_config_change=True).train()
        assert "holds a reference model that has moved; without sync_ref_model it is dropped" in caplog.text

    @pytest.mark.parametrize(
        ("before", "after", "message"),
        [
            ({}, _LORA, "holds a whole model, this run trains adapters"),
            (_LORA, {}, "holds adapters .use_peft., this run trains the whole model"),
            (_LORA, {**_LORA, "lora_r": 3}, r"holds adapters of other shapes than this run's: .* is \[2, .*there"),
        ],
        ids=["adapters from none", "none from adapters", "another rank"],
    )
    def test_adapters_and_models_are_told_apart(
        self, before: dict[str, Any], after: dict[str, Any], message: str, tiny_model_dir: Path, tmp_path: Path
    ) -> None:
        make_trainer(tiny_model_dir, tmp_path, **before).train()
        with pytest.raises((ValueError, CheckpointError), match=message):
            make_trainer(tiny_model_dir, tmp_path, **after, max_steps=6, allow_config_change=True).train()

    @pytest.mark.parametrize("resume", [True, None, 3])
    def test_resume_is_a_word_or_a_path(self, resume: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=f"resume={resume} must be auto, never or a checkpoint's path"):
            make_trainer(tiny_model_dir, tmp_path).train(resume=resume)
        with pytest.raises(CheckpointError, match="newest does not exist: resume is auto, never or"):
            make_trainer(tiny_model_dir, tmp_path).train(resume="newest")


class TestAdaptersAsAModel:
    def test_what_a_run_leaves_is_evaluated_and_trained_on(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        """A LoRA run's `model` folder holds adapters alone; they stand for the model they were trained on, changed."""
        held_out = {"eval_dataset": ROWS[:4], "eval_num_generations": 4}
        trained = make_trainer(tiny_model_dir, tmp_path / "a", **_LORA, **held_out, learning_rate=0.05)
        trained.train()
        after = {k: v for k, v in read_lines(tmp_path / "a")[-1].items() if k.startswith("eval/")}
        adapters = _checkpoint(tmp_path / "a", 4) / "model"
        assert make_trainer(adapters, tmp_path / "b", **held_out).evaluate() == after
        assert after != make_trainer(tiny_model_dir, tmp_path / "c", **held_out).evaluate()
        # Adapters on top of adapters: what is saved stands on both.
        again = make_trainer(adapters, tmp_path / "d", **_LORA, **held_out, learning_rate=0.05)
        again.train()
        second = {k: v for k, v in read_lines(tmp_path / "d")[-1].items() if k.startswith("eval/")}
        assert make_trainer(_checkpoint(tmp_path / "d", 4) / "model", tmp_path / "e", **held_out).evaluate() == second

    def test_adapters_that_do_not_say_of_what(self, helpers: Any, tmp_path: Path) -> None:
        given = {"processing_class": helpers.make_tokenizer(), "max_steps": 1, **_LORA}
        make_trainer(helpers.make_model(), tmp_path, **given).train()
        with pytest.raises(ValueError, match="do not name their base model"):
            make_trainer(_checkpoint(tmp_path, 1) / "model", tmp_path / "b").train()

    def test_a_run_in_place_of_its_model(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_trainer(tiny_model_dir, tmp_path).train()
        newest = str(_checkpoint(tmp_path, 4) / "model")
        for folder in (tmp_path / "run", _checkpoint(tmp_path, 4)):
            with pytest.raises(ValueError, match="not a model; did you mean") as raised:
                make_trainer(folder, tmp_path / "b").train()
            assert newest in str(raised.value)


class TestPlaces:
    def test_a_folder_that_cannot_be_made_is_named_before_a_model_is_loaded(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"output_dir='.*file/run' cannot be written: '.*file' is a file"):
            make_trainer("/nowhere/model", tmp_path / "file").train()

    def test_nor_one_that_the_system_refuses(
        self, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(self: Path, *_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system", str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(ConfigError, match=r"output_dir='.*run' cannot be written: Read-only file system"):
            make_trainer(tiny_model_dir, tmp_path).train()

    def test_a_disk_that_fills_up_is_named(
        self, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("fastgrpo.run_directory.atomic_write", full)
        with pytest.raises(ConfigError, match=r"output_dir='.*run' cannot be written: No space"):
            make_trainer(tiny_model_dir, tmp_path).train()
        monkeypatch.undo()
        monkeypatch.setattr("fastgrpo.recorder.write_completions", full)
        with pytest.raises(RunError, match=r"output_dir='.*run': completions of step 1 could not be written: No space"):
            make_trainer(tiny_model_dir, tmp_path).train()
        monkeypatch.setattr("fastgrpo.recorder.write_summary", full)
        with pytest.raises(RunError, match=r"output_dir='.*run': summary and report could not be written: No space"):
            make_trainer(tiny_model_dir, tmp_path, log_completions=False, max_steps=1).train()
        monkeypatch.setattr("fastgrpo.tracking.MetricsWriter.write", full)
        with pytest.raises(RunError, match=r"output_dir='.*run': metrics of step 2 could not be written: No space"):
            make_trainer(tiny_model_dir, tmp_path, log_completions=False).train()

    def test_what_cannot_be_closed_hides_nothing(
        self, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("fastgrpo.recorder.write_completions", full)
        monkeypatch.setattr("fastgrpo.tracking.Tracker.close", full)
        with pytest.raises(RunError, match="completions of step 1 could not be written"):
            make_trainer(tiny_model_dir, tmp_path).train()
        assert "trackers of" in caplog.text
        monkeypatch.undo()
        assert make_trainer(tiny_model_dir, tmp_path).train().step == 4  # the folder was left to others

    def test_nothing_left_to_go_on_from(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        make_trainer(tiny_model_dir, tmp_path, save_steps=0).train()
        (_checkpoint(tmp_path, 4) / "state.json").unlink()
        with pytest.raises(
            CheckpointError,
            match=r"is damaged: .* begin anew: .* overwrite_output_dir=true",
        ):
            make_trainer(tiny_model_dir, tmp_path).train()
        make_trainer(tiny_model_dir, tmp_path, overwrite_output_dir=True).train(resume="never")
        assert len(read_lines(tmp_path)) == 4
