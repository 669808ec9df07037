"""Compiles every Triton kernel for GPUs that need not be here, and tabulates what the compiler made of it.

    python -m benchmarks.kernel_table [MODULE ...] [--arch sm_90 gfx942] [--json PATH]

Without MODULE, the `KERNELS` of every `kernel.py` in `fastgrpo_kernels`. Exits with 1 if a kernel does not compile,
spills registers, asks for more shared memory than a block can have, or moves less than half of its main loop's bytes
through 128-bit accesses where its spec says `wide`. Nothing is run: numerics are the interpreter's business, speed a
GPU's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import fastgrpo_kernels
from benchmarks.machine_code import Listing
from fastgrpo_kernels.specs import KernelSpec

T, R = TypeVar("T"), TypeVar("R")

# Bytes of shared memory that one block can have (CUDA: with opt-in). Triton checks it only where a kernel is loaded.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
MIN_WIDE_SHARE = 0.5


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture."""

    kernel: str
    arch: str
    warps: int
    registers: int  # of a thread
    spills: int  # bytes stored and loaded by a thread
    shared: int  # bytes of a block
    tensor: int  # tensor-core instructions
    ld128: int  # instructions that load 128 bits or more a thread
    ld: int  # narrower loads
    st128: int
    st: int
    loop128: float  # share of the main loop's bytes that goes through 128-bit accesses

    def faults(self, spec: KernelSpec) -> Iterator[str]:
        if self.spills:
            yield f"spills {self.spills} bytes"
        if self.shared > SHARED_LIMIT[self.arch]:
            yield f"{self.shared} bytes of shared memory, a block has {SHARED_LIMIT[self.arch]}"
        if spec.wide and self.loop128 < MIN_WIDE_SHARE:
            yield f"{self.loop128:.0%} of the main loop's bytes go through 128-bit accesses, {MIN_WIDE_SHARE:.0%} must"


def kernel_modules() -> list[str]:
    """The dotted names of all `kernel.py` in `fastgrpo_kernels`."""
    root = Path(fastgrpo_kernels.__path__[0])
    files = sorted(root.rglob("kernel.py"))
    return [".".join((root.name, *file.relative_to(root).with_suffix("").parts)) for file in files]


def compile_kernel(spec: KernelSpec, arch: str) -> tuple[Any, str]:
    """Triton's compiled kernel, and what the CUDA assembler said (empty for AMD)."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = spec.kernel
    while not isinstance(kernel, triton.JITFunction):  # an autotuner or heuristics around it
        kernel = kernel.fn
    if odd := {*spec.signature, *spec.constexprs} ^ set(kernel.arg_names):
        raise ValueError(f"in the spec or in the kernel, not in both: {', '.join(sorted(odd))}")
    signature, hints = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name], _, divisor = spec.signature.get(name, "constexpr").partition(":")
        if divisor:
            hints[(i,)] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(spec.constexprs), attrs=hints)
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    stages = {} if spec.num_stages is None else {"num_stages": spec.num_stages}
    options = {"num_warps": spec.num_warps, **stages, **spec.options}
    # A kernel out of Triton's cache comes without the assembler's log, the only place that tells spills.
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        return triton.compile(source, target=target, options=options), log.getvalue()


def inspect(spec: KernelSpec, arch: str) -> Row:
    """Compile one kernel for one architecture and read what came of it."""
    compiled, log = compile_kernel(spec, arch)
    if arch.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", assembly) + _number(r"\.sgpr_spill_count:\s+(\d+)", assembly)
        registers, spills = _number(r"\.vgpr_count:\s+(\d+)", assembly), 4 * spilled
    else:
        assembly = _disassemble(compiled.asm["cubin"])
        registers = _number(r"Used (\d+) registers", log)
        spills = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
    listing = Listing(assembly)
    return Row(
        kernel=spec.name,
        arch=arch,
        warps=spec.num_warps,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        tensor=listing.tensor_core,
        ld128=listing.count("load", wide=True),
        ld=listing.count("load", wide=False),
        st128=listing.count("store", wide=True),
        st=listing.count("store", wide=False),
        loop128=round(listing.wide_share(), 3),
    )


def _number(pattern: str, text: str) -> int:
    """The one number that the pattern finds; ValueError where there is none, or several that differ."""
    (found,) = set(re.findall(pattern, text))
    return int(found)


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def tabulate(modules: Sequence[str], archs: Sequence[str], jobs: int = 1) -> tuple[list[Row], list[str]]:
    """The rows of the table, and what is wrong. jobs: processes that compile."""
    work: list[_Work] = []
    for module in modules:
        specs = getattr(importlib.import_module(module), "KERNELS", ())
        if not specs:
            work.append((module, None, ""))
        for i, spec in enumerate(specs):
            work += [(module, i, arch) for arch in archs if spec.archs is None or arch in spec.archs]
    rows, faults = [], []
    for row, found in in_processes(_one, work, jobs):
        rows += [] if row is None else [row]
        faults += found
    return rows, faults


_Work = tuple[str, int | None, str]  # a module, which of its kernels (None: it has none), an architecture


def in_processes(run: Callable[[T], R], work: Sequence[T], jobs: int) -> Iterator[R]:
    """`run` of each, in order, in so many processes; with one job in this one."""
    if jobs == 1:
        yield from map(run, work)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(run, work)


def _one(item: _Work) -> tuple[Row | None, list[str]]:
    """The row of a module's i-th kernel on an architecture, and its faults."""
    module, i, arch = item
    if i is None:
        return None, [f"{module}: no KERNELS"]
    spec = importlib.import_module(module).KERNELS[i]
    try:
        row = inspect(spec, arch)
    except Exception as error:  # one kernel that does not compile must not hide the others
        return None, [f"{spec.name} {arch}: {type(error).__name__}: {error}"]
    return row, [f"{spec.name} {arch}: {fault}" for fault in row.faults(spec)]


def as_text(rows: Sequence[Row]) -> str:
    head = [field.name for field in fields(Row)]
    lines = [head, *([str(value) for value in asdict(row).values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = 2  # the names
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_table", description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="dotted names; default: all of fastgrpo_kernels")
    parser.add_argument("--arch", nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one a core")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    modules = args.modules or kernel_modules()
    rows, faults = tabulate(modules, args.arch, args.jobs)
    if not modules:
        faults.append("no kernel.py in fastgrpo_kernels")
    print(as_text(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    for fault in faults:
        print(f"FAIL {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
