"""Runs that are begun again, in ways users do: twice in one process, elsewhere, with other options, by two at once."""

from __future__ import annotations

import fcntl
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROWS, assert_same_run, digits, make_trainer, read_lines, timeless
from transformers import AutoModelForCausalLM, TrainerCallback

from fastgrpo import ConfigError
from fastgrpo.optim import Optimizer
from fastgrpo.rewards import RewardRunner
from fastgrpo.signals import StopRequested
from fastgrpo.state import CheckpointError, RunError


def _fail_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's `step`th step raises, once."""
    original, calls = Optimizer.step, [0]

    def failing(self: Optimizer, rate: float, norm: float) -> bool:
        calls[0] += 1
        if calls[0] == step:
            raise RuntimeError("broken")
        return original(self, rate, norm)

    monkeypatch.setattr(Optimizer, "step", failing)


def test_a_trainer_whose_first_attempt_failed_begins_anew(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer(tiny_model_dir, tmp_path / "whole", save_steps=0).train()
    trainer = make_trainer(tiny_model_dir, tmp_path / "twice", save_steps=0)
    _fail_at(3, monkeypatch)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    trainer.train()
    assert_same_run(tmp_path / "whole", tmp_path / "twice")


def test_never_trains_from_the_first_step_again(tiny_model_dir: Path, helpers: Any, tmp_path: Path) -> None:
    make_trainer(tiny_model_dir, tmp_path / "whole").train()
    trainer = make_trainer(tiny_model_dir, tmp_path / "again", overwrite_output_dir=True)
    trainer.train()
    trainer.train(resume="never")
    assert_same_run(tmp_path / "whole", tmp_path / "again")

    loaded = {"processing_class": helpers.make_tokenizer(), "overwrite_output_dir": True}
    trainer = make_trainer(helpers.make_model(), tmp_path / "loaded", **loaded)
    trainer.train()
    with pytest.raises(ConfigError, match="has been trained already"):
        trainer.train(resume="never")
    assert len(read_lines(tmp_path / "loaded")) == 4


def test_two_trainers_and_two_calls_share_a_bf16_model(tiny_model_dir: Path, helpers: Any, tmp_path: Path) -> None:
    """The first optimizer lets go of the parameters."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    given = {"processing_class": helpers.make_tokenizer(), "dtype": "bfloat16", "max_steps": 2}
    for name in ("a", "b"):
        trainer = make_trainer(model, tmp_path / name, **given)
        trainer.train()
        trainer.config.max_steps = 3
        assert trainer.train().step == 3


def test_stopped_in_the_first_collection_the_start_is_not_evaluated_twice(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(completions: list[str], **_: Any) -> list[float]:
        return [share + random.random() for share in digits(completions)]

    options = {"eval_dataset": ROWS[:3]}
    make_trainer(tiny_model_dir, tmp_path / "whole", noisy, **options).train()
    score = RewardRunner.score

    def stopping(self: RewardRunner, rollouts: Any, **given: Any) -> Any:
        if len(rollouts) == 16:
            monkeypatch.undo()
            raise StopRequested(15)
        return score(self, rollouts, **given)

    monkeypatch.setattr(RewardRunner, "score", stopping)
    with pytest.raises(StopRequested):
        make_trainer(tiny_model_dir, tmp_path / "parts", noisy, **options).train()
    make_trainer(tiny_model_dir, tmp_path / "parts", noisy, **options).train()
    assert [line["step"] for line in read_lines(tmp_path / "parts")] == [0, 1, 2, 3, 4]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_is_answered_after_the_step_with_rollouts_pending(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"num_iterations": 4, "save_steps": 0}
    make_trainer(tiny_model_dir, tmp_path / "whole", **options).train()
    trainer = make_trainer(tiny_model_dir, tmp_path / "parts", **options)
    step = Optimizer.step

    def signalled(self: Optimizer, rate: float, norm: float) -> bool:
        trainer.signals._requested = 15
        return step(self, rate, norm)

    monkeypatch.setattr(Optimizer, "step", signalled)
    with pytest.raises(StopRequested):
        trainer.train()
    monkeypatch.undo()
    assert len(read_lines(tmp_path / "parts")) == 1
    make_trainer(tiny_model_dir, tmp_path / "parts", **options).train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_branch_given_up_is_not_taken_up_again(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back to step 2 by its path, killed before the next checkpoint: the run goes on from 2, not from the old 4."""
    make_trainer(tiny_model_dir, tmp_path).train()
    _fail_at(2, monkeypatch)
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(tiny_model_dir, tmp_path).train(resume=str(tmp_path / "run" / "checkpoints" / "step-00000002"))
    (tmp_path / "run" / "summary.json").unlink()
    make_trainer(tiny_model_dir, tmp_path).train()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 4]


