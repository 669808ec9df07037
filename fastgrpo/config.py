"""GRPOConfig: every option of a run in one validated record, and the file it is kept in.

Nothing here loads torch: a wrong option is reported before anything heavy starts.
"""

from __future__ import annotations

import difflib
import inspect
import os
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self, get_type_hints

from fastgrpo.algorithms import ALGORITHMS, Algorithm
from fastgrpo.option_types import choices, describe, matches
from fastgrpo.options import (
    AdvantageOptions,
    DataOptions,
    EvalOptions,
    LossOptions,
    ModelOptions,
    RewardOptions,
    RolloutOptions,
    RunOptions,
    SaveOptions,
    TaskOptions,
    UpdateOptions,
)

if TYPE_CHECKING:
    from fastgrpo_kernels import LossConfig

# Options that may differ when a run goes on: they change neither data, samples nor gradients of the steps to come.
FREE_ON_RESUME = {
    *("output_dir", "overwrite_output_dir", "allow_config_change", "run_name", "report_to", "log_completions"),
    *("disable_progress", "max_steps", "num_train_epochs", "num_threads", "eval_steps", "eval_on_start", "eval_on_end"),
    *("save_steps", "save_total_limit", "reward_timeout", "max_skipped_steps", "check_sampling"),
    *("gradient_checkpointing", "gradient_checkpointing_every"),  # bitwise the same; max_tokens_per_microbatch is not
}

_POSITIVE = (
    *("num_threads", "num_train_epochs", "lora_r", "lora_alpha", "max_prompt_length", "num_prompts_per_step"),
    *("num_generations", "max_completion_length", "temperature", "rollout_batch_size", "dynamic_sampling_max_rounds"),
    *("reward_timeout", "delta", "sampling_clip_max", "sapo_temperature_pos", "sapo_temperature_neg"),
    *("ref_model_sync_steps", "num_iterations", "num_minibatches", "max_tokens_per_microbatch", "adam_epsilon"),
    *("max_skipped_steps", "eval_max_prompts", "eval_num_generations", "eval_temperature"),
    *("eval_max_completion_length", "save_total_limit", "gradient_checkpointing_every", "rollout_timeout"),
    *("vllm_server_timeout", "cliprange_value"),
)
_NOT_NEGATIVE = (
    *("seed", "epsilon", "epsilon_high", "beta", "sampling_clip_min", "learning_rate", "warmup_steps"),
    *("weight_decay", "max_grad_norm", "eval_steps", "save_steps", "top_k", "kl_coef", "critic_learning_rate"),
)
_SHARES = ("min_p", "lora_dropout", "ref_model_mixup_alpha", "min_lr_ratio", "adam_beta1", "adam_beta2", "gamma", "lam")
_ADAPTERS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
_CRITIC = ("lam", "critic_model", "critic_learning_rate", "cliprange_value")


class ConfigError(ValueError):
    """An option is unknown, of the wrong type, out of range, or does not fit another. One line, names the option."""


