"""What is drawn: for each picture, the numbers of one machine's results, JSON values only. `drawing.py` draws them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.cases import OURS
from benchmarks.registry import PEERS
from benchmarks.results import Results, Row

Data = dict[str, Any]

_THROUGHPUT = ("update", "update_trl", "step", "rollout", "train_trl")


def timed(rows: Iterable[Row]) -> list[Row]:
    """Rows with a time."""
    return [row for row in rows if row["ms"]]


def head(rows: list[Row]) -> Data:
    """Curves of the fused loss: {along N or V: {peer: [[size, ms, p20, p80, bytes], ...]}}, the other sizes fixed."""
    chosen = [r for r in timed(rows) if r["op"] == "linear_grpo_loss" and {"N", "D", "V"} <= r["params"].keys()]
    chosen = [r for r in chosen if r["params"].get("trainable", True) and not r["params"].get("schedule")]
    chosen = [r for r in chosen if r["params"]["D"] == _usual(chosen, "D")]
    curves: Data = {}
    for along, fixed in (("N", "V"), ("V", "N")):
        value = _usual(chosen, fixed)
        line: dict[str, dict[int, list[float]]] = {}
        for r in chosen:
            if r["params"][fixed] == value:
                ms, x = r["ms"], r["params"][along]
                line.setdefault(r["peer"], {})[x] = [x, ms["median"], ms["p20"], ms["p80"], r["peak_bytes"]]
        if any(len(points) > 1 for points in line.values()):
            curves[along] = {
                "fixed": {fixed: value, "D": _usual(chosen, "D")},
                "peers": {peer: [points[x] for x in sorted(points)] for peer, points in line.items()},
            }
    return curves


def _usual(rows: list[Row], name: str) -> Any:
    """The value most rows have; of equals the largest."""
    counts = Counter(r["params"][name] for r in rows)
    return max(counts, key=lambda value: (counts[value], value), default=None)


def peers(rows: list[Row]) -> Data:
    """How many times our time and memory each peer takes: {op: {peer: [time or None, memory or None]}}."""
    return {
        op: {peer: over(row, group[OURS]) for peer, row in group.items() if peer != OURS}
        for op, group in by_op(rows).items()
    }


def by_op(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """{op: {peer: row}}, of the size that takes us most time, or memory where nothing is timed, a peer beside.

    The op that takes us most comes first.
    """
    groups: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["ms"] or row["peak_bytes"]:
            groups.setdefault(row["op"], {}).setdefault(json.dumps(row["params"]), {}).setdefault(row["peer"], row)
    compared = {op: [g for g in sizes.values() if OURS in g and len(g) > 1] for op, sizes in groups.items()}
    largest = {op: max(sizes, key=lambda g: _cost(g[OURS])) for op, sizes in compared.items() if sizes}
    return dict(sorted(largest.items(), key=lambda item: _cost(item[1][OURS]), reverse=True))


def _cost(row: Row) -> tuple[float, int]:
    return row["ms"]["median"] if row["ms"] else 0.0, row["peak_bytes"] or 0


def over(row: Row, ours: Row) -> list[float | None]:
    """The peer's time and memory over ours, None where one was not measured."""
    weighed = row["peak_bytes"] is not None and ours["peak_bytes"]
    return [
        round(row["ms"]["median"] / ours["ms"]["median"], 3) if row["ms"] and ours["ms"] else None,
        round(row["peak_bytes"] / ours["peak_bytes"], 3) if weighed else None,
    ]


def throughput(rows: list[Row]) -> Data:
    """Tokens per second: {job: {model: {peer: rate}}}, models from small to large; the best where sizes differ."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in timed(rows):
        model, tokens = row["params"].get("model"), row.get("tokens")
        if row["op"] in _THROUGHPUT and model and tokens and row["case"] not in ("checkpointing", "body"):
            rates = found.setdefault(row["op"], {}).setdefault(model, {})
            rates[row["peer"]] = max(rates.get(row["peer"], 0.0), round(1e3 * tokens / row["ms"]["median"], 1))
    return {
        job: {m: dict(sorted(models[m].items(), key=_place)) for m in sorted(models, key=_parameters)}
        for job, models in found.items()
    }


def _place(item: tuple[str, Any]) -> int:
    """Of a peer among all, ours first."""
    return [*PEERS].index(item[0]) if item[0] in PEERS else len(PEERS)


def _parameters(model: str) -> float:
    """The number of parameters in a model's name, such as qwen3-3.1m or qwen2.5-1.5b."""
    size = re.search(r"-([\d.]+)([mb])$", model.lower())
    return float(size[1]) * (1e9 if size[2] == "b" else 1e6) if size else 0.0


def roofline(rows: list[Row], limits: dict[str, float] | None) -> Data:
    """Ops against the measured rates.

    gemms:  {op: {peer: [[FLOPs per byte, FLOP/s], ...]}}, of the operations and bytes that no way can do without.
    passes: {op: {peer: bytes/s}}, where bytes alone count, at the largest size.
    """
    gemms: Data = {}
    passes: Data = {}
    for row in timed(rows) if limits else []:
        flops, moved, seconds = row.get("flops"), row.get("moved_bytes"), row["ms"]["median"] / 1e3
        if flops and moved:
            point = [round(flops / moved, 3), round(flops / seconds)]
            gemms.setdefault(row["op"], {}).setdefault(row["peer"], []).append(point)
        elif moved:
            passes.setdefault(row["op"], {})[row["peer"]] = round(moved / seconds)
    return {"limits": limits, "gemms": gemms, "passes": passes} if gemms or passes else {}


FIGURES: dict[str, Callable[[list[Row], dict[str, float] | None], Data]] = {
    "head": lambda rows, _: head(rows),
    "peers": lambda rows, _: peers(rows),
    "throughput": lambda rows, _: throughput(rows),
    "roofline": roofline,
}


def machines(files: Iterable[Results]) -> dict[str, list[Results]]:
    """Files by machine."""
    found: dict[str, list[Results]] = {}
    for file in files:
        found.setdefault(file.machine, []).append(file)
    return found


def data(name: str, files: list[Results]) -> Data:
    """A picture's numbers, from the files of one machine; empty if they have none for it."""
    limits = next((file.header["limits"] for file in files if file.header.get("limits")), None)
    return FIGURES[name]([row for file in files for row in file.rows], limits or _stage_limits(files))


def _stage_limits(files: list[Results]) -> dict[str, float] | None:
    """The rates that the GPU suite's stage of that name found."""
    found: dict[str, float] = {}
    for row in (row for file in files for row in file.rows if row["op"] == "limit"):
        found |= {f"gemm_{k}" if k == "tflops" else f"copy_{k}": row[k] for k in ("tflops", "gb_per_s") if row.get(k)}
    return found if len(found) == 2 else None


def digest(found: Data) -> str:
    """Of a picture's numbers: drawn into it, it says whether the picture is that of the results that are there."""
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
