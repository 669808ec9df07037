"""The house: who may import whom, how long a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_PACKAGE = _ROOT / "fastgrpo"
_KERNELS = _ROOT / "kernels" / "fastgrpo_kernels"

# Stages meet in records.py and never import one another; what leads a batch through them may import them all.
_STAGES = {"advantages", "data", "evaluation", "loss", "optim", "packing", "policy", "rewards", "rollout"}
_CONDUCTORS = {"trainer", "collect", "update", "evaluation", "snapshot", "task"}
_SHARED = {"records", "config", "options", "errors", "importing", "seeding", "layers", "products", "wording"} | {
    "distributed"
}
# A stage spread over several modules.
_PARTS = {"data": {"rows"}}
_TRANSFORMERS = {"rollout", "policy", "data", "integrations", "rewards.model"}


def _modules() -> dict[str, Path]:
    return {
        ".".join(p.relative_to(_PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
        for p in sorted(_PACKAGE.rglob("*.py"))
    }


def _imports(path: Path) -> set[str]:
    """Every module imported anywhere in the file, inside functions too; relative ones as written."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return found


def _room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", sorted(m for m in _modules() if _room(m) in _STAGES - _CONDUCTORS))
def test_stages_do_not_import_one_another(module: str) -> None:
    own = _room(module)
    allowed = _SHARED | {own} | _PARTS.get(own, set())
    seen = {name.split(".")[1] for name in _imports(_modules()[module]) if name.startswith("fastgrpo.")}
    assert seen <= allowed, seen - allowed


def test_only_some_rooms_import_transformers() -> None:
    for module, path in _modules().items():
        if any(name.split(".")[0] == "transformers" for name in _imports(path)):
            assert _room(module) in _TRANSFORMERS or module in _TRANSFORMERS, module


def test_config_and_options_need_no_torch() -> None:
    algorithms = [name for name in _modules() if _room(name) == "algorithms"]
    for name in ("config", "options", "option_types", "wording", "errors", "cli", "seeding", *algorithms):
        tree = ast.parse(_modules()[name].read_text())
        top = {n.names[0].name for n in tree.body if isinstance(n, ast.Import)}
        top |= {n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)}
        assert not {t.split(".")[0] for t in top} & {"torch", "transformers", "numpy", "datasets"}, name


def test_the_kernels_stand_alone() -> None:
    """torch, triton and the standard library; relative imports; no package around them."""
    assert not (_KERNELS.parent / "__init__.py").exists()
    for path in _KERNELS.rglob("*.py"):
        for name in _imports(path):
            assert name.split(".")[0] not in {"fastgrpo", "fastgrpo_kernels", "transformers", "numpy", "datasets"}, (
                path,
                name,
            )


def test_files_and_functions_can_be_read() -> None:
    for folder in (_PACKAGE, _KERNELS, _ROOT / "tests", _ROOT / "examples", _ROOT / "benchmarks"):
        for path in folder.rglob("*.py"):
            text = path.read_text()
            assert text.count("\n") <= 400, f"{path}: {text.count(chr(10))} lines"
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                    assert node.end_lineno - node.lineno < 75, f"{path}: {node.name}"


def test_nothing_is_swallowed() -> None:
    for folder in (_PACKAGE, _KERNELS):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ExceptHandler):
                    assert not all(isinstance(s, ast.Pass) for s in node.body), f"{path}:{node.lineno}"
