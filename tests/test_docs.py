"""docs/: examples run and print what is shown; what is named exists. Each section runs alone."""

from __future__ import annotations

import ast
import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

import fastgrpo_kernels
from fastgrpo_kernels.head import plan

_DOCS = Path(__file__).parents[1] / "docs"
_TEXT = (_DOCS / "ops.md").read_text()
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def _sections(text: str) -> dict[str, str]:
    """Text by heading; a `###` belongs to the `##` before it."""
    parts = re.split(r"^##? (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _examples(text: str) -> str:
    return "\n".join(code for language, code in _BLOCK.findall(text) if language == "pycon")


_SECTIONS = _sections(_TEXT)
_INTRODUCTION, *_OTHERS = (name for name, text in _SECTIONS.items() if ">>>" in text)


@pytest.mark.parametrize("name", _OTHERS)
def test_examples(name: str) -> None:
    code = _examples(_SECTIONS[name])
    if "from peft" in code:
        pytest.importorskip("peft")
    _run([(_examples(_SECTIONS[_INTRODUCTION]), _INTRODUCTION), (code, name)], "docs/ops.md")


@pytest.mark.parametrize("page", ["update.md", "plan.md"])
def test_examples_of_other_pages(page: str) -> None:
    sections = [(name, text) for name, text in _sections((_DOCS / page).read_text()).items() if ">>>" in text]
    assert sections
    for name, text in sections:
        _run([(_examples(text), name)], f"docs/{page}")


def _run(parts: list[tuple[str, str]], file: str) -> None:
    """Each (examples, title) with the names of those before it."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    report: list[str] = []
    for source, title in parts:
        test = parser.get_doctest(source, names, title, file, 0)
        assert test.examples, title
        runner.run(test, out=report.append, clear_globs=False)
        names = test.globs
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_code_that_is_not_run_is_python() -> None:
    blocks = [code for language, code in _BLOCK.findall(_TEXT) if language == "python"]
    assert blocks
    for code in blocks:
        ast.parse(code)


def test_every_public_name_is_there() -> None:
    absent = [name for name in fastgrpo_kernels.__all__ if name not in _TEXT]
    assert not absent


def test_budgets_are_the_code_s() -> None:
    host, device = (plan.HOST_LOGITS, plan.HOST_SEQUENCE_LOGITS), (plan.DEVICE_LOGITS, plan.DEVICE_GRADIENTS_FROZEN)
    shown = [f"{size >> 20} MiB" for size in (*host, *device)] + [f"{plan.DEVICE_GRADIENTS >> 30} GiB"]
    assert not [amount for amount in shown if amount not in _TEXT]


def test_transformers_gives_the_normed_states_last() -> None:
    """What the recipe for OpenRLHF rests on."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=32, num_hidden_layers=2, num_key_value_heads=1, **sizes))
    ids = torch.arange(6)[None]
    output = model(ids, output_hidden_states=True, logits_to_keep=1)
    assert output.logits.shape == (1, 1, 32)
    assert torch.equal(output.hidden_states[-1], model.model(ids).last_hidden_state)


def test_compiled_and_checkpointed_it_is_the_same() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    others = torch.arange(6), torch.tensor([1.0, -1.0]), torch.tensor([0, 2, 6], dtype=torch.int32)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fastgrpo_kernels.linear_grpo_loss(hidden, weight, *others).loss

    plain = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden, weight)
    checkpointed = torch.utils.checkpoint.checkpoint(loss, hidden, weight, use_reentrant=False)
    for other in (compiled, checkpointed):
        assert all(map(torch.equal, plain, torch.autograd.grad(other, (hidden, weight))))


@pytest.mark.parametrize(
    "page", ["ops.md", "update.md", "losses.md", "rollouts.md", "algorithms.md", "plan.md", "performance.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    for path, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", (_DOCS / page).read_text()):
        if path.startswith("http"):
            continue
        file = _DOCS / path if path else _DOCS / page
        assert file.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings], anchor
