"""Models to be judged: TokenFormers, and for comparison any language model or image classifier of transformers."""

import json
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tokenformer.errors import UserError
from tokenformer.models import TokenFormerConfig, TokenFormerVisionConfig
from tokenformer.models.checkpoints import one_line, read_json
from tokenformer.models.loading import (
    CONFIG,
    TOKENIZER,
    load_image_classifier,
    load_model,
    load_tokenizer,
    model_folder,
    move_model,
    named_dtype,
    num_entries,
    quiet,
)


def load_any_model(
    path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode: a TokenFormer with all checks of `load_model`, or another.

    Args:
        path: folder, or name of a model on the Hub.
        dtype: of the weights; as saved if not given.
        device: where to put it; the CPU if not given.

    Raises:
        UserError: as `load_model`; a model of another kind that transformers cannot load.
    """
    folder = model_folder(path)
    if (kind := _other_kind(folder)) is None:
        return load_model(folder, dtype=dtype, device=device)
    dtype = named_dtype(dtype)
    with quiet():
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto" if dtype is None else dtype, local_files_only=True
            )
        except Exception as error:  # transformers raises many unrelated types
            raise UserError(f"{folder}: cannot load the '{kind}' model: {one_line(error)}") from error
    move_model(model, device)
    return model.eval()


def load_any_classifier(
    path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """An image classifier in evaluation mode: a TokenFormer with all checks of `load_image_classifier`, or another.

    Args:
        path: folder, or name of a model on the Hub.
        dtype: of the weights; as saved if not given.
        device: where to put it; the CPU if not given.

    Raises:
        UserError: no such folder; no model in it, one that is no image classifier or was saved without its classifier,
            or one that cannot be loaded; an unknown dtype or device.
    """
    folder = model_folder(path)
    fields = read_json(folder / CONFIG, f"{folder} holds no {CONFIG}: give a folder written by save_pretrained")
    if (kind := fields.get("model_type")) == TokenFormerVisionConfig.model_type:
        return load_image_classifier(folder, dtype=dtype, device=device)
    dtype = named_dtype(dtype)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
                raise UserError(f"{folder} holds a '{kind}' model, which is no image classifier: --images needs one")
            model: PreTrainedModel
            model, report = AutoModelForImageClassification.from_pretrained(
                folder,
                config=config,
                dtype="auto" if dtype is None else dtype,
                local_files_only=True,
                output_loading_info=True,
            )
        except UserError:
            raise
        except Exception as error:  # transformers raises many unrelated types
            raise UserError(f"{folder}: cannot load the '{kind}' model: {one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):  # transformers made them up
        raise UserError(
            f"{folder}: the weights lack {missing[0]} and so the model is no trained image classifier: train one from "
            "it first"
        )
    move_model(model, device)
    return model.eval()


def load_any_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a model's folder, whatever kind of model it is.

    Raises:
        UserError: as `load_tokenizer`.
    """
    folder = model_folder(path)
    if (kind := _other_kind(folder)) is None:
        return load_tokenizer(folder)
    if kind == TokenFormerVisionConfig.model_type:
        raise UserError(f"{folder} holds an image classifier: evaluate it with --images")
    if not (folder / TOKENIZER).is_file():
        raise UserError(f"{folder} holds no tokenizer: copy the {TOKENIZER} that the model was trained with into it")
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{folder}: cannot read the tokenizer: {one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{folder}: {type(tokenizer).__name__} is no tokenizer of the tokenizers library: convert it")
    entries = num_entries(tokenizer)
    vocab_size = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("vocab_size", entries)
    if entries > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {entries} entries but the model's vocab_size is {vocab_size}: use the "
            "tokenizer that the model was trained with"
        )
    return tokenizer


def start_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token that begins a document: beginning of text, else end of text, as lm-eval chooses it too.

    Raises:
        UserError: the tokenizer has neither.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError(
            "the tokenizer has no end-of-text token to begin a document with: name it as eos_token in "
            "tokenizer_config.json"
        )
    return int(start)


def _other_kind(folder: Path) -> str | None:
    """The model_type of a folder that is not for our loader, which also says what is wrong with a configuration."""
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return kind if isinstance(kind, str) and kind != TokenFormerConfig.model_type else None
