"""Adapters in folders: `adapter_model.safetensors` and `adapter_config.json`, as PEFT names and reads them.

The configuration says which model the adapter was made for (`tokenformer.tuning.identity`); the weights are named by
their layer, so that `PeftModel.from_pretrained` reads the folder too (`tokenformer.tuning.peft_method`).
"""

import json
import re
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tokenformer.errors import UserError
from tokenformer.folders import new_folder, write_atomically
from tokenformer.models.checkpoints import one_line, read_json
from tokenformer.modules import KINDS
from tokenformer.pattention import AdapterTokens
from tokenformer.tuning.adapters import (
    check_adapter_name,
    insert_adapter,
    kind_of,
    list_adapters,
    pattention_layers,
    segments_of,
    set_adapter,
    train_only,
)
from tokenformer.tuning.identity import WRAPPERS_TOKENS, base_hashes, comparable

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_TYPE = "TOKENS"
_PREFIX, _SUFFIX = "base_model.model.", f".{WRAPPERS_TOKENS}."


def save_adapter(model: nn.Module, name: str, folder: str | Path) -> None:
    """Write an adapter alone into a new folder.

    Raises:
        UserError: no such adapter, one that is merged, or a folder that holds something already.
    """
    segments_of(model, name)
    with new_folder(Path(folder)) as partial:
        write_adapter(model, name, partial)


def write_adapter(model: nn.Module, name: str, folder: Path, *, base: str | None = None) -> None:
    """Write an adapter into a folder that is there.

    Args:
        model: that has it.
        name: of the adapter.
        folder: for the files.
        base: how the model is called; by the folder it was loaded from if not given.
    """
    tensors = {
        f"{_PREFIX}{path}{_SUFFIX}{leaf}": parameter.detach().cpu().contiguous()
        for path, layer in pattention_layers(model).items()
        if name in layer.adapters
        for leaf, parameter in layer.segments[name].named_parameters()
    }
    (counts,) = (adapter.tokens for adapter in list_adapters(model) if adapter.name == name)
    fields = {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": base or getattr(model, "name_or_path", None) or None,
        "base_hashes": base_hashes(model),
        "name": name,
        **{kind: counts.get(kind, 0) for kind in (*KINDS, "tokens")},
        "inference_mode": True,
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_atomically(folder / CONFIG, json.dumps(fields, indent=2) + "\n")


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    activate: bool = True,
    trainable: bool = False,
    check_base: bool = True,
) -> str:
    """Put the adapter in a folder into `model`.

    Args:
        model: the one that it was made for, in any dtype.
        folder: written by `save_adapter`, `tokenformer tune`, or PEFT's save_pretrained with our method.
        name: to give it here; the one it was saved with if not given.
        activate: make it the active adapter; otherwise it has no effect until `set_adapter`.
        trainable: train it, and nothing else; otherwise it is frozen, and the rest stays as it is.
        check_base: refuse a model with other parameters than the one that the adapter was made for.

    Returns:
        Its name.

    Raises:
        UserError: no adapter in the folder, one of another kind, or a damaged one; a name that is taken; layers or
            shapes that the model does not have; another model. The model is then unchanged.
    """
    folder = Path(folder)
    fields = read_adapter_config(folder)
    name = name or fields.get("name") or re.sub(r"\W", "_", folder.resolve().name)
    check_adapter_name(model, name)
    tensors = _read(folder, model)
    _check_counts(folder, fields, model, tensors)
    if check_base:
        check_base_model(model, fields, str(folder))
    insert_adapter(model, name, tensors)
    if trainable:
        train_only(model, name)
    if activate:
        set_adapter(model, name)
    return name


@torch.no_grad()
def restore_adapter(model: nn.Module, name: str, folder: Path) -> None:
    """Give an adapter of `model` the keys and values in a folder.

    Raises:
        UserError: no such adapter in the model, or none in the folder that fits it.
    """
    segments_of(model, name)
    tensors = _read(folder, model)
    own = {
        path: cast(AdapterTokens, layer.segments[name])
        for path, layer in pattention_layers(model).items()
        if name in layer.adapters
    }
    if {path: len(key) for path, (key, _) in tensors.items()} != {path: s.num_tokens for path, s in own.items()}:
        raise UserError(f"{folder} holds an adapter of other sizes than '{name}'")
    for path, (key, value) in tensors.items():
        own[path].key.copy_(key)
        own[path].value.copy_(value)


