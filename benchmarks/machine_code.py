"""Reads the machine code of a compiled kernel: opcodes, global memory accesses, loops. Nothing here compiles or runs.

Two listings are understood: what `nvdisasm -c` prints of a CUDA binary, and the assembly that LLVM writes for AMD.
Loops are found by their backward branches, without a control-flow graph: code that was moved out of line and jumps back
looks like a loop, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

WIDE_BYTES = 16  # 128 bits: the widest access that every target has

_LABEL = re.compile(r"(\.L\w+):")
_INSTRUCTION = re.compile(r"\s+(?:/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?)?([A-Za-z]\w*(?:\.\w+)*)(.*)")
_TARGET = re.compile(r"\.L\w+")
_BRANCHES = ("BRA", "s_branch", "s_cbranch")
_TENSOR_CORE = re.compile(r"[A-Z]*MMA(\.|$)|v_(s?mfma|s?wmma)_")

# Bulk copies (TMA) move a tile with one instruction: they count as one 128-bit access of each thread.
_CUDA_OPS: dict[str, Literal["load", "store"]] = {
    "LDG": "load",
    "LDGSTS": "load",
    "UTMALDG": "load",
    "UBLKCP": "load",
    "STG": "store",
    "UTMASTG": "store",
    "UTMAREDG": "store",
}
_CUDA_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)")
_AMD_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8, "b96": 12, "b128": 16}


@dataclass(frozen=True)
class Access:
    """A load from or a store to global memory, by one thread."""

    kind: Literal["load", "store"]
    size: int  # bytes

    @property
    def wide(self) -> bool:
        return self.size >= WIDE_BYTES


class Listing:
    """The instructions of one kernel, in the order of their addresses.

    `accesses` maps positions in `opcodes` to what is accessed there; `loops` are ranges of positions, by their start.
    """

    def __init__(self, assembly: str) -> None:
        self.opcodes: list[str] = []
        labels: dict[str, int] = {}
        ends: dict[int, int] = {}
        for line in assembly.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(self.opcodes)
            elif instruction := _INSTRUCTION.match(line):
                opcode, operands = instruction.groups()
                target = _TARGET.search(operands) if opcode.startswith(_BRANCHES) else None
                if target and target[0] in labels:  # seen already: the branch goes back
                    ends[labels[target[0]]] = len(self.opcodes)
                self.opcodes.append(opcode)
        self.loops = [range(start, stop + 1) for start, stop in sorted(ends.items())]
        self.accesses = {i: access for i, opcode in enumerate(self.opcodes) if (access := _access(opcode))}

    @property
    def tensor_core(self) -> int:
        """Matrix multiply-add instructions."""
        return sum(bool(_TENSOR_CORE.match(opcode)) for opcode in self.opcodes)

    def count(self, kind: Literal["load", "store"], *, wide: bool) -> int:
        return sum(access.kind == kind and access.wide == wide for access in self.accesses.values())

    def wide_share(self) -> float:
        """Of the bytes that the main loop accesses, the share that goes through 128-bit accesses.

        Main are the innermost loops that access memory, those that move less than half of what the largest moves left
        out (a search in `cu_seqlens` beside the loop over the vocabulary); the least of their shares counts. A kernel
        without such loops is taken as a whole.
        """
        bodies = list(self._innermost()) or [list(self.accesses.values())]
        moved = [sum(access.size for access in body) for body in bodies]
        shares = [
            sum(access.size for access in body if access.wide) / total
            for body, total in zip(bodies, moved, strict=True)
            if total and 2 * total >= max(moved)
        ]
        return min(shares, default=0.0)

    def _innermost(self) -> Iterator[list[Access]]:
        loops = [loop for loop in self.loops if any(i in loop for i in self.accesses)]
        for loop in loops:
            if not any(inner != loop and inner.start >= loop.start and inner.stop <= loop.stop for inner in loops):
                yield [access for i, access in self.accesses.items() if i in loop]


def _access(opcode: str) -> Access | None:
    if amd := _AMD_ACCESS.match(opcode):
        narrow = 1 if "byte" in amd[2] or amd[2].endswith("8") else 2
        return Access("load" if amd[1] == "load" else "store", _AMD_BYTES.get(amd[2], narrow))
    name, *modifiers = opcode.split(".")
    if name not in _CUDA_OPS:
        return None
    if name.startswith("U"):
        return Access(_CUDA_OPS[name], WIDE_BYTES)
    return Access(_CUDA_OPS[name], next((_CUDA_BYTES[m] for m in modifiers if m in _CUDA_BYTES), 4))
