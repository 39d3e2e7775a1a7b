"""What a saved model is and costs, from its configuration and the headers of its weights: nothing large is read."""

from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from tokenformer.errors import UserError
from tokenformer.models.cost import (
    count_tokens,
    forward_flops_per_image,
    shares,
    training_flops_per_image,
    trunk_parameters,
)
from tokenformer.models.loading import (
    IMAGE_PROCESSOR,
    TOKENIZER,
    StoredTensor,
    check_weights,
    empty_model,
    holds_image_classifier,
    load_config,
    load_tokenizer,
    load_vision_config,
    model_folder,
    num_entries,
    stored_tensors,
)
from tokenformer.models.modeling_tokenformer import TokenFormerForCausalLM
from tokenformer.models.modeling_tokenformer_vision import TokenFormerForImageClassification
from tokenformer.modules import KINDS
from tokenformer.pattention import Pattention
from tokenformer.sparse import SparsePattention

# As safetensors writes them.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def inspect_model(path: str | Path, *, sequence_length: int | None = None) -> dict[str, Any]:
    """Describe the model in a folder.

    Args:
        path: folder with config.json and weights, or a name on the Hub.
        sequence_length: for FLOPs and for the cache that decoding reads; the longest of the configuration if not given.

    Returns:
        Plain numbers, lists and dictionaries, for every model:

        - `segments`: of each, its tokens and parameters by kind of layer.
        - `scale`: by kind, `min` and `max` of the layers, `num_tokens` per layer now, and `sqrt_of`: the number of
          tokens, now or before a growth, whose root all of them are (None: of none).
        - `weights`: dtype, files and bytes; and the fields of the configuration that decide what is computed.

        For a language model also:

        - `parameters`: `total`, `embedding`, `parameter_tokens`, `final_norm`.
        - `flops_per_token` forward and training, `decode_bytes_per_token` with an empty cache and a full one.
        - `tokenizer`: its entries or None.
        - `sparsity`: None, or the shares of parameter tokens `computed` and of their memory `read` by an input.

        For an image classifier also:

        - `parameters`: `total`, `embedding` (patches, positions, class token), `parameter_tokens`, `block_norms`,
          `final_norm`, `classifier`.
        - `flops_per_image` forward and training, `tokens_per_image`, `classes` by name.
        - `image_processor`: whether there is one.

    Raises:
        UserError: what `tokenformer.models.loading.load_tokenformer` and `load_tokenizer` raise, a length below 1, or
            any length for an image classifier.
    """
    folder = model_folder(path)
    if not holds_image_classifier(folder):
        return _inspect_language_model(path, folder, sequence_length)
    if sequence_length is not None:
        raise UserError(f"{path} is an image classifier, whose images have their own length: leave sequence_length out")
    return _inspect_image_classifier(path, folder)


def _inspect_language_model(path: str | Path, folder: Path, sequence_length: int | None) -> dict[str, Any]:
    config = load_config(folder)
    length = config.max_position_embeddings if sequence_length is None else sequence_length
    if length < 1:
        raise UserError(f"sequence_length must be at least 1, got {length}")
    stored = stored_tensors(folder)
    check_weights(config, stored, folder)
    model = empty_model(config)
    dtype = _main_dtype(stored)
    return {
        "path": str(path),
        **_shared(model, stored, dtype),
        "rotary": {
            "pct": config.rotary_pct,
            "channels_per_head": config.rotary_dim,
            "head_size": config.head_dim,
            "theta": config.rope_parameters["rope_theta"],
        },
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "tokenizer": num_entries(load_tokenizer(folder)) if (folder / TOKENIZER).is_file() else None,
        "sparsity": shares(model) if config.sparsity else None,
        "parameters": {
            "total": model.num_parameters(),
            "embedding": sum(p.numel() for p in {model.model.embed_tokens.weight, model.lm_head.weight}),
            "parameter_tokens": model.num_token_parameters(),
            "final_norm": _parameters(model.model.norm),
        },
        "sequence_length": length,
        "flops_per_token": {
            "forward": model.forward_flops_per_token(length),
            "training": model.training_flops_per_token(length),
        },
        "decode_bytes_per_token": {
            "empty_cache": model.decode_bytes_per_token(dtype=dtype),
            "full_cache": model.decode_bytes_per_token(length, dtype=dtype),
        },
    }


