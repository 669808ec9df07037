"""What `fastgrpo plan` says against what happens: bytes and seconds of every phase, on a GPU or the CPU.

    python -m benchmarks.planned [--model Qwen3-0.6B] [--prompts 2] [--group 4] [--prompt 100] [--completion 100]
                                 [--dtype bfloat16] [--checkpoint] [--lora] [--reference] [--json FILE]

The model has random weights, and every completion the longest length. On a GPU bytes are those of torch's allocator, on
the CPU those resident beyond what was before the model came, of which glibc keeps some that were freed unless
MALLOC_MMAP_THRESHOLD_=65536. Each phase runs twice; the second time counts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import end, positive, writable
from benchmarks.small_model import SMALL, make_tokenizer
from fastgrpo.config import GRPOConfig
from fastgrpo.optim import Optimizer
from fastgrpo.plan.command import pick_device
from fastgrpo.plan.planner import plan_run
from fastgrpo.plan.records import Plan, Workload
from fastgrpo.plan.shapes import describe_shape
from fastgrpo.plan.table import MODELS
from fastgrpo.policy import Reference, load_policy
from fastgrpo.policy.loading import skeleton_of
from fastgrpo.records import Prompt, Rollout, RolloutBatch, Sampling
from fastgrpo.rollout import make_engine
from fastgrpo.update import Updater

_SMALL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32000}
_HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
SIZES = MODELS | {"100M": MODELS["Qwen3-0.6B"] | _SMALL | _HEADS}


@dataclass(frozen=True)
class Figures:
    """Of a phase. seconds are planned where the device's rates are known."""

    phase: str
    bytes: int
    planned_bytes: int
    seconds: float
    planned_seconds: float | None


class Meter:
    """Peak bytes and seconds of a call."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._before = 0 if self._gpu else self._resting()

    def _resting(self) -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return _resident("VmRSS")

    def of(self, run: Callable[[], object]) -> tuple[int, float]:
        """Bytes in all, weights included, and seconds."""
        if self._gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._resting()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here: proc(5)
        started = time.perf_counter()
        run()
        if self._gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return torch.cuda.max_memory_allocated() if self._gpu else _resident("VmHWM") - self._before, seconds


def measure(name: str, config: GRPOConfig, load: Workload, device: Any) -> tuple[Plan, list[Figures]]:
    """The plan of a run and what its phases take."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SIZES[name]
    plan = plan_run(describe_shape(skeleton_of(sizes), config), config, device, load)
    place = torch.device("cuda" if device.is_gpu else "cpu")
    _warm(config, place)
    meter = Meter(place)
    torch.manual_seed(0)
    with place:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
    policy = load_policy(model, make_tokenizer(replace(SMALL, vocabulary=999)), config)
    optimizer = Optimizer(policy.trainable(), config)
    reference = Reference(policy) if config.beta else None
    updater, (engine, _) = Updater(policy, reference, optimizer, config), make_engine(config, policy)
    del model
    batch = _batch(load)
    engine.end_tokens = set()  # type: ignore[attr-defined]
    prompts = [batch.rollouts[g * load.group].prompt for g in range(load.prompts)]

    def prepare() -> None:
        for rollout in batch.rollouts:
            rollout.ref_logprob = rollout.old_logprob = None
        updater.prepare(batch)

    def update() -> None:
        batch.used = 0
        updater.step(batch, 1e-6)

    prepare()
    update()  # the optimizer's state exists from here on
    runs: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
        "rollout": (lambda: engine.generate(prompts, load.group, Sampling(load.longest)), ("rollout",)),
        "update": (update, ("update", "optimizer step")),
    }
    if reference is not None:
        runs["reference"] = (prepare, ("reference",))
    found = []
    for phase, (run, stages) in runs.items():
        run()
        used, seconds = meter.of(run)
        planned = None if plan.seconds is None else sum(plan.seconds[stage] for stage in stages)
        found.append(Figures(phase, used, sum(plan.phases[phase].values()), seconds, planned))
    return plan, found


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _warm(config: GRPOConfig, place: torch.device) -> None:
    """Libraries load their code and make their buffers: none of it is the model's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1000, "intermediate_size": 128}
    with place:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES["100M"] | tiny))
    policy = load_policy(model, make_tokenizer(replace(SMALL, vocabulary=999)), replace(config, beta=0.0))
    updater = Updater(policy, None, Optimizer(policy.trainable(), config), replace(config, beta=0.0))
    updater.step(_batch(Workload(2, 2, 8, 8, 8)), 1e-6)


def _batch(load: Workload) -> RolloutBatch:
    rollouts = []
    for g in range(load.prompts):
        prompt = Prompt(g, "", [5 + (g + i) % 900 for i in range(load.prompt)])
        for k in range(load.group):
            ids, logprobs = [5 + (7 * k + i) % 900 for i in range(load.longest)], -torch.ones(load.longest)
            rollouts.append(Rollout(prompt, g, ids, logprobs, True, reward=k % 2, advantage=k % 2 - 0.5))
    return RolloutBatch(rollouts, {})


def main() -> None:
    """Measure one run and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planned")
    parser.add_argument("--model", choices=list(SIZES), default="100M")
    for name, default in (("prompts", 2), ("group", 4), ("prompt", 100), ("completion", 100), ("microbatch", 16384)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    for flag in ("--checkpoint", "--lora", "--reference"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.json:
        writable(given.json.parent)
    config = GRPOConfig(
        num_prompts_per_step=given.prompts,
        num_generations=given.group,
        max_completion_length=given.completion,
        max_tokens_per_microbatch=given.microbatch,
        dtype=given.dtype,
        gradient_checkpointing=given.checkpoint,
        use_peft=given.lora,
        beta=0.1 if given.reference else 0.0,
        rollout_engine="loop",
        check_sampling=False,
    )
    load = Workload(given.prompts, given.group, given.prompt, given.completion, given.completion)
    here = pick_device(None, None, config)
    plan, found = measure(given.model, config, load, here)
    print(f"{given.model}, {plan.inputs['parameters']:,} parameters, {plan.inputs['dtype']}, {here.name}")
    for row in found:
        planned = "" if row.planned_seconds is None else f", planned {row.planned_seconds:.3g}"
        print(
            f"{row.phase:10} {row.bytes / 1e6:8.0f} MB, planned {row.planned_bytes / 1e6:.0f} "
            f"({row.bytes / row.planned_bytes:.3f}); {row.seconds:.3g} s{planned}"
        )
    if given.json:
        record = {"plan": plan.to_dict(), "measured": [asdict(row) for row in found]}
        given.json.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    end(main)
