"""The stages `train` and `algorithms`: whole runs of the trainer, and PPO against GRPO, controlled.

PPO and GRPO get the same model, prompts, lengths, packing, kernels and options; what PPO adds is its critic. Memory is
that of tensors: what lasts, by part, and the peak of each phase; beside each the planner's prediction.

    python -m benchmarks.gpu.algorithms --out DIR      # PPO against GRPO here, without a GPU a model of 10 M parameters
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.clock import peak_tensor_bytes
from benchmarks.command import end, writable
from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.rollout import Job, make_policy
from benchmarks.gpu.update_cases import shapes
from benchmarks.small_model import MEDIUM, Shape
from fastgrpo import GRPOConfig, GRPOTrainer
from fastgrpo.gpus import Device, gpu_of
from fastgrpo.optim import Optimizer
from fastgrpo.plan.planner import plan_run
from fastgrpo.plan.records import Plan, Workload
from fastgrpo.plan.shapes import describe_shape
from fastgrpo.policy import Policy

LASTING = {False: 0.5, True: 0.55}
"""Of PPO's weights, gradients and optimizer state, GRPO's at most; without and with a reference model in both."""

PREDICTED = 0.1
"""What a peak may be off its prediction; what lasts must be predicted to the byte."""

NEVER = 1e12
"""Mean length of completions that do not end by themselves: all are the longest, for both algorithms."""

STAGES = ("rollout", "prepare", "update", "critic")
_MEASURED = 2
"""The step whose memory is measured; the optimizers' state is there by then. Times are those of the steps after it."""


def share_even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even tokens: what a model without a language can learn."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


class Watched(GRPOTrainer):
    """A trainer that notes the peak of each phase of its second step, in bytes of tensors beyond those before it."""

    peaks: dict[str, int]

    def _begin(self) -> None:
        super()._begin()
        self.peaks = {}
        for phase, owner, name in (
            ("rollout", self.engine, "generate"),
            ("prepare", self.updater, "prepare"),
            ("update", self.updater, "step"),
        ):
            setattr(owner, name, self._watched(phase, getattr(owner, name)))

    def _watched(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any, **kwargs: Any) -> Any:
            if self.state.step != _MEASURED - 1:
                return call(*args, **kwargs)
            found: list[Any] = []
            self.peaks[phase] = peak_tensor_bytes(self.policy.device, lambda: found.append(call(*args, **kwargs)))
            return found[0]

        return watch

    def lasting(self) -> Row:
        """Bytes that are there throughout, by part."""
        learners: list[tuple[Any, Optimizer]] = [(self.policy.model, self.optimizer)]
        if self.critic is not None and self.critic_optimizer is not None:
            whole = torch.nn.ModuleList([self.critic.body.model, self.critic.value_head])
            learners.append((whole, self.critic_optimizer))
        weights = [t for model, o in learners for t in (*model.parameters(), *o.masters().values())]
        trained = [p for _, o in learners for group in o.torch_optimizer.param_groups for p in group["params"]]
        state = [t for _, o in learners for s in o.torch_optimizer.state.values() for t in s.values()]
        frozen = self.reference.frozen.model.parameters() if self.reference and self.reference.frozen else ()
        return {
            "weights": _bytes(weights),
            "reference": _bytes(frozen),
            "gradients": _bytes(p.grad for p in trained),
            "optimizer": _bytes(state),
        }


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of storages, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t is not None}
    return sum(s.nbytes() for s in storages.values())


def _run(bench: Bench, shape: Shape, job: Job, steps: int, **options: Any) -> tuple[Watched, list[Row], GRPOConfig]:
    """So many steps of a policy with random weights; the lines of its metrics."""
    policy = make_policy(bench, shape, job)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            device="cuda:0" if bench.device.type == "cuda" else "cpu",
            max_steps=steps,
            num_prompts_per_step=job.prompts,
            num_generations=job.n,
            max_prompt_length=job.length,
            max_completion_length=job.longest,
            rollout_batch_size=min(1024, job.prompts * job.n),
            save_steps=0,
            disable_progress=True,
            log_completions=False,
            report_to=["none"],
            **{"learning_rate": 1e-6, "rollout_engine": "loop", "max_tokens_per_microbatch": 32768} | options,
        )
        rows = [{"prompt": " ".join(map(str, p.token_ids))} for p in job.make(shape.vocabulary)]
        trainer = Watched(policy.causal_lm, share_even, config, rows, processing_class=policy.tokenizer)
        trainer.train()
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return trainer, lines, config


