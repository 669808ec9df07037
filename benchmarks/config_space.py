"""The configurations that a GPU session may time: every candidate compiled ahead of time, those that cannot be dropped.

    python -m benchmarks.config_space [--families exp_gemm ...] [--arch sm_90 ...] [--write PATH]

A family is a kernel, or kernels that share their block, with the tiles, warps and stages it could be launched with;
what the code launches is among them. A candidate that spills registers, asks for more shared memory than a block can
have or does not compile is dropped, with the reason. Others are written with registers, shared memory and the blocks
that a multiprocessor holds, for the GPU suite's stage `sweep`. `make kernels` compiles what is launched, not this.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.command import end, positive, writable
from benchmarks.kernel_table import SHARED_LIMIT, Row, in_processes, inspect
from fastgrpo.files import atomic_write
from fastgrpo_kernels.decode_attention import kernel as decode
from fastgrpo_kernels.grpo_loss import kernel as loss
from fastgrpo_kernels.head.exp_gemm import config as tiles
from fastgrpo_kernels.head.exp_gemm import kernel as exp_gemm
from fastgrpo_kernels.head.rows import kernel as rows
from fastgrpo_kernels.sample_tokens import kernel as sample
from fastgrpo_kernels.specs import KernelSpec
from fastgrpo_kernels.token_logprob import kernel as logprob

RESULTS = Path(__file__).parent / "results" / "aot" / "config_space.json"

Config = dict[str, int]

_PER_SM = {"sm_80": 167_936, "sm_90": 233_472, "sm_100": 233_472, "gfx942": 65_536}
"""Bytes of shared memory of a multiprocessor; CUDA keeps 1 KiB of them for each block."""


@dataclass(frozen=True)
class Family:
    """options: values of each number of a configuration. specs: what must compile with one, on an architecture.
    launched: what the code takes there. configured: a block in which it takes another.
    """

    name: str
    options: dict[str, tuple[int, ...]]
    specs: Callable[[Config, str], list[KernelSpec]]
    launched: Callable[[str], Config]
    configured: Callable[[Config], AbstractContextManager[Any]]

    def configs(self) -> list[Config]:
        return [dict(zip(self.options, values, strict=True)) for values in product(*self.options.values())]


def _listed(module: Any, *names: str) -> list[KernelSpec]:
    by_name = {spec.name: spec for spec in module.KERNELS}
    return [by_name[name] for name in names]


def _with(spec: KernelSpec, config: Config) -> KernelSpec:
    """The listed kernel with another block, other warps, other stages."""
    changed = {name: value for name, value in config.items() if name in spec.constexprs}
    stages = config.get("num_stages", spec.num_stages)
    constexprs = {**spec.constexprs, **changed}
    return replace(spec, constexprs=constexprs, num_warps=config["num_warps"], num_stages=stages, wide=False)


def tile_of(config: Config, arch: str) -> tiles.TileConfig:
    """Of four warps two programs share a multiprocessor."""
    programs, on_tma = 8 // config["num_warps"], arch in ("sm_90", "sm_100")
    return tiles.TileConfig(GROUP_M=8, archs=(arch,), TMA=on_tma, programs_per_sm=programs, **config)


def _launched_tile(arch: str) -> Config:
    capability = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}.get(arch)
    chosen = tiles.config_for(capability, 8192, 2048)
    return {name: getattr(chosen, name) for name in ("BM", "BK", "num_warps", "num_stages")}


def _launched_decoding(_: str) -> Config:
    block, stages = decode.config_of(128, True)
    return {"BLOCK": block, "num_warps": decode.NUM_WARPS, "num_stages": stages}


def _launched_groups(_: str) -> Config:
    """Of long fp32 rows."""
    tiling = logprob._tiling(4, 1 << 17, 1 << 17, False)
    return {"GROUPS": tiling["BLOCK"] // tiling["GROUP"], "num_warps": tiling["num_warps"]}


def _tiling(config: Config) -> Callable[..., dict[str, int]]:
    """As `token_logprob`'s own `_tiling`, with rows of 16-byte strides."""

    def tiling(itemsize: int, *_: Any) -> dict[str, int]:
        group = 16 // itemsize
        return {"UNIT": group, "GROUP": group, "BLOCK": config["GROUPS"] * group, "num_warps": config["num_warps"]}

    return tiling


