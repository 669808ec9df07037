"""What a run leaves behind while it trains: metrics.jsonl, summary.json, trackers, the progress display.

Only the main process constructs what is here. Drawing the run is report.py's work; deciding what is a metric is the
trainer's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fastgrpo.charts import number
from fastgrpo.files import replacing
from fastgrpo.wording import counted

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

logger = logging.getLogger(__name__)


def plain(value: Any) -> Any:
    """`value` as JSON knows it: numpy and torch scalars unwrapped, a non-finite number None, containers likewise."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Replaces `path` atomically by `summary` as strict JSON; non-finite numbers become null."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(plain(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")


class MetricsWriter:
    """Appends a line per optimizer step to a `metrics.jsonl`.

    A line reaches the operating system as soon as it is written (a killed process loses none) and the disk at
    `sync()`. Floats are written by `repr`: they read back to the same bits. On resume call `truncate_after` first.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a", encoding="utf-8", newline="\n", buffering=1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends `metrics`, `step` first, the other names sorted. A non-finite value is null; a value that is no JSON
        scalar raises TypeError and leaves the file as it was."""
        line = {"step": step} | {key: plain(metrics[key]) for key in sorted(metrics) if key != "step"}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Everything written so far is on the disk when this returns. To be called before each checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()

    @staticmethod
    def truncate_after(path: str | Path, step: int) -> int:
        """Drops the lines that are torn (no newline, not JSON, no step) or newer than `step`; returns how many.

        Atomic: after a crash the file is either the old or the new one. A missing file is left missing.
        """
        path = Path(path)
        if not path.exists():
            return 0
        dropped = damaged = 0
        with replacing(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
            for line in old:
                at = _line_step(line)
                if at <= step:
                    new.write(line)
                else:
                    dropped += 1
                    damaged += at == math.inf and line.endswith(b"\n")
        if damaged:  # a kill tears the last line only
            logger.warning("%s: %s could not be read and left out", path, counted(damaged, "line"))
        return dropped


def _line_step(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinite for a line that is not whole."""
    try:
        record = json.loads(line)
    except ValueError:
        return math.inf
    found = record.get("step") if isinstance(record, dict) else None
    return found if isinstance(found, int) and line.endswith(b"\n") else math.inf


class Tracker:
    """The same metrics to TensorBoard (`output_dir/tensorboard`) and Weights & Biases.

    report_to:    any of "tensorboard" and "wandb"; "none" and an empty list mean nothing.
    config:       the resolved configuration, shown beside the curves.
    resume_step:  the last optimizer step already done, 0 for a fresh run: TensorBoard forgets newer events and wandb
                  goes on with the run whose id stands in `output_dir/wandb_run_id`.

    ValueError for an unknown name, ImportError with the install command for a missing package. wandb takes its
    project, entity and mode from its usual environment variables (project: fastgrpo by default).
    """

    def __init__(
        self,
        report_to: Sequence[str],
        output_dir: str | Path,
        config: Mapping[str, Any] | None = None,
        run_name: str | None = None,
        *,
        resume_step: int = 0,
    ) -> None:
        openers = {"tensorboard": self._open_tensorboard, "wandb": self._open_wandb}
        names = [name for name in dict.fromkeys(report_to) if name != "none"]
        if unknown := [name for name in names if name not in openers]:
            raise ValueError(f"report_to: unknown tracker {unknown[0]!r}; known: {', '.join(openers)}, none")
        self._sinks: list[Callable[[int, dict[str, float]], None]] = []
        with ExitStack() as opened:  # closes the first if the second cannot be opened
            self._resources = opened
            for name in names:
                openers[name](Path(output_dir), plain(config or {}), run_name, resume_step)
            self._resources = opened.pop_all()

    def _open_tensorboard(self, output_dir: Path, config: dict[str, Any], run_name: str | None, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("report_to='tensorboard' needs tensorboard: pip install tensorboard") from error
        writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=step + 1 if step else 0)
        self._resources.callback(writer.close)
        pretty = json.dumps({"run_name": run_name, **config}, indent=2, default=str)
        writer.add_text("config", "\n".join(f"    {line}" for line in pretty.splitlines()), step)

        def write(at: int, metrics: dict[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, at)

        self._sinks.append(write)

    def _open_wandb(self, output_dir: Path, config: dict[str, Any], run_name: str | None, step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("report_to='wandb' needs wandb: pip install 'fastgrpo[wandb]'") from error
        output_dir.mkdir(parents=True, exist_ok=True)
        id_file = output_dir / "wandb_run_id"
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastgrpo"),
            name=run_name,
            dir=str(output_dir),
            config=config,
            id=id_file.read_text().strip() if step and id_file.exists() else None,
            resume="allow",
        )
        self._resources.callback(run.finish)
        id_file.write_text(run.id + "\n")
        self._sinks.append(lambda at, metrics: run.log(metrics, step=at))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Sends the finite numbers of `metrics` to every tracker."""
        values = {name: plain(value) for name, value in metrics.items() if name != "step"}
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for sink in self._sinks:
            sink(step, numbers)

    def close(self) -> None:
        """Flushes and closes every tracker; a second call does nothing."""
        self._sinks.clear()
        self._resources.close()


# What the display shows, in order of importance.
_FIELDS = {
    "reward": "reward {}",
    "eval/accuracy": "eval {}",
    "loss": "loss {}",
    "entropy": "entropy {}",
    "kl": "kl {}",
    "completions/mean_length": "length {}",
    "perf/tokens_per_second": "{} tok/s",
}
_SPARKS = "▁▂▃▄▅▆▇█"


class Progress:
    """How the run is going: a live bar on a terminal, otherwise a plain line now and then.

    total_steps:     optimizer steps of the run.
    first_step:      those already done when it starts (resume).
    enabled:         False shows nothing at all (every process but the main one).
    plain_interval:  seconds between two plain lines; the first, the last and those with an evaluation always show.

    A context manager. While the bar lives, prints and log lines that go to the terminal appear above it.
    """

    def __init__(
        self, total_steps: int, first_step: int = 0, enabled: bool = True, *, plain_interval: float = 5.0
    ) -> None:
        self._total, self._step = total_steps, first_step
        self._enabled, self._interval = enabled, plain_interval
        self._started = time.monotonic()
        self._next_line = self._started
        self._arrivals: deque[tuple[int, float]] = deque([(first_step, self._started)], maxlen=51)
        self._latest: dict[str, float] = {}
        self._rewards: deque[float] = deque(maxlen=20)
        self._live = ExitStack()
        self._console: Console | None = None
        if enabled and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            self._start_live()

    def _start_live(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=sys.stdout, highlight=False)
        terminals = {id(stream): name for name in ("stdout", "stderr") if (stream := getattr(sys, name)).isatty()}
        self._live.enter_context(
            Live(self, console=self._console, refresh_per_second=4, redirect_stderr="stderr" in terminals.values())
        )
        # Handlers made earlier hold the real stream and would write into the bar: point them at Live's proxies.
        known = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
        for handler in {handler for logger in known for handler in logger.handlers}:
            stream = getattr(handler, "stream", None)
            if isinstance(handler, logging.StreamHandler) and id(stream) in terminals:
                handler.setStream(getattr(sys, terminals[id(stream)]))
                self._live.callback(handler.setStream, stream)

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`step` is done. A metric that is missing keeps its last value, one that is None or NaN shows as nan."""
        if not self._enabled:
            return
        self._step = step
        now = time.monotonic()
        self._arrivals.append((step, now))
        for name in _FIELDS.keys() & metrics.keys():
            value = plain(metrics[name])
            self._latest[name] = math.nan if value is None else float(value)
        if "reward" in metrics and math.isfinite(self._latest["reward"]):
            self._rewards.append(self._latest["reward"])
        due = step >= self._total or now >= self._next_line
        if self._console is None and (due or any(name.startswith("eval/") for name in metrics)):
            self._next_line = now + self._interval
            eta = [f"eta {_clock(self._eta())}"] if step < self._total else []
            self._print("  ".join([f"step {step}/{self._total}", *self._fields(), *eta]))

    def message(self, text: str) -> None:
        """Prints `text` on a line of its own, above the bar when there is one."""
        if self._enabled and self._console is None:
            self._print(text)
        elif self._console is not None:
            self._console.print(text, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the last state of the bar on the screen and gives the streams back; a second call does nothing."""
        self._live.close()
        self._console = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, text: str) -> None:
        try:
            print(text, flush=True)
        except OSError:  # the reader of a pipe has gone: training goes on without a display
            self._enabled = False

    def _eta(self) -> float:
        """Seconds to the end at the pace of the last 50 steps; NaN before the first step."""
        (first, start), (last, end) = self._arrivals[0], self._arrivals[-1]
        pace = (end - start) / (last - first) if last > first else math.nan
        return max(self._total - self._step, 0) * pace

    def _fields(self) -> list[str]:
        return [
            label.format(number(value) if math.isfinite(value) else "nan")
            for name, label in _FIELDS.items()
            if (value := self._latest.get(name)) is not None
        ]

    def _reward_trend(self, ascii_only: bool) -> str:
        """The mean of the last 20 rewards and the course of the last 12: `(avg 0.58 ▁▃▅█)`."""
        if len(self._rewards) < 3:
            return ""
        recent = list(self._rewards)[-12:]
        low = min(recent)
        scale = (len(_SPARKS) - 1) / (max(recent) - low or math.inf)
        sparks = "" if ascii_only else " " + "".join(_SPARKS[round((reward - low) * scale)] for reward in recent)
        return f" (avg {number(sum(self._rewards) / len(self._rewards))}{sparks})"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Two lines that never wrap: the bar, then as many figures as the width holds."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        done = f"step {self._step}/{self._total}"
        times = _clock(time.monotonic() - self._started)
        times += f", eta {_clock(self._eta())}" if self._step < self._total else " elapsed"
        width = min(40, options.max_width - len(done) - len(times) - 2)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(done, style="bold", no_wrap=True),
            ProgressBar(total=max(self._total, 1), completed=self._step, width=width) if width >= 4 else "",
            Text(times, style="dim", no_wrap=True, overflow="ellipsis"),
        )
        yield bar
        line = Text(no_wrap=True, overflow="ellipsis", end="")
        for field in self._fields():
            trend = self._reward_trend(options.ascii_only) if field.startswith("reward") else ""
            gap = "  " if line else ""
            if len(gap + field + trend) + len(line) > options.max_width:
                trend = ""
            if len(gap + field + trend) + len(line) <= options.max_width:
                line.append(gap + field, "bold cyan" if field.startswith("reward") else None).append(trend, "dim")
        yield line


def _clock(seconds: float) -> str:
    """0:31, 12:05, 3:07:09; `?` when unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
