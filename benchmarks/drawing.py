"""Pictures from `figures.py`'s numbers, by matplotlib, which only this needs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS
from benchmarks.figures import Data, digest

_COLOURS = {
    OURS: "#c1121f",
    "trl": "#1d6fa5",
    "trl-whole": "#7fb2d6",
    "liger": "#e08e0b",
    "cce": "#7b4fa3",
    "torch": "#2a9d5c",
    "torch_compile": "#8bc34a",
    "naive": "#5c6770",
    "transformers": "#8c6239",
    "padded": "#a9a9a9",
    "unshared": "#d38fb0",
    "plain": "#d3b88f",
}
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6e8",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastgrpo",
    "figure.facecolor": "white",
}


def draw(name: str, found: Data, machine: str, path: Path) -> None:
    """Write one picture, PNG or SVG by the path's suffix; its metadata hold the digest of its numbers."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            "matplotlib, which draws, is not installed: pip install -c constraints.txt -e '.[bench]'"
        ) from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        {"head": _head, "peers": _peers, "throughput": _throughput, "roofline": _roofline}[name](figure, found)
        figure.suptitle(f"{figure.get_suptitle()} · {machine}", fontsize=11, fontweight="bold")
        metadata: dict[str, Any] = {"Description": f"data {digest(found)}"}
        if path.suffix == ".svg":
            metadata["Date"] = None
        figure.savefig(path, dpi=150, metadata=metadata)


def _colour(peer: str) -> str:
    return _COLOURS.get(peer, "#999999")


def _head(figure: Any, found: Data) -> None:
    """Time and memory, along N and along V."""
    figure.set_size_inches(9, 3.2 * len(found))
    figure.suptitle("linear_grpo_loss, forward and backward")
    axes = figure.subplots(len(found), 2, squeeze=False)
    for row, (along, curve) in zip(axes, found.items(), strict=True):
        fixed = ", ".join(f"{k} = {v:,}" for k, v in curve["fixed"].items())
        for axis, what in zip(row, ("time (ms)", "peak memory (MB)"), strict=True):
            for peer, points in curve["peers"].items():
                _line(axis, peer, points, what)
            axis.set(xscale="log", yscale="log", xlabel=_NAMES[along], ylabel=what, title=fixed)
            ticks = sorted({point[0] for points in curve["peers"].values() for point in points})
            axis.set_xticks(ticks, [f"{x:,}" for x in ticks])
            axis.minorticks_off()
            _plain_ticks(axis)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7)


_NAMES = {"N": "N, tokens", "V": "V, vocabulary"}


def _line(axis: Any, peer: str, points: list[list[float]], what: str) -> None:
    ours = peer == OURS
    style: dict[str, Any] = {"color": _colour(peer), "linewidth": 2.4 if ours else 1.4, "zorder": 3 if ours else 2}
    if what.startswith("time"):
        axis.plot(*zip(*[p[:2] for p in points], strict=True), "o-", markersize=4, label=peer, **style)
        x, low, high = zip(*[(p[0], p[2], p[3]) for p in points], strict=True)
        axis.fill_between(x, low, high, color=_colour(peer), alpha=0.15, linewidth=0)
    elif weighed := [(p[0], p[4] / 1e6) for p in points if p[4]]:
        axis.plot(*zip(*weighed, strict=True), "o-", markersize=4, label=peer, **style)


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... as they are read, not as powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _peers(figure: Any, found: Data) -> None:
    """A line an op, a mark a peer; both panels in multiples of ours."""
    figure.set_size_inches(9, 1.6 + 0.36 * len(found))
    figure.suptitle("Peers against fastgrpo, each op at the size that takes ours longest")
    axes = figure.subplots(1, 2, sharey=True)
    jobs = list(found)[::-1]
    for axis, what, which in zip(axes, ("time", "peak memory"), (0, 1), strict=True):
        axis.axvline(1, color=_colour(OURS), linewidth=1.5)
        for y, job in enumerate(jobs):
            for peer, ratios in found[job].items():
                if ratios[which] is not None:
                    axis.plot(ratios[which], y, "o", color=_colour(peer), markersize=7, alpha=0.9)
        axis.set(xscale="log", xlabel=f"{what}, multiples of ours (right: ours is better)", yticks=range(len(jobs)))
        axis.set_yticklabels(jobs)
        axis.margins(y=0.08)
        _multiples(axis.xaxis)
    _name_peers(figure, {peer for ratios in found.values() for peer in ratios})


