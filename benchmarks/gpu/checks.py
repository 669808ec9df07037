"""The stages `environment` and `tests`: where this runs, and the tests marked `gpu`."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench

ROOT = Path(__file__).parents[2]
SHARDS = 8
"""Processes that run tests at a time. They share the GPU: the largest test takes some 20 GB."""
GPU_TESTS = (
    *("tests/ops/test_gpu_attention.py", "tests/ops/test_shared_prefix_varlen.py", "tests/trainer/test_gpu_update.py"),
    *("tests/ops/test_gpu_ops.py", "tests/ops/test_gpu_head.py", "tests/ops/test_fuzz.py"),
    "tests/ops/test_gpu_layer_ops.py",
    *("tests/trainer/test_gpu_rollout.py", "tests/ops/test_decode_attention.py", "tests/ops/test_sample_tokens.py"),
)
PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "datasets", "trl", "liger-kernel", "cut-cross-entropy"),
    *("flash-attn", "flash-attn-3", "flash-attn-4", "peft", "accelerate"),
)


def versions() -> dict[str, str | None]:
    """Of torch the build that is loaded: a CUDA build's package may not say that it is one."""
    found: dict[str, str | None] = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"torch": torch.__version__}


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
    """`pytest -m gpu` of `GPU_TESTS`, in several processes, since most of the time goes into compiling kernels.

    In small form one file of the CPU's. One row a failure, as soon as its process has ended, and one for the whole.
    """
    chosen = ["tests/ops/test_loss_output.py"] if bench.small else ["-m", "gpu", *GPU_TESTS]
    listed = _pytest("--collect-only", "-q", *chosen)
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    shards = [names[i :: min(SHARDS, len(names))] for i in range(min(SHARDS, len(names)))]
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    said = [] if listed.returncode == 0 else [listed.stdout[-4000:] + listed.stderr[-4000:]]
    with ThreadPoolExecutor(SHARDS) as pool:
        runs = [pool.submit(_shard, bench.out / f"junit-{i}.xml", shard) for i, shard in enumerate(shards)]
        for run in as_completed(runs):
            done, report = run.result()
            if done.returncode != 0:
                said.append((done.stdout + done.stderr)[-4000:])
            if report.exists():
                for name, count in _failures(bench, report).items():
                    counts[name] += count
    passed = not said and counts["tests"] == len(names) > counts["skipped"]
    bench.add("tests", "tests", "pytest", {}, correct=passed, error="\n".join(said) or None, counts=counts)


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def _shard(report: Path, names: list[str]) -> tuple[subprocess.CompletedProcess[str], Path]:
    report.unlink(missing_ok=True)  # an earlier run's
    return _pytest("-q", f"--junitxml={report}", *names), report


def _failures(bench: Bench, report: Path) -> dict[str, int]:
    """Adds a row for each test that failed; the numbers of all."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    suites = ElementTree.parse(report).getroot()
    for suite in suites.iter("testsuite"):
        counts = {name: counts[name] + int(suite.get(name, 0)) for name in counts}
    for case in suites.iter("testcase"):
        for bad in (*case.findall("failure"), *case.findall("error")):
            name = f"{case.get('classname')}::{case.get('name')}"
            bench.add("test", "tests", name, {}, correct=False, error=(bad.text or "")[-4000:])
    return counts
