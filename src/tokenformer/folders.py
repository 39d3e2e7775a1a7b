"""Folders of models and runs: written whole or not at all, whatever happens while they are written."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenformer.errors import UserError

PARTIAL = ".partial"
CHECKPOINTS = "checkpoints"
# How some network and FUSE file systems answer, and what a folder is that may be written to but not read.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
_FULL = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "quota exceeded", errno.EFBIG: "file too large"}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `folder` once everything is in it.

    Raises:
        UserError: `folder` holds something already, or cannot be written; nothing is left behind.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: give another folder, or remove it")
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with saving(folder):
            partial.mkdir(parents=True)
            yield partial
            sync_tree(partial)
            os.replace(partial, folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: readers see the old file or the new one."""
    with saving(path):
        partial = path.with_name(path.name + PARTIAL)
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)


def sync_tree(folder: Path) -> None:
    """See all that a folder holds onto the disk.

    After a power cut the name of a folder can be there and what it holds not, unless that was synced before.
    """
    for path in (*sorted(folder.rglob("*")), folder):
        if path.is_file() or path.is_dir():  # a link may lead nowhere
            sync(path)


def sync(path: Path) -> None:
    """See a file, or the names in a folder, onto the disk."""
    windows, is_folder = os.name == "nt", path.is_dir()
    if windows and is_folder:  # Windows opens no folders
        return
    try:
        descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)  # and syncs what is open for writing alone
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in _NO_FOLDER_SYNC):
            raise


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """Turn a full disk into one clear line. Libraries report it in several ways; the cause is the same."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise _full(target, _FULL[error.errno]) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"cannot write {target}: {error.strerror}; choose a folder you may write to") from error
        raise
    except Exception as error:
        # torch.save reports a failed write as RuntimeError, in words that depend on the byte at which the disk is full,
        # and safetensors as SafetensorError; neither has an errno.
        signs = (
            "No space left",
            "File too large",
            "file write failed",
            "PytorchStream",
            "inline_container",
            "iostream error",
        )
        if any(sign in str(error) for sign in signs):
            raise _full(target, "no space left on the device") from error
        raise


def whole_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. A half-written one is not among them: it still has another name."""
    found = [path for path in (run / CHECKPOINTS).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step at which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _full(target: Path, reason: str) -> UserError:
    free = shutil.disk_usage(next(path for path in (target, *target.resolve().parents) if path.exists())).free
    full = UserError(
        f"cannot write {target}: {reason} ({free / 2**20:.0f} MiB free); what was saved before is whole, "
        "so make room and run the same command again"
    )
    full.everywhere = True  # the disk of another process need not be full
    return full