def _name_peers(figure: Any, peers: Iterable[str]) -> None:
    """A legend of colours below the figure, in the colours' order."""
    from matplotlib.lines import Line2D

    order = {peer: i for i, peer in enumerate(_COLOURS)}
    names = sorted(peers, key=lambda peer: order.get(peer, len(order)))
    marks = [Line2D([], [], marker="o", linestyle="", color=_colour(peer), markersize=6) for peer in names]
    figure.legend(marks, names, loc="outside lower center", ncols=8)


def _multiples(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axis.set_minor_locator(NullLocator())


def _throughput(figure: Any, found: Data) -> None:
    """A panel a job, a group of bars a model."""
    figure.set_size_inches(2.4 * max(len(found), 2) + 0.6, 3.2)
    figure.suptitle("Tokens per second by model")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (job, models) in zip(axes, found.items(), strict=True):
        names = list(dict.fromkeys(peer for rates in models.values() for peer in rates))
        width = 0.8 / len(names)
        for i, peer in enumerate(names):
            at = [x + (i - (len(names) - 1) / 2) * width for x, rates in enumerate(models.values()) if peer in rates]
            rates = [rates[peer] for rates in models.values() if peer in rates]
            bars = axis.bar(at, rates, width * 0.92, color=_colour(peer))
            axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], fontsize=7, padding=1)
        axis.set_xticks(range(len(models)), list(models))
        axis.set(title=job, ylabel="tokens/s" if axis is axes[0] else "")
        axis.grid(visible=False, axis="x")
        axis.margins(x=0.15, y=0.12)
    _name_peers(figure, {peer for models in found.values() for rates in models.values() for peer in rates})


def _roofline(figure: Any, found: Data) -> None:
    """Left: matrix products under the measured roof; right: passes against the measured copy."""
    figure.set_size_inches(9, 3.8)
    figure.suptitle("Against this machine's measured limits")
    left, right = figure.subplots(1, 2)
    peak, copy = found["limits"]["gemm_tflops"] * 1e12, found["limits"]["copy_gb_per_s"] * 1e9
    points = [point for job in found["gemms"].values() for each in job.values() for point in each]
    if points:
        low, high = min([peak / copy, *(p[0] for p in points)]) / 4, max(p[0] for p in points) * 4
        roof = [low, peak / copy, high]
        left.plot(roof, [min(x * copy, peak) / 1e9 for x in roof], color="#222222", linewidth=1.5)
        left.annotate(f"GEMM {peak / 1e9:,.0f} GFLOP/s", (high, peak / 1e9), ha="right", va="bottom", fontsize=8)
        for mark, (job, each) in zip("o^sDvP", found["gemms"].items(), strict=False):
            for peer, where in each.items():
                x, y = zip(*[(p[0], p[1] / 1e9) for p in where], strict=True)
                left.plot(x, y, mark, color=_colour(peer), markersize=5, alpha=0.85)
            left.plot([], [], mark, color="#222222", markersize=5, label=job)
        left.legend(loc="lower left", fontsize=7)
        left.set(xscale="log", yscale="log", title="matrix products")
        left.set(xlabel="least FLOPs per byte moved", ylabel="least FLOPs / time (GFLOP/s)")
        _plain_ticks(left)
    for place, each in enumerate(found["passes"].values()):
        for peer, rate in each.items():
            right.plot(rate / 1e9, place, "o", color=_colour(peer), markersize=7, alpha=0.9)
    right.axvline(copy / 1e9, color="#222222", linewidth=1.5)
    right.annotate(f"copy {copy / 1e9:,.0f} GB/s ", (copy / 1e9, -0.45), ha="right", va="bottom", fontsize=8)
    right.set(title="passes over logits", xlabel="least bytes / time (GB/s)", ylim=(-0.5, len(found["passes"]) - 0.4))
    right.set_yticks(range(len(found["passes"])), list(found["passes"]))
    right.set_xlim(left=0)
    ops = [*found["gemms"].values(), *found["passes"].values()]
    _name_peers(figure, {peer for each in ops for peer in each})
