"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml

from fastgrpo.config import RunConfig

_ROOT = Path(__file__).parents[1]
_README = (_ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", _README, flags=re.DOTALL | re.MULTILINE)


def test_the_yaml_is_a_valid_config() -> None:
    [text] = _blocks("yaml")
    config = RunConfig(**yaml.safe_load(text))
    assert config.column_mapping == {"question": "prompt"}


def test_the_reward_works() -> None:
    text = next(b for b in _blocks("python") if "def brevity" in b)
    names: dict[str, object] = {}
    exec(text, names)
    assert names["brevity"](completions=["x"], completion_ids=[[1, 2]], answer=["y"]) == [1 - 2 / 512]  # type: ignore[operator]


def test_the_three_lines_of_the_fused_op() -> None:
    text = next(b for b in _blocks("python") if "linear_grpo_loss" in b)
    hidden = torch.randn(5, 8, requires_grad=True)
    lm_head = torch.nn.Linear(8, 11, bias=False)
    names = {
        "hidden": hidden,
        "lm_head": lm_head,
        "target": torch.randint(11, (5,)),
        "advantage": torch.tensor([1.0, -1.0]),
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
        "old": torch.full((5,), -2.4),
    }
    exec(text, names)
    assert hidden.grad is not None
    assert lm_head.weight.grad is not None
    assert hidden.grad.abs().sum() > 0


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", _README):
        assert target.startswith("http") or (_ROOT / target).exists(), target
