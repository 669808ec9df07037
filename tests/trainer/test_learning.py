"""Each algorithm learns the demo's task, from a model taught more briefly than the demo's. GRPO: test_demo.py."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import make_trainer, read_lines

_EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def arithmetic() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(_EXAMPLES))
        import arithmetic

        yield arithmetic
        del sys.modules["arithmetic"]


@pytest.fixture(scope="module")
def adder(arithmetic: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Right in a little less than half of its answers."""
    folder = tmp_path_factory.mktemp("adder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "_RIGHT_STEPS", 400)
        patch.setattr(arithmetic, "_WRONG_STEPS", 30)
        for part in arithmetic.model(0):
            part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "rloo"},
        {"algorithm": "reinforce"},
        {"algorithm": "reinforce_baseline", "num_generations": 1, "num_prompts_per_step": 256},
        {"algorithm": "reinforce_pp"},
        {"algorithm": "ppo", "critic_learning_rate": 1e-3},
    ],
    ids=["rloo", "reinforce", "reinforce_baseline-without-groups", "reinforce_pp", "ppo"],
)
def test_it_learns_to_add(options: dict[str, Any], arithmetic: Any, adder: Path, tmp_path: Path) -> None:
    task = {"train_dataset": arithmetic.train_dataset(), "num_prompts_per_step": 32, "num_generations": 8}
    steps = {"max_steps": 20, "learning_rate": 2e-4, "warmup_steps": 5, "max_completion_length": 4, "save_steps": 0}
    make_trainer(adder, tmp_path, "exact_match", **{**task, **steps, **options}).train()
    lines = read_lines(tmp_path)
    rewards = [line["reward"] for line in lines]
    assert statistics.fmean(rewards[-5:]) > statistics.fmean(rewards[:5]) + 0.2
    if options["algorithm"] == "ppo":
        assert lines[-1]["value_loss"] < 0.7 * lines[0]["value_loss"]
