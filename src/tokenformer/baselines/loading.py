"""Transformers from their folders, with weights that fit their configuration."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, GPTNeoXForCausalLM, PreTrainedConfig

from tokenformer.errors import UserError
from tokenformer.models.checkpoints import one_line
from tokenformer.models.loading import CONFIG, model_folder, quiet


def load_transformer(path: str | Path, *, dtype: torch.dtype | None = None) -> GPTNeoXForCausalLM:
    """The GPTNeoX in a folder, in evaluation mode.

    Args:
        path: folder, or name of a model on the Hub (`owner/name`).
        dtype: of the weights; as saved if not given.

    Raises:
        UserError: no such folder; no configuration, or that of another kind of model; weights that are missing,
            damaged, or do not fit the configuration.
    """
    found: GPTNeoXForCausalLM = load_architecture(GPTNeoXForCausalLM, path, dtype, kind="a GPT-NeoX or Pythia model")
    return found


def load_architecture(architecture: Any, path: str | Path, dtype: torch.dtype | None, *, kind: str) -> Any:
    """A model whose weights are those that its configuration asks for and no others, in evaluation mode.

    Args:
        architecture: a model class of transformers.
        path: folder, or name of a model on the Hub.
        dtype: of the weights; as saved if not given.
        kind: what the folder is to hold, for messages.

    Raises:
        UserError: as `load_transformer`.
    """
    folder = model_folder(path)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no {CONFIG}: give the folder of {kind}")
    wanted = architecture.config_class
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # a model type transformers does not know, a value of the wrong type, no JSON
            raise UserError(f"{folder}/{CONFIG} cannot be read: {one_line(error)}") from error
        if not isinstance(config, wanted):
            raise UserError(f"{folder} is a '{config.model_type}', not a '{wanted.model_type}': give {kind}")
        model, surplus = load_weights(architecture, folder, config, dtype)
    if surplus:
        raise UserError(
            f"{folder}: the weights hold {_some(surplus)}, which {CONFIG} does not list: "
            f"restore the {CONFIG} and the weights that were saved together"
        )
    return model.eval()


def load_weights(
    architecture: Any, folder: Path, config: PreTrainedConfig, dtype: torch.dtype | None = None
) -> tuple[Any, list[str]]:
    """`architecture.from_pretrained`, which would start from random values for what is missing or of another shape.

    Args:
        architecture: a model class of transformers.
        folder: with its weights.
        config: of the model.
        dtype: of the weights; as saved if not given.

    Returns:
        The model, and the names of tensors in the folder that it has no place for: those of another head, or of layers
        that the configuration does not list.

    Raises:
        UserError: weights that are missing, damaged, or do not fit the configuration.
    """
    try:
        model, report = architecture.from_pretrained(
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot read the weights: {one_line(error)}") from error
    if report["mismatched_keys"]:
        name, found, wanted = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"{folder}: {name} has shape {tuple(found)} but {tuple(wanted)} by {CONFIG}: "
            f"restore the {CONFIG} and the weights that were saved together"
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder}: the weights lack {_some(missing)}: copy all files of the model")
    return model, sorted(report["unexpected_keys"])


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
