"""The table of compiled kernels: what it reads out of machine code, and what it refuses."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernel_table import kernel_modules
from benchmarks.machine_code import Listing

_ROOT = Path(__file__).parents[1]

compiles = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

_CUDA = """
        /*0000*/                   LDG.E.U16 R9, desc[UR16][R4.64] ;
        /*0010*/              @!P3 BRA `(.L_x_0) ;
.L_x_2:
        /*0020*/                   LDG.E.64.CONSTANT R8, desc[UR4][R2.64] ;
        /*0030*/              @!P5 BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R13], desc[UR16][R4.64], P5 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/               @P0 LDG.E.LTC128B R8, desc[UR16][R12.64] ;
        /*0070*/              @!P5 BRA `(.L_x_1) ;
.L_x_0:
        /*0080*/              @!P1 STG.E desc[UR16][R4.64], R7 ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
"""
_AMD = """
	s_load_dwordx4 s[12:15], s[0:1], 0x28
	s_branch .LBB0_6
.LBB0_5:                                ;   in Loop: Header=BB0_6 Depth=1
	v_mfma_f32_32x32x8_bf16 v[16:31], v[112:113], v[64:65], v[16:31]
	s_cbranch_scc0 .LBB0_9
.LBB0_6:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[2:5], v1, s[20:23], 0 offen
	s_cbranch_execz .LBB0_5
	global_load_ushort v2, v1, s[2:3]
	s_branch .LBB0_5
.LBB0_9:
	global_store_dword v1, v2, s[2:3]
	global_store_short_d16_hi v1, v2, s[2:3]
"""


def test_cuda_listing() -> None:
    """The main loop is the third: 16 bytes in one access, 4 in another, which are no 128 bits for all its name says."""
    listing = Listing(_CUDA)
    assert listing.tensor_core == 1
    assert (listing.count("load", wide=True), listing.count("load", wide=False)) == (1, 3)
    assert (listing.count("store", wide=True), listing.count("store", wide=False)) == (0, 1)
    assert sorted(access.size for access in listing.accesses.values()) == [2, 4, 4, 8, 16]
    assert [list(loop) for loop in listing.loops] == [[2, 3], [4, 5, 6, 7], [9]]
    assert listing.wide_share() == pytest.approx(16 / 20)


def test_amd_listing() -> None:
    listing = Listing(_AMD)
    assert listing.tensor_core == 1
    assert sorted(access.size for access in listing.accesses.values()) == [2, 2, 4, 16]
    assert [list(loop) for loop in listing.loops] == [[2, 3, 4, 5, 6, 7]]
    assert listing.wide_share() == pytest.approx(16 / 18)


def test_the_outer_of_two_loops_does_not_count_and_a_kernel_without_loops_is_taken_whole() -> None:
    wide, narrow = "    /*0000*/ LDG.E.128 R2, desc[UR4][R2.64] ;\n", "    /*0000*/ LDG.E R2, desc[UR4][R2.64] ;\n"
    back = "    /*0000*/ @P0 BRA `(.L_x_{}) ;\n"
    nested = ".L_x_0:\n" + 9 * narrow + ".L_x_1:\n" + wide + back.format(1) + back.format(0)
    assert Listing(nested).wide_share() == 1
    beside = ".L_x_0:\n" + wide + back.format(0) + ".L_x_1:\n" + 4 * narrow + back.format(1)
    assert Listing(beside).wide_share() == 0
    assert Listing(wide + 4 * narrow).wide_share() == 0.5
    assert Listing("").wide_share() == 0


def _table(path: Path, arguments: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, Any]]]:
    """The finished command and its rows by kernel and architecture."""
    command = [sys.executable, "-m", "benchmarks.kernel_table", *arguments, "--json", str(path)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=_ROOT, env=env, capture_output=True, text=True)
    rows = json.loads(path.read_text()) if path.exists() else []
    return done, {f"{row['kernel']} {row['arch']}": row for row in rows}


@compiles
def test_sound_kernels(tmp_path: Path) -> None:
    done, rows = _table(tmp_path / "rows.json", ["tests.ops.sample_kernels", "--arch", "sm_90", "gfx942"])
    assert done.returncode == 0, done.stderr
    assert list(rows) == ["matmul sm_90", "matmul gfx942", "cast sm_90", "cast gfx942"]
    for name, row in rows.items():
        assert row["spills"] == 0
        assert row["loop128"] == 1
        assert row["ld"] == row["st"] == 0
        assert 16 <= row["registers"] <= 255
        assert (row["tensor"] > 0) == (row["shared"] >= 16384) == name.startswith("matmul")
        assert any(line.split()[:2] == name.split() for line in done.stdout.splitlines())
    # 4096 elements over 4 warps: 128 bytes of fp32 and 64 of bf16 for each of 128 threads, 64 and 32 for each of 256.
    assert [rows[f"cast {arch}"][column] for arch in ("sm_90", "gfx942") for column in ("ld128", "st128")] == [
        8,
        4,
        4,
        2,
    ]


@compiles
def test_faulty_kernels(tmp_path: Path) -> None:
    """Each fault is named, and those that come after it are still found."""
    modules = ["tests.faulty_kernels", "benchmarks.machine_code"]
    done, rows = _table(tmp_path / "rows.json", [*modules, "--arch", "sm_80"])
    assert done.returncode == 1
    assert list(rows) == ["spilling sm_80", "too_much_shared sm_80", "narrow sm_80"]
    spilled, shared = rows["spilling sm_80"]["spills"], rows["too_much_shared sm_80"]["shared"]
    assert spilled > 0
    assert [line for line in done.stderr.splitlines() if line.startswith("FAIL")] == [
        "FAIL misspelt sm_80: ValueError: in the spec or in the kernel, not in both: BLOCK, p_x, p_y",
        f"FAIL spilling sm_80: spills {spilled} bytes",
        f"FAIL too_much_shared sm_80: {shared} bytes of shared memory, a block has 166912",
        "FAIL narrow sm_80: 0% of the main loop's bytes go through 128-bit accesses, 50% must",
        "FAIL benchmarks.machine_code: no KERNELS",
    ]


def test_every_kernel_file_is_in_the_table() -> None:
    files = (_ROOT / "kernels" / "fastgrpo_kernels").rglob("kernel.py")
    names = {".".join(file.relative_to(_ROOT / "kernels").with_suffix("").parts) for file in files}
    assert names
    assert set(kernel_modules()) == names


@compiles
def test_no_kernel_has_more_than_25_arguments() -> None:
    for module in kernel_modules():
        for spec in importlib.import_module(module).KERNELS:
            assert len({*spec.signature, *spec.constexprs}) <= 25, spec.name
