"""What the trainer asks of whatever generates, and which engine that is."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fastgrpo.config import GRPOConfig
from fastgrpo.records import Prompt, Rollout, Sampling

_A_YEAR = 365 * 86400.0


class Engine(Protocol):
    """Token ids in; token ids and the log-probs of the true sampling distribution out."""

    version: int
    """How many times `sync` took the weights over; `Rollout.weights_version` is its value when a sample began."""

    def generate(
        self, prompts: list[Prompt], n: int, sampling: Sampling, done: Callable[[list[Rollout]], None] | None = None
    ) -> list[Rollout]:
        """`n` completions of every prompt, those of one prompt together; `group` is the prompt's place in the list.

        Sampled from the weights as they stand after the last `sync`; the same seed gives the same tokens where the
        engine says so. done: is called with each prompt's completions, the objects that are returned, as soon as the
        engine has all of them; in the thread that called `generate`.
        Raises RunError when the engine is dead or takes longer than it may.
        """

    def sync(self, policy: Any) -> None:
        """Take over the policy's weights; called after every optimizer step and after loading a checkpoint."""

    def sleep(self) -> None:
        """Give device memory back while the policy trains."""

    def wake(self) -> None:
        """Take it again before the next `generate`."""

    def close(self) -> None:
        """Release everything."""


class NoEngine:
    """That of a process whose samples are drawn by another: it counts, and generates nothing."""

    def __init__(self) -> None:
        self.version = 0

    def generate(
        self, prompts: list[Prompt], n: int, sampling: Sampling, done: Callable[[list[Rollout]], None] | None = None
    ) -> list[Rollout]:
        """Of no prompts, nothing."""
        assert not prompts
        return []

    def sync(self, policy: Any) -> None:
        """The one that generates takes the weights."""
        self.version += 1

    def sleep(self) -> None:
        """It has no memory."""

    def wake(self) -> None:
        """As `sleep`."""

    def close(self) -> None:
        """As `sleep`."""


def make_engine(config: GRPOConfig, policy: Any, rank: int = 0, processes: int = 1) -> tuple[Engine, str]:
    """The engine that `rollout_engine` names, and which it is and why, for people.

    rank, processes: of the run. Each makes one of its own, but servers are the first one's.

    Raises ValueError, ImportError or RunError, in one line, for one that cannot be had.
    """
    name, reason = choose_engine(config.rollout_engine, policy.device.type, processes)
    engine = NoEngine() if rank and config.rollouts_by_first else _MAKERS[name](config, policy)
    return engine, f"rollouts by {name} ({reason})"


def choose_engine(name: str, device_type: str, processes: int = 1) -> tuple[str, str]:
    """The engine for `rollout_engine` on a device, and why."""
    if processes > 1 and name == "vllm":
        raise ValueError(
            f"rollout_engine='vllm' is for runs of one process, this one has {processes}: take loop, or vllm_server on "
            "GPUs of its own"
        )
    if name in _MAKERS:
        return name, "as asked for"
    if name != "auto":
        raise ValueError(f"rollout_engine={name!r} must be auto, {', '.join(_MAKERS)}")
    if device_type != "cuda":
        return "loop", "the fastest on a CPU"
    if processes > 1:
        return "loop", "the one for several processes"
    return ("vllm", "installed") if find_spec("vllm") else ("loop", "vllm is not installed")


def _loop(config: GRPOConfig, policy: Any) -> Engine:
    from fastgrpo.rollout.loop import LoopEngine

    return LoopEngine(
        policy.model, policy.tokenizer, batch_size=config.rollout_batch_size, timeout=config.rollout_timeout
    )


def _transformers(config: GRPOConfig, policy: Any) -> Engine:
    from fastgrpo.rollout.transformers import TransformersEngine

    timeout = config.rollout_timeout or _A_YEAR
    return TransformersEngine(policy.model, policy.tokenizer, batch_size=config.rollout_batch_size, timeout=timeout)


def _vllm(config: GRPOConfig, policy: Any) -> Engine:
    from fastgrpo.rollout.vllm.engine import VLLMEngine

    return VLLMEngine(
        policy, max_length=_longest(config), step_timeout=config.rollout_timeout, engine_args=config.vllm_args
    )


def _vllm_server(config: GRPOConfig, policy: Any) -> Engine:
    from fastgrpo.rollout.vllm.server import ServerOptions, VLLMServerEngine

    arguments = [part for key, value in (config.vllm_args or {}).items() for part in _flag(key, value)]
    options = ServerOptions(
        urls=config.vllm_server_urls,
        devices=config.vllm_server_devices,
        arguments=arguments,
        max_length=_longest(config),
        log_folder=str(Path(config.output_dir) / "vllm") if config.vllm_server_devices else None,
        request_timeout=config.vllm_server_timeout,
        step_timeout=config.rollout_timeout,
    )
    return VLLMServerEngine(policy, options)


_MAKERS: dict[str, Callable[[GRPOConfig, Any], Engine]] = {
    "loop": _loop,
    "transformers": _transformers,
    "vllm": _vllm,
    "vllm_server": _vllm_server,
}


def _longest(config: GRPOConfig) -> int | None:
    """Tokens of the longest prompt and completion, in training and evaluation; None = what the context allows."""
    if config.max_prompt_length is None:
        return None
    return config.max_prompt_length + max(config.max_completion_length, config.eval_max_completion_length or 0)


def _flag(key: str, value: Any) -> list[str]:
    """An argument of `vllm.LLM` as one of `vllm serve`: true is the flag alone, false its `--no-` form."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]