def test_a_path_and_overwriting_exclude_each_other(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_trainer(tiny_model_dir, tmp_path).train()
    start = tmp_path / "run" / "checkpoints" / "step-00000002"
    trainer = make_trainer(tiny_model_dir, tmp_path, learning_rate=1e-2, overwrite_output_dir=True)
    with pytest.raises(ConfigError, match="would remove the run"):
        trainer.train(resume=str(start))
    assert start.is_dir()
    with pytest.raises(ConfigError, match="is a run directory"):
        make_trainer(tiny_model_dir, tmp_path).train(resume=str(tmp_path / "run"))


def test_a_run_that_got_nowhere_does_not_block_its_correction(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer than max_prompt_length=1"):
        make_trainer(tiny_model_dir, tmp_path, max_prompt_length=1).train()
    assert make_trainer(tiny_model_dir, tmp_path).train().step == 4


def test_checkpoints_without_a_config_are_nobodys(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_trainer(tiny_model_dir, tmp_path).train()
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"without its config\.yaml"):
        make_trainer(tiny_model_dir, tmp_path, learning_rate=0.5).train()


def test_two_at_once_are_kept_apart(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="in use by another process"):
            make_trainer(tiny_model_dir, tmp_path).train()
    assert make_trainer(tiny_model_dir, tmp_path).train().step == 4


def test_pending_rollouts_are_used_as_they_were_made(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {"num_minibatches": 4, "max_steps": 2, "allow_config_change": True}
    make_trainer(tiny_model_dir, tmp_path, **options).train()
    with pytest.raises(CheckpointError, match="num_minibatches: 4 -> 1"):
        make_trainer(tiny_model_dir, tmp_path, max_steps=4, allow_config_change=True).train()


def test_another_dtype_cannot_go_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_trainer(tiny_model_dir, tmp_path, max_steps=2).train()
    with pytest.raises(RunError, match="another dtype"):
        make_trainer(tiny_model_dir, tmp_path, dtype="bfloat16", allow_config_change=True).train()


def test_more_steps_under_a_falling_rate_are_a_change(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_trainer(tiny_model_dir, tmp_path, lr_scheduler_type="linear").train()
    with pytest.raises(ConfigError, match="max_steps: 4 -> 8"):
        make_trainer(tiny_model_dir, tmp_path, lr_scheduler_type="linear", max_steps=8).train()


def test_a_factory_is_called_again_after_a_resume(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may do more than load weights, such as freezing some."""
    (tmp_path / "freezing_task.py").write_text(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "def model():\n"
        f"    net = AutoModelForCausalLM.from_pretrained({str(tiny_model_dir)!r})\n"
        "    net.get_input_embeddings().weight.requires_grad_(False)\n"
        f"    return net, AutoTokenizer.from_pretrained({str(tiny_model_dir)!r})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    make_trainer("freezing_task:model", tmp_path / "whole").train()
    make_trainer("freezing_task:model", tmp_path / "parts", max_steps=2).train()
    make_trainer("freezing_task:model", tmp_path / "parts").train()
    assert timeless(read_lines(tmp_path / "whole")) == timeless(read_lines(tmp_path / "parts"))


def test_a_wish_of_a_callback_is_granted_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    saved: list[int] = []

    class Wishing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_save = control.should_evaluate = state.global_step == 2
            return control

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            saved.append(state.global_step)

    options = {"eval_dataset": ROWS[:2], "eval_steps": 2, "save_steps": 2, "max_steps": 5}
    make_trainer(tiny_model_dir, tmp_path, callbacks=[Wishing()], **options).train()
    assert saved == [2, 4, 5]
    assert [line["step"] for line in read_lines(tmp_path) if "eval/reward" in line] == [0, 2, 4, 5]


def test_one_failed_call_of_several_does_not_end_the_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A refill, or an evaluation, whose every sample failed."""
    sizes: list[int] = []

    def picky(completions: list[str], **_: Any) -> list[float | None]:
        sizes.append(len(completions))
        return [float(i % 4 == 0 and i < 12) if len(completions) == 16 else None for i in range(len(completions))]

    options = {"eval_dataset": ROWS[:3], "eval_steps": 2, "dynamic_sampling": True, "dynamic_sampling_max_rounds": 2}
    assert make_trainer(tiny_model_dir, tmp_path, picky, **options).train().step == 4
    assert {3, 4, 16} <= set(sizes)
    lines = read_lines(tmp_path)
    assert lines[0]["eval/reward"] is None
    assert lines[0]["eval/failed"] == 3
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["accuracy_after"] is None


def test_adapters_cannot_have_a_moving_reference(tiny_model_dir: Path, helpers: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(helpers.make_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    options = {"sync_ref_model": True, "beta": 0.1, "processing_class": helpers.make_tokenizer()}
    with pytest.raises(ConfigError, match="excludes adapters"):
        make_trainer(model, tmp_path, **options).train()


def test_stop_tokens_of_another_vocabulary(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stop_token_ids=\[99999\] are outside"):
        make_trainer(tiny_model_dir, tmp_path, stop_token_ids=[99999]).train()


def test_torch_generators_are_where_they_were(tiny_model_dir: Path, tmp_path: Path) -> None:
    """What a run draws does not depend on what its process drew before."""
    for name, draws in (("a", 0), ("b", 7)):
        torch.rand(draws)
        make_trainer(tiny_model_dir, tmp_path / name, max_steps=1).train()
    assert timeless(read_lines(tmp_path / "a")) == timeless(read_lines(tmp_path / "b"))