def load_adapters(model: nn.Module, given: list[str]) -> dict[str, float]:
    """Load adapters as a command line names them, `FOLDER` or `FOLDER=WEIGHT`, and make them active together.

    Returns:
        Their names with weights.

    Raises:
        UserError: as `load_adapter` and `set_adapter`.
    """
    weights = {}
    for text in given:
        folder, weight = _with_weight(text)
        weights[load_adapter(model, folder, activate=False)] = weight
    set_adapter(model, weights)
    return weights


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The fields of an adapter's configuration.

    Raises:
        UserError: there is none, it is damaged, or it is that of another kind of adapter.
    """
    fields = read_json(folder / CONFIG, f"{folder} holds no adapter ({CONFIG}): give a folder of `tokenformer tune`")
    if (kind := fields.get("peft_type")) != PEFT_TYPE:
        raise UserError(f"{folder} holds an adapter of the kind '{kind}': load it with peft")
    name = fields.get("name")
    if name is not None and not isinstance(name, str):
        raise UserError(f"{folder}/{CONFIG}: name must be text, got {name!r}")
    return fields


def check_base_model(model: nn.Module, fields: dict[str, Any], what: str) -> None:
    """Compare a model with the one that an adapter was made for.

    Raises:
        UserError: it is another one, or the configuration does not say which.
    """
    dtype = comparable(model)
    hashes = fields.get("base_hashes")
    wanted = hashes.get(dtype) if isinstance(hashes, dict) else None
    if wanted is None:
        raise UserError(f"{what}: {CONFIG} does not say which model it was made for: pass check_base=False to try it")
    found = base_hashes(model)[dtype]
    if found != wanted:
        base = fields.get("base_model_name_or_path")
        raise UserError(
            f"{what} was made for another model{f' ({base})' if base else ''}: its parameters have the hash "
            f"{wanted[:12]}, those of this model {found[:12]}; load the model it was made for"
        )


def _with_weight(text: str) -> tuple[str, float]:
    folder, equals, weight = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return text, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        return text, 1.0  # an equals sign in the name of a folder, which may be missing


def _read(folder: Path, model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values by path of the layer, checked against the layers of a model."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder} holds no weights ({WEIGHTS}): copy all files of the adapter")
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or cut short ({one_line(error)}): copy it again") from error
    layers = pattention_layers(model)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for label, tensor in stored.items():
        path, found, leaf = label.removeprefix(_PREFIX).rpartition(_SUFFIX)
        if not found or leaf not in ("key", "value"):
            raise UserError(f"{file}: '{label}' is no key or value of parameter tokens")
        if path not in layers:
            raise UserError(f"{file} has tokens for '{path}', a layer that this model does not have: wrong model?")
        pairs.setdefault(path, {})[leaf] = tensor
    if not pairs:
        raise UserError(f"{file} holds no tokens")
    for path, pair in pairs.items():
        if missing := {"key", "value"} - set(pair):
            raise UserError(f"{file} lacks the {missing.pop()} of '{path}': copy it again")
        layer = layers[path]
        wanted = {"key": layer.in_features, "value": layer.out_features}
        for leaf, channels in wanted.items():
            shape = tuple(pair[leaf].shape)
            if shape != (len(pair["key"]), channels) or not shape[0]:
                raise UserError(f"{file}: the {leaf} of '{path}' has shape {shape}, this model takes (N, {channels})")
    return {path: (pair["key"], pair["value"]) for path, pair in pairs.items()}


def _check_counts(folder: Path, fields: dict[str, Any], model: nn.Module, tensors: dict[str, Any]) -> None:
    """See that weights and configuration belong together."""
    for path, layer in pattention_layers(model).items():
        kind = kind_of(layer)
        given = len(tensors[path][0]) if path in tensors else 0
        if kind in fields and given != fields[kind] and not fields.get("target_modules"):
            raise UserError(
                f"{folder}: '{path}' has {given} tokens in {WEIGHTS} but {fields[kind]} by {CONFIG}: restore the files "
                "that were saved together"
            )
