"""The stages `environment` and `tests`: where this runs, and the tests marked `gpu`."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "transformers", "numpy", "trl", "liger-kernel", "cut-cross-entropy")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def environment(bench: Bench) -> None:
    """Versions, and the GPU with its driver."""
    params: dict[str, object] = {**versions()}
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        params |= {"gpu": properties.name, "bytes": properties.total_memory, "sms": properties.multi_processor_count}
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            params["driver"] = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            params["driver"] = f"unknown: {error}"
    bench.add("environment", "environment", "", params, correct=True)


def tests(bench: Bench) -> None:
    """`pytest -m gpu tests/ops`; in small form one file of the CPU's. One row a failure, one for the whole."""
    chosen = ["tests/ops/test_loss_output.py"] if bench.small else ["-m", "gpu", "tests/ops"]
    report = bench.out / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *chosen]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    if report.exists():
        suites = ElementTree.parse(report).getroot()
        for suite in suites.iter("testsuite"):
            counts = {name: counts[name] + int(suite.get(name, 0)) for name in counts}
        for case in suites.iter("testcase"):
            for bad in (*case.findall("failure"), *case.findall("error")):
                name = f"{case.get('classname')}::{case.get('name')}"
                bench.add("test", "tests", name, {}, correct=False, error=(bad.text or "")[-4000:])
    ran = counts["tests"] > counts["skipped"]
    passed = done.returncode == 0 and ran
    text = None if passed else (done.stdout + done.stderr)[-4000:]
    bench.add("tests", "tests", "pytest", {}, correct=passed, error=text, counts=counts)
