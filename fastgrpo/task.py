"""What a run is about - model, data, rewards - and how each is taken in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastgrpo.config import ConfigError, GRPOConfig
from fastgrpo.data import PromptSource, load_rows
from fastgrpo.policy import Policy
from fastgrpo.rewards import RewardDefaults, RewardFunction, resolve_all


@dataclass(frozen=True)
class Task:
    """The arguments of `GRPOTrainer` that are not options; see there. Any but the rewards may be None."""

    model: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    reward_funcs: list[Any]
    peft_config: Any

    def options(self) -> dict[str, Any]:
        """The task as config.yaml shows it: plain values, Python objects by what they are called."""
        names = ["model", "processing_class", "train_dataset", "eval_dataset"]
        names += ["peft_config"] * (self.peft_config is not None)
        shown = {name: _scalar(getattr(self, name)) for name in names}
        return shown | {"reward_funcs": [_plain(spec) for spec in self.reward_funcs]}

    def rewards(self, config: GRPOConfig) -> list[RewardFunction]:
        """The reward functions with their weights and timeouts."""
        if not self.reward_funcs:
            raise ConfigError("reward_funcs is required: at least one reward function")
        weights = config.reward_weights
        if weights is not None and len(weights) != len(self.reward_funcs):
            raise ConfigError(f"reward_weights has {len(weights)} entries, reward_funcs {len(self.reward_funcs)}")
        defaults = RewardDefaults(timeout=config.reward_timeout, max_completion_length=config.max_completion_length)
        functions = resolve_all(self.reward_funcs, defaults=defaults)
        if weights is not None:
            functions = [replace(f, weight=w) for f, w in zip(functions, weights, strict=True)]
        return functions

    def train_rows(self, config: GRPOConfig) -> Any:
        """The training data set. Raises ConfigError without one."""
        if self.train_dataset is None:
            raise ConfigError("train_dataset is required")
        return _rows(self.train_dataset, config.train_split, config)

    def eval_rows(self, config: GRPOConfig) -> Any | None:
        """The evaluation data set, if there is one. ConfigError when `eval_steps` wants one in vain."""
        if self.eval_dataset is None and config.eval_steps:
            raise ConfigError(f"eval_steps={config.eval_steps} needs an eval_dataset: there is nothing to evaluate on")
        return None if self.eval_dataset is None else _rows(self.eval_dataset, config.eval_split, config)


def make_prompts(rows: Any, policy: Policy, config: GRPOConfig, completion_length: int) -> PromptSource:
    """Rows -> prompts that leave room for the completions. Raises ConfigError when there is no room at all."""
    room = (policy.context_length or 2**31) - completion_length
    if room < 1:
        raise ConfigError(
            f"max_completion_length={completion_length} leaves no room for a prompt in the model's context of "
            f"{policy.context_length} tokens"
        )
    left = f"the {room} that max_completion_length={completion_length} leaves of the model's context"
    return PromptSource(
        rows,
        policy.tokenizer,
        max_prompt_length=min(config.max_prompt_length or room, room),
        limit=left if (config.max_prompt_length or room + 1) > room else None,
        vocab_size=policy.vocab_size,
        system_prompt=config.system_prompt,
        prompt_template=config.prompt_template,
        chat=config.chat,
        chat_template_kwargs=config.chat_template_kwargs,
        long_prompts=config.long_prompts,
        shuffle=config.shuffle_dataset,
        seed=config.seed,
    )


def _rows(source: Any, split: str, config: GRPOConfig) -> Any:
    return load_rows(source, split=split, name=config.dataset_name, column_mapping=config.column_mapping)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else _scalar(value)


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return f"<{getattr(value, '__name__', None) or type(value).__name__}>"
