"""Triton's interpreter: every test marked `interpreter` passes in it, and bfloat16 in it is what a GPU's is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from fastgrpo_kernels.backend import INTERPRETED

from .interpreter import repair

_ROOT = Path(__file__).parents[2]

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1; test_the_marked_tests_pass runs it")


@pytest.mark.skipif(INTERPRETED, reason="the tests it starts run here already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(900)
def test_the_marked_tests_pass(tmp_path: Path) -> None:
    """In a process of its own: Triton decides when it is imported whether kernels are interpreted."""
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "tests/ops", "-m", "interpreter", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--junitxml={report}"],
        cwd=_ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    assert int(suite.attrib["tests"]) - int(suite.attrib["skipped"]) > 0, done.stdout


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from .sample_kernels import cast

    out = torch.full_like(x, 77, dtype=dtype)
    cast[(1,)](x, out, x.numel(), BLOCK=1024)
    return out


@interpreted
@pytest.mark.interpreter
def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    repair()
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 2**-133 * 0.5, 2**-133 * 1.5])
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-40])
    x = torch.cat([ties, special, torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 100])
    torch.testing.assert_close(_cast(x, torch.bfloat16), x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert _cast(torch.tensor([-0.0]), torch.bfloat16).signbit().all()


@interpreted
@pytest.mark.interpreter
@pytest.mark.parametrize("other", [torch.float16, torch.float32, torch.float64, torch.int32])
def test_casts_of_bfloat16_keep_the_number(other: torch.dtype) -> None:
    repair()
    x = torch.arange(-128, 128)
    torch.testing.assert_close(_cast(x.bfloat16(), other), x.to(other), rtol=0, atol=0)
    torch.testing.assert_close(_cast(x.to(other), torch.bfloat16), x.bfloat16(), rtol=0, atol=0)


@interpreted
@pytest.mark.interpreter
def test_dot_of_bfloat16_is_exact_in_fp32() -> None:
    from .sample_kernels import matmul

    repair()
    a, b = torch.randint(-8, 9, (2, 32, 64), generator=torch.Generator().manual_seed(0)).bfloat16() / 4
    out = torch.empty(32, 32)
    matmul[(1,)](a, b, out, 64, BM=32, BN=32, BK=16)
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=0, atol=0)  # every product and sum is representable


@interpreted
@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["double_uncast", "cumulate_uncast"])
def test_arithmetic_on_bfloat16_is_refused(name: str) -> None:
    from . import sample_kernels

    repair()
    x = torch.ones(16)
    out = torch.empty(16)
    getattr(sample_kernels, name)[(1,)](x, out, BLOCK=16)
    assert (out == (2 * x if name == "double_uncast" else x.cumsum(0))).all()
    with pytest.raises(Exception, match="cast to float32 first"):
        getattr(sample_kernels, name)[(1,)](x.bfloat16(), out.bfloat16(), BLOCK=16)
