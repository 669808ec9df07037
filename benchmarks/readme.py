"""`fastgrpo bench --readme`: the tables and pictures of the documents, from the files in benchmarks/results.

A document says where: `<!-- benchmarks: BLOCK -->` ... `<!-- /benchmarks -->`, with BLOCK one of `summary`, `full` or
`picture NAME` (a name of `figures.FIGURES`). A picture holds the digest of the numbers that it was drawn from.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from benchmarks import figures, results, tables

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/benchmarks.md")
PICTURES = Path("docs") / "benchmarks"

_BLOCK = re.compile(r"(<!-- benchmarks: ([^\n]+?) -->\n).*?(<!-- /benchmarks -->)", flags=re.DOTALL)


def update(*, check: bool = False, root: Path = ROOT) -> int:
    """Write what differs, or with `check` only say so and return 1. ValueError for a block that nobody knows."""
    machines = figures.machines(results.load(root / "benchmarks" / "results"))
    stale = []
    for name in DOCUMENTS:
        path = root / name
        before = path.read_text(encoding="utf-8")
        pictures: dict[Path, tuple[str, str]] = {}
        after = render(before, path.parent, machines, pictures, root)
        if after != before:
            stale.append(name)
            if not check:
                path.write_text(after, encoding="utf-8")
        for picture, (kind, machine) in pictures.items():
            found = figures.data(kind, machines[machine])
            if not _is_current(picture, figures.digest(found)):
                stale.append(str(picture.relative_to(root)))
                if not check:
                    _draw(kind, found, machine, picture)
    for name in dict.fromkeys(stale):
        print(f"{name}: {'differs from benchmarks/results; run: fastgrpo bench --readme' if check else 'written'}")
    return 1 if check and stale else 0


def render(
    text: str,
    folder: Path,
    machines: dict[str, list[results.Results]],
    pictures: dict[Path, tuple[str, str]],
    root: Path = ROOT,
) -> str:
    """The document with its blocks filled in; `pictures` gets those it shows: path -> (name, machine)."""

    def fill(match: re.Match[str]) -> str:
        kind, _, name = match[2].partition(" ")
        parts = []
        for machine, files in machines.items():
            if kind in ("summary", "full"):
                table = tables.summary(files) if kind == "summary" else tables.full(files)
                parts.append(f"**{machine}**: {tables.where(files)}\n\n{table}")
            elif kind != "picture" or name not in figures.FIGURES:
                raise ValueError(f"unknown block 'benchmarks: {match[2]}'")
            elif figures.data(name, files):
                path = root / PICTURES / f"{machine}-{name}.svg"
                pictures[path] = name, machine
                parts.append(f"![{name}, {machine}]({os.path.relpath(path, folder)})")
        return match[1] + "\n" + "\n\n".join(parts) + "\n\n" + match[3]

    return _BLOCK.sub(fill, text)


def _is_current(picture: Path, digest: str) -> bool:
    return picture.exists() and f"data {digest}" in picture.read_text(encoding="utf-8")


def _draw(kind: str, found: figures.Data, machine: str, picture: Path) -> None:
    from benchmarks.drawing import draw

    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(kind, found, machine, picture)
