"""A run directory -> one self-contained report.html: figures, curves, where the time went, sample completions.

`fastgrpo report RUN_DIR` is to be quick: neither torch nor transformers is imported. This module reads the files and
prepares numbers; all markup is in templates/, rendered by Jinja with autoescaping, so nothing a model wrote reaches
the page unescaped. No statistics beyond means: whether a run was good is for its reader to say.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from fastgrpo.charts import Chart, Series, draw, duration, number

MAX_TEXT = 4000  # characters shown of a prompt or a completion
MAX_OTHER_CHARTS = 40
_TIMES = ("rollout", "prepare", "update", "critic", "reward")

_ELSEWHERE = {"reward", "eval/reward", "num_tokens", "perf/step_time", *(f"perf/{name}_time" for name in _TIMES)}


@dataclass
class Run:
    """The files of a run directory, as far as they are there and readable."""

    folder: Path
    metrics: dict[str, Series] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def get(self, name: str) -> Series | None:
        """The metric, unless it never had a finite value."""
        series = self.metrics.get(name)
        return series if series is not None and series.finite.size else None


def build_report(run_dir: str | Path) -> Path:
    """Writes `run_dir/report.html` (atomically) from whatever the run has left so far and returns its path.

    Missing or damaged files leave gaps that the report names. FileNotFoundError if `run_dir` is no folder.
    """
    run = read_run(Path(run_dir))
    environment = _templates()
    script = environment.get_template("report.js").render()
    sections, reward = _sections(run), _reward_chart(run)
    charts = [chart for charts in sections.values() for chart in charts] + ([reward] if reward else [])
    page = environment.get_template("report.html").render(
        run=run,
        title=str(run.config.get("run_name") or run.folder.name),
        facts=_facts(run),
        status=_status(run),
        tiles=_tiles(run),
        reward=reward,
        sections=sections,
        breakdown=_breakdown(run),
        data={chart.key: chart.data for chart in charts},
        summary_text=json.dumps(run.summary, indent=2, ensure_ascii=False) if run.summary else "",
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path = run.folder / "report.html"
    temporary = path.with_name(".tmp-report.html")
    temporary.write_bytes(page.encode("utf-8", "replace"))
    temporary.replace(path)
    return path


def reward_curve_svg(run_dir: str | Path) -> str:
    """A standalone SVG (720 x 320) of the run's reward curve that reads well on light and dark pages."""
    run = read_run(Path(run_dir))
    return _templates().get_template("reward.svg").render(chart=_reward_chart(run), title=run.folder.name)


def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("fastgrpo"),
        autoescape=lambda name: name is not None and name.endswith((".html", ".svg")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "duration": duration, "visible": visible}
    return environment


# ---------------------------------------------------------------------------------------------------- reading a run


def read_run(folder: Path) -> Run:
    """Reads metrics.jsonl, summary.json, config.yaml and a few of the completions; what fails goes to `problems`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a run directory")
    run = Run(folder.resolve())
    _read_metrics(run)
    if (path := folder / "summary.json").exists():
        try:
            run.summary = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            run.problems.append(f"summary.json could not be read: {error}")
    if (path := folder / "config.yaml").exists():
        run.config_text = path.read_text(encoding="utf-8", errors="replace")
        try:
            run.config = dict(yaml.safe_load(run.config_text) or {})
        except (yaml.YAMLError, ValueError, TypeError) as error:
            run.problems.append(f"config.yaml could not be parsed: {error}")
    files = sorted((folder / "completions").glob("step-*.parquet"))
    for index in sorted({0, len(files) // 2, len(files) - 1}) if files else []:
        try:
            run.samples.append(_read_samples(files[index]))
        except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are among these
            run.problems.append(f"completions/{files[index].name} could not be read: {error}")
    return run


def _read_metrics(run: Run) -> None:
    path = run.folder / "metrics.jsonl"
    columns: dict[str, tuple[list[int], list[float]]] = {}
    torn = 0
    for raw in path.open("rb") if path.exists() else []:
        try:
            record = json.loads(raw)
            step = int(record.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError):
            torn += 1
            continue
        run.steps.append(step)
        for name, value in record.items():
            if value is None or isinstance(value, (int, float)):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(step)
                # Clipped far beyond anything meaningful, so that no sum or difference below can overflow.
                values.append(math.nan if value is None else float(min(max(value, -1e100), 1e100)))
    run.metrics = {name: Series(np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}
    if torn:
        run.problems.append(f"{torn} line{'s' * (torn > 1)} of metrics.jsonl could not be read")


def _read_samples(path: Path) -> dict[str, Any]:
    """The two best and the two worst completions of a file, none twice."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path).to_pylist()
    scored = [row for row in rows if row["reward"] is not None]
    scored.sort(key=lambda row: -row["reward"])
    distinct: dict[tuple[str, str], dict[str, Any]] = {}
    for row in scored:
        distinct.setdefault((row["prompt"], row["completion"]), row)
    ranked = list(distinct.values())
    best, worst = ranked[:2], ranked[2:][-2:][::-1]
    return {
        "step": rows[0]["step"] if rows else int(path.stem.removeprefix("step-")),
        "count": len(rows),
        "failed": len(rows) - len(scored),
        "best": [_sample(row) for row in best],
        "worst": [_sample(row) for row in worst],
    }


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    parts = {key.removeprefix("rewards/"): row[key] for key in row if key.startswith("rewards/")}
    return {
        "turns": _turns(row["prompt"]),
        "completion": _shorten(row["completion"]),
        "reward": row["reward"],
        "parts": parts if len(parts) > 1 else {},
        "num_tokens": row["num_tokens"],
        "finished": row["finished"],
    }


