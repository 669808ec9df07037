"""`fastgrpo bench --report`: pictures as PNG, and one page that holds them and every table."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from benchmarks import figures, results, tables
from benchmarks.cases import OURS
from benchmarks.drawing import draw
from benchmarks.results import Results

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2327; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-bottom: 2px solid #c1121f; padding-bottom: .2rem } p { color: #57606a }
img { width: 100%; margin: .6rem 0 } table { border-collapse: collapse; margin: .4rem 0 1.6rem; font-size: 13px }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #e3e6e8; white-space: nowrap }
td:nth-child(-n+2), th:nth-child(-n+2), td:last-child, th:last-child { text-align: left }
tr.ours { font-weight: 600; background: #fdf3f3 } td.note { color: #9a3412; white-space: normal }
.wide { overflow-x: auto }
"""


def build(source: Path, folder: Path) -> Path:
    """Draw results (a file, a machine's folder or several) into `folder`; returns the page's path."""
    machines = figures.machines(results.load(source))
    folder.mkdir(parents=True, exist_ok=True)
    body = "".join(_machine(machine, files, folder) for machine, files in machines.items())
    page = folder / "report.html"
    head = f"<!doctype html><meta charset=utf-8><title>fastgrpo benchmarks</title><style>{_STYLE}</style>"
    page.write_text(f"{head}<h1>fastgrpo benchmarks</h1>{body}\n", encoding="utf-8")
    return page


def _machine(machine: str, files: list[Results], folder: Path) -> str:
    parts = [f"<h2>{html.escape(machine)}</h2><p>{html.escape(tables.where(files))}</p>"]
    for name in figures.FIGURES:
        if found := figures.data(name, files):
            picture = folder / f"{machine}-{name}.png"
            draw(name, found, machine, picture)
            inlined = base64.b64encode(picture.read_bytes()).decode()
            parts.append(f'<img alt="{name}" src="data:image/png;base64,{inlined}">')
    return "".join(parts) + "".join(_table(file, op) for file in files for op in tables.ops(file))


def _table(file: Results, op: str) -> str:
    rows = [row for row in file.rows if row["op"] == op]
    lines = ["<tr>" + "".join(f"<th>{c}</th>" for c in ("size", "peer", *tables.COLUMNS)) + "</tr>"]
    for row in rows:
        shown = [html.escape(cell) for cell in (tables.size(row), row["peer"], *tables.cells(row, rows))]
        ours = ' class="ours"' if row["peer"] == OURS else ""
        last = f'<td class="note">{shown.pop()}</td>'
        lines.append(f"<tr{ours}>" + "".join(f"<td>{cell}</td>" for cell in shown) + last + "</tr>")
    return f'<h3>{html.escape(op)}</h3><div class="wide"><table>{"".join(lines)}</table></div>'
