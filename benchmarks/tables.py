"""Markdown tables from results files, for README.md and docs/benchmarks.md."""

from __future__ import annotations

from benchmarks.cases import OURS
from benchmarks.figures import by_op, over
from benchmarks.results import Results, Row

COLUMNS = ("ms", "p20-p80", "x ours", "x limit", "MB", "")
"""Of `cells`."""


def where(files: list[Results]) -> str:
    """The machine in words: what it is, which commits and versions, when."""
    header = files[0].header
    device = header["device"]
    if isinstance(device, dict):
        threads = f"{device['cores']} cores, {device['threads']} thread{'s' if device['threads'] > 1 else ''}"
        timers = {file.header.get("timer") for file in files}
        clock = ", CPU time" if timers == {"time.process_time"} else ""
        device = device.get("gpu") or f"{device['cpu']}, {threads}{clock}"
    commits = sorted({(file.header["commit"] or "unknown")[:7] for file in files})
    days = sorted({file.header["date"][:10] for file in files})
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items() if v and k != "fastgrpo")
    return f"{device}; commit {', '.join(commits)}, {' to '.join(dict.fromkeys((days[0], days[-1])))}; {versions}"


def summary(files: list[Results]) -> str:
    """A line an op, at the size that takes us most: our time and memory, and every peer's in multiples of them."""
    lines = ["| op | size | ms | MB | peers: time (memory) in multiples of ours |", "|---|---|---|---|---|"]
    for op, group in by_op(row for file in files for row in file.rows).items():
        ours = group[OURS]
        theirs = "; ".join(f"{peer} {_multiples(row, ours)}" for peer, row in group.items() if peer != OURS)
        ms, _, _, _, peak, _ = cells(ours, [ours])
        lines.append(f"| `{op}` | {size(ours)} | {ms} | {peak} | {theirs} |")
    return "\n".join(lines)


def _multiples(row: Row, ours: Row) -> str:
    time, memory = over(row, ours)
    shown = [] if time is None else [f"{time:.2g}"]
    return " ".join(shown if memory is None else [*shown, f"({memory:.2g})"])


def full(files: list[Results]) -> str:
    """A table an op, every row of it, wrong and absent ones too."""
    return "\n\n".join(_one(file.rows, op) for file in files for op in ops(file))


def ops(file: Results) -> list[str]:
    """Those of a file, in order; the GPU suite's row of versions is none."""
    return [op for op in dict.fromkeys(row["op"] for row in file.rows) if op != "environment"]


def _one(rows: list[Row], op: str) -> str:
    rows = [row for row in rows if row["op"] == op]
    lines = [f"`{op}`", "", f"| size | peer | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    lines += [f"| {size(row)} | {row['peer']} | {' | '.join(cells(row, rows))} |" for row in rows]
    return "\n".join(lines)


def size(row: Row) -> str:
    """The params in words; what is None is left out."""
    return ", ".join(f"{k} {v}" for k, v in row["params"].items() if v is not None)


def cells(row: Row, rows: list[Row]) -> list[str]:
    """Time, its spread, the ratio to ours, the ratio to the measured limit, megabytes, and a word."""
    ms, ours = row["ms"], ours_of(row, rows)
    over = f"{ms['median'] / ours['ms']['median']:.2f}" if ms and ours and ours["ms"] and ours is not row else ""
    note = row["note"] or ("" if row["correct"] is not False else f"wrong: {row['errors']}")
    note = " ".join(note.replace("|", "/").split())[:160]
    return [
        number(ms["median"]) if ms else "",
        f"{number(ms['p20'])}-{number(ms['p80'])}" if ms else "",
        over,
        f"{row['ratio_to_limit']:.2f}" if row.get("ratio_to_limit") else "",
        number(row["peak_bytes"] / 1e6) if row["peak_bytes"] is not None else "",
        note,
    ]


def ours_of(row: Row, rows: list[Row]) -> Row | None:
    """Our own row of the same job and size."""
    same = (r for r in rows if (r["op"], r["params"], r["peer"]) == (row["op"], row["params"], OURS))
    return next(same, None)


def number(x: float) -> str:
    """Three digits or whole units."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
