"""What became slower or larger between two results, beyond the spread of their own rounds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import results
from benchmarks.cases import OURS
from benchmarks.tables import number

_TIME = 0.03
"""Two rounds may be closer to one another than to any third."""
_SHARE, _BYTES = 0.1, 8 << 20
"""Peaks have no spread of their own: repeated, they differ by less than a tenth or by a few allocations' pages."""


@dataclass(frozen=True)
class Change:
    """One case: `kind` is slower, faster, larger, smaller or lost; `text` says from what to what."""

    kind: str
    case: str
    peer: str
    text: str

    @property
    def bad(self) -> bool:
        """Ours became worse. What a peer became says that the machine was another, or busy."""
        return self.peer == OURS and self.kind in ("slower", "larger", "lost")


def compare(before: Path, after: Path) -> list[Change]:
    """The changes of the cases in both. ValueError where they have none in common."""
    old, new = (_by_case(results.load(path)) for path in (before, after))
    common = [key for key in old if key in new]
    if not common:
        raise ValueError(f"{before} and {after} have no case in common")
    return [change for key in common for change in changes(old[key], new[key])]


def changes(old: results.Row, new: results.Row) -> list[Change]:
    """Slower: even the fast fifth of the new rounds, p20, takes longer than p80 of the old; faster likewise."""
    change, found = partial(Change, case=new["case"], peer=new["peer"]), []
    if old["ms"] and not new["ms"]:
        why = new["note"] or "its result is not right"
        return [change("lost", text=f"{number(old['ms']['median'])} ms before; now {why}")]
    if old["ms"] and new["ms"]:
        more = new["ms"]["median"] / old["ms"]["median"] - 1
        text = f"{number(old['ms']['median'])} -> {number(new['ms']['median'])} ms ({more:+.0%})"
        if more > _TIME and new["ms"]["p20"] > old["ms"]["p80"]:
            found.append(change("slower", text=text))
        elif more < -_TIME and new["ms"]["p80"] < old["ms"]["p20"]:
            found.append(change("faster", text=text))
    if old["peak_bytes"] is not None and new["peak_bytes"] is not None:
        grown = new["peak_bytes"] - old["peak_bytes"]
        if abs(grown) > max(_BYTES, _SHARE * old["peak_bytes"]):
            text = f"{number(old['peak_bytes'] / 1e6)} -> {number(new['peak_bytes'] / 1e6)} MB"
            found.append(change("larger" if grown > 0 else "smaller", text=text))
    return found


def _by_case(files: list[results.Results]) -> dict[str, results.Row]:
    """The GPU suite's cases have one name for several peers and sizes."""
    rows = [row for file in files for row in file.rows]
    return {json.dumps([row["case"], row["op"], row["peer"], row["params"]]): row for row in rows}


def _machine(files: list[results.Results]) -> str:
    """Devices and clocks, without what changes from one minute to the next."""
    found = set()
    for file in files:
        device = file.header["device"]
        if isinstance(device, dict):
            device = ", ".join(f"{name} {value}" for name, value in device.items() if name != "load_average_1min")
        found.add(f"{device}, {file.header.get('timer') or 'an unknown clock'}")
    return " and ".join(sorted(found))


def report(before: Path, after: Path) -> int:
    """Print the changes, bad ones first; 1 if ours became worse anywhere."""
    found = sorted(compare(before, after), key=lambda change: not change.bad)
    old, new = results.load(before), results.load(after)
    if (here := _machine(old)) != (there := _machine(new)):
        print(f"measured in two ways: {before} on {here}; {after} on {there}")
    if alone := len(_by_case(old).keys() ^ _by_case(new).keys()):
        print(f"left out: {alone} cases that are in one of the two alone")
    width = max((len(change.case) for change in found), default=0)
    for change in found:
        print(f"{change.kind:8}{change.case:{width}}  {change.text}")
    bad = sum(change.bad for change in found)
    better = sum(change.kind in ("faster", "smaller") for change in found if change.peer == OURS)
    peers = sum(change.peer != OURS for change in found)
    print(f"beyond the spread: {bad} of ours worse, {better} better; {peers} of the peers' changed")
    return 1 if bad else 0