def _inspect_image_classifier(path: str | Path, folder: Path) -> dict[str, Any]:
    config = load_vision_config(folder)
    stored = stored_tensors(folder)
    check_weights(config, stored, folder)
    model = empty_model(config)
    tokens = sum(sum(kinds.values()) for kinds in count_tokens(model).values())
    labels: dict[Any, str] = config.id2label or {}  # as JSON has them: 10 before 2
    return {
        "path": str(path),
        **_shared(model, stored, _main_dtype(stored)),
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "pooling": config.pooling,
        "norm_affine": config.norm_affine,
        "drop_path_rate": config.drop_path_rate,
        "tokens_per_image": config.sequence_length,
        "classes": [labels[index] for index in sorted(labels)],
        "image_processor": (folder / IMAGE_PROCESSOR).is_file(),
        "parameters": {
            "total": model.num_parameters(),
            "embedding": _parameters(model.model.embeddings),
            "parameter_tokens": tokens,
            "block_norms": trunk_parameters(model) - tokens,
            "final_norm": _parameters(model.model.norm),
            "classifier": _parameters(model.classifier),
        },
        "flops_per_image": {
            "forward": forward_flops_per_image(model),
            "training": training_flops_per_image(model),
        },
    }


def _shared(
    model: TokenFormerForCausalLM | TokenFormerForImageClassification,
    stored: dict[str, StoredTensor],
    dtype: torch.dtype,
) -> dict[str, Any]:
    config = model.config
    counts = count_tokens(model)
    files = sorted({tensor.file for tensor in stored.values()})
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "normalization": config.normalization,
        "activation": config.activation,
        "segments": [
            {
                "name": segment["name"],
                "tokens": {kind: segment[kind] for kind in KINDS},
                "parameters": {kind: counts.get(segment["name"], {}).get(kind, 0) for kind in KINDS},
            }
            for segment in config.segments
        ],
        "scale": _scales(model, stored),
        "weights": {
            "dtype": str(dtype).removeprefix("torch."),
            "files": [file.name for file in files],
            "bytes": sum(file.stat().st_size for file in files),
        },
    }


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _main_dtype(stored: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype that holds the most elements (scales stay float32 in a bfloat16 model)."""
    elements: Counter[str] = Counter()
    for tensor in stored.values():
        elements[tensor.dtype] += torch.Size(tensor.shape).numel()
    name = elements.most_common(1)[0][0]
    if name not in _DTYPES:
        raise UserError(f"the weights are saved as {name}: use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _scales(
    model: TokenFormerForCausalLM | TokenFormerForImageClassification, stored: dict[str, StoredTensor]
) -> dict[str, dict[str, float | int | None]]:
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for name, layer in model.named_modules():
        if isinstance(layer, (Pattention, SparsePattention)):
            tensor = stored[f"{name}.scale"]
            with safe_open(tensor.file, framework="pt") as file:
                found[layer.kind or ""].append(file.get_tensor(tensor.key).item())
    scales = {}
    for kind, values in found.items():
        low, high = min(values), max(values)
        counts = list(accumulate(segment[kind] for segment in model.config.segments))
        # Newest first: a model trained from scratch with several segments has the root of all.
        roots = (n for n in reversed(counts) if all(abs(value / n**0.5 - 1) < 1e-6 for value in values))
        scales[kind] = {"min": low, "max": high, "num_tokens": counts[-1], "sqrt_of": next(roots, None)}
    return scales
