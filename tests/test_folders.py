"""Folders and files take their name only once what they hold is on the disk: a power cut leaves the old or the new."""

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from tokenformer.errors import UserError
from tokenformer.folders import new_folder, write_atomically

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows syncs no folders")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was synced and what was renamed, in order, by inode, which a new name does not change."""
    seen: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_sync(descriptor: int) -> None:
        fsync(descriptor)
        seen.append(("sync", os.fstat(descriptor).st_ino))

    def recorded_replace(source: Path, target: Path) -> None:
        replace(source, target)
        seen.append(("name", Path(target).stat().st_ino))

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    return seen


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, events: list[tuple[str, int]]) -> None:
    target = tmp_path / "model"
    with new_folder(target) as partial:
        (partial / "inside").mkdir()
        for name in ("weights", "inside/config"):
            (partial / name).write_text("x")
        (partial / "nowhere").symlink_to("nothing")
    named = events.index(("name", inode(target)))
    before = {number for kind, number in events[:named] if kind == "sync"}
    assert before == {inode(target / name) for name in ("weights", "inside", "inside/config", ".")}
    assert events[named + 1 :] == [("sync", inode(tmp_path))]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, events: list[tuple[str, int]]) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    events.clear()
    write_atomically(path, "new")
    number = inode(path)
    assert events == [("sync", number), ("name", number), ("sync", inode(tmp_path))]


@pytest.mark.parametrize("refused", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders(refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "fsync", files_alone)
    with new_folder(tmp_path / "model") as partial:
        (partial / "weights").write_text("x")
    write_atomically(tmp_path / "file", "text")
    assert (tmp_path / "model/weights").read_text() == "x"
    assert (tmp_path / "file").read_text() == "text"


def test_a_disk_found_full_on_syncing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where space is given out late, writing goes well and syncing fails."""
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"):
        write_atomically(path, "new")
    with pytest.raises(UserError, match="no space left"), new_folder(tmp_path / "model") as partial:
        (partial / "weights").write_text("x")
    assert path.read_text() == "old"
    assert not (tmp_path / "model").exists()
