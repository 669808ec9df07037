"""`fastgrpo bench` as a user meets it: cases run and are kept, and what is wrong with the command is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_suite, registry, runner
from fastgrpo import cli

_ROOT = Path(__file__).parents[2]
_SUITE = ["--suite", "ops", "--case", "gae", "--device", "cpu"]
_WRONG = """
import fastgrpo_kernels, sys
right = fastgrpo_kernels.gae
fastgrpo_kernels.gae = lambda *args, **options: [1.1 * x for x in right(*args, **options)]
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""

_STOPPED = """
import fastgrpo_kernels, os, signal, sys
fastgrpo_kernels.gae = lambda *args, **options: os.kill(os.getpid(), signal.SIGTERM)
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def _bench(*arguments: str, program: list[str]) -> subprocess.CompletedProcess[str]:
    """Free of this test's own pytest: under xdist, pytest-benchmark does not time."""
    command = [sys.executable, *program, *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_a_suite_runs_and_its_results_are_kept(tmp_path: Path) -> None:
    kept = tmp_path / "results"
    suite = ["--suite", "ops", "--case", "attention[prompt=128", "--device", "cpu"]
    done = _bench("bench", *suite, "--cpu-time", "--results", str(kept), program=["-m", "fastgrpo"])
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((kept / "shared_prefix_attention.json").read_text())
    assert {"commit", "date", "versions", "device"} <= content.keys()
    assert content["device"]["threads"] == 1
    assert content["timer"] == "time.process_time"
    assert content["limits"]["gemm_tflops"] > 0
    rows = content["results"]
    assert [row["peer"] for row in rows] == ["torch", "fastgrpo"]
    assert all(row["correct"] and row["ms"]["p20"] <= row["ms"]["p80"] for row in rows)
    assert all(row["ratio_to_limit"] > 0 for row in rows)
    if sys.platform == "linux":
        assert all(row["peak_bytes"] > 0 for row in rows)
    assert "1/2 shared_prefix_attention[prompt=128,n=8,completion=64]-torch" in done.stderr
    assert "p20-p80" in done.stdout
    assert "fastgrpo" in done.stdout


def test_a_wrong_op_of_ours_is_an_error_and_has_no_time(tmp_path: Path) -> None:
    done = _bench(*_SUITE, "--results", str(tmp_path), program=["-c", _WRONG])
    assert done.returncode == 1, done.stderr
    naive, ours = json.loads((tmp_path / "gae.json").read_text())["results"]
    assert naive["ms"] is not None
    assert ours["ms"] is None
    assert ours["correct"] is False
    assert "is wrong, so it is not timed" in done.stdout


def test_what_was_measured_before_sigterm_is_kept(tmp_path: Path) -> None:
    """The peer's row; the rows of an earlier run that it replaces are told."""
    earlier = json.loads((_ROOT / "benchmarks" / "results" / "cpu-2core" / "gae.json").read_text())
    (tmp_path / "gae.json").write_text(json.dumps(earlier))
    done = _bench(*_SUITE, "--results", str(tmp_path), program=["-c", _STOPPED])
    assert done.returncode == 143, done.stderr
    [naive] = json.loads((tmp_path / "gae.json").read_text())["results"]
    assert naive["ms"] is not None
    assert "gae.json: 1 rows of an earlier run are no longer in it" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["gae.json"]
    done = _bench(*_SUITE, "--peer", "fastgrpo", "--results", str(tmp_path), program=["-c", _STOPPED])
    assert (done.returncode, done.stdout.strip()) == (143, "stopped before there was a result")
    assert json.loads((tmp_path / "gae.json").read_text())["results"] == [naive]


def test_what_the_gpu_suite_had_when_it_was_stopped_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(arguments: list[str]) -> int:
        (Path(arguments[1]) / "results.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_suite, "main", stopped)
    with pytest.raises(KeyboardInterrupt):
        runner.run_stages(["rollout"], tmp_path / "results")
    assert (tmp_path / "results" / "gpu_suite.json").read_text() == "{}"
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        runner.run_stages(["rollout"], tmp_path / "file")


@pytest.mark.parametrize(("name", "word"), [("file", "File exists"), ("results", "gae.json cannot be read as results")])
def test_results_that_cannot_be_kept_are_no_reason_to_measure(name: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "gae.json").write_text('{"results": [')
    done = _bench("bench", *_SUITE, "--results", str(tmp_path / name), program=["-m", "fastgrpo"])
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert word in line


def test_suites_are_named_the_same_in_both_places() -> None:
    """The parser must not import torch, so it has their names itself."""
    from benchmarks.__main__ import _SUITES

    assert sorted(_SUITES) == sorted(registry.SUITES)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--peer", "ligr"], "--peer: unknown 'ligr'"),
        (["--suite", "ops", "--case", "nothing"], "--suite ops has no such case"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU"),
        (["--compare", "nowhere", "nowhere"], "nowhere cannot be read as results"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--threads", "1", *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("fastgrpo: error: ")
    assert word in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--suite", "opps"],
        ["--threads", "0"],
        ["--check"],
        ["--from", "somewhere"],
        ["--list", "--readme"],
        ["--compare", "a", "b", "--report"],
        ["--results", "somewhere", "--list"],
    ],
)
def test_options_that_do_not_parse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


def test_without_a_clone_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "fastgrpo" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert "runs from a clone" in capsys.readouterr().err


def test_the_list_names_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--list", "--device", "cpu", *_SUITE[:4]]) == 0
    names = ["gae[S=128,N=32768]-naive", "gae[S=128,N=32768]-fastgrpo"]
    assert capsys.readouterr().out.split() == names
    twice = ["--suite", "ops", "--suite", "memory", "--case", "gae", "--peer", "naive", "--peer", "trl"]
    assert cli.main(["bench", "--list", "--device", "cpu", *twice]) == 0
    assert capsys.readouterr().out.split() == names
