"""Models and tokenizers from a folder written by `save_pretrained`, from a published one, or from the Hub.

Weights are compared with the configuration before they are read: transformers would start from random values for what
is missing and pass over what the configuration does not list.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from tokenformer.errors import UserError
from tokenformer.models.checkpoints import (
    WEIGHTS_FILES,
    download,
    listed_files,
    one_line,
    published_fields_of,
    read_json,
    read_published,
)
from tokenformer.models.configuration_tokenformer import TokenFormerConfig
from tokenformer.models.configuration_tokenformer_vision import TokenFormerVisionConfig
from tokenformer.models.modeling_tokenformer import TokenFormerForCausalLM
from tokenformer.models.modeling_tokenformer_vision import TokenFormerForImageClassification
from tokenformer.published import is_published_name

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
IMAGE_PROCESSOR = "preprocessor_config.json"


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
        path: folder, ours or published, or name of a model on the Hub (`owner/name`).
        dtype: of the weights; as saved if not given. Scales stay float32.
        device: where to put it; the CPU if not given.

    Raises:
        UserError: no such folder; no configuration, or not a TokenFormer's; weights that are missing, damaged, or do
            not fit the configuration; an unknown dtype or device.
    """
    folder = model_folder(path)
    # Of a published folder from_pretrained compares weights and configuration.
    config = load_config(folder) if published_fields_of(folder) is None else None
    model: TokenFormerForCausalLM = _load(TokenFormerForCausalLM, folder, config, dtype, device)
    return model


