"""The corpus that every machine has: the source text of the running Python's own standard library."""

import json
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tokenformer.errors import UserError
from tokenformer.folders import write_atomically

# Packages of others, and test suites: half of the bytes, most of them tables of cases.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"}


def write_corpus(path: Path) -> int:
    """Write one JSON line `{id, text}` per module of the standard library, in the order of their names.

    Returns:
        The number of modules.

    Raises:
        UserError: this Python has no readable standard library (some embedded builds keep it in an archive).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    lines = [json.dumps({"id": name, "text": text}) + "\n" for name, text in _modules(root)]
    if len(lines) < 100:
        raise UserError(f"only {len(lines)} modules of the standard library found in {root}: use a full Python install")
    write_atomically(path, "".join(lines))
    return len(lines)


def _modules(root: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if _LEFT_OUT.isdisjoint(name.parts):
            try:
                with tokenize.open(file) as source:  # honours each file's declared encoding
                    text = source.read()
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue  # lib2to3 and friends ship modules that are broken on purpose
            if text.strip():
                yield name.as_posix(), text