def _grouped(spec: KernelSpec, config: Config) -> KernelSpec:
    block = config["GROUPS"] * spec.constexprs["GROUP"]
    return _with(spec, {"BLOCK": block, "num_warps": config["num_warps"]})


_DECODED = ((2, 7, 64), (2, 6, 128))
"""Heads of keys, queries of each, numbers: Qwen2.5-0.5B and 1.5B."""

FAMILIES = (
    Family(
        "exp_gemm",
        {"BM": (128, 256), "BK": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
        lambda config, arch: [exp_gemm._spec(tile_of(config, arch))],
        _launched_tile,
        lambda _: nullcontext(),  # takes its configuration as an argument
    ),
    Family(
        "decode_attention",
        {"BLOCK": (32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4)},
        lambda config, _: [_with(decode._spec("bf16", *x, False, False, False), config) for x in _DECODED],
        _launched_decoding,
        lambda config: mock.patch.multiple(
            decode,
            NUM_WARPS=config["num_warps"],
            config_of=lambda size, half: (config["BLOCK"], config["num_stages"]),
        ),
    ),
    Family(
        "single_read",
        {"BLOCK": (2048, 4096, 8192), "num_warps": (4, 8, 16)},
        lambda config, _: [_with(spec, config) for spec in _listed(rows, "single_read_bf16_guess")],
        lambda _: {name: rows.ROW_TILING[name] for name in ("BLOCK", "num_warps")},
        lambda config: mock.patch.dict(rows.ROW_TILING, config),
    ),
    Family(
        "token_logprob",
        {"GROUPS": (256, 512, 1024, 2048), "num_warps": (4, 8, 16)},
        lambda config, _: [
            _grouped(spec, config)
            for spec in _listed(logprob, "token_logprob_forward_fp32", "token_logprob_backward_fp32")
        ],
        _launched_groups,
        lambda config: mock.patch.object(logprob, "_tiling", _tiling(config)),
    ),
    Family(
        "sample_tokens",
        {"BLOCK": (2048, 4096, 8192), "num_warps": (4, 8, 16)},
        lambda config, _: [
            _with(spec, config) for spec in _listed(sample, "chunk_sums_bf16", "draw_bf16", "filter_sums_top_p_bf16")
        ],
        lambda _: {"BLOCK": sample.BLOCK, "num_warps": sample.NUM_WARPS},
        lambda config: mock.patch.multiple(sample, BLOCK=config["BLOCK"], NUM_WARPS=config["num_warps"]),
    ),
    Family(
        "coefficients",
        {"BLOCK": (256, 512, 1024), "num_warps": (4, 8)},
        lambda config, _: [
            _with(spec, config) for spec in _listed(loss, "coefficients_dapo", "coefficients_token_truncate_vespo")
        ],
        lambda _: {"BLOCK": loss.BLOCK, "num_warps": loss.NUM_WARPS},
        lambda config: mock.patch.multiple(loss, BLOCK=config["BLOCK"], NUM_WARPS=config["num_warps"]),
    ),
)


def blocks_per_multiprocessor(row: Row) -> int:
    """Blocks that registers, shared memory and threads leave room for."""
    by_shared = _PER_SM[row.arch] // row.shared if row.shared else 32
    if row.arch.startswith("gfx"):  # four SIMDs, each with 512 registers a lane and 8 waves at most
        waves = 4 * min(8, 512 // max(8, -(-row.registers // 8) * 8))
        return min(waves // row.warps, by_shared, 16)
    by_shared = _PER_SM[row.arch] // (row.shared + 1024)
    registers = 32 * row.warps * max(8, -(-row.registers // 8) * 8)
    return min(65_536 // registers, by_shared, 64 // row.warps, 32)


def judge(work: tuple[str, Config, str]) -> dict[str, Any]:
    """A candidate: family, configuration, architecture -> its row; `why` it is dropped, "" if it is not."""
    name, config, arch = work
    family = next(f for f in FAMILIES if f.name == name)
    found: dict[str, Any] = {"family": name, "arch": arch, "config": config}
    compiled: list[Row] = []
    for spec in family.specs(config, arch):
        try:
            row = inspect(spec, arch)
        except Exception as error:  # what does not compile is dropped, whatever the compiler's reason
            return {**found, "why": f"{spec.name}: {type(error).__name__}"}
        if faults := list(row.faults(spec)):
            return {**found, "why": f"{spec.name}: {faults[0]}"}
        compiled.append(row)
    blocks = min(map(blocks_per_multiprocessor, compiled))
    largest = {key: max(asdict(row)[key] for row in compiled) for key in ("registers", "shared")}
    return {**found, **largest, "blocks": blocks, "why": "" if blocks else "no block fits a multiprocessor"}


def surviving(path: Path, family: str, arch: str) -> list[Config]:
    """The configurations of the file that are worth a try, what is launched first."""
    chosen = next(f for f in FAMILIES if f.name == family)
    found = [r["config"] for r in _read(path) if (r["family"], r["arch"], r["why"]) == (family, arch, "")]
    return sorted(found, key=lambda config: config != chosen.launched(arch))


def _read(path: Path) -> list[dict[str, Any]]:
    """ValueError for a file of anything else."""
    if not path.exists():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text())
        for row in found:
            row["family"], row["arch"], row["config"], row["why"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no candidates: {error}") from error
    return found


def _write(path: Path, found: list[dict[str, Any]]) -> None:
    """A line a candidate."""
    atomic_write(path, "[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")


def space_rows(path: Path = RESULTS) -> list[list[str]]:
    """Of each family: candidates, those left on each architecture, and registers and blocks of what sm_90 launches."""
    table = [["family", "candidates", *SHARED_LIMIT, "launched on sm_90", "registers", "shared", "blocks"]]
    for family in FAMILIES:
        mine = [row for row in _read(path) if row["family"] == family.name]
        left = [str(sum(row["arch"] == arch and not row["why"] for row in mine)) for arch in SHARED_LIMIT]
        launched = family.launched("sm_90")
        row = next(r for r in mine if (r["arch"], r["config"]) == ("sm_90", launched))
        named = ", ".join(f"{name} {value}" for name, value in launched.items())
        figures = [str(row.get(key, row["why"])) for key in ("registers", "shared", "blocks")]
        table.append([family.name, str(len(family.configs())), *left, named, *figures])
    return table


def candidates(families: Sequence[str], archs: Sequence[str]) -> Iterator[tuple[str, Config, str]]:
    for family in FAMILIES:
        if family.name in families:
            yield from ((family.name, config, arch) for arch in archs for config in family.configs())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.config_space", description=__doc__.splitlines()[0])
    names = [family.name for family in FAMILIES]
    parser.add_argument("--families", nargs="+", choices=names, default=names)
    parser.add_argument("--arch", nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="processes; default: one a core")
    parser.add_argument("--write", type=Path, metavar="PATH", default=RESULTS, help="these rows are renewed there")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    writable(args.write.parent)
    _read(args.write)  # what cannot be read is told before hours of compiling
    made = []
    for row in in_processes(judge, list(candidates(args.families, args.arch)), args.jobs):
        print(row["family"], row["arch"], row["config"], row["why"] or f"{row['blocks']} blocks", flush=True)
        made.append(row)
    kept = [r for r in _read(args.write) if r["family"] not in args.families or r["arch"] not in args.arch]
    _write(args.write, sorted([*kept, *made], key=lambda r: (names.index(r["family"]), r["arch"], str(r["config"]))))
    return 0


if __name__ == "__main__":
    end(main)
