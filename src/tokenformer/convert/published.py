"""Published checkpoints to ours, and back."""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open

from tokenformer.convert.reading import Progress, find_source, read_fields, read_source
from tokenformer.convert.scale import absorb_scale, is_root, num_appended
from tokenformer.convert.writing import write_safetensors
from tokenformer.errors import UserError
from tokenformer.folders import new_folder
from tokenformer.models.checkpoints import published_fields_of, translate
from tokenformer.models.configuration_tokenformer import TokenFormerConfig
from tokenformer.models.loading import (
    CONFIG,
    TOKENIZER,
    StoredTensor,
    check_weights,
    copy_tokenizer,
    load_config,
    load_tokenizer,
    model_folder,
    stored_tensors,
)
from tokenformer.modules import KINDS
from tokenformer.pattention import BASE
from tokenformer.published import LEAVES, PATTENTIONS, published_fields, tensor_names

Dtype = Literal["float32", "bfloat16", "float16"]

_GENERATION = "generation_config.json"
# As safetensors names them.
_STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def convert(
    model: str,
    out: str,
    *,
    to: Literal["tokenformer", "published"] = "tokenformer",
    config: str | None = None,
    dtype: Dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Convert a published checkpoint to a model of this library, or a model of this library to the published format.

    Tokenizer files come along. Weights are neither changed nor rounded unless `dtype` asks for it, or a grown model is
    handed back (see `appended` and `rescaled`). Nothing that is read can run code.

    Args:
        model: folder or weights file, or a name on the Hub (owner/name).
        out: folder to write; must not hold anything yet.
        to: tokenformer reads the published format; published writes it, with all segments merged into one.
        config: configuration in published names, as JSON or as YAML of the training code, where none lies beside the
            weights.
        dtype: of the weights; as stored if not given. Scales stay float32.
        progress: called with how much is done and how much there is in all.

    Returns:
        `out` and `to`; of what was written the number of `parameters`, their `dtype`, `layers`, `segments` (tokens of a
        layer by kind) and `tokenizer` files. For `to="published"` also the segments that were `merged`; by kind, the
        tokens `appended` to each layer; and the kinds whose values were `rescaled`, both so that the published code
        computes what the model does.

    Raises:
        UserError: what is read is missing, damaged, contradicts itself, asks to run code or for what is not
            implemented; `out` holds something. Nothing is written then.
    """
    if to not in ("tokenformer", "published"):
        raise UserError(f"unknown format '{to}': use tokenformer or published")
    if dtype not in (None, *get_args(Dtype)):
        raise UserError(f"unknown dtype '{dtype}': use one of {', '.join(get_args(Dtype))}")
    target: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    with new_folder(Path(out)) as partial:
        if to == "published":
            if config is not None:
                raise UserError("config is for reading the published format: leave it out with --to published")
            summary = _to_published(model, partial, target, progress)
        else:
            summary = _from_published(model, partial, config, target, progress)
    return {"out": out, "to": to, **summary}


def _from_published(
    model: str, partial: Path, config_file: str | None, dtype: torch.dtype | None, progress: Progress | None
) -> dict[str, Any]:
    source = find_source(model)
    fields, where = read_fields(source, config_file)
    fields, tensors = translate(fields, read_source(source), where, source.name)
    dtype = dtype or _common_dtype({t.dtype for name, t in tensors.items() if not _is_scale(name)}, source.name)
    config = TokenFormerConfig(**fields, architectures=["TokenFormerForCausalLM"], dtype=dtype)
    copied = copy_tokenizer(source.folder, partial)
    if TOKENIZER in copied:
        tokenizer = load_tokenizer(source.folder, vocab_size=config.vocab_size)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name) is not None:
                setattr(config, name, getattr(tokenizer, name))
    _copy_generation(source.folder, partial)
    config.save_pretrained(partial)
    dtypes = {name: torch.promote_types(dtype, torch.float32) if _is_scale(name) else dtype for name in tensors}
    write_safetensors(tensors, dtypes, partial, progress)
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if not _is_scale(name))
    return _summary(config, parameters, dtype, copied)


def _to_published(model: str, partial: Path, dtype: torch.dtype | None, progress: Progress | None) -> dict[str, Any]:
    folder = model_folder(model)
    if published_fields_of(folder) is not None:
        raise UserError(f"{folder} is in the published format already")
    config = load_config(folder)
    stored = stored_tensors(folder)
    check_weights(config, stored, folder)
    stored.pop("lm_head.weight", None)  # tied: the embedding again
    dtype = dtype or _common_dtype({_STORED.get(t.dtype) for name, t in stored.items() if not _is_scale(name)}, model)
    taus = {name: _read(tensor).item() for name, tensor in stored.items() if _is_scale(name)}
    appended, rescaled = _plan(config, taus)
    merged = copy.deepcopy(config)
    merged.segments = [{"name": BASE, **{kind: config.num_tokens(kind) + appended.get(kind, 0) for kind in KINDS}}]
    fields = published_fields(merged, dtype)
    (partial / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    copied = copy_tokenizer(folder, partial)
    _copy_generation(folder, partial)
    tensors = _published_tensors(config, stored, taus, appended, dtype, progress)
    torch.save(tensors, partial / "pytorch_model.bin")
    return {
        **_summary(merged, sum(tensor.numel() for tensor in tensors.values()), dtype, copied),
        "merged": [segment["name"] for segment in config.segments],
        "appended": appended,
        "rescaled": rescaled,
    }


def _plan(config: TokenFormerConfig, taus: Mapping[str, float]) -> tuple[dict[str, int], list[str]]:
    """By kind, the tokens to append to each layer; and the kinds whose values take a factor."""
    appended, rescaled = {}, []
    for kind in KINDS:
        paths = tuple(f".{path}.scale" for path, (_, of) in PATTENTIONS.items() if of == kind)
        scales = [tau for name, tau in taus.items() if name.endswith(paths)]
        num_tokens = config.num_tokens(kind)
        if count := num_appended(config.normalization, num_tokens, config.hidden_size, scales):
            appended[kind] = count
        elif not all(is_root(tau, num_tokens) for tau in scales):
            rescaled.append(kind)
    return appended, rescaled


def _published_tensors(
    config: TokenFormerConfig,
    stored: Mapping[str, StoredTensor],
    taus: Mapping[str, float],
    appended: Mapping[str, int],
    dtype: torch.dtype,
    progress: Progress | None,
) -> dict[str, torch.Tensor]:
    """The tensors in published names and order, with segments merged and scales absorbed."""
    names = tensor_names(config.num_hidden_layers)
    tensors = {}
    for done, (ours, theirs) in enumerate(names.items()):
        path, _, leaf = ours.partition(f".segments.{BASE}.")
        if not leaf:
            tensors[theirs] = _read(stored[ours]).to(dtype, copy=True)
        elif leaf == "key":
            key, value = (_merged(config, stored, path, leaf, dtype) for leaf in LEAVES)
            added = appended.get(_kind(path), 0)
            key, value = absorb_scale(config.normalization, key, value, taus[f"{path}.scale"], added)
            tensors[theirs] = key.to(dtype)
            tensors[names[f"{path}.segments.{BASE}.value"]] = value.to(dtype)
        if progress is not None:
            progress(done + 1, len(names))
    return tensors


def _merged(
    config: TokenFormerConfig, stored: Mapping[str, StoredTensor], path: str, leaf: str, dtype: torch.dtype
) -> torch.Tensor:
    """Keys or values (n, D) of all segments of a layer, in the better of both dtypes."""
    parts = [stored.get(f"{path}.segments.{segment['name']}.{leaf}") for segment in config.segments]
    tensor = torch.cat([_read(part) for part in parts if part is not None])
    return tensor.to(torch.promote_types(tensor.dtype, dtype))


def _kind(path: str) -> str:
    """The kind of a layer: `model.layers.3.attention.query` is `qkv`."""
    return PATTENTIONS[path.split(".", 3)[3]][1]


def _read(tensor: StoredTensor) -> torch.Tensor:
    # Opened for each tensor: the pages of one that was copied are then given back.
    with safe_open(tensor.file, framework="pt") as file:
        read: torch.Tensor = file.get_tensor(tensor.key)
    return read


def _is_scale(name: str) -> bool:
    return name.endswith(".scale")


def _common_dtype(dtypes: set[torch.dtype | None], source: str) -> torch.dtype:
    """The one dtype of all weights, which is kept.

    Raises:
        UserError: there are several, or one that models are not trained in.
    """
    (dtype, *others) = dtypes
    if others or dtype is None or dtype not in _STORED.values():
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UserError(f"{source} holds weights in {found}: choose one of {', '.join(get_args(Dtype))} as dtype")
    return dtype


def _copy_generation(source: Path, target: Path) -> None:
    if (source / _GENERATION).is_file():
        shutil.copyfile(source / _GENERATION, target / _GENERATION)


def _summary(config: TokenFormerConfig, parameters: int, dtype: torch.dtype, copied: list[str]) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": config.num_hidden_layers,
        "segments": config.segments,
        "tokenizer": copied,
    }
