"""Checkpoints that are whole or not there.

A checkpoint is a folder `run_dir/checkpoints/step-00000123`. It is written under a `.tmp-` name, described by a
manifest (size and SHA-256 of every file), flushed to the disk, and only then renamed; a kill at any moment leaves the
one before or the new one, never half of one. Reading starts by checking the manifest, and a damaged checkpoint is
named and passed over.

One process writes (rank 0); nothing here is collective. What goes into the folder is the caller's: `fastgrpo.state` has
the forms for tensors, optimizers, generators and rollouts, and its names are importable from here too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastgrpo.config import ConfigError
from fastgrpo.files import sync
from fastgrpo.state import CheckpointError, load_json

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointStore:
    """The checkpoints of one run directory.

    save_total_limit: keep so many of the newest; None keeps all.

    Making a store tidies up after a killed process: `.tmp-` folders go, and a checkpoint that was being replaced is put
    back. So make it where no other process is saving into the same run directory.
    """

    def __init__(self, run_dir: str | os.PathLike[str], save_total_limit: int | None = None) -> None:
        if save_total_limit is not None and save_total_limit < 1:
            raise ValueError(f"save_total_limit={save_total_limit}: at least 1, or None to keep all")
        self.folder = Path(run_dir) / "checkpoints"
        self._limit = save_total_limit
        self._tidy()

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Makes the checkpoint of `step` from the files that `write(folder)` writes; returns its path.

        An existing one of the same step is replaced. Steps only grow within a run, so checkpoints of later steps are
        from a continuation that was given up: they are deleted, with a warning, and those beyond `save_total_limit`
        too. Raises CheckpointError when the disk is full or fails; nothing is left of the attempt then, and all
        earlier checkpoints are as they were. Any other exception of `write` passes through, as cleanly.
        """
        final = self.folder / f"step-{step:08d}"
        temp = self._temp_name(final)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy()
            temp.mkdir()
            write(temp)
            manifest = {"format": FORMAT, "step": step, "files": _describe_files(temp)}
            (temp / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            _sync_tree(temp)
            self._publish(temp, final)
        except BaseException as error:
            shutil.rmtree(temp, ignore_errors=True)
            code = _error_number(error)
            if code is None:
                raise
            reason = "no space left on the disk" if code in FULL else _first_line(error)
            raise CheckpointError(
                f"checkpoint {final.name} could not be written in {self.folder}: {reason}; {self._what_is_left()}"
            ) from error
        self._prune(step)
        return final

    def latest(self) -> Path | None:
        """The newest intact checkpoint, None if there is none at all. Damaged ones are named in a warning.

        Raises CheckpointError when there are checkpoints and all are damaged.
        """
        found = self._list()
        for _, path in reversed(found):
            try:
                self.verify(path)
            except CheckpointError as error:
                logger.warning("%s; passed over", error)
            else:
                return path
        if found:
            many = f"all {len(found)} checkpoints in {self.folder} are"
            damaged = many if len(found) > 1 else f"checkpoint {found[0][1]} is"
            raise CheckpointError(
                f"{damaged} damaged: the run cannot go on. Put one back, or begin anew: in another output_dir, or here "
                "with resume=never and overwrite_output_dir=true"
            )
        return None

    @staticmethod
    def verify(path: str | os.PathLike[str]) -> None:
        """Checks every file of a checkpoint against its manifest; CheckpointError names the first that is wrong.

        Files that the manifest does not list are not read by anyone here, and are let be.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"checkpoint {path} does not exist")
        listed = _read_manifest(path)
        try:
            present = _describe_files(path, only=listed)
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} is damaged: {error.filename}: {error.strerror}") from error
        for name, expected in listed.items():
            actual = present.get(name)
            if actual is None:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing")
            if actual["size"] != expected["size"]:
                sizes = f"{actual['size']} bytes instead of {expected['size']}"
                raise CheckpointError(f"checkpoint {path} is damaged: {name} has {sizes}")
            if actual["sha256"] != expected["sha256"]:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} has changed (its SHA-256 differs)")

    def _list(self) -> list[tuple[int, Path]]:
        """(step, path) of all checkpoints, oldest first, checked or not."""
        if not self.folder.is_dir():
            return []
        matches = [(NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted((int(match[1]), path) for match, path in matches if match)

    def _temp_name(self, path: Path) -> Path:
        return self.folder / f".tmp-{path.name}-{os.getpid()}"

    def _publish(self, temp: Path, final: Path) -> None:
        """Gives a written folder its name. One that it replaces waits under a name that `_tidy` can undo."""
        replaced = self.folder / f".replaced-{final.name}"
        if final.exists():
            final.rename(replaced)
        try:
            temp.rename(final)
        except BaseException:
            if replaced.exists() and not final.exists():
                replaced.rename(final)
            raise
        sync(self.folder)
        sync(self.folder.parent)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: the run goes on from `step`, they are of a continuation given up."""
        abandoned = [path for other, path in self._list() if other > step]
        if abandoned:
            names = ", ".join(path.name for path in abandoned)
            logger.warning("going on from step %d; deleting later checkpoints: %s", step, names)
        self._delete_all(abandoned)

    def _prune(self, step: int) -> None:
        self.drop_after(step)
        older = [path for other, path in self._list() if other <= step]
        surplus = older[: -self._limit] if self._limit else []
        self._delete_all([*self.folder.glob(".replaced-*"), *surplus])

    def _delete_all(self, paths: list[Path]) -> None:
        for path in paths:
            try:
                self._delete(path)
            except OSError as error:
                logger.warning("old checkpoint %s could not be deleted: %s", path, error)

    def _delete(self, path: Path) -> None:
        """Takes the good name away first: a kill in the middle leaves no half checkpoint under it."""
        temp = self._temp_name(path)
        path.rename(temp)
        shutil.rmtree(temp)

    def _tidy(self) -> None:
        if not self.folder.is_dir():
            return
        for replaced in self.folder.glob(".replaced-*"):
            final = self.folder / replaced.name.removeprefix(".replaced-")
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                replaced.rename(final)
        for temp in self.folder.glob(".tmp-*"):
            shutil.rmtree(temp, ignore_errors=True)

    def _what_is_left(self) -> str:
        try:
            path = self.latest()
        except CheckpointError as error:
            return str(error)
        return f"the last checkpoint, {path.name}, is intact" if path else "there is no earlier checkpoint"


def find_checkpoint(run_dir: Path, resume: Any) -> Path | None:
    """What a run goes on from: the newest intact one of `run_dir` for "auto", none for "never", or the path given.

    Raises ConfigError for what is no path of a checkpoint, CheckpointError for one that is not there or damaged.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return CheckpointStore(run_dir).latest()
    if not isinstance(resume, str | os.PathLike):
        raise ConfigError(f"resume={resume!r} must be auto, never or a checkpoint's path")
    path = Path(resume)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist: resume is auto, never or a checkpoint's path")
    if (path / "checkpoints").is_dir():
        raise ConfigError(f"resume={str(path)!r} is a run directory: name one of its checkpoints, or use auto")
    CheckpointStore.verify(path)
    return path


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The `files` of a checkpoint's manifest, checked for form."""
    try:
        manifest = load_json(path / MANIFEST)
        version, step, files = manifest["format"], manifest["step"], manifest["files"]
        if not all({"size", "sha256"} <= entry.keys() for entry in files.values()):
            raise KeyError("size or sha256")
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} is missing or malformed") from error
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {version}, this version of fastgrpo reads {FORMAT}")
    if (match := NAME.fullmatch(path.name)) and int(match[1]) != step:
        raise CheckpointError(f"checkpoint {path} is damaged: its {MANIFEST} is that of step {step}")
    return files


def _describe_files(folder: Path, only: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the files below `folder` except the manifest, by relative path; of those in `only`."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    names = [name for name in files if name != MANIFEST and (only is None or name in only)]

    def describe(name: str) -> dict[str, Any]:
        with files[name].open("rb") as file:
            return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing releases the interpreter lock
        return dict(zip(names, pool.map(describe, names), strict=True))


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _error_number(error: BaseException) -> int | None:
    """The errno of an OSError, also of one that safetensors or another Rust library has wrapped as text."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    wrapped = re.search(r"os error (\d+)", str(error)) if isinstance(error, Exception) else None
    return int(wrapped[1]) if wrapped else None


def _first_line(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
