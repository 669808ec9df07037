"""Checkpoints under kills, damage and full disks."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgrpo.checkpoint import CheckpointStore
from fastgrpo.state import CheckpointError, load_tensors, save_tensors

FILES = ("model/config.json", "model/model.safetensors", "state.json", "empty")


def writer(text: str = "") -> Callable[[Path], None]:
    """Writes a small folder like a real one, different for each `text`."""

    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text(json.dumps({"text": text}))
        save_tensors(folder / "model/model.safetensors", {"w": torch.arange(300.0)})
        (folder / "state.json").write_text(json.dumps({"text": text}))
        (folder / "empty").touch()

    return write


def text_of(path: Path) -> str:
    return json.loads((path / "state.json").read_text())["text"]


def names(run_dir: Path) -> list[str]:
    """Everything in the checkpoints folder, hidden names included."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# ----------------------------------------------------------------------------------------------------- saving, reading


def test_layout_and_manifest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    assert store.latest() is None
    assert not (tmp_path / "run").exists()  # asking changes nothing
    path = store.save(123, writer("x"))
    assert path == tmp_path / "run/checkpoints/step-00000123" == store.latest()
    assert names(tmp_path / "run") == ["step-00000123"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], set(manifest["files"])) == (1, 123, set(FILES))
    assert manifest["files"]["empty"] == {
        "size": 0,
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    assert torch.equal(load_tensors(path / "model/model.safetensors")["w"], torch.arange(300.0))


def test_written_under_a_temporary_name(tmp_path: Path) -> None:
    seen = []

    def write(folder: Path) -> None:
        seen.append((folder.name, names(tmp_path)))

    CheckpointStore(tmp_path).save(7, write)
    temp = f".tmp-step-00000007-{os.getpid()}"
    assert seen == [(temp, [temp])]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recording_rename(source: Any, target: Any) -> None:
        events.append(("rename", str(source)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    CheckpointStore(tmp_path).save(1, writer())
    temp = tmp_path / f"checkpoints/.tmp-step-00000001-{os.getpid()}"
    flushed = {str(temp / name) for name in (*FILES, "manifest.json", "model")} | {str(temp)}
    at = events.index(("rename", str(temp)))
    assert flushed <= {path for event, path in events[:at] if event == "fsync"}
    assert ("fsync", str(tmp_path / "checkpoints")) in events[at:]


def test_limit_keeps_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=2)
    for step in (1, 2, 10, 100_000_000):
        store.save(step, writer())
    assert names(tmp_path) == ["step-00000010", "step-100000000"]
    assert store.latest() == tmp_path / "checkpoints/step-100000000"
    with pytest.raises(ValueError, match="save_total_limit=0: at least 1"):
        CheckpointStore(tmp_path, save_total_limit=0)


def test_no_limit_keeps_all(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(4):
        store.save(step, writer())
    assert len(names(tmp_path)) == 4


def test_same_step_again_replaces(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, writer("old"))
    assert text_of(store.save(1, writer("new"))) == "new"
    assert names(tmp_path) == ["step-00000001"]
    store.verify(tmp_path / "checkpoints/step-00000001")


def test_going_back_drops_the_later_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run resumed from step 1 must not find step 3 of its earlier life when it is resumed again."""
    store = CheckpointStore(tmp_path, save_total_limit=2)
    for step in (1, 3):
        store.save(step, writer("first life"))
    latest = store.save(2, writer("second life"))
    assert store.latest() == latest
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert "going on from step 2; deleting later checkpoints: step-00000003" in caplog.text


def test_leftovers_go_at_the_start(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(1, writer())
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000001", folder / ".tmp-step-00000002-4711")
    shutil.copytree(folder / "step-00000001", folder / ".replaced-step-00000001")
    (folder / "notes.txt").write_text("a user's own file")
    CheckpointStore(tmp_path)
    assert names(tmp_path) == ["notes.txt", "step-00000001"]


def test_interrupted_replacement_is_undone_at_the_start(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path).save(1, writer("old"))
    path.rename(path.with_name(".replaced-step-00000001"))
    latest = CheckpointStore(tmp_path).latest()
    assert latest == path
    assert text_of(path) == "old"


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    """A store with steps 1 and 2; tests undo what they do to it."""
    store = CheckpointStore(tmp_path_factory.mktemp("two"))
    for step in (1, 2):
        store.save(step, writer(str(step)))
    return store


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found(two: CheckpointStore, caplog: pytest.LogCaptureFixture, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["manifest.json", *FILES[:3]]))
    path = two.folder / "step-00000002" / name
    intact = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(intact) - 1))
    damaged = bytearray(intact)
    damaged[bit // 8] ^= 1 << (bit % 8)
    caplog.clear()
    try:
        path.write_bytes(damaged)
        assert two.latest() == two.folder / "step-00000001"
        [record] = caplog.records
        assert record.name == "fastgrpo.checkpoint"
        assert "step-00000002" in record.getMessage()
        if name != "manifest.json":
            assert f"is damaged: {name} has changed" in record.getMessage()
        with pytest.raises(CheckpointError):
            two.verify(two.folder / "step-00000002")
    finally:
        path.write_bytes(intact)
    two.verify(two.folder / "step-00000002")


def damage(step: int, name: str, how: Callable[[Path], Any]) -> Callable[[CheckpointStore], None]:
    return lambda store: how(store.folder / f"step-{step:08d}" / name)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (damage(2, "state.json", Path.unlink), "state.json is missing"),
        (damage(2, "model", shutil.rmtree), "model/config.json is missing"),
        (damage(2, "state.json", lambda p: p.write_text("{}")), "state.json has 2 bytes instead of 13"),
        (damage(2, "empty", lambda p: p.write_text("x")), "empty has 1 bytes instead of 0"),
        (damage(2, "manifest.json", Path.unlink), "manifest.json is missing or malformed"),
        (damage(2, "manifest.json", lambda p: os.truncate(p, 100)), "manifest.json is missing or malformed"),
        (damage(2, "manifest.json", lambda p: p.write_text("[]")), "manifest.json is missing or malformed"),
        (damage(2, "manifest.json", lambda p: p.write_bytes(b"\xff")), "manifest.json is missing or malformed"),
        (
            damage(2, "manifest.json", lambda p: p.write_text('{"format": 1, "step": 2, "files": {"a": {}}}')),
            "manifest.json is missing or malformed",
        ),
        (
            damage(2, "manifest.json", lambda p: p.write_text('{"format": 2, "step": 2, "files": {}}')),
            "has format 2, this version of fastgrpo reads 1",
        ),
        (
            damage(2, "", lambda p: shutil.rmtree(p) or shutil.copytree(p.with_name("step-00000001"), p)),  # type: ignore[func-returns-value]
            "its manifest.json is that of step 1",
        ),
    ],
)
def test_damage_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, break_it: Any, message: str
) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, writer(str(step)))
    break_it(store)
    assert store.latest() == store.folder / "step-00000001"
    assert message in caplog.text
    with pytest.raises(CheckpointError) as caught:
        store.verify(store.folder / "step-00000002")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    # The run goes on from step 1 and reaches step 2 again.
    assert store.save(2, writer("again")) == store.latest()


def test_unlisted_file_is_let_be(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(1, writer())
    (path / "notes.txt").write_text("mine")
    assert store.latest() == path


def test_all_damaged_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        (store.save(step, writer()) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged"):
        store.latest()
    assert len(caplog.records) == 2


def test_explicit_path(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    copy = shutil.copytree(store.save(1, writer()), tmp_path / "best")
    CheckpointStore.verify(str(copy))
    with pytest.raises(CheckpointError, match=r"checkpoint .*/nowhere does not exist"):
        store.verify(tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------- disks that fill up


def fill_dev_full(folder: Path) -> None:
    writer()(folder)
    with open("/dev/full", "wb") as file:  # the kernel's own ENOSPC, for any user
        file.write(b"x" * 100_000)


def raise_(error: BaseException) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        writer()(folder)
        raise error

    return write


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (fill_dev_full, "no space left on the disk"),
        (raise_(OSError(errno.EDQUOT, "Disk quota exceeded")), "no space left on the disk"),
        (raise_(RuntimeError("I/O error: No space left on device (os error 28)")), "no space left on the disk"),
        (raise_(OSError(errno.EIO, "Input/output error")), "Input/output error"),
        (raise_(OSError("odd\nlines")), "odd"),
    ],
)
def test_failing_disk(tmp_path: Path, write: Callable[[Path], None], reason: str) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=1)
    with pytest.raises(CheckpointError, match=f"step-00000001 could not be .*{reason}; there is no earlier checkpoint"):
        store.save(1, write)
    assert names(tmp_path) == []
    store.save(2, writer("good"))
    for step in (2, 3):  # replacing is as safe as adding
        with pytest.raises(CheckpointError) as caught:
            store.save(step, write)
        assert f"could not be written in {store.folder}: {reason}" in str(caught.value)
        assert str(caught.value).endswith("the last checkpoint, step-00000002, is intact")
        assert "\n" not in str(caught.value)
        assert names(tmp_path) == ["step-00000002"]
        assert text_of(store.latest() or tmp_path) == "good"


def test_error_does_not_call_a_damaged_checkpoint_intact(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (store.save(1, writer()) / "empty").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint .*step-00000001 is damaged: the run cannot go on"):
        store.save(2, fill_dev_full)


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_other_exceptions_pass_through_cleanly(tmp_path: Path, error: BaseException) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, writer("good"))
    for step in (1, 2):
        with pytest.raises(type(error)):
            store.save(step, raise_(error))
    assert names(tmp_path) == ["step-00000001"]
    assert text_of(store.latest() or tmp_path) == "good"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here; the same errors are tested with /dev/full")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_for_real(small_disk: Path) -> None:
    """300 KB a checkpoint: the fourth does not fit, wherever in its files the disk ends."""

    def write(folder: Path) -> None:
        for i in range(30):
            save_tensors(folder / f"{i}.safetensors", {"w": torch.full((2500,), float(i))})

    store = CheckpointStore(small_disk)
    with pytest.raises(CheckpointError, match=r"no space left on the disk; the last checkpoint, step-0000000[23], is"):
        [store.save(step, write) for step in range(1, 6)]
    latest = store.latest()
    assert latest is not None
    assert not [name for name in names(small_disk) if name.startswith(".")]
    # With a limit there is room again, as soon as the old ones are gone.
    shutil.rmtree(small_disk / "checkpoints/step-00000001")
    assert CheckpointStore(small_disk, save_total_limit=1).save(9, write).name == "step-00000009"
    assert names(small_disk) == ["step-00000009"]


def test_old_checkpoint_that_cannot_be_deleted_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, save_total_limit=1)
    store.save(1, writer())

    def refuse(path: Path, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "fastgrpo.checkpoint"):
        patch.setattr("fastgrpo.checkpoint.shutil.rmtree", refuse)
        patch.setattr(store, "_tidy", lambda: None)
        assert store.save(2, writer()) == store.latest()
    assert "step-00000001 could not be deleted: [Errno 13] Permission denied" in caplog.text
