"""The space of configurations: what the committed file holds is the code's, and what it drops cannot be launched."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

if importlib.util.find_spec("triton"):
    from benchmarks import config_space
    from benchmarks.config_space import FAMILIES, RESULTS, blocks_per_multiprocessor, judge
    from benchmarks.gpu import predict_rollout
    from benchmarks.kernel_table import SHARED_LIMIT, Row
    from fastgrpo_kernels.decode_attention.kernel import PROGRAMS, pieces_of


def _rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text())
    return found


def test_the_file_has_every_candidate_of_the_code() -> None:
    rows = [(r["family"], str(r["config"]), r["arch"]) for r in _rows()]
    wanted = [
        (name, str(config), arch)
        for name, config, arch in config_space.candidates([f.name for f in FAMILIES], list(SHARED_LIMIT))
    ]
    assert sorted(rows) == sorted(wanted)


@pytest.mark.parametrize("text", ["[", "[1]", '[{"family": "exp_gemm"}]', '{"a": 1}'])
def test_a_file_of_anything_else_is_refused_before_compiling(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "space.json").write_text(text)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"space\.json holds no candidates"):
        config_space.main(["--jobs", "1", "--write", str(tmp_path / "space.json")])
    assert (tmp_path / "space.json").read_text() == text


def test_what_is_launched_survives_and_comes_first() -> None:
    for family in FAMILIES:
        for arch in SHARED_LIMIT:
            assert config_space.surviving(RESULTS, family.name, arch)[0] == family.launched(arch), (family.name, arch)


def test_what_survives_fits() -> None:
    kept = [r for r in _rows() if not r["why"]]
    assert len(kept) < len(_rows())
    for row in kept:
        assert row["blocks"] >= 1
        assert row["shared"] <= SHARED_LIMIT[row["arch"]]
        assert row["registers"] <= (512 if row["arch"].startswith("gfx") else 255)


def test_a_configuration_is_taken_and_given_back() -> None:
    """exp_gemm takes its own as an argument."""
    for family in FAMILIES:
        usual = family.launched("sm_90")
        other = next(config for config in family.configs() if config != usual)
        with family.configured(other):
            assert family.name == "exp_gemm" or family.launched("sm_90") == other
        assert family.launched("sm_90") == usual


def test_the_model_knows_when_paths_are_split() -> None:
    assert predict_rollout.SPLIT_BELOW == PROGRAMS
    assert pieces_of(rows=255, heads=2, longest=640) > 1 == pieces_of(rows=256, heads=2, longest=640)


def test_blocks_of_a_multiprocessor() -> None:
    row = Row("k", "sm_90", 8, 181, 0, 214_048, 0, 0, 0, 0, 0, 0.0)
    assert blocks_per_multiprocessor(row) == 1  # registers: 65536 // (256 * 184); shared memory: one
    assert blocks_per_multiprocessor(replace(row, warps=4, registers=168, shared=70_000)) == 3
    assert blocks_per_multiprocessor(replace(row, warps=4, registers=32, shared=0)) == 16
    amd = replace(row, arch="gfx942", warps=4, registers=128, shared=0)
    assert blocks_per_multiprocessor(amd) == 4
    assert blocks_per_multiprocessor(replace(amd, shared=40_000)) == 1


def test_a_candidate_that_asks_for_too_much_is_dropped() -> None:
    """Three stages of 256 + 128 rows, 128 deep, are 288 KiB."""
    found = judge(("exp_gemm", {"BM": 256, "BK": 128, "num_warps": 8, "num_stages": 3}, "sm_90"))
    assert "shared memory" in found["why"]
    assert "blocks" not in found
