"""The run directory: what lies where, whose run it is, and what is cut when a run goes on."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import IO, Any

from fastgrpo.checkpoint import find_checkpoint
from fastgrpo.config import ConfigError, GRPOConfig, decisive_changes
from fastgrpo.distributed import Ranks
from fastgrpo.files import atomic_write

# What a run writes, in the order it is removed: cut short, a removal must not leave checkpoints without a config.
# Nothing else in the folder is ever touched.
_OWN = (
    *("checkpoints", "metrics.jsonl", "summary.json", "report.html", "completions", "tensorboard", "failed"),
    *("wandb_run_id", "config.yaml"),
)
# Options that of several processes only the first obeys, or each for itself.
_THE_FIRSTS = ("run_name", "report_to", "log_completions", "disable_progress", "num_threads")


class RunDirectory:
    """Paths of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.completions = self.path / "completions"
        self.summary = self.path / "summary.json"
        self.parts = self.path / ".parts"  # what other processes add to a checkpoint, until the first takes it in
        self._lock: IO[str] | None = None

    def lock(self) -> None:
        """Keep other processes out until `release`. Raises ConfigError when one is at work here."""
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("w")
        except OSError as error:
            raise self._unwritable(error.strerror) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.close()
            raise ConfigError(f"output_dir={str(self.path)!r} is in use by another process") from error
        self._lock = handle

    def release(self) -> None:
        """Let others in. The system does so too when the process dies."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def enter(
        self, options: dict[str, Any], resume: str, config: GRPOConfig, ranks: Ranks
    ) -> tuple[bool, Path | None, str]:
        """Must an old run be removed, and if not, which checkpoint is gone on from, and with which other options?

        Changes nothing. Raises ConfigError as `check`, `find_checkpoint` and `check_origin` do, while another run is at
        work here, and where the processes of this one do not agree.
        """
        self._check_alike(options, ranks)
        return ranks.from_first("output_dir", lambda: self._look(options, resume, config))

    def _look(self, options: dict[str, Any], resume: str, config: GRPOConfig) -> tuple[bool, Path | None, str]:
        if self.path.is_dir():
            self.lock()
        afresh = self.check(
            options,
            restart=resume == "never",
            overwrite=config.overwrite_output_dir,
            allow_change=config.allow_config_change,
        )
        if afresh and resume not in ("auto", "never"):
            raise ConfigError(f"overwrite_output_dir would remove the run that resume={resume!r} is to go on from")
        checkpoint = None if afresh else find_checkpoint(self.path, resume)
        return afresh, checkpoint, self.check_origin(checkpoint, options, allow_change=config.allow_config_change)

    def _check_alike(self, options: dict[str, Any], ranks: Ranks) -> None:
        """Raises ConfigError, in all processes, where one has another folder, named by the time, or other options."""
        first, *others = ranks.gather("options", options | {"output_dir": str(self.path.resolve())})
        for name, value in first.items():
            if name not in _THE_FIRSTS and any(other[name] != value for other in others):
                values = ", ".join(str(of[name]) for of in (first, *others))
                raise ConfigError(f"the processes of this run have different values of {name}: {values}")

    def check(self, options: dict[str, Any], *, restart: bool, overwrite: bool, allow_change: bool) -> bool:
        """May this run be written here? Changes nothing; returns whether an old run must go first.

        options: the resolved configuration. restart: the run begins anew (`resume=never`).
        Raises ConfigError when the folder holds another run, or any run and `restart`, unless `overwrite`.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir={str(self.path)!r} is a file")
        self._check_place()
        if not self._begun():
            return False
        if not self.config.exists():
            raise ConfigError(
                f"output_dir={str(self.path)!r} holds a run without its config.yaml: choose another folder"
            )
        changes = decisive_changes(self._read_config(), options)
        if (restart or changes) and overwrite:
            return True
        if restart:
            raise ConfigError(
                f"output_dir={str(self.path)!r} holds a run: go on with it (resume=auto), choose another folder, or "
                "replace it with overwrite_output_dir=true"
            )
        if changes and not allow_change:
            raise ConfigError(
                f"output_dir={str(self.path)!r} holds another run ({_some(changes)}): choose another folder, "
                "replace it with overwrite_output_dir=true, or go on with the new options with allow_config_change=true"
            )
        return False

    def _check_place(self) -> None:
        """Can the folder be made, or written where it is there? Asked before a model is loaded for it."""
        there = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        reason = "" if there.is_dir() else f"{str(there)!r} is a file"
        if not reason and not os.access(there, os.W_OK | os.X_OK):
            reason = f"no permission to write in {str(there)!r}"
        if reason:
            raise self._unwritable(reason)

    def _unwritable(self, reason: str | None) -> ConfigError:
        return ConfigError(f"output_dir={str(self.path)!r} cannot be written: {reason}")

    def check_origin(self, checkpoint: Path | None, options: dict[str, Any], *, allow_change: bool) -> str:
        """The decisive options that changed since the run that `checkpoint` is of, here or in another folder, in words.

        Raises ConfigError when there are any, unless `allow_change`. Where the checkpoint stands alone, without its
        run's config.yaml, nothing is known of it.
        """
        run = RunDirectory(checkpoint.absolute().parents[1]) if checkpoint else self
        if checkpoint is None or not run.config.is_file():
            return ""
        changes = decisive_changes(run._read_config(), options)
        if changes and not allow_change:
            raise ConfigError(
                f"checkpoint {checkpoint} is of a run with other options ({_some(changes)}): go on with the new ones "
                "with allow_config_change=true"
            )
        return f" with other options: {'; '.join(changes)}" if changes else ""

    def claim(self, options: dict[str, Any], *, afresh: bool) -> None:
        """Make the folder this run's: remove an old run if `afresh`, and write config.yaml."""
        import yaml

        self.lock()
        if afresh:
            self._remove_run()
        try:
            atomic_write(self.config, yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise self._unwritable(error.strerror) from error

    def cut_after(self, step: int) -> None:
        """Drop what was written after `step`: the run goes on from there and writes it again."""
        from fastgrpo.tracking import MetricsWriter

        shutil.rmtree(self.parts, ignore_errors=True)
        MetricsWriter.truncate_after(self.metrics, step)
        for file in self.completions.glob("step-*.parquet"):
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()

    def _begun(self) -> bool:
        """Has a run got anywhere: checkpoints, or a line of metrics? A config alone is a run that failed to start."""
        return any(self.path.glob("checkpoints/step-*")) or (self.metrics.exists() and self.metrics.stat().st_size > 0)

    def _read_config(self) -> dict[str, Any]:
        import yaml

        try:
            old = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{self.config} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(old, dict):
            raise ConfigError(f"{self.config} does not hold a run's options")
        return old

    def _remove_run(self) -> None:
        for name in _OWN:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)


def _some(changes: list[str]) -> str:
    return "; ".join([*changes[:3], *(["..."] if len(changes) > 3 else [])])