@dataclass(kw_only=True)
class GRPOConfig(
    SaveOptions,
    EvalOptions,
    UpdateOptions,
    LossOptions,
    AdvantageOptions,
    RewardOptions,
    RolloutOptions,
    DataOptions,
    ModelOptions,
    RunOptions,
):
    """All options of a run; see `fastgrpo.options` for each. Raises `ConfigError` on construction when one is wrong."""

    def __new__(cls, *_: Any, **options: Any) -> Self:
        """Refuse unknown options before Python does, which would not say what is near."""
        parameters = inspect.signature(cls.__init__).parameters  # a subclass may take others
        known = list(parameters)[1:]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name in options:
            if name not in known and not takes_any:
                raise ConfigError(f"unknown option {name!r}{nearest(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every option alone and those that must fit each other."""
        for option in fields(self):
            _check_type(self, option.name)
        for name in _POSITIVE:
            _require(self, name, lambda v: v > 0, "greater than 0")
        for name in _NOT_NEGATIVE:
            _require(self, name, lambda v: v >= 0, "0 or more")
        for name in _SHARES:
            _require(self, name, lambda v: 0 <= v <= 1, "between 0 and 1")
        _require(self, "top_entropy_quantile", lambda v: 0 < v <= 1, "above 0 and at most 1")
        _require(self, "top_p", lambda v: 0 < v <= 1, "above 0 and at most 1")
        _require(self, "stop_strings", all, "strings that are not empty")
        _require(self, "max_steps", lambda v: v == -1 or v > 0, "-1 or greater than 0")
        _require(self, "seed", lambda v: v < 2**63, "less than 2**63")
        _require(self, "output_dir", bool, "a folder's name")
        self._follow_algorithm()
        self._check_combinations()

    def _follow_algorithm(self) -> None:
        """What was left to the algorithm gets its value; what contradicts the algorithm is an error."""
        algorithm = self._algorithm
        left = {"advantage_whitening": False, "kl_coef": 0.0, **algorithm.defaults}
        for name, value in {**left, **algorithm.decides}.items():
            given = getattr(self, name)
            if given is None or given == "auto":
                setattr(self, name, value)
            elif name in algorithm.decides and given != value:
                raise ConfigError(f"{name}={given!r} contradicts algorithm={self.algorithm}, where it is {value!r}")
        if not algorithm.critic and (changed := self._first_changed(_CRITIC)):
            raise ConfigError(f"{changed} is for a critic, and algorithm={self.algorithm} has none")

    def _first_changed(self, names: tuple[str, ...]) -> str | None:
        """The first of these options that is not its default."""
        return next((f.name for f in fields(self) if f.name in names and getattr(self, f.name) != f.default), None)

    def _check_combinations(self) -> None:
        if self.advantage_baseline == "batch" and self.samples_per_batch < 2:
            raise ConfigError("advantage_baseline=batch needs num_prompts_per_step * num_generations of 2 or more")
        if self.advantage_baseline in ("mean", "leave_one_out") and self.num_generations < 2:
            raise ConfigError(
                f"num_generations={self.num_generations}: a group needs 2 or more for advantage_baseline="
                f"{self.advantage_baseline}"
            )
        if self.advantage_baseline == "none" and self.scale_rewards == "group":
            raise ConfigError(
                'scale_rewards=group needs a baseline; with advantage_baseline=none use "batch" or "none"'
            )
        if self.gradient_checkpointing_every > 1 and not self.gradient_checkpointing:
            raise ConfigError(
                f"gradient_checkpointing_every={self.gradient_checkpointing_every} needs gradient_checkpointing=true"
            )
        if not self.use_peft and (name := self._first_changed(_ADAPTERS)):
            raise ConfigError(f"{name} is for adapters, and there are none: set use_peft=true")
        if self.fused_layers and self.torch_compile:
            raise ConfigError("fused_layers=true and torch_compile=true: choose one of them")
        self._check_engine()
        if self.num_minibatches > self.num_prompts_per_step:
            raise ConfigError(
                f"num_minibatches={self.num_minibatches} is more than num_prompts_per_step="
                f"{self.num_prompts_per_step}: groups stay whole"
            )
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ConfigError("epsilon_high must be given for loss_type=cispo (the cap of the ratio, such as 5.0)")
        if self.loss_type == "vespo" and self.sampling_correction.startswith("sequence"):
            raise ConfigError(
                "sampling_correction must be none or a token mode, not a sequence mode, for loss_type=vespo"
            )
        if self.dynamic_sampling and self.advantage_baseline in ("none", "batch"):
            raise ConfigError("dynamic_sampling needs a baseline in the group: without it every group carries a signal")
        if self.reward_weights is not None and not any(self.reward_weights):
            raise ConfigError("reward_weights are all 0: nothing would be rewarded")
        if self.sync_ref_model and not self.needs_reference:
            raise ConfigError("sync_ref_model needs a reference model: set beta or kl_coef above 0")
        if self.sync_ref_model and self.use_peft:
            raise ConfigError(
                "sync_ref_model and use_peft exclude each other: the reference is the model without adapters"
            )
        if self.sampling_clip_min is not None and self.sampling_clip_min > self.sampling_clip_max:
            raise ConfigError(
                f"sampling_clip_min={self.sampling_clip_min} is above sampling_clip_max={self.sampling_clip_max}"
            )

    def _check_engine(self) -> None:
        servers = bool(self.vllm_server_urls or self.vllm_server_devices)
        if servers != (self.rollout_engine == "vllm_server"):
            raise ConfigError(
                "vllm_server_urls or vllm_server_devices, and rollout_engine=vllm_server go together: which servers, "
                "and that they are used"
            )
        if self.async_rollouts and (self.rollout_engine != "vllm_server" or self.dynamic_sampling):
            raise ConfigError("async_rollouts needs rollout_engine=vllm_server, and no dynamic_sampling")
        if self.async_rollouts and self.sampling_correction == "none":
            raise ConfigError(
                "async_rollouts needs a sampling_correction, such as token_truncate: its samples come from the policy "
                "of a step before"
            )

    def loss_config(self) -> LossConfig:
        """The options the loss ops need, as the record `fastgrpo_kernels` takes."""
        from fastgrpo_kernels import LossConfig

        return LossConfig(**{f.name: getattr(self, f.name) for f in fields(LossConfig)})

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, in the order of the groups."""
        return asdict(self)

    @property
    def _algorithm(self) -> Algorithm:
        return ALGORITHMS[self.algorithm]

    @property
    def per_token(self) -> bool:
        """Has each token an advantage of its own?"""
        return self._algorithm.per_token

    @property
    def has_critic(self) -> bool:
        """Does a critic learn beside the policy?"""
        return self._algorithm.critic

    @property
    def rollouts_by_first(self) -> bool:
        """Of several processes, does the first ask for all samples and score them? Servers are one's alone."""
        return self.rollout_engine == "vllm_server"

    @property
    def needs_reference(self) -> bool:
        """Is the policy compared with a reference model, in the loss or in the reward?"""
        return self.beta > 0 or bool(self.kl_coef)

    @property
    def filters(self) -> str:
        """The sampling filters in force, for people; empty when samples come from the whole distribution."""
        default = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return ", ".join(f"{n}={getattr(self, n)}" for n, off in default.items() if getattr(self, n) != off)

    @property
    def samples_per_batch(self) -> int:
        """Completions in a rollout batch."""
        return self.num_prompts_per_step * self.num_generations

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps each rollout batch is used for."""
        return self.num_iterations * self.num_minibatches


@dataclass(kw_only=True)
class RunConfig(GRPOConfig, TaskOptions):
    """What the command line reads: the task (model, data, rewards) and every option of the trainer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model", "train_dataset", "reward_funcs"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is required: set it in the config file or with --{name}")

    def grpo_config(self) -> GRPOConfig:
        """The trainer's part."""
        return GRPOConfig(**{f.name: getattr(self, f.name) for f in fields(GRPOConfig)})


