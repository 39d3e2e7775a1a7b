"""The flat copy of the modeling code: only imports differ from our sources, and all that is imported is there."""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

import tokenformer
from tokenformer.export.remote_code import auto_map, flat_name, make_relative, remote_code

PACKAGE = Path(tokenformer.__file__).parent
# What whoever can load a model with transformers and torch has installed.
AVAILABLE = {"torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy", "packaging"}

KINDS = {"tokenformer": "AutoModelForCausalLM", "tokenformer_vision": "AutoModelForImageClassification"}

SOURCE = '''\
"""About tokenformer: `from tokenformer.ops import pattention` is only text here."""
from __future__ import annotations
import torch, os  # from tokenformer.errors import UserError
from tokenformer.errors import UserError; X = "from tokenformer.errors import UserError"
from tokenformer.models.configuration_tokenformer import (
    # a remark: größer
    TokenFormerConfig as Config,
)
if True:
    from tokenformer.ops import (pattention)
def f():
    """from tokenformer.ops import pattention"""
    from tokenformer.ops.fused import fused_segments as _f  # why
    import tokenformers.other
    from tokenformers.other import thing
'''
RELATIVE = '''\
"""About tokenformer: `from tokenformer.ops import pattention` is only text here."""
from __future__ import annotations
import torch, os  # from tokenformer.errors import UserError
from .errors import UserError; X = "from tokenformer.errors import UserError"
from .configuration_tokenformer import (
    # a remark: größer
    TokenFormerConfig as Config,
)
if True:
    from .ops import (pattention)
def f():
    """from tokenformer.ops import pattention"""
    from .ops_fused import fused_segments as _f  # why
    import tokenformers.other
    from tokenformers.other import thing
'''


def test_only_imports_of_this_package_change() -> None:
    text, imported = make_relative(SOURCE)
    assert text == RELATIVE
    assert sorted(imported) == [
        "tokenformer.errors",
        "tokenformer.models.configuration_tokenformer",
        "tokenformer.ops",
        "tokenformer.ops.fused",
    ]


@pytest.mark.parametrize(
    "source", ["import tokenformer", "import os, tokenformer.ops as ops", "from tokenformer import ops"]
)
def test_what_transformers_would_not_find_is_refused(source: str) -> None:
    with pytest.raises(AssertionError, match="tokenformer"):
        make_relative(source)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_the_sources_with_relative_imports(kind: str) -> None:
    files = remote_code(kind)
    sources = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        sources[flat_name(".".join(["tokenformer", *(part for part in parts if part != "__init__")])) + ".py"] = path
    for name, text in files.items():
        head, version, *lines = text.splitlines()
        assert head == "# SPDX-License-Identifier: Apache-2.0"
        origin = sources[name].relative_to(PACKAGE).as_posix()
        assert version == f"# tokenformer {tokenformer.__version__}: {origin}"
        for mine, theirs in zip(lines, sources[name].read_text(encoding="utf-8").splitlines(), strict=True):
            if mine != theirs:
                assert mine.lstrip().startswith("from .")
                assert theirs.lstrip().startswith("from tokenformer.")
                assert mine.partition(" import ")[2] == theirs.partition(" import ")[2]


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_imported_is_there(kind: str) -> None:
    files = remote_code(kind)
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert f"{node.module}.py" in files
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                roots = {str(name).partition(".")[0] for name in names}
                assert roots <= AVAILABLE | sys.stdlib_module_names


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_finds_every_file_from_those_of_the_auto_map(kind: str, tmp_path: Path) -> None:
    for name, text in remote_code(kind).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = set()
    for reference in auto_map(kind).values():
        file = tmp_path / f"{reference.partition('.')[0]}.py"
        check_imports(file)
        found |= {file.name, *(Path(needed).name for needed in get_relative_import_files(file))}
    assert found == set(remote_code(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_auto_map_names_classes_that_exist(kind: str) -> None:
    files = remote_code(kind)
    assert list(auto_map(kind)) == ["AutoConfig", "AutoModel", KINDS[kind]], "vLLM reads them in this order"
    for reference in auto_map(kind).values():
        module, _, name = reference.partition(".")
        classes = [node.name for node in ast.parse(files[f"{module}.py"]).body if isinstance(node, ast.ClassDef)]
        assert name in classes