# ------------------------------------------------------------------------------------------------------------- the run


def train(bench: Bench) -> None:
    """A real run: samples, rewards, updates; the reward must rise. Seconds by stage, tokens per second, peak memory."""
    shape = shapes(bench)[0]
    job = Job(4, 4, 6, 8.0, 16) if bench.small else Job(32, 8, 128, 200.0, 512)
    steps = 6 if bench.small else 16
    rate = 3e-3 if bench.small else 2e-5
    params = {"model": shape.name, "steps": steps, "learning_rate": rate, **job.params}
    bench.attempt("run", "train", "fastgrpo", params, partial(_train, bench, shape, job, steps, rate))
    bench.free()


def _train(bench: Bench, shape: Shape, job: Job, steps: int, rate: float) -> Row:
    trainer, lines, _ = _run(bench, shape, job, steps, learning_rate=rate)
    quarter = max(1, steps // 4)
    first, last = (statistics.fmean(line["reward"] for line in part) for part in (lines[:quarter], lines[-quarter:]))
    timed = [line["perf/step_time"] for line in lines[_MEASURED:]]
    times = {name: 1e3 * f(timed) for name, f in (("ms", statistics.median), ("p20", min), ("p80", max))}
    names = ("perf/rollout_time", "perf/prepare_time", "perf/update_time", "perf/tokens_per_second", "perf/mfu")
    stages = {name: statistics.median(line[name] for line in lines[_MEASURED:]) for name in names if name in lines[-1]}
    return {
        **{name: round(value, 3) for name, value in times.items()},
        "stages": stages, "reward": [first, last], "peak_bytes": trainer.peaks and max(trainer.peaks.values()),
        "correct": last > first and not trainer.state.skipped_steps,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------- PPO against GRPO


def algorithms(bench: Bench) -> None:
    """GRPO and PPO, each without and with a reference model; what lasts, the peaks, the seconds."""
    job = Job(4, 4, 6, NEVER, 16) if bench.small else Job(16, 8, 128, NEVER, 512)
    for shape in dict.fromkeys(shapes(bench)):
        compare(bench, shape, job)


def compare(bench: Bench, shape: Shape, job: Job) -> None:
    """One shape."""
    for reference in (False, True):
        found: dict[str, Row] = {}
        for algorithm in ("grpo", "ppo"):
            params = {"model": shape.name, "algorithm": algorithm, "reference": reference, **job.params}
            run = partial(_measure, bench, shape, job, algorithm, reference)
            bench.attempt("memory", algorithm, "fastgrpo", params, run)
            if bench.rows[-1]["ms"]:
                found[algorithm] = bench.rows[-1]
            bench.free()
        if len(found) == 2:
            _compare(bench, found, {"model": shape.name, "reference": reference, **job.params})


def _compare(bench: Bench, found: dict[str, Row], params: Row) -> None:
    """What lasts must be at most a share; the peak is told."""
    grpo, ppo = (found[name] for name in ("grpo", "ppo"))
    must = LASTING[params["reference"]]
    counted = ("weights", "reference", "gradients", "optimizer")
    lasting = sum(grpo["measured"][part] for part in counted) / sum(ppo["measured"][part] for part in counted)
    bench.add(
        "lasting", "grpo", "ppo", params,
        memory_ratio=round(lasting, 4), speed_ratio=round(must / lasting, 4), required=1.0, reached=lasting <= must,
    )  # fmt: skip
    peaks = grpo["peak_bytes"] / ppo["peak_bytes"]
    bench.add("peak", "grpo", "ppo", params, memory_ratio=round(peaks, 4), speed_ratio=round(ppo["ms"] / grpo["ms"], 3))


def _measure(bench: Bench, shape: Shape, job: Job, algorithm: str, reference: bool) -> Row:
    options: dict[str, Any] = {"algorithm": algorithm, "beta": 0.04 if reference and algorithm == "grpo" else 0.0}
    options["dtype"] = "bfloat16"  # with fp32 master weights, as on a GPU
    if algorithm == "ppo":
        options |= {"kl_coef": 0.05 if reference else 0.0, "critic_learning_rate": 1e-6}
    trainer, lines, config = _run(bench, shape, job, 5, check_sampling=False, **options)
    measured, plan = trainer.lasting(), _planned(trainer.policy, bench.device, config, job)
    stays = sum(measured.values())
    measured |= {f"peak/{phase}": stays + extra for phase, extra in trainer.peaks.items()}
    predicted: Row = _predicted(plan)
    off = {name: predicted[name] / value - 1 for name, value in measured.items() if value}
    worst = max(map(abs, off.values()))
    timed = lines[_MEASURED:]
    seconds = {s: statistics.median(line.get(f"perf/{s}_time", 0.0) for line in timed) for s in STAGES}
    steps = [1e3 * sum(line.get(f"perf/{stage}_time", 0.0) for stage in STAGES) for line in timed]
    times = {name: round(f(steps), 3) for name, f in (("ms", statistics.median), ("p20", min), ("p80", max))}
    exact = all(off.get(part, 0.0) == 0 for part in ("weights", "reference", "gradients", "optimizer"))
    return {
        **times, "seconds": seconds, "predicted_seconds": plan.seconds,
        "peak_bytes": max(value for name, value in measured.items() if name.startswith("peak/")),
        "measured": measured, "predicted": predicted, "off": {name: round(value, 4) for name, value in off.items()},
        "correct": exact, "required": PREDICTED, "reached": worst <= PREDICTED, "speed_ratio": round(worst, 4),
    }  # fmt: skip


def _planned(policy: Policy, device: torch.device, config: GRPOConfig, job: Job) -> Plan:
    """With the lengths that were sampled."""
    workload = Workload(job.prompts, job.n, job.length, job.longest, min(job.mean, job.longest))
    if device.type != "cuda":
        return plan_run(describe_shape(policy.causal_lm, config), config, Device("CPU", 64 << 30), workload)
    found = torch.cuda.get_device_properties(device)
    known = gpu_of(found.name) or Device(found.name, 0)
    here = Device(found.name, found.total_memory, known.flops, known.bandwidth, found.major)
    return plan_run(describe_shape(policy.causal_lm, config), config, here, workload)


def _predicted(plan: Plan) -> Row:
    """The same parts; of phases that are measured together the larger."""
    models = {name: model for name, model in plan.models.items() if name != "reference"}
    reference = plan.models["reference"].total if "reference" in plan.models else 0
    names = ("weights", "gradients", "optimizer")
    parts: Row = {name: sum(getattr(model, name) for model in models.values()) for name in names}
    together = {
        "rollout": ("rollout",),
        "prepare": ("reference", "old log-probs", "values"),
        "update": ("update", "critic update", "optimizer step"),
    }
    sums = {phase: sum(found.values()) for phase, found in plan.phases.items()}
    lasting = sum(model.total for model in plan.models.values())
    peaks = {
        f"peak/{phase}": max([lasting, *(sums[name] for name in names if name in sums)])
        for phase, names in together.items()
    }
    return parts | {"reference": reference} | peaks


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.algorithms", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where ppo_against_grpo.json goes")
    out = writable(parser.parse_args().out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench("algorithms", Path(folder), device, small=False)
        if device.type == "cuda":
            algorithms(bench)
        else:
            compare(bench, MEDIUM, Job(4, 4, 24, NEVER, 48))
    header = results.header(device, "time.perf_counter", None)
    results.write(out, [_as_peers(row) for row in bench.rows if row["case"] == "memory"], header)
    shown = ("case", "op", "params", "memory_ratio", "measured", "off", "seconds", "error")
    for row in bench.rows:
        print(json.dumps({name: row[name] for name in shown if row.get(name) is not None}))


def _as_peers(row: Row) -> Row:
    """For a results file of one op, in which the algorithms are each other's peers."""
    params = {name: value for name, value in row["params"].items() if name not in ("algorithm", "mean")}
    return {**row, "op": "ppo_against_grpo", "peer": row["params"]["algorithm"], "params": params}


if __name__ == "__main__":
    end(main)
