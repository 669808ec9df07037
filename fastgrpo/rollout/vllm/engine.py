"""vLLM in this process: continuous batching and paged attention on the policy's device, weights synced in place.

The engine starts with the policy's config and no weights; every `sync` loads the policy's through vLLM's own reload,
which keeps what its kernels and CUDA graphs point at. Asleep (GPU only) it holds neither weights nor cache; they come
back at `wake`. Not done here: several GPUs for one model, adapters that vLLM applies itself.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastgrpo.errors import RunError
from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout.vllm.requests import CPU_ARGUMENTS, ENVIRONMENT, import_vllm, sampling_options, to_rollouts
from fastgrpo.rollout.vllm.weights import checkpoint_weights, write_model_folder
from fastgrpo.rollout.vllm.worker import pack_heads

MEMORY_SHARE = 0.3
"""Of the GPU, what vLLM takes while it generates, unless told otherwise: weights, keys and values, and the rest."""


class VLLMEngine:
    """Generates with a vLLM `LLM` beside the policy.

    policy:       the weights to start from; its model, tokenizer, device and dtype.
    max_length:   longest prompt and completion together, in tokens; None = the model's context.
    step_timeout: seconds a `generate` may take; None = no limit.
    engine_args:  more arguments of `vllm.LLM`, e.g. {"gpu_memory_utilization": 0.5} (`MEMORY_SHARE` unless given).

    The same seed, prompts and weights give the same tokens where the batch does not change vLLM's rounding.
    Raises ImportError when vLLM is missing or too old, ValueError for a policy it cannot take over.
    """

    def __init__(
        self,
        policy: Any,
        *,
        max_length: int | None = None,
        step_timeout: float | None = None,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        if (policy.device.index or 0) != 0:
            raise ValueError(f"the vLLM engine runs on the first GPU, the policy is on {policy.device}: make it first")
        self.version = -1
        self._policy = policy
        self._asleep = False
        self._step_timeout = step_timeout
        self._owns_process_group = not torch.distributed.is_initialized()
        with _environment(), _unchanged_process(), tempfile.TemporaryDirectory(prefix="fastgrpo-vllm-") as folder:
            self._vllm = import_vllm()
            write_model_folder(policy, Path(folder), weights=False)
            arguments = _default_args(policy, max_length) | dict(engine_args or {})
            self._can_sleep = bool(arguments.get("enable_sleep_mode"))
            self._llm = self._vllm.LLM(model=folder, **arguments)
        self.sync(policy)

    def generate(
        self, prompts: list[Prompt], n: int, sampling: Sampling, done: Callable[[list[Rollout]], None] | None = None
    ) -> list[Rollout]:
        """See `Engine.generate`. Raises RunError when vLLM fails, or takes longer than `step_timeout`."""
        deadline = time.monotonic() + self._step_timeout if self._step_timeout else float("inf")
        rollouts: dict[int, list[Rollout]] = {}
        with _unchanged_process():
            try:
                self._add(prompts, n, sampling)
                while len(rollouts) < len(prompts):
                    for output in self._step():
                        group = int(output.request_id)
                        rollouts[group] = self._rollouts(prompts[group], group, sampling, output)
                        if done is not None:
                            done(rollouts[group])
                    if time.monotonic() > deadline and len(rollouts) < len(prompts):
                        done_so_far = f"{len(rollouts)} of {len(prompts)} prompts were done"
                        raise RunError(f"rollouts took more than {self._step_timeout:.0f} s: {done_so_far}")
            except BaseException:
                self._abort()
                raise
        return [rollout for group in range(len(prompts)) for rollout in rollouts[group]]

    def sync(self, policy: Any) -> None:
        """Load the policy's weights; an engine asleep does it when it wakes."""
        self._policy = policy
        self.version += 1
        if not self._asleep:
            self._load()

    def sleep(self) -> None:
        """Free weights and cache. On a CPU there is no such thing, and nothing happens."""
        if self._can_sleep and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True

    def wake(self) -> None:
        """Take the memory again: weights, which are the policy's as they stand, then the cache."""
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
            self._load()
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False

    def close(self) -> None:
        """Stop the engine and release its memory; a second call does nothing."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        if self._owns_process_group:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()

    def _add(self, prompts: list[Prompt], n: int, sampling: Sampling) -> None:
        from vllm.sampling_params import RequestOutputKind

        for group, prompt in enumerate(prompts):
            params = self._vllm.SamplingParams(
                **sampling_options(self._policy, sampling, group, n),
                flat_logprobs=True,
                detokenize=bool(sampling.stop_strings),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._llm.llm_engine.add_request(str(group), {"prompt_token_ids": prompt.token_ids}, params)

    def _step(self) -> list[Any]:
        """A token for every running sample; returns the prompts whose samples are all complete."""
        try:
            return [output for output in self._llm.llm_engine.step() if output.finished]
        except Exception as error:
            said = str(error).partition("\n")[0]
            raise RunError(f"vLLM failed while it generated: {type(error).__name__}: {said}") from error

    def _rollouts(self, prompt: Prompt, group: int, sampling: Sampling, output: Any) -> list[Rollout]:
        completions = sorted(output.outputs, key=lambda c: c.index)
        samples = [(list(c.token_ids), c.logprobs.logprobs, c.finish_reason == "stop") for c in completions]
        return to_rollouts(self._policy, prompt, group, sampling, samples, self.version)

    def _abort(self) -> None:
        """Drop what a signal or an error left behind: the next `generate` would compute and return it too."""
        engine = self._llm.llm_engine
        left = engine.output_processor
        with contextlib.suppress(Exception):  # a dead engine has nothing left; the first error is the one to tell
            engine.abort_request([*left.request_states, *left.parent_requests], internal=True)

    def _load(self) -> None:
        with _unchanged_process():
            weights = checkpoint_weights(self._policy)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._llm.apply_model(pack_heads)
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept its prefix cache: something still generates while weights are synced")


def _default_args(policy: Any, max_length: int | None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that make its distribution the policy's, and what suits the device."""
    common = {
        "dtype": str(policy.dtype).removeprefix("torch."),
        "load_format": "dummy",
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # the model's own would filter
        "max_model_len": max_length,
        "seed": 0,
        "disable_log_stats": True,
    }
    if policy.device.type == "cpu":
        return common | CPU_ARGUMENTS
    return common | {"enable_sleep_mode": True, "gpu_memory_utilization": MEMORY_SHARE}


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Variables for vLLM's start, the user's own first; taken away again."""
    # One process: the weights are handed over as they lie in memory.
    wanted = ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _unchanged_process() -> Iterator[None]:
    """Leave the trainer's random generators and thread count as they were: vLLM seeds, draws from and sets them."""
    import numpy as np

    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is meant
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
