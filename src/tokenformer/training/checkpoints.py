"""Checkpoints of a run: given their name once they are safe on the disk, known to be whole by hashes, kept or dropped.

A checkpoint is a folder with a manifest of its files, their sizes and their SHA-256. A run goes on from the newest one
that is as it was written; a newer one that is not is set aside, for whoever wants to know what befell it.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from tokenformer.errors import UserError
from tokenformer.folders import CHECKPOINTS, saving, step_of, sync, sync_tree, whole_checkpoints

MANIFEST_FILE = "manifest.json"
_DAMAGED = ".damaged"
_BLOCK = 2**20


def write_manifest(checkpoint: Path) -> None:
    """Note size and SHA-256 of every file in `checkpoint`, and see all of it onto the disk."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            files[path.relative_to(checkpoint).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = checkpoint / MANIFEST_FILE
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    sync_tree(checkpoint)


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, beginning with the name of a file; None if all is as it was written.

    A checkpoint without a manifest, as earlier versions wrote them, is taken as it is.

    Raises:
        UserError: a file may not be read, which says nothing about what it holds.
    """
    manifest = checkpoint / MANIFEST_FILE
    if not manifest.exists():
        return None
    name = MANIFEST_FILE
    try:
        for name, written in json.loads(manifest.read_text(encoding="utf-8"))["files"].items():
            size = (checkpoint / name).stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size} bytes instead of {written['bytes']}"
            if _sha256(checkpoint / name) != written["sha256"]:
                return f"{name} does not hold what was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except PermissionError as error:
        raise UserError(f"cannot read {checkpoint / name}: {error.strerror}; give yourself the right to") from error
    except OSError as error:  # a disk that is failing
        return f"{name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):  # what damaged JSON can lead to
        return f"{MANIFEST_FILE} is damaged"
    return None


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint of a run that is as it was written; newer ones are set aside, each with a line on stderr.

    Returns:
        None if the run has no checkpoint.

    Raises:
        UserError: it has some and none is whole, and all stay where they are; or a damaged one cannot be renamed.
    """
    faults: dict[Path, str] = {}
    for checkpoint in reversed(whole_checkpoints(run)):
        fault = find_fault(checkpoint)
        if fault is None:
            for damaged, what in faults.items():
                aside = _set_aside(damaged)
                sys.stderr.write(
                    f"{damaged} is damaged ({what}): set aside as {aside.name}, going on from {checkpoint.name}\n"
                )
            return checkpoint
        faults[checkpoint] = fault
    if faults:
        newest = next(iter(faults))
        raise UserError(
            f"no checkpoint in {run / CHECKPOINTS} is whole ({newest.name}: {faults[newest]}): bring a copy back, or "
            "remove that folder to begin the run anew"
        )
    return None


def publish(partial: Path, run: Path, keep: int, milestone_every: int = 0) -> Path:
    """Give a finished checkpoint its name, the moment from which it counts, and drop old ones.

    Args:
        partial: the checkpoint, in a folder that holds nothing else and is removed.
        run: folder of the run.
        keep: newest checkpoints to keep.
        milestone_every: checkpoints at multiples of so many steps are kept too; 0 keeps none.
    """
    write_manifest(partial)
    target = run / CHECKPOINTS / partial.name
    os.replace(partial, target)
    sync(target.parent)
    # Renamed first: a kill in the middle of the removal must not leave a checkpoint with files missing.
    for old in whole_checkpoints(run)[:-keep]:
        if not milestone_every or step_of(old) % milestone_every:
            os.replace(old, partial.parent / old.name)
    shutil.rmtree(partial.parent)
    return target


def _set_aside(checkpoint: Path) -> Path:
    number = 1
    while (aside := checkpoint.with_name(f"{checkpoint.name}{_DAMAGED}{'' if number == 1 else number}")).exists():
        number += 1
    with saving(aside):
        os.replace(checkpoint, aside)
    return aside


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
