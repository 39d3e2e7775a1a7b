"""Where published weights come from: folders of the Hub, bare files, training folders of DeepSpeed."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tokenformer.errors import UserError
from tokenformer.models.checkpoints import (
    CONFIG,
    WEIGHTS_FILES,
    listed_files,
    one_line,
    only_tensors,
    read_json,
    read_pickle,
    read_tensors,
    weights_files,
)
from tokenformer.models.loading import model_folder

# Called with how much is done and how much there is in all, in bytes or in tensors.
Progress = Callable[[int, int], None]

_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")


@dataclass(frozen=True)
class Source:
    """Published weights, found but not read.

    Attributes:
        name: what to call them in errors.
        parts: weights files, each with what to put before the names in it.
        folder: where configuration and tokenizer may lie.
    """

    name: str
    parts: list[tuple[Path, str]]
    folder: Path


def find_source(model: str) -> Source:
    """What `model` stands for: a folder, a weights file or an index of shards, or a name on the Hub.

    Raises:
        UserError: none of these, or a folder without weights.
    """
    path = Path(model)
    if path.is_file():
        files = listed_files(path) if path.suffix == ".json" else [path]
        return Source(model, [(file, "") for file in files], path.parent)
    folder = path if path.is_dir() else model_folder(model)
    if any((folder / name).is_file() for name in WEIGHTS_FILES):
        return Source(model, [(file, "") for file in weights_files(folder)], folder)
    step = _training_step(folder)
    return Source(str(step), _training_parts(step), step if (step / CONFIG).is_file() else folder)


def read_source(source: Source) -> dict[str, torch.Tensor]:
    """All tensors of a source, by their published names.

    Raises:
        UserError: a file is missing, damaged, asks to run code, or holds something else; a name occurs twice.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file, prefix in source.parts:
        if file.suffix == ".safetensors" or not file.is_file():
            found = read_tensors(file)
        else:
            found = only_tensors(_weights_in(read_pickle(file), file), file)
        for name, tensor in found.items():
            if prefix + name in tensors:
                raise UserError(f"{file}: {prefix}{name} is in another file too: give a folder with one checkpoint")
            tensors[prefix + name] = tensor
    return tensors


def read_fields(source: Source, config: str | None) -> tuple[dict[str, Any], str]:
    """The configuration in published names, and what to call it in errors; empty where there is none.

    Args:
        source: whose folder is looked into.
        config: JSON file, or YAML as the published training code takes it; the source's own config.json if None.

    Raises:
        UserError: no such file, or it cannot be read, or is the configuration of something else.
    """
    if config is not None:
        file = Path(config)
        return _read_config(file), config
    file = source.folder / CONFIG
    if not file.is_file():
        return {}, f"{source.name} (no {CONFIG} there)"
    fields = read_json(file, f"{file} is missing")
    kind = fields.get("model_type")
    if kind == "tokenformer":
        raise UserError(
            f"{source.folder} is a model of this library already: use it as it is, or hand it back with --to published"
        )
    if kind is not None:
        raise UserError(
            f"{file}: model_type is '{kind}', not a published TokenFormer: to begin from a Transformer, run "
            f"`tokenformer convert --from-transformer {source.name} OUT`"
        )
    return fields, str(file)


def _read_config(file: Path) -> dict[str, Any]:
    missing = f"config {file} not found: give a JSON or YAML file"
    if file.suffix not in (".yml", ".yaml"):
        return read_json(file, missing)
    if not file.is_file():
        raise UserError(missing)
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"config {file} is not YAML: {one_line(error)}") from error
    if not isinstance(fields, dict):
        raise UserError(f"config {file} holds no fields")
    return {str(name).replace("-", "_"): value for name, value in fields.items()}


def _weights_in(state: Any, file: Path) -> Any:
    """What of a file's contents are the weights: DeepSpeed and others store them as one entry among many."""
    if not isinstance(state, dict) or "module" not in state:
        return state
    if not isinstance(state["module"], dict):
        raise UserError(
            f"{file} holds no weights, but the state of training beside them: copy the layer_* files of that step too"
        )
    return state["module"]


def _training_step(folder: Path) -> Path:
    """The folder of one step: `folder` itself, the one that `latest` names, or the only one there is."""
    latest = folder / "latest"
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not tag or Path(tag).name != tag or not (folder / tag).is_dir():
            raise UserError(f"{latest} names the step '{tag}', but there is no such folder beside it: copy that folder")
        return folder / tag
    if _has_states(folder):
        return folder
    steps = sorted(child for child in folder.iterdir() if child.is_dir() and _has_states(child))
    if not steps:
        raise UserError(
            f"{folder} holds no weights: neither {', '.join(WEIGHTS_FILES)} nor layer_* or mp_rank_* files of DeepSpeed"
        )
    if len(steps) > 1:
        raise UserError(f"{folder} holds the steps {', '.join(step.name for step in steps)}: give the folder of one")
    return steps[0]


def _has_states(folder: Path) -> bool:
    return any(_LAYER.fullmatch(file.name) or _RANK.fullmatch(file.name) for file in folder.iterdir())


def _training_parts(step: Path) -> list[tuple[Path, str]]:
    """The files with weights of one step; those of the optimizer have other names and are passed over."""
    files = sorted(step.iterdir())
    layers = [(file, found) for file in files if (found := _LAYER.fullmatch(file.name))]
    ranks = [(file, found) for file in files if (found := _RANK.fullmatch(file.name))]
    if not layers and not ranks:
        raise UserError(f"{step} holds no weights: no layer_* or mp_rank_* files of DeepSpeed")
    # Pipeline stages have mp_rank files of their own, with nothing in them that the layer files lack.
    split = [file for file, found in layers if int(found[2])] or ([] if layers else [file for file, _ in ranks[1:]])
    if split:
        raise UserError(
            f"{step} holds weights split over several devices ({split[0].name}): merge them with the code that wrote "
            "them, as a model of model_parallel_size 1"
        )
    if layers:
        return [(file, f"sequential.{int(found[1])}.") for file, found in layers]
    return [(ranks[0][0], "")]
