"""Options: types, ranges, combinations, help texts, and what may change between two parts of a run."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.config import FREE_ON_RESUME, ConfigError, GRPOConfig, RunConfig, decisive_changes, nearest, wrong_type
from fastgrpo.options import GROUPS, TaskOptions
from fastgrpo_kernels import LossConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, "beta=-0.1 must be 0 or more"),
        ({"temperature": 0}, "temperature=0.0 must be greater than 0"),
        ({"seed": "a"}, "seed='a' must be a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        ({"num_generations": True}, "num_generations=True must be a whole number"),
        ({"loss_type": "ppo"}, "loss_type='ppo' must be one of grpo, bnpo, dr_grpo, dapo, "),
        ({"stop_token_ids": ["x"]}, "stop_token_ids=.* must be a list of whole numbers"),
        ({"column_mapping": {"a": 1}}, "column_mapping=.* must be a mapping of strings to strings or null"),
        ({"max_steps": 0}, "max_steps=0 must be -1 or greater than 0"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile"),
        ({"adam_beta1": 1.5}, "adam_beta1=1.5 must be between 0 and 1"),
        ({"lerning_rate": 1.0}, "unknown option 'lerning_rate', did you mean 'learning_rate'"),
        ({"beta": None}, "beta=None must be a number$"),
        ({"cliprange_value": "x", "algorithm": "ppo"}, "cliprange_value='x' must be a number or null"),
        ({"report_to": "wandb"}, "report_to='wandb' must be a list of any of tensorboard, wandb, none, did you mean"),
        ({"lora_r": 4}, "lora_r is for adapters, and there are none: set use_peft=true"),
        ({"num_generations": 1}, "a group needs 2 or more"),
        ({"advantage_baseline": "none"}, "scale_rewards=group needs a baseline"),
        ({"num_minibatches": 9}, "num_minibatches=9 is more than num_prompts_per_step=8"),
        ({"loss_type": "cispo"}, "epsilon_high must be given"),
        ({"loss_type": "vespo", "sampling_correction": "sequence_mask"}, "token mode"),
        ({"sync_ref_model": True}, "needs a reference model"),
        ({"sync_ref_model": True, "beta": 0.1, "use_peft": True}, "exclude each other"),
        ({"sampling_clip_min": 4.0}, "is above sampling_clip_max"),
        ({"seed": 2**63}, "less than 2"),
        ({"output_dir": ""}, "output_dir='' must be a folder's name"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs=inf must be a finite number"),
        ({"dtype": "float16"}, "dtype='float16' must be one of auto, float32, bfloat16, did you mean 'bfloat16'"),
        ({"reward_weights": [0.0, 0.0]}, "reward_weights are all 0"),
        (
            {"dynamic_sampling": True, "advantage_baseline": "none", "scale_rewards": "none"},
            "dynamic_sampling needs a baseline",
        ),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(**options)


def test_whole_numbers_are_floats_where_floats_are_meant() -> None:
    assert isinstance(GRPOConfig(learning_rate=1).learning_rate, float)


def test_a_subclass_may_take_options_of_its_own() -> None:
    class Mine(GRPOConfig):
        def __init__(self, *, mine: int, **options: Any) -> None:
            super().__init__(**options)
            self.mine = mine

    assert Mine(mine=3, seed=1).mine == 3
    assert copy.deepcopy(GRPOConfig(seed=7)) == pickle.loads(pickle.dumps(GRPOConfig(seed=7)))


def test_a_folder_may_be_a_path() -> None:
    assert GRPOConfig(output_dir=Path("runs") / "x").output_dir == "runs/x"  # type: ignore[arg-type]


def test_every_option_says_what_it_takes() -> None:
    for option in dataclasses.fields(RunConfig):
        text = str(wrong_type(option.name, object()))
        assert " must be " in text
        assert not {"typing", "class", "Literal", "NoneType"} & set(re.findall(r"\w+", text)), text


def test_every_option_is_documented_once() -> None:
    for group in (TaskOptions, *GROUPS):
        documented = re.findall(r"^        (\w+): ", group.__doc__ or "", flags=re.MULTILINE)
        assert documented == [f.name for f in dataclasses.fields(group)], group.__name__


def test_the_groups_are_the_config_and_share_no_name() -> None:
    names = [f.name for group in (TaskOptions, *GROUPS) for f in dataclasses.fields(group)]
    assert len(names) == len(set(names))
    assert set(names) == {f.name for f in dataclasses.fields(RunConfig)}
    assert set(names) >= FREE_ON_RESUME


def test_every_option_of_the_loss_has_the_same_name_and_default() -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    for field in dataclasses.fields(LossConfig):
        if field.name != "max_completion_length":
            assert defaults[field.name] == field.default, field.name
    config = GRPOConfig(epsilon=0.3, max_completion_length=77)
    assert config.loss_config() == LossConfig(epsilon=0.3, max_completion_length=77)


def test_the_task_is_required() -> None:
    with pytest.raises(ConfigError, match="model is required"):
        RunConfig(train_dataset="x", reward_funcs=["exact_match"])
    with pytest.raises(ConfigError, match="reward_funcs is required"):
        RunConfig(model="x", train_dataset="x")


def test_nearest_spelling() -> None:
    assert nearest("learning_rat", ["beta", "learning_rate"]) == ", did you mean 'learning_rate'?"
    assert nearest("zzz", ["beta"]) == ""


def test_changes_that_decide_a_run() -> None:
    old, new = GRPOConfig(), GRPOConfig(max_steps=9, save_steps=1, beta=0.1)
    assert decisive_changes(old.to_dict(), new.to_dict()) == ["beta: 0.0 -> 0.1"]


def test_an_option_newer_than_the_run_had_its_default() -> None:
    saved = GRPOConfig().to_dict()
    del saved["share_prompts"]
    assert decisive_changes(saved, GRPOConfig().to_dict()) == []
    assert decisive_changes(saved, GRPOConfig(share_prompts=False).to_dict()) == ["share_prompts: True -> False"]


def test_checkpointing_of_every_kth_layer_needs_checkpointing() -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing_every=2 needs gradient_checkpointing=true"):
        GRPOConfig(gradient_checkpointing_every=2)
    with pytest.raises(ConfigError, match="gradient_checkpointing_every=0 must be greater than 0"):
        GRPOConfig(gradient_checkpointing=True, gradient_checkpointing_every=0)