def _turns(prompt: str) -> list[tuple[str, str]]:
    """(role, text) of each message of a chat prompt; a plain prompt is one turn."""
    try:
        messages = json.loads(prompt) if prompt.startswith("[{") else None
        turns = [(str(m["role"]), m["content"]) for m in messages or []]
    except (ValueError, TypeError, KeyError):
        turns = []
    texts = [(role, c if isinstance(c, str) else json.dumps(c, ensure_ascii=False)) for role, c in turns]
    return [(role, _shorten(text)) for role, text in texts or [("prompt", prompt)]]


def visible(text: str) -> str:
    """`text` with its control characters (NUL, escape, ...) shown as the symbols Unicode has for them."""
    return text.translate({code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421})


def _shorten(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[: MAX_TEXT // 2]}\n[… {len(text) - MAX_TEXT:,} characters left out …]\n{text[-MAX_TEXT // 2 :]}"


# ------------------------------------------------------------------------------------------------- figures and curves


def _facts(run: Run) -> list[str]:
    """The line under the title: what was trained, how."""
    facts = [
        str(run.config[key]) for key in ("model", "algorithm", "loss_type") if isinstance(run.config.get(key), str)
    ]
    facts += [f"seed {run.config['seed']}"] if "seed" in run.config else []
    if run.steps:
        written = datetime.fromtimestamp(os.path.getmtime(run.folder / "metrics.jsonl"), UTC)
        facts += [f"last step written {written:%Y-%m-%d %H:%M} UTC"]
    return facts


def _status(run: Run) -> str:
    """One sentence on how far the run came; empty if it is complete."""
    if not run.steps:
        return "No steps have been recorded yet."
    planned, done = run.config.get("max_steps"), run.steps[-1]
    if isinstance(planned, int) and done < planned:
        return f"This run is not complete: step {done:,} of {planned:,}."
    return "" if run.summary else "This run has no summary.json: it is still going on or was stopped."


def _tiles(run: Run) -> list[dict[str, str]]:
    """The key figures: label, value (and before), note."""
    tiles: list[dict[str, str]] = []

    def tile(label: str, value: str, before: str = "", note: str = "") -> None:
        tiles.append({"label": label, "value": value, "before": before, "note": note})

    accuracy = _accuracy(run)
    if accuracy is not None:
        tile("Accuracy", f"{accuracy.finite[-1]:.1%}", f"{accuracy.finite[0]:.1%}", "held out, before and after")
    if (reward := run.get("reward")) is not None:
        n = max(1, min(20, reward.finite.size // 10))
        means = [number(part.mean()) for part in (reward.finite[:n], reward.finite[-n:])]
        tile("Reward", means[1], means[0], f"mean of the first and last {n} steps" if n > 1 else "first and last step")
    if run.steps:
        tile("Steps", f"{run.steps[-1]:,}")
    if (tokens := run.get("num_tokens")) is not None:
        tile("Tokens", number(tokens.finite[-1]), note="prompts and completions")
    step_time = run.get("perf/step_time")
    seconds = run.summary.get("seconds", step_time.finite.sum() if step_time is not None else None)
    if isinstance(seconds, (int, float)):
        tile("Time", duration(seconds), note="whole run" if "seconds" in run.summary else "sum of the steps")
    if (rate := run.get("perf/tokens_per_second")) is not None:
        tile("Throughput", f"{number(float(np.median(rate.finite)))}", note="tokens per second, median step")
    return tiles


def _accuracy(run: Run) -> Series | None:
    """eval/accuracy, with the summary's before and after at the run's ends."""
    series = run.get("eval/accuracy")
    points = dict(zip(series.steps.tolist(), series.values.tolist(), strict=True)) if series is not None else {}
    for key, step in (("accuracy_before", 0), ("accuracy_after", max(run.steps, default=0))):
        if isinstance(value := run.summary.get(key), (int, float)) and run.steps:
            points[step] = value
    steps = sorted(points)
    return Series(np.array(steps), np.array([points[step] for step in steps], float)) if points else None


def _sections(run: Run) -> dict[str, list[Chart]]:
    """Every chart that has data, by section."""
    specs: dict[str, list[dict[str, Any]]] = yaml.safe_load(
        (Path(__file__).parent / "templates" / "charts.yaml").read_text(encoding="utf-8")
    )
    repeated = {
        name: name.removeprefix("eval/") for name in run.metrics if name.startswith(("eval/avg@", "eval/pass@"))
    }
    functions = [name for name in run.metrics if name.startswith("rewards/") and name.endswith("/mean")]
    titles = {name: name.removeprefix("rewards/").removesuffix("/mean") for name in functions}
    specs["Learning"][1:1] = [
        {"title": f"Held-out {' and '.join(repeated.values())}", "metrics": repeated},
        *(
            {"title": titles[name], "unit": "reward", "note": _failures(run, titles[name]), "metrics": {name: ""}}
            for name in (functions if len(functions) > 1 else [])
        ),
    ]
    named = {name for charts in specs.values() for chart in charts for name in chart["metrics"]}
    others = [name for name in sorted(run.metrics) if name not in named | _ELSEWHERE | set(functions)]
    specs["Everything else"] = [{"title": name, "metrics": {name: ""}} for name in others[:MAX_OTHER_CHARTS]]
    sections: dict[str, list[Chart]] = {}
    for section, wanted in specs.items():
        for spec in wanted:
            found = {label: series for name, label in spec["metrics"].items() if (series := run.get(name)) is not None}
            if found:
                key = f"chart-{sum(map(len, sections.values()))}"
                words = {name: spec.get(name, "") for name in ("unit", "note")}
                sections.setdefault(section, []).append(draw(key, spec["title"], found, _span(run), **words))
    return sections


def _span(run: Run) -> tuple[int, int]:
    """The steps of every chart's axis; it starts at 0 where that costs little room."""
    first, last = min(run.steps), max(run.steps)
    return (0 if first <= 0.1 * last or last == 1 else first), last


def _failures(run: Run, function: str) -> str:
    failed = run.get(f"rewards/{function}/failed")
    count = 0 if failed is None else failed.finite.sum()
    return f"{number(count)} failed sample{'s' if count > 1 else ''}" if count else ""


def _reward_chart(run: Run) -> Chart | None:
    """Reward, with the evaluations on it where they share its scale."""
    if (reward := run.get("reward")) is None:
        return None
    curves = {"training reward": reward}
    if (evaluated := run.get("eval/reward")) is not None:
        curves["held-out reward"] = evaluated
    accuracy = _accuracy(run)
    if accuracy is not None and reward.finite.min() >= 0 and reward.finite.max() <= 1:
        same = evaluated is not None and np.array_equal(evaluated.values, accuracy.values, equal_nan=True)
        curves |= {} if same else {"held-out accuracy": accuracy}
    return draw("chart-reward", "Reward", curves, _span(run))


def _breakdown(run: Run) -> dict[str, Any] | None:
    """Seconds per step by stage of 1/1000 or more: `shares` of the whole run, `bars` of at most 60 spans of steps."""
    total = run.get("perf/step_time")
    least = 1e-3 * np.nansum(total.values) if total is not None else 0.0
    found = {name: series for name in _TIMES if (series := run.get(f"perf/{name}_time")) is not None}
    parts = {name: series for name, series in found.items() if np.nansum(series.values) >= least}
    if total is None or not parts:
        return None
    seconds: dict[str, np.ndarray] = {}
    for name, series in parts.items():  # a stage that did not run in a step has no value on its line
        at = dict(zip(series.steps.tolist(), np.nan_to_num(series.values).tolist(), strict=True))
        seconds[name] = np.array([at.get(step, 0.0) for step in total.steps.tolist()])
    seconds["other"] = np.maximum(np.nan_to_num(total.values) - sum(seconds.values()), 0)
    whole = sum(part.sum() for part in seconds.values())
    # A bar covers whole rollouts, or it would show which of its steps happened to sample and not where time goes.
    rollouts = parts["rollout"].steps if "rollout" in parts else total.steps
    period = max(1, int(np.median(np.diff(rollouts)))) if rollouts.size > 1 else 1
    width = math.ceil(total.steps.size / 60 / period) * period
    spans = [slice(start, start + width) for start in range(0, total.steps.size, width)]
    means = [{name: float(part[span].mean()) for name, part in seconds.items()} for span in spans]
    return {
        "shares": [(name, float(part.sum()), float(part.sum() / max(whole, 1e-9))) for name, part in seconds.items()],
        "bars": [(*total.steps[span][[0, -1]].tolist(), mean) for span, mean in zip(spans, means, strict=True)],
        "highest": max(max(sum(mean.values()) for mean in means), 1e-9),
    }
