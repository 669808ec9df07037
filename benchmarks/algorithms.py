"""The demo trained by every algorithm: reward against samples and against seconds, in one figure.

    OMP_NUM_THREADS=1 python -m benchmarks.algorithms --out DIR [--seeds 0 1 2] [--only ppo grpo] [--steps 100]

The demo's model is warmed up once, for all (`DIR/model`). Each run is `fastgrpo train examples/arithmetic.yaml` with
another `algorithm`, into `DIR/<algorithm>-<seed>`; one that is there already goes on or is kept. `DIR/algorithms.json`
has a row per run. `DIR/algorithms.svg` is the figure: the rewards' mean over the seeds, and over 9 steps around each.
Seconds are those of a step's stages, without evaluations and checkpoints, and their median over the seeds: the machine
may be doing other things.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jinja2 import Environment, StrictUndefined

from benchmarks import results
from benchmarks.command import end, positive, writable
from fastgrpo.algorithms import ALGORITHMS
from fastgrpo.charts import Chart, Series, draw, moving_mean, number
from fastgrpo.errors import RunError

_EXAMPLES = Path(__file__).parents[1] / "examples"
_STAGES = ("rollout", "reward", "prepare", "update", "critic")
# As by default, the critic learns faster than the policy; the demo's learning_rate is 2e-4.
_OPTIONS = {"ppo": {"critic_learning_rate": 1e-3}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.algorithms", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=_seed, nargs="+", default=[0])
    parser.add_argument("--only", choices=ALGORITHMS, nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--steps", type=positive, default=100)
    options = parser.parse_args(argv)
    model = _warm_model(writable(options.out) / "model")
    rows = []
    for seed, algorithm in itertools.product(options.seeds, options.only):
        folder = options.out / f"{algorithm}-{seed}"
        _train(folder, model, {"algorithm": algorithm, "seed": seed, "max_steps": options.steps})
        rows.append(read_row(folder, algorithm, seed))
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "curve"}), flush=True)
    write(options.out, rows)
    (options.out / "algorithms.svg").write_text(figure(rows), encoding="utf-8")


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, got {text!r}")
    return int(text)


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A results file, a line for each row."""
    header = json.dumps(results.header(torch.device("cpu"), "time.perf_counter", None), indent=2).removesuffix("\n}")
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    (folder / "algorithms.json").write_text(f'{header},\n  "results": [\n{lines}\n  ]\n}}\n')


def _warm_model(folder: Path) -> Path:
    """The demo's model as the demo warms it up, with its tokenizer."""
    if not (folder / "tokenizer_config.json").exists():
        sys.path.insert(0, str(_EXAMPLES))
        import arithmetic

        torch.set_num_threads(1)
        for part in arithmetic.model(0):
            part.save_pretrained(folder)
    return folder


def _train(folder: Path, model: Path, options: dict[str, Any]) -> None:
    fixed = {"model": model, "output_dir": folder, "eval_steps": 0, "save_steps": 0, "report_to": "none"}
    given = fixed | options | _OPTIONS.get(options["algorithm"], {}) | {"disable_progress": "true"}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "fastgrpo", "train", str(_EXAMPLES / "arithmetic.yaml"), *flags]
    if code := subprocess.run(command).returncode:
        raise RunError(f"{folder}: its training ended with exit code {code}; what it said stands above")


def read_row(folder: Path, algorithm: str, seed: int) -> dict[str, Any]:
    """What a finished run of one step per rollout batch left behind, as a row of results; `ms` is a step's.

    Beside it `seconds` by stage; `skipped`, the mean share of tokens that the policy's steps left out; `reward` over
    the first and last tenth of the steps; `curve`: after each step the samples seen and seconds spent so far, and the
    reward of the step's samples.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward" in line]
    summary = json.loads((folder / "summary.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    seconds = {stage: sum(line.get(f"perf/{stage}_time", 0.0) for line in steps) for stage in _STAGES}
    spent = np.cumsum([sum(line.get(f"perf/{stage}_time", 0.0) for stage in _STAGES) for line in steps])
    samples = config["num_prompts_per_step"] * config["num_generations"] * np.arange(1, len(steps) + 1)
    rewards = [line["reward"] for line in steps]
    tenth = max(1, len(steps) // 10)
    times = np.percentile(np.diff(spent, prepend=0.0), [50, 20, 80])
    return {
        "case": f"algorithms-{algorithm}-{seed}",
        "op": "algorithms",
        "peer": algorithm,
        "params": {"model": "demo-0.33m", "steps": len(steps), "seed": seed},
        "ms": {name: round(1e3 * float(t), 1) for name, t in zip(("median", "p20", "p80"), times, strict=True)},
        "peak_bytes": None,
        "correct": summary["accuracy_after"] > summary["accuracy_before"],  # it has learnt
        "options": {name: config[name] for name in ("loss_type", "learning_rate", "kl_coef", "critic_learning_rate")},
        "samples": int(samples[-1]),
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()} | {"all": round(float(spent[-1]), 2)},
        "skipped": round(float(np.mean([line["perf/skipped_token_fraction"] for line in steps])), 3),
        "reward": [round(float(np.mean(part)), 4) for part in (rewards[:tenth], rewards[-tenth:])],
        "accuracy": [summary["accuracy_before"], summary["accuracy_after"]],
        "curve": {"samples": samples.tolist(), "seconds": np.round(spent, 3).tolist(), "reward": rewards},
    }


def figure(rows: Sequence[dict[str, Any]]) -> str:
    """An SVG of two panels, reward against samples and against seconds, a curve for each algorithm."""
    curves: dict[str, dict[str, np.ndarray]] = {}
    for algorithm in dict.fromkeys(row["peer"] for row in rows):
        own = [row["curve"] for row in rows if row["peer"] == algorithm]
        shortest = min(len(curve["reward"]) for curve in own)
        seeds = {axis: np.array([curve[axis][:shortest] for curve in own]) for axis in own[0]}
        curves[algorithm] = {axis: np.mean(values, axis=0) for axis, values in seeds.items()}
        curves[algorithm]["seconds"] = np.median(seeds["seconds"], axis=0)
    panels = [_panel(axis, curves) for axis in ("samples", "seconds")]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    template = environment.from_string(Path(__file__).with_suffix(".svg").read_text(encoding="utf-8"))
    return template.render(panels=panels, title="The demo by algorithm")


def _panel(axis: str, curves: dict[str, dict[str, np.ndarray]]) -> Chart:
    series = {name: Series(curve[axis], moving_mean(curve["reward"], 9)) for name, curve in curves.items()}
    end = math.ceil(max(curve[axis][-1] for curve in curves.values()))
    return draw(axis, f"Reward against {axis}", series, (0, end))


if __name__ == "__main__":
    end(main)
