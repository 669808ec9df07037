"""`fastgrpo doctor`: what this machine offers, and what each missing piece would bring."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from importlib.util import find_spec

from fastgrpo.wording import counted

# Optional package -> (what it brings, how to get it).
_OPTIONAL = {
    "peft": ("LoRA adapters (use_peft)", "pip install 'fastgrpo[peft]'"),
    "math-verify": ("the reward 'math'", "pip install 'fastgrpo[math]'"),
    "vllm": ("rollouts by vLLM (rollout_engine)", "pip install 'fastgrpo[vllm]'"),
    "flash-attn": ("flash attention 2 in the update, with softcaps", "pip install 'fastgrpo[flash]'"),
    "wandb": ("Weights & Biases (report_to)", "pip install 'fastgrpo[wandb]'"),
}
_REQUIRED = ("torch", "triton", "transformers", "datasets", "jsonargparse", "safetensors", "tensorboard", "rich")


def describe_machine() -> str:
    """A few lines for people."""
    lines = [f"python {platform.python_version()} on {platform.platform()}, {counted(os.cpu_count() or 1, 'CPU core')}"]
    lines += ["", "packages"]
    lines += [f"  {name:<14}{_version(name) or 'MISSING: reinstall fastgrpo'}" for name in _REQUIRED]
    for name, (brings, command) in _OPTIONAL.items():
        lines.append(f"  {name:<14}{_version(name) or f'not installed; brings {brings}: {command}'}")
    return "\n".join([*lines, "", *_devices(), "", *_attention(), "", *_engines()])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    threads = counted(torch.get_num_threads(), "thread")
    lines = [
        "devices",
        f"  cpu           {threads}, {sys.byteorder} endian, dtype float32 by default",
    ]
    if not torch.cuda.is_available():
        return [*lines, "  gpu           none found: everything runs on the CPU, for small models only"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(
            f"  cuda:{i}        {properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
            f"{properties.major}.{properties.minor}, dtype bfloat16 by default"
        )
    if torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        lines.append(f"                all of them: torchrun --nproc-per-node {count} -m fastgrpo train CONFIG.yaml")
    return lines


def _attention() -> list[str]:
    """What the update's attention runs on, the best first."""
    import torch

    from fastgrpo_kernels import attention_backends

    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    return ["attention in the update"] + [
        f"  {device:<8}{name:<14}{status}" for device in devices for name, status in attention_backends(device)
    ]


def _engines() -> list[str]:
    """What rollouts come from by default, and what else could be asked for."""
    import torch

    from fastgrpo.rollout.engine import choose_engine

    name, reason = choose_engine("auto", "cuda" if torch.cuda.is_available() else "cpu")
    vllm = "there" if find_spec("vllm") else "not installed"
    return [
        "rollout engines",
        f"  auto          takes {name} ({reason})",
        "  loop          here, from the training weights themselves",
        f"  transformers  here, by its continuous batching; for GPUs with flash attention{_too_old()}",
        f"  vllm          beside the policy, weights synced in place: {vllm}",
        f"  vllm_server   servers here ({vllm}) or elsewhere",
    ]


def _too_old() -> str:
    from packaging.version import Version

    from fastgrpo.rollout.transformers import OLDEST

    there = _version("transformers")
    return "" if there is None or Version(there) >= Version(OLDEST) else f": transformers {OLDEST} is needed"
