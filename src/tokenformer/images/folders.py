"""Images in class folders."""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenformer.errors import UserError
from tokenformer.images.image_set import Files
from tokenformer.images.parts import HELD_OUT_NAMES, Part

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif")


def is_image_folder(source: str) -> bool:
    """Whether it is a folder for this module: one without Parquet files in it or in its folders."""
    folder = Path(source)
    return folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))


def open_folder(
    source: str, held_out: Sequence[str] = HELD_OUT_NAMES, *, may_be_empty: bool = False
) -> dict[str, Part]:
    """Open a folder of class folders, or one that holds `train` and `val` (or `valid`, `validation`, `test`) with such.

    Files in folders within a class folder belong to the class; what is hidden is not looked at; files of other types
    are left out with a warning.

    Args:
        source: the folder.
        held_out: names of what is held out; the first there is counts.
        may_be_empty: whether a class folder of the training images may hold none; one that is held out may.

    Raises:
        UserError: there are no class folders, or there are no images where there must be some.
    """
    folder = Path(source)
    names = {path.name for path in _subfolders(folder)}
    if "train" in names and _subfolders(folder / "train"):
        parts = {"train": _open(folder / "train", may_be_empty=may_be_empty)}
        for name in held_out:
            if name in names and _subfolders(folder / name):
                parts["held_out"] = _open(folder / name, may_be_empty=True)
                break
        return parts
    return {"train": _open(folder, may_be_empty=may_be_empty)}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _open(folder: Path, *, may_be_empty: bool) -> Part:
    """Read the class folders of `folder`."""
    class_folders = _subfolders(folder)
    beside = Counter(path.suffix.lower() for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    if not class_folders:
        if not beside:
            raise UserError(f"'{folder}' is empty: it needs a folder of images for each class")
        raise UserError(
            f"'{folder}' has files but no class folders: move the images of each class into a folder of its own"
        )
    digest = hashlib.sha256()
    paths: list[str] = []
    labels: list[int] = []
    for label, class_folder in enumerate(class_folders):
        before = len(paths)
        others: Counter[str] = Counter()
        for path, size in _files(class_folder):
            kind = os.path.splitext(path)[1].lower()
            if kind not in SUFFIXES:
                others[kind] += 1
                continue
            digest.update(f"{os.path.relpath(path, folder)}\0{size}\0".encode(errors="surrogateescape"))
            paths.append(path)
            labels.append(label)
        if len(paths) == before and not may_be_empty:
            only = f", only files of type {_types(others)}" if others else ""
            raise UserError(
                f"class folder '{class_folder}' holds no images{only}: add some ({', '.join(SUFFIXES)}) or remove it"
            )
        beside += others
    if beside:
        warnings.warn(
            f"'{folder}': {sum(beside.values())} files are left out, which are no images in a class folder (of type "
            f"{_types(beside)})",
            stacklevel=2,
        )
    if not paths:
        raise UserError(f"'{folder}' holds no images in its class folders ({', '.join(SUFFIXES)})")
    return Part(
        pictures=Files(paths),
        labels=np.array(labels, dtype=np.int64),
        classes=tuple(path.name for path in class_folders),
        fingerprint=f"{len(paths)} files {digest.hexdigest()}",
        where=f"'{folder}'",
    )


def _types(suffixes: Counter[str]) -> str:
    return ", ".join(suffix or "none" for suffix in sorted(suffixes))


def _files(folder: Path) -> list[tuple[str, int]]:
    """All files below a folder that are not hidden, with their sizes in bytes, sorted."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += _files(Path(entry.path))
            else:
                # A link that leads nowhere has no size, and is named when it is read.
                found.append((entry.path, entry.stat().st_size if entry.is_file() else 0))
    return sorted(found)
