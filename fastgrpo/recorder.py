"""What a run writes down: metrics, completions, trackers, progress, summary, report."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastgrpo.completions import write_completions
from fastgrpo.config import GRPOConfig
from fastgrpo.errors import RunError
from fastgrpo.records import Rollout, RolloutBatch
from fastgrpo.run_directory import RunDirectory
from fastgrpo.state import pack_rollouts, save_tensors
from fastgrpo.tracking import MetricsWriter, Progress, Tracker, write_summary

logger = logging.getLogger(__name__)


class Recorder:
    """Open from the first step to the last.

    options: the resolved configuration. first_step: steps done before; trackers forget what is newer.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: GRPOConfig,
        options: dict[str, Any],
        device: torch.device,
        first_step: int,
        total_steps: int,
    ) -> None:
        self._device = device
        self._directory = directory
        self._config = config
        name = config.run_name or directory.path.name
        self._metrics = MetricsWriter(directory.metrics)
        self._tracker = Tracker(config.report_to, directory.path, options, name, resume_step=first_step)
        self._progress = Progress(total_steps, first_step, enabled=not config.disable_progress)
        self._last_line = time.perf_counter()

    def step_line(self, step: int, metrics: dict[str, float], batch: RolloutBatch) -> dict[str, float]:
        """Write the line of an optimizer step: its own metrics and those of its rollout batch; returns it.

        The time since the line before is the step's; a batch's rollout and reward times stand on its first step only.
        """
        seconds = time.perf_counter() - self._last_line
        first = batch.used == 1
        own = {k: v for k, v in batch.metrics.items() if first or not k.startswith("perf/")}
        tokens = sum(len(r.prompt.token_ids) + r.num_tokens for r in batch.rollouts) / self._config.steps_per_batch
        speed = {
            "perf/step_time": seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/peak_memory_gb": _peak_memory(self._device) / 1e9,
        }
        line = own | metrics | speed
        self.line(step, line)
        return line

    def line(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics everywhere."""
        self._last_line = time.perf_counter()
        with self._writing(f"metrics of step {step}"):
            self._metrics.write(step, metrics)
            self._tracker.log(step, metrics)
        self._progress.update(step, metrics)

    def completions(self, step: int, rollouts: list[Rollout]) -> None:
        """Keep the completions that step `step` is the first to train on."""
        if self._config.log_completions:
            with self._writing(f"completions of step {step}"):
                self._directory.completions.mkdir(exist_ok=True)
                write_completions(self._directory.completions, step, rollouts)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """A full disk is told with where it is; OSError alone often names no file."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise RunError(
                f"output_dir={str(self._directory.path)!r}: {what} could not be written: {reason}"
            ) from error

    def message(self, text: str) -> None:
        """Tell the user, above the progress display."""
        self._progress.message(text)

    def sync(self) -> None:
        """Metrics are on the disk when this returns; called before each checkpoint."""
        self._metrics.sync()

    def finish(self, summary: dict[str, Any]) -> None:
        """Summary and report of a run that reached its end."""
        from fastgrpo.report import build_report

        with self._writing("summary and report"):
            self._metrics.sync()
            write_summary(self._directory.summary, summary)
            report = build_report(self._directory.path)
        self.message(f"report: {report}")

    def close(self) -> None:
        """Close files, trackers and display. A failure is only told: as an error it would hide what ended the run."""
        for name, part in (("progress", self._progress), ("trackers", self._tracker), ("metrics", self._metrics)):
            try:
                part.close()
            except OSError as error:
                logger.warning("%s of %s may lack their end: %s", name, self._directory.path, error)


class SilentRecorder(Recorder):
    """That of the processes beside the first: it works the figures out and writes nothing down."""

    def __init__(self, config: GRPOConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._last_line = time.perf_counter()

    def line(self, step: int, metrics: dict[str, float]) -> None:
        self._last_line = time.perf_counter()

    def completions(self, step: int, rollouts: list[Rollout]) -> None:
        return

    def message(self, text: str) -> None:
        return

    def sync(self) -> None:
        return

    def finish(self, summary: dict[str, Any]) -> None:
        return

    def close(self) -> None:
        return


def save_failed_step(folder: Path, step: int, rollouts: list[Rollout]) -> Path:
    """Keep the inputs of a step that ended the run: a table to read, and the tokens and log-probs; returns where."""
    kept = folder / "failed"
    kept.mkdir(exist_ok=True)
    save_tensors(kept / f"step-{step:08d}.safetensors", pack_rollouts(rollouts)[0])
    return write_completions(kept, step, rollouts)


def _peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak allocation, or the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
