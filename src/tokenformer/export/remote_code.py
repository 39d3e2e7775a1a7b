"""The code of the model as a flat set of files, which transformers loads from a model's folder.

transformers copies the file that `auto_map` names, and those it imports relatively, from the folder beside the weights;
it has no place for sub-packages. So each module of ours that the model needs becomes one file, its imports of this
package become relative ones, and nothing else changes: the files read like the sources.
"""

import ast
from importlib.util import find_spec
from pathlib import Path

from tokenformer import __version__

PACKAGE = __name__.partition(".")[0]

# model_type: the modules of configuration and modeling, and the class of each Auto class; the configuration first, as
# vLLM wants it
_CODE = {
    "tokenformer": (
        f"{PACKAGE}.models.configuration_tokenformer",
        f"{PACKAGE}.models.modeling_tokenformer",
        {
            "AutoConfig": "TokenFormerConfig",
            "AutoModel": "TokenFormerModel",
            "AutoModelForCausalLM": "TokenFormerForCausalLM",
        },
    ),
    "tokenformer_vision": (
        f"{PACKAGE}.models.configuration_tokenformer_vision",
        f"{PACKAGE}.models.modeling_tokenformer_vision",
        {
            "AutoConfig": "TokenFormerVisionConfig",
            "AutoModel": "TokenFormerVisionModel",
            "AutoModelForImageClassification": "TokenFormerForImageClassification",
        },
    ),
}


def remote_code(model_type: str) -> dict[str, str]:
    """File name -> source of the modeling code of one kind of model and everything of this package that it imports."""
    configuration, modeling, _ = _CODE[model_type]
    files: dict[str, str] = {}
    todo, seen = [configuration, modeling], set()
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        path = _source_file(module)
        source = path.read_text(encoding="utf-8")
        text, imported = make_relative(source)
        name = f"{flat_name(module)}.py"
        assert name not in files, f"{module}: another module is called {name} already"
        inside = path.relative_to(Path(_source_file(PACKAGE)).parent).as_posix()
        files[name] = f"# SPDX-License-Identifier: Apache-2.0\n# {PACKAGE} {__version__}: {inside}\n{text}"
        todo += imported
    return files


def auto_map(model_type: str) -> dict[str, str]:
    """Which class of which file each Auto class of transformers loads."""
    configuration, modeling, classes = _CODE[model_type]
    return {
        auto: f"{flat_name(configuration if auto == 'AutoConfig' else modeling)}.{name}"
        for auto, name in classes.items()
    }


def flat_name(module: str) -> str:
    """The file that holds `module`: `tokenformer.ops.fused` is `ops_fused`, and models keep the names of the Hub."""
    return module.removeprefix(f"{PACKAGE}.").removeprefix("models.").replace(".", "_")


def make_relative(source: str) -> tuple[str, list[str]]:
    """Rewrite the imports of this package in `source`; gives the new text, and the modules that it imports."""
    lines = source.splitlines(keepends=True)
    imported = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            # transformers finds only `from .module import name`.
            assert all(alias.name.partition(".")[0] != PACKAGE for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            module = str(node.module)
            line, start = lines[node.lineno - 1], f"from {module} import"
            assert module != PACKAGE, ast.unparse(node)
            assert line[node.col_offset :].startswith(start), ast.unparse(node)
            relative = f"from .{flat_name(module)} import"
            lines[node.lineno - 1] = line[: node.col_offset] + relative + line[node.col_offset + len(start) :]
            imported.append(module)
    return "".join(lines), imported


def _source_file(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin)
