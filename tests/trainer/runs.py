"""Runs of a tiny model, for the tests of whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from fastgrpo import GRPOConfig, GRPOTrainer

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(6) for b in range(6)]


def digits(completions: list[str], **_: Any) -> list[float]:
    """Dense enough for a random model: the share of digits."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def make_trainer(model: Any, folder: Path, reward: Any = digits, **options: Any) -> GRPOTrainer:
    given = {
        k: options.pop(k) for k in ("eval_dataset", "callbacks", "processing_class", "train_dataset") if k in options
    }
    base = {
        "output_dir": str(folder / "run"),
        "max_steps": 4,
        "num_prompts_per_step": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "report_to": [],
        "disable_progress": True,
        "num_threads": 1,
        "save_steps": 2,
    }
    model = str(model) if isinstance(model, Path) else model
    return GRPOTrainer(model, reward, GRPOConfig(**{**base, **options}), **{"train_dataset": ROWS, **given})


def write_config(folder: Path, model: Path, **options: Any) -> Path:
    """A config file for the command, beside its 25 problems; the run goes into `folder / "run"`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    problems = [(a, b) for a in range(5) for b in range(5)]
    rows.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in problems))
    config = {
        "model": str(model),
        "train_dataset": str(rows),
        "eval_dataset": str(rows),
        "output_dir": str(folder / "run"),
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "eval_steps": 3,
        "save_steps": 2,
        "report_to": [],
        "num_threads": 1,
        **options,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def final_weights(folder: Path, step: int = 4) -> dict[str, torch.Tensor]:
    path = folder / "run" / "checkpoints" / f"step-{step:08d}" / "model"
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def assert_same_run(a: Path, b: Path, step: int = 4) -> None:
    assert timeless(read_lines(a)) == timeless(read_lines(b))
    mine, theirs = final_weights(a, step), final_weights(b, step)
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
