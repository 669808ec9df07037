"""Results files: read in one form, compared, drawn, and written into the documents, which CI holds against them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, figures, readme, results, tables
from benchmarks.__main__ import main
from benchmarks.cases import OURS

_ROOT = Path(__file__).parents[2]


def _row(peer: str, ms: float | None, peak: int | None = None, op: str = "linear_grpo_loss", **params: Any) -> Any:
    params = params or {"N": 256, "D": 8, "V": 1024}
    spread = None if ms is None else {"median": ms, "min": 0.8 * ms, "p20": 0.9 * ms, "p80": 1.1 * ms}
    case = f"{op}[{params}]-{peer}"
    row = {"case": case, "op": op, "peer": peer, "params": params, "tokens": 256, "ms": spread, "peak_bytes": peak}
    return {**row, "limit_ms": None, "ratio_to_limit": None, "correct": True, "errors": {}, "note": None}


def _write(folder: Path, rows: list[Any], name: str = "ops.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    device = {"cpu": "some CPU", "cores": 2, "threads": 1}
    header = {"commit": "0123456789", "date": "2026-11-28T10:00:00+00:00", "versions": {"torch": "2.13.0"}}
    limits = {"gemm_tflops": 0.1, "copy_gb_per_s": 20.0}
    (folder / name).write_text(json.dumps({**header, "device": device, "limits": limits, "results": rows}))
    return folder


_SOME = [
    *(_row(peer, ms * n, peak) for n in (1, 2) for peer, ms, peak in (("trl", 30.0, 400), (OURS, 10.0, 100))),
    _row("trl", 25.0, None, "update", model="qwen3-10.3m"),
    _row(OURS, 5.0, None, "update", model="qwen3-10.3m"),
    _row(OURS, 2.0, None, "update", model="qwen3-3.1m"),
]
for _i in (2, 3):
    _SOME[_i]["params"] = {"N": 512, "D": 8, "V": 1024}
    _SOME[_i] |= {"flops": 1e9, "moved_bytes": 1e7, "case": f"larger-{_i}"}


def test_the_gpu_suite_s_rows_are_read_in_the_same_form() -> None:
    size = {"N": 32768, "D": 4, "V": 8}
    stage = {
        "case": "peers",
        "op": "linear_grpo_loss",
        "peer": "trl",
        "params": size,
        "ms": 2.0,
        "p20": 1.9,
        "p80": 2.2,
    }
    stage |= {"peak_bytes": 7, "correct": True, "error": {"logprob": 1e-3}, "N_measured": 8192}
    row = results.common(stage)
    assert row["ms"] == {"median": 2.0, "p20": 1.9, "p80": 2.2}
    assert row["params"] == {"N": 8192, "D": 4, "V": 8}
    assert (row["flops"], row["moved_bytes"]) == (6 * 8192 * 4 * 8, 2 * 2 * (8192 * 4 + 8 * 4))
    assert row["errors"] == {"logprob": 1e-3}
    assert row["note"] is None
    assert results.common(row) == row
    assert results.common({**stage, "ms": None, "error": "out of memory"})["note"] == "out of memory"


def test_what_is_no_results_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results in"):
        results.load(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json cannot be read"):
        results.load(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ms": {"median": float("nan"), "p20": 1.0, "p80": 1.0}}, "NaN is no result"),
        ({"ms": {"median": 0.0, "p20": 1.0, "p80": 1.0}}, "are no times"),
        ({"ms": {"median": 1.0}}, "are no times"),
        ({"ms": 1.0}, "are no times"),
        ({"peak_bytes": "many"}, "peak_bytes=many is no size"),
        ({"params": None}, "row 0 is not one"),
    ],
)
def test_rows_that_are_none_are_named(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = _write(tmp_path / "cpu", [_row(OURS, 1.0) | changed])
    with pytest.raises(ValueError, match=rf"ops\.json cannot be read as results: .*{message}"):
        results.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"results": []}, "it does not say its commit"), (None, "it has no rows"), ({"results": [1]}, "its commit")],
)
def test_files_without_rows_or_a_header(content: Any, message: str, tmp_path: Path) -> None:
    file = _write(tmp_path / "cpu", []) / "ops.json"
    if content is not None:
        file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        results.load(file)


@pytest.mark.parametrize(
    ("ms", "peak", "kinds"),
    [
        (11.9, None, []),  # its p20 of 10.7 is below the p80 of 11 before
        (12.5, None, ["slower"]),
        (8.0, None, ["faster"]),
        (10.0, 105 << 20, []),
        (10.0, 120 << 20, ["larger"]),
        (13.0, 80 << 20, ["slower", "smaller"]),
        (None, None, ["lost"]),
    ],
)
def test_changes_beyond_the_spread(ms: float | None, peak: int | None, kinds: list[str]) -> None:
    found = compare.changes(_row(OURS, 10.0, 100 << 20), _row(OURS, ms, peak))
    assert [change.kind for change in found] == kinds
    assert all("10" in change.text for change in found)


def test_compare_says_what_became_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _write(tmp_path / "a", [_row("trl", 20.0), _row(OURS, 10.0), _row("gone", 1.0)])
    after = _write(tmp_path / "b", [_row("trl", 30.0), _row(OURS, 15.0)])
    assert main(["--compare", str(before), str(after)]) == 1
    alone, first, second, last = capsys.readouterr().out.splitlines()
    assert alone == "left out: 1 cases that are in one of the two alone"
    assert first.startswith("slower")
    assert "10 -> 15 ms (+50%)" in first
    assert second.startswith("slower")
    assert "20 -> 30 ms" in second
    assert last == "beyond the spread: 1 of ours worse, 0 better; 1 of the peers' changed"
    assert main(["--compare", str(after), str(before)]) == 0
    assert main(["--compare", str(before), str(before)]) == 0
    text = (before / "ops.json").read_text()
    (_write(tmp_path / "d", []) / "ops.json").write_text(text.replace("some CPU", "another"))
    capsys.readouterr()
    assert main(["--compare", str(before), str(tmp_path / "d")]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert re.match(r"measured in two ways: .*/a on cpu some CPU, .*/d on cpu another, cores 2", first)
    with pytest.raises(ValueError, match="no case in common"):
        compare.compare(before, _write(tmp_path / "c", [_row("other", 1.0)]))


def test_figures_take_their_numbers_from_the_rows(tmp_path: Path) -> None:
    files = results.load(_write(tmp_path / "cpu", _SOME))
    along_n = figures.data("head", files)["N"]
    assert along_n["fixed"] == {"V": 1024, "D": 8}
    assert along_n["peers"][OURS] == [[256, 10.0, 9.0, 11.0, 100], [512, 20.0, 18.0, 22.0, 100]]
    assert figures.data("peers", files) == {"linear_grpo_loss": {"trl": [3.0, 4.0]}, "update": {"trl": [5.0, None]}}
    rates = figures.data("throughput", files)["update"]
    assert list(rates) == ["qwen3-3.1m", "qwen3-10.3m"]
    assert rates["qwen3-10.3m"] == {OURS: 51200.0, "trl": 10240.0}
    roof = figures.data("roofline", files)
    assert roof["gemms"]["linear_grpo_loss"] == {"trl": [[100.0, 16666666667]], OURS: [[100.0, 50000000000]]}


def test_tables_show_wrong_and_absent_rows_without_times(tmp_path: Path) -> None:
    rows = [_row("cce", None), _row("liger", None), _row(OURS, 10.0, 10**8)]
    rows[0]["note"] = "absent: cut_cross_entropy is not installed"
    rows[1] |= {"correct": False, "errors": {"loss": 0.2}}
    text = tables.full(results.load(_write(tmp_path / "cpu", rows)))
    assert "| cce |  |  |  |  |  | absent: cut_cross_entropy is not installed |" in text
    assert "| liger |  |  |  |  |  | wrong: {'loss': 0.2} |" in text
    assert "| fastgrpo | 10 | 9-11 |  |  | 100 |  |" in text


def test_the_documents_show_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    """When this fails: fastgrpo bench --readme."""
    assert readme.update(check=True) == 0, capsys.readouterr().out


def _copy(root: Path) -> Path:
    """A root with the documents, and results of one machine."""
    (root / "docs").mkdir()
    for name in readme.DOCUMENTS:
        shutil.copy(_ROOT / name, root / name)
    return _write(root / "benchmarks" / "results" / "cpu", _SOME)


def test_documents_and_pictures_are_written_and_held_against_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folder = _copy(tmp_path)
    assert readme.update(check=True, root=tmp_path) == 1
    assert readme.update(root=tmp_path) == 0
    assert readme.update(check=True, root=tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| `linear_grpo_loss` | N 512, D 8, V 1024 | 20 | 0.0001 | trl 3 (4) |" in text
    assert "| `update` | model qwen3-10.3m | 5 |  | trl 5 |" in text
    assert "0123456" in text
    shown = re.findall(r"\]\((benchmarks/[^)]*svg)\)", (tmp_path / "docs" / "benchmarks.md").read_text())
    assert len(shown) == len(figures.FIGURES)
    assert all((tmp_path / "docs" / path).exists() for path in shown)
    _write(folder, [*_SOME[:-1], _row(OURS, 2.5, None, "update", model="qwen3-3.1m")])
    capsys.readouterr()
    assert readme.update(check=True, root=tmp_path) == 1
    said = capsys.readouterr().out
    assert "docs/benchmarks/cpu-throughput.svg: differs" in said
    assert "cpu-head.svg" not in said


def test_an_unknown_block_is_an_error() -> None:
    machines = {"cpu": results.load(results.FOLDER)}
    with pytest.raises(ValueError, match="unknown block 'benchmarks: picture hed'"):
        readme.render("<!-- benchmarks: picture hed -->\n<!-- /benchmarks -->", _ROOT, machines, {})


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    source = _write(tmp_path / "cpu", _SOME)
    assert main(["--report", str(tmp_path / "out"), "--from", str(source)]) == 0
    page = Path(capsys.readouterr().out.strip())
    text = page.read_text()
    assert {path.name for path in page.parent.glob("*.png")} == {f"cpu-{name}.png" for name in figures.FIGURES}
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]{30})', text))
    assert text.count("<img") == len(figures.FIGURES)
    assert "linear_grpo_loss" in text