def nearest(name: str, known: list[str]) -> str:
    """`", did you mean X?"` for a misspelt name, or nothing when none is near."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f", did you mean {match[0]!r}?" if match else ""


def decisive_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The options, as `name: old -> new`, that differ and would change the course of a run that goes on."""
    free = FREE_ON_RESUME
    if new.get("lr_scheduler_type") != "constant":
        free = free - {"max_steps", "num_train_epochs"}  # the learning rate's course hangs on the last step
    # An option that did not exist when the run was saved has its default there.
    defaults = {f.name: f.default for f in fields(RunConfig) if f.default is not MISSING} | GRPOConfig().to_dict()
    old = {name: value for name, value in defaults.items() if name in new} | old
    names = [n for n in {**old, **new} if n not in free]
    return [f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in names if old.get(n) != new.get(n)]


def _require(config: GRPOConfig, name: str, test: Any, expected: str) -> None:
    value = getattr(config, name)
    if value is not None and not test(value):
        raise ConfigError(f"{name}={value!r} must be {expected}")


_HINTS: dict[str, Any] = {}


def hint_of(name: str) -> Any:
    """The annotation of an option of a run."""
    return _HINTS.get(name) or _HINTS.setdefault(name, get_type_hints(RunConfig)[name])


def wrong_type(name: str, value: Any) -> ConfigError:
    """The error for a value that does not fit the option's annotation; `value` as it was given."""
    hint = hint_of(name)
    near = nearest(value, choices(hint)) if isinstance(value, str) else ""
    return ConfigError(f"{name}={value!r} must be {describe(hint, value)}{near}")


def _check_type(config: GRPOConfig, name: str) -> None:
    hint, value = hint_of(name), getattr(config, name)
    if hint is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
        setattr(config, name, value)
    if not matches(value, hint):
        raise wrong_type(name, value)
    if isinstance(value, int) and not isinstance(value, bool) and hint is float:
        setattr(config, name, float(value))