def load_image_classifier(
    path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> TokenFormerForImageClassification:
    """An image classifier, in evaluation mode.

    Args:
        path: folder, or name of a model on the Hub (`owner/name`).
        dtype: of the weights; as saved if not given. Scales stay float32.
        device: where to put it; the CPU if not given.

    Raises:
        UserError: as `load_model`.
    """
    folder = model_folder(path)
    config = load_vision_config(folder)
    model: TokenFormerForImageClassification = _load(TokenFormerForImageClassification, folder, config, dtype, device)
    return model


def load_tokenformer(
    path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> TokenFormerForCausalLM | TokenFormerForImageClassification:
    """The language model or the image classifier in a folder; arguments and errors are those of `load_model`."""
    folder = model_folder(path)
    return (load_image_classifier if holds_image_classifier(folder) else load_model)(folder, dtype=dtype, device=device)


def _load(
    architecture: Any,
    folder: Path,
    config: TokenFormerConfig | TokenFormerVisionConfig | None,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
) -> Any:
    dtype = named_dtype(dtype)
    if config is not None:
        check_weights(config, stored_tensors(folder), folder)
    with quiet():
        try:
            model = architecture.from_pretrained(folder, config=config, dtype="auto" if dtype is None else dtype)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: cannot read the model: {one_line(error)}") from error
    move_model(model, device)
    return model.eval()


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of that name; a dtype and None are returned as they are.

    Raises:
        UserError: no floating-point dtype has that name.
    """
    if not isinstance(dtype, str):
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise UserError(f"unknown dtype '{dtype}': use float32, bfloat16 or float16")
    return named


def move_model(model: torch.nn.Module, device: torch.device | str | None) -> None:
    """Put a model on a device, unless None is given.

    Raises:
        UserError: there is no such device here.
    """
    if device is None:
        return
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"device '{device}' cannot be used: {one_line(error)}") from error


def load_tokenizer(path: str | Path, *, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer in a model's folder.

    Args:
        path: folder, or name of a model on the Hub (`owner/name`).
        vocab_size: rows of the embedding it is for; those of the model in the folder if not given.

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
    with quiet():
        try:
            tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{folder}/{TOKENIZER} cannot be read: {one_line(error)}: copy it again") from error
    if vocab_size is None and (folder / CONFIG).is_file():
        vocab_size = load_config(folder).vocab_size
    entries = num_entries(tokenizer)
    if vocab_size is not None and entries > vocab_size:
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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return download(str(path))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"there is no folder '{path}', and the Hub gives no model of that name ({one_line(error)}): check the path"
        ) from error


def holds_image_classifier(folder: Path) -> bool:
    """Whether the configuration in a folder is that of our image classifiers; it may be damaged otherwise."""
    file = folder / CONFIG
    return file.is_file() and read_json(file, "").get("model_type") == TokenFormerVisionConfig.model_type


def load_config(folder: Path) -> TokenFormerConfig:
    """The configuration of the language model in a folder, ours or published.

    Raises:
        UserError: missing, not JSON, of another kind of model, or with values that do not fit together.
    """
    if published_fields_of(folder) is not None:
        return TokenFormerConfig(**read_published(folder)[0])
    config: TokenFormerConfig = _read_config(TokenFormerConfig, folder)
    return config


def load_vision_config(folder: Path) -> TokenFormerVisionConfig:
    """The configuration of the image classifier in a folder.

    Raises:
        UserError: as `load_config`.
    """
    config: TokenFormerVisionConfig = _read_config(TokenFormerVisionConfig, folder)
    return config


def _read_config(wanted: Any, folder: Path) -> Any:
    fields = read_json(folder / CONFIG, f"{folder} holds no {CONFIG}: give a folder written by save_pretrained")
    kind = fields.get("model_type")
    if kind != wanted.model_type:
        found = f"'{kind}'" if kind else "missing"
        raise UserError(f"{folder}/{CONFIG}: model_type is {found}, not '{wanted.model_type}'")
    with quiet():
        try:
            return wanted.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever a value of the wrong type runs into
            raise UserError(f"{folder}/{CONFIG}: {one_line(error)}") from error


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of `model.safetensors`, or of the files its index lists, by their names in the whole model.

    Only headers are read.

    Raises:
        UserError: a file is missing or damaged.
    """
    files = [folder / WEIGHTS]
    if not files[0].is_file():
        if not (folder / INDEX).is_file():
            if any((folder / name).is_file() for name in WEIGHTS_FILES):
                raise _published(folder)
            raise UserError(
                f"{folder} holds no weights ({WEIGHTS} or {INDEX}): give a folder written by save_pretrained"
            )
        files = listed_files(folder / INDEX)
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
            raise UserError(f"{file} is damaged or cut short ({one_line(error)}): copy or save it again") from error
    if any(is_published_name(name) for name in stored):
        raise _published(folder)
    if not any(name.startswith("model.") for name in stored):  # a bare backbone was saved
        stored = {f"model.{name}": tensor for name, tensor in stored.items()}
    return stored


@overload
def empty_model(config: TokenFormerConfig) -> TokenFormerForCausalLM: ...
@overload
def empty_model(config: TokenFormerVisionConfig) -> TokenFormerForImageClassification: ...
def empty_model(config: Any) -> TokenFormerForCausalLM | TokenFormerForImageClassification:
    """The modules of a model without memory for its parameters (on the meta device)."""
    with torch.device("meta"):
        if isinstance(config, TokenFormerVisionConfig):
            return TokenFormerForImageClassification(config)
        return TokenFormerForCausalLM(config)


def check_weights(
    config: TokenFormerConfig | TokenFormerVisionConfig, stored: dict[str, StoredTensor], folder: Path
) -> None:
    """Compare names and shapes of stored tensors with those that the configuration asks for.

    Raises:
        UserError: something is missing, superfluous, or has another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    tied = isinstance(config, TokenFormerConfig) and config.tie_word_embeddings
    optional = {"lm_head.weight"} if tied else set()
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


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the files of a tokenizer, as they are, from one folder to another; returns their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def copy_preprocessing(source: Path, target: Path) -> list[str]:
    """Copy what makes a model's input, tokenizer or image processor, from one folder to another; returns the names."""
    names = copy_tokenizer(source, target)
    if (source / IMAGE_PROCESSOR).is_file():
        shutil.copyfile(source / IMAGE_PROCESSOR, target / IMAGE_PROCESSOR)
        names.append(IMAGE_PROCESSOR)
    return names


def _published(folder: Path) -> UserError:
    return UserError(
        f"{folder} holds published weights, and this needs a model in our own format: run "
        f"`tokenformer convert {folder} OUT` first"
    )


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@contextmanager
def quiet() -> Iterator[None]:
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
