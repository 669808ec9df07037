"""The package stands alone: torch and the standard library only, relative imports, nothing heavy on import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import fastgrpo_kernels

ROOT = Path(fastgrpo_kernels.__file__).parent


def test_imports_are_relative_torch_triton_or_standard() -> None:
    files = list(ROOT.rglob("*.py"))
    assert len(files) > 10
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top in ("torch", "triton") or top in sys.stdlib_module_names, f"{path}: {name}"


def test_import_loads_neither_transformers_nor_triton() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fastgrpo_kernels; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split()) - set(sys.stdlib_module_names)
    assert loaded <= {"fastgrpo_kernels", "torch"}


def test_the_folder_that_holds_the_package_is_no_package() -> None:
    assert not (ROOT.parent / "__init__.py").exists()


def test_public_names() -> None:
    assert sorted(fastgrpo_kernels.__all__) == fastgrpo_kernels.__all__
    assert all(getattr(fastgrpo_kernels, name).__doc__ for name in fastgrpo_kernels.__all__)
