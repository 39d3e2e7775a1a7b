"""Stops a preparation in the middle, as a kill or a power cut would."""

import itertools
import os
from pathlib import Path

import pytest


class Crash(BaseException):
    """Stands for a kill: nothing in the library may catch it."""


def crash_at(patch: pytest.MonkeyPatch, point: int) -> None:
    """Crash at the `point`-th moment before or after a file operation.

    A crash at an fsync leaves half of what was written to the file since the last one.
    """
    moments = itertools.count(1)
    durable: dict[int, int] = {}

    def tick() -> None:
        if next(moments) == point:
            raise Crash

    def around(operation):
        def replaced(*args, **kwargs):
            tick()
            result = operation(*args, **kwargs)
            tick()
            return result

        return replaced

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        safe = min(durable.get(status.st_ino, 0), status.st_size)
        if next(moments) == point:
            os.ftruncate(descriptor, (safe + status.st_size) // 2)
            raise Crash
        durable[status.st_ino] = status.st_size

    patch.setattr(os, "replace", around(os.replace))
    patch.setattr(os, "fsync", fsync)
    patch.setattr(Path, "mkdir", around(Path.mkdir))
    patch.setattr(Path, "unlink", around(Path.unlink))
