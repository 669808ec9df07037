"""`fastgrpo plan`: its own arguments, and the prediction as people read it. No torch here before it is needed."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.config import ConfigError, GRPOConfig, nearest
from fastgrpo.gpus import GPUS, Device, gpu_of
from fastgrpo.wording import counted

if TYPE_CHECKING:
    from fastgrpo.plan.fitting import Planning
    from fastgrpo.plan.records import Plan, Workload

PROMPT_LENGTH = 512
"""Tokens of a prompt where neither the options nor the command line say."""


def make_parser() -> argparse.ArgumentParser:
    """The arguments beside a run's options, which follow CONFIG.yaml as they do for `train`."""
    parser = argparse.ArgumentParser(
        prog="fastgrpo plan",
        usage="fastgrpo plan CONFIG.yaml [--option value ...] [--gpu NAME] ...",
        description="Predict a run's memory by part and phase, its seconds by stage; docs/plan.md has the formulas. "
        "Only the model's config is loaded. Exits with 1 when the run does not fit.",
        epilog="fastgrpo train --help lists every option of a run. Of CONFIG.yaml only `model` is required here.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", metavar="NAME", help=f"the device: {', '.join(GPUS)}, or cpu; default: what is here")
    parser.add_argument("--gpu-memory", metavar="GB", type=float, help="its memory in 1e9 bytes")
    parser.add_argument(
        "--prompt-length",
        metavar="TOKENS",
        type=int,
        help=f"of every prompt; default: max_prompt_length, or else {PROMPT_LENGTH}",
    )
    parser.add_argument(
        "--mean-length", metavar="TOKENS", type=float, help="of completions; default: max_completion_length"
    )
    parser.add_argument(
        "--processes", metavar="N", type=int, default=None, help="GPUs, a process each: torchrun --nproc-per-node N"
    )
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.add_argument("--table", action="store_true", help="print what fits: model size by context, in Markdown")
    parser.add_argument("--into", metavar="FILE", type=Path, help="put that table between its marks in a file")
    return parser


def print_table(asked: argparse.Namespace, rest: Sequence[str]) -> int:
    """The table of what fits, to the screen or into a file. ConfigError for arguments that it takes no heed of."""
    into: Path | None = asked.into
    named = ("gpu", "gpu_memory", "prompt_length", "mean_length", "processes")
    others = [f"--{name.replace('_', '-')}" for name in named if getattr(asked, name) is not None]
    if others := [*others, *(["--json"] if asked.json else []), *rest]:
        raise ConfigError(f"--table is of models and GPUs of its own: it takes --into FILE alone, not {others[0]}")
    from fastgrpo.plan.table import make_table, write_table

    if into is None:
        print(make_table())
    else:
        write_table(into)
        print(into)
    return 0


def run(asked: argparse.Namespace, model: str, config: GRPOConfig) -> int:
    """Predict and print; the exit code."""
    device, workload = pick_device(asked.gpu, asked.gpu_memory, config), _workload(asked, config)
    from fastgrpo.plan.fitting import Planning
    from fastgrpo.policy.loading import load_skeleton

    planning = Planning(load_skeleton(model, config), config, device, workload)
    plan = planning.plan()
    if asked.json:
        print(json.dumps({"model": model} | plan.to_dict(), indent=2))
    else:
        _show(model, plan, planning)
    return 0 if plan.fits else 1


def pick_device(gpu: str | None, gigabytes: float | None, config: GRPOConfig) -> Device:
    """What `--gpu` and `--gpu-memory` name, else where the run would be: the GPU that is here, or the CPU."""
    if gigabytes is not None and not 0 < gigabytes <= 1e9:
        raise ConfigError(f"--gpu-memory={gigabytes:g} must be greater than 0, in GB, and at most 1e9")
    name = None if gpu is None else gpu.lower()
    if name not in (None, "cpu", *GPUS):
        known = [*GPUS, "cpu"]
        raise ConfigError(f"--gpu={gpu} is not known{nearest(str(name), known)}; there are {', '.join(known)}")
    device = GPUS[name] if name in GPUS else _here(config) if name is None else _cpu()
    if gigabytes is None:
        return device
    memory = round(gigabytes * 1e9)
    if name is None:  # some GPU: of no known rates, and without what only Hopper has
        return Device("a GPU", memory, capability=8)
    return Device(device.name, memory, device.flops, device.bandwidth, device.capability)


def _here(config: GRPOConfig) -> Device:
    import torch

    if config.device == "cpu" or not torch.cuda.is_available():
        return _cpu()
    found = torch.cuda.get_device_properties(None if config.device == "auto" else config.device)
    known = gpu_of(found.name) or Device(found.name, 0)
    return Device(found.name, found.total_memory, known.flops, known.bandwidth, found.major)


