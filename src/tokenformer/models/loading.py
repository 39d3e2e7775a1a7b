"""Models and tokenizers from a folder written by `save_pretrained`, or from the Hub.

Weights are compared with the configuration before they are read: transformers would start from random values for what
is missing and pass over what the configuration does not list.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from tokenformer.errors import UserError
from tokenformer.models.configuration_tokenformer import TokenFormerConfig
from tokenformer.models.modeling_tokenformer import TokenFormerForCausalLM

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a weights file says of one tensor.

    Attributes:
        file: that holds it.
        key: its name in the file.
        shape: as saved.
        dtype: as safetensors writes it (`F32`, `BF16`, ...).
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def load_model(
    path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> TokenFormerForCausalLM:
    """A language model, in evaluation mode.

    Args:
        path: folder, or name of a model on the Hub (`owner/name`).
        dtype: of the weights; as saved if not given. Scales stay float32.
        device: where to put it; the CPU if not given.

    Raises:
        UserError: no such folder; no configuration, or not a TokenFormer's; weights that are missing, damaged, or do
            not fit the configuration; an unknown dtype or device.
    """
    if isinstance(dtype, str):
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise UserError(f"unknown dtype '{dtype}': use float32, bfloat16 or float16")
        dtype = named
    folder = model_folder(path)
    config = load_config(folder)
    check_weights(config, stored_tensors(folder), folder)
    with _quiet():
        try:
            model = TokenFormerForCausalLM.from_pretrained(
                folder, config=config, dtype="auto" if dtype is None else dtype
            )
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: cannot read the model: {_line(error)}") from error
    if device is not None:
        try:
            model.to(torch.device(device))  # type: ignore[arg-type]
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise UserError(f"device '{device}' cannot be used: {_line(error)}") from error
    return model.eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a model's folder.

    Raises:
        UserError: no such folder, no tokenizer in it, one that cannot be read, or one with ids that the model beside it
            has no embedding for.
    """
    folder = model_folder(path)
    if not (folder / TOKENIZER).is_file():
        raise UserError(
            f"{folder} holds no tokenizer: copy the {TOKENIZER} (and tokenizer_config.json) that the model was trained "
            "with into it"
        )
    with _quiet():
        try:
            tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{folder}/{TOKENIZER} cannot be read: {_line(error)}: copy it again") from error
    if (folder / CONFIG).is_file():
        entries, vocab_size = num_entries(tokenizer), load_config(folder).vocab_size
        if entries > vocab_size:
            raise UserError(
                f"{folder}: the tokenizer has {entries} entries but the model's vocab_size is {vocab_size}: use the "
                "tokenizer that the model was trained with"
            )
    return tokenizer


def num_entries(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id a tokenizer can give."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def model_folder(path: str | Path) -> Path:
    """`path` if it is a folder; otherwise the model of that name on the Hub, downloaded into the cache.

    Raises:
        UserError: neither.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"'{path}' is a file: give the folder that holds {CONFIG} and {WEIGHTS}")
    # `runs/small` mistyped looks like a name on the Hub; an existing first part gives it away.
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) or folder.parent.is_dir():
        raise UserError(
            f"there is no folder '{path}': give a folder written by save_pretrained or by tokenformer train"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"there is no folder '{path}', and the Hub gives no model of that name ({_line(error)}): check the path"
        ) from error


def load_config(folder: Path) -> TokenFormerConfig:
    """The configuration in a folder.

    Raises:
        UserError: missing, not JSON, of another kind of model, or with values that do not fit together.
    """
    fields = _read_json(folder / CONFIG, f"{folder} holds no {CONFIG}: give a folder written by save_pretrained")
    kind = fields.get("model_type")
    if kind != TokenFormerConfig.model_type:
        found = f"'{kind}'" if kind else "missing"
        raise UserError(f"{folder}/{CONFIG}: model_type is {found}, not '{TokenFormerConfig.model_type}'")
    with _quiet():
        try:
            config: TokenFormerConfig = TokenFormerConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever a value of the wrong type runs into
            raise UserError(f"{folder}/{CONFIG}: {_line(error)}") from error
    return config


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of `model.safetensors`, or of the files its index lists, by their names in TokenFormerForCausalLM.

    Only headers are read.

    Raises:
        UserError: a file is missing or damaged.
    """
    files = [folder / WEIGHTS]
    if not files[0].is_file():
        index = folder / INDEX
        missing = f"{folder} holds no weights ({WEIGHTS} or {INDEX}): give a folder written by save_pretrained"
        shards = _read_json(index, missing).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{index} lists no files under 'weight_map': save the model again")
        files = [folder / name for name in sorted(set(map(str, shards.values())))]
    stored = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, though {INDEX} lists it: copy all files of the model")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    header = opened.get_slice(key)
                    stored[key] = StoredTensor(file, key, tuple(header.get_shape()), header.get_dtype())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is damaged or cut short ({_line(error)}): copy or save it again") from error
    if not any(name.startswith("model.") for name in stored):  # a bare TokenFormerModel was saved
        stored = {f"model.{name}": tensor for name, tensor in stored.items()}
    return stored


def empty_model(config: TokenFormerConfig) -> TokenFormerForCausalLM:
    """The modules of a model without memory for its parameters (on the meta device)."""
    with torch.device("meta"):
        return TokenFormerForCausalLM(config)


def check_weights(config: TokenFormerConfig, stored: dict[str, StoredTensor], folder: Path) -> None:
    """Compare names and shapes of stored tensors with those that the configuration asks for.

    Raises:
        UserError: something is missing, superfluous, or has another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    hint = f"restore the {CONFIG} and the weights that were saved together"
    if missing := [name for name in expected if name not in stored and name not in optional]:
        raise UserError(f"{folder}: the weights lack {_some(missing)}, which {CONFIG} asks for: {hint}")
    if surplus := [name for name in stored if name not in expected]:
        raise UserError(f"{folder}: the weights hold {_some(surplus)}, which {CONFIG} does not list: {hint}")
    for name, tensor in stored.items():
        if tensor.shape != expected[name]:
            raise UserError(
                f"{folder}: {name} has shape {tensor.shape} in {tensor.file.name} but {expected[name]} by {CONFIG}: "
                f"{hint}"
            )


def _read_json(file: Path, missing: str) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(missing)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not JSON ({_line(error)}): copy or save it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object: copy or save it again")
    return value


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers: what matters is checked here and said in one line."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
