"""The run directory: what lies where, whose run it is, and what is cut when a run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fastgrpo.config import ConfigError, decisive_changes
from fastgrpo.files import atomic_write

# What a run writes; nothing else in the folder is ever touched.
_OWN = (
    *("config.yaml", "metrics.jsonl", "summary.json", "report.html", "wandb_run_id"),
    *("completions", "checkpoints", "tensorboard", "failed"),
)


class RunDirectory:
    """Paths of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.completions = self.path / "completions"
        self.summary = self.path / "summary.json"

    def check(self, options: dict[str, Any], *, restart: bool, overwrite: bool, allow_change: bool) -> bool:
        """May this run be written here? Changes nothing; returns whether an old run must go first.

        options: the resolved configuration. restart: the run begins anew (`resume=never`).
        Raises ConfigError when the folder holds another run, or any run and `restart`, unless `overwrite`.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir={str(self.path)!r} is a file")
        if not self.config.exists():
            return False
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
                f"output_dir={str(self.path)!r} holds another run ({'; '.join(changes[:3])}"
                f"{'; ...' if len(changes) > 3 else ''}): choose another folder, replace it with "
                "overwrite_output_dir=true, or go on with the new options with allow_config_change=true"
            )
        return False

    def claim(self, options: dict[str, Any], *, afresh: bool) -> None:
        """Make the folder this run's: remove an old run if `afresh`, and write config.yaml."""
        import yaml

        if afresh:
            self._remove_run()
        self.path.mkdir(parents=True, exist_ok=True)
        atomic_write(self.config, yaml.safe_dump(options, sort_keys=False, allow_unicode=True))

    def cut_after(self, step: int) -> None:
        """Drop what was written after `step`: the run goes on from there and writes it again."""
        from fastgrpo.tracking import MetricsWriter

        MetricsWriter.truncate_after(self.metrics, step)
        for file in self.completions.glob("step-*.parquet"):
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()

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