def _cpu() -> Device:
    return Device("CPU", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _workload(asked: argparse.Namespace, config: GRPOConfig) -> Workload:
    from fastgrpo.plan.records import Workload

    for name in ("prompt_length", "mean_length", "processes"):
        value = getattr(asked, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')}={value:g} must be greater than 0")
    prompt = asked.prompt_length or config.max_prompt_length or PROMPT_LENGTH
    longest = config.max_completion_length
    mean = asked.mean_length or longest
    if mean > longest:
        raise ConfigError(f"--mean-length={mean:g} is above max_completion_length={longest}")
    processes = asked.processes or 1
    share = -(-config.num_prompts_per_step // processes)
    return Workload(share, config.num_generations, prompt, longest, mean, processes)


# ------------------------------------------------------------------------------------------------------------ in words


def _show(model: str, plan: Plan, planning: Planning) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    given = plan.inputs
    trains = "all train" if given["trainable"] == given["parameters"] else f"{given['trainable']:,} train"
    console.print(f"{model}: {given['parameters']:,} parameters, {trains}, {given['dtype']}", markup=False)
    if given["processes"] > 1:
        console.print(f"{given['processes']} processes, a GPU each; what follows is of one of them", markup=False)
    prompts, group = counted(given["prompts"], "prompt"), counted(given["group"], "completion")
    console.print(
        f"{plan.device.name}, {_gb(plan.device.memory)} GB; {prompts} of {given['prompt_tokens']} tokens, "
        f"{group} each, of up to {given['longest_completion']}, "
        f"{given['mean_completion']:g} on average\nmicro-batches of up to {given['microbatch_tokens']:,} tokens; "
        f"{counted(given['rollout_rows'], 'completion')} decoded at once by {given['engine']}\n",
        markup=False,
    )
    console.print(_memory_table(plan))
    console.print(f"\npeak {_gb(plan.peak)} GB, in {plan.peak_phase}" + _beyond(plan), markup=False)
    for line in [*_verdict(plan, planning), *_time(plan, planning), *(f"note: {note}" for note in plan.notes)]:
        console.print(line, markup=False)


def _beyond(plan: Plan) -> str:
    if not plan.device.is_gpu:
        return ""
    return f"; {_gb(plan.needed)} GB with what CUDA and its allocator take"


def _memory_table(plan: Plan) -> Any:
    from rich import box
    from rich.table import Table

    unit, name = (1e9, "GB") if plan.peak >= 1e9 else (1e6, "MB")

    def row(part: str, sizes: Iterable[int]) -> None:
        table.add_row(part, *(f"{size / unit:.3g}" if size >= unit else f"{size / unit:.2f}" for size in sizes))

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(name, no_wrap=True)
    for phase in plan.phases:  # narrow: a name's words below one another, none cut
        table.add_column(phase, justify="right", min_width=max(map(len, phase.split())))
    for part in next(iter(plan.phases.values())):
        sizes = [parts[part] for parts in plan.phases.values()]
        if any(sizes):
            row(part, sizes)
    table.add_section()
    row("together", (sum(parts.values()) for parts in plan.phases.values()))
    return table


def _verdict(plan: Plan, planning: Planning) -> list[str]:
    """Does it fit, what more would, or what else."""
    if plan.fits:
        largest = planning.largest_microbatch()
        room = f"; max_tokens_per_microbatch could be {largest:,}" if largest else ""
        return [f"fits{room}"]
    found = [
        f"  with {', '.join(f'{name}={_yaml(value)}' for name, value in changes.items())}: {_gb(other.needed)} GB"
        for changes, other in planning.suggestions()
    ]
    return ["does not fit" + (":" if found else ", nor with checkpointing, short micro-batches or LoRA"), *found]


def _time(plan: Plan, planning: Planning) -> list[str]:
    if not plan.fits:
        return []
    if plan.seconds is None:
        return [f"seconds: not predicted for {plan.device.name}, whose rates are not known"]
    stages = ", ".join(f"{stage} {seconds:.3g}" for stage, seconds in plan.seconds.items())
    total = sum(plan.seconds.values())
    steps = planning.config.steps_per_batch
    return [f"seconds of a rollout batch, {counted(steps, 'optimizer step')}: {stages}; together {total:.3g}"]


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gb(size: int) -> str:
    """GB of 1e9 bytes, to three digits."""
    return f"{size / 1e9:.3g}" if size < 1e12 else f"{size / 1e9:.0f}"
