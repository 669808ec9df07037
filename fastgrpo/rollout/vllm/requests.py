"""What both vLLM engines ask for and hand back; finding vLLM itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastgrpo.records import Prompt, Rollout, Sampling
from fastgrpo.rollout.loop import end_tokens_of
from fastgrpo.seeding import derive_seed

# The oldest version the engines were run with; before it the calls they make are missing or differ.
OLDEST = (0, 32)

# Of the engine on a CPU: no compiling, a GiB of cache, and every prompt in one piece. vLLM dies on a prompt in pieces
# whose request has a seed: it winds the generator back, which those of the CPU cannot do.
CPU_ARGUMENTS = {"enforce_eager": True, "kv_cache_memory_bytes": 2**30, "enable_chunked_prefill": False}

# What vLLM reads when it starts, unless the user has set it: the threads stay ours, warnings only, nobody is told.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def import_vllm() -> Any:
    """vLLM. Raises ImportError, in one line, when it is missing, broken or too old."""
    try:
        import vllm
    except ImportError as error:
        cause = "" if error.name == "vllm" else f" (importing it failed: {error})"
        raise ImportError(
            f"rollout_engine 'vllm' and 'vllm_server' need vLLM{cause}: pip install 'fastgrpo[vllm]'", name=error.name
        ) from error
    check_version(vllm.__version__)
    return vllm


def check_version(version: str) -> None:
    """Raises ImportError for a version before `OLDEST`; builds without a number ("dev") pass."""
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(version).release
    except InvalidVersion:
        return
    if release < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"vLLM {version} is too old, {oldest} is needed: pip install --upgrade 'vllm>={oldest}'")


def sampling_options(policy: Any, sampling: Sampling, group: int, n: int) -> dict[str, Any]:
    """One prompt's options, by the names that `SamplingParams` and /v1/completions share.

    A seed of its own for each prompt: what is sampled does not depend on what runs beside it, or on which server. vLLM
    gives sample k of the prompt the seed + k. It applies min_p before the other filters; log-probs are those of what
    it does.
    """
    ends = end_tokens_of(policy.causal_lm, policy.tokenizer) | set(sampling.stop_token_ids)
    return {
        "n": n,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "seed": derive_seed(sampling.seed, "vllm", sampling.first_group + group) >> 1,
        "stop_token_ids": sorted(ends),
        "stop": list(sampling.stop_strings),
        "include_stop_str_in_output": True,  # the token that completes it is sampled, and trains
        "ignore_eos": True,  # vLLM's own idea of the end; ours is among the stop tokens
        "logprobs": 0,  # of the sampled token alone
    }


def to_rollouts(
    policy: Any,
    prompt: Prompt,
    group: int,
    sampling: Sampling,
    samples: Iterable[tuple[list[int], list[float], bool]],
    weights_version: int,
) -> list[Rollout]:
    """Rollouts of one prompt from (token ids, log-probs, finished); the text by the policy's tokenizer."""
    samples = list(samples)
    texts = policy.tokenizer.batch_decode([ids for ids, _, _ in samples], skip_special_tokens=True)
    return [
        Rollout(
            prompt,
            group,
            ids,
            # The likeliest token is certain when nothing else can be drawn; vLLM gives it the model's probability.
            torch.tensor(logprobs, dtype=torch.float32) if sampling.temperature > 0 else torch.zeros(len(ids)),
            finished=finished,
            text=text,
            weights_version=weights_version,
        )
        for (ids, logprobs, finished), text in zip(samples, texts, strict=True)
    ]
