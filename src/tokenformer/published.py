"""The published format: how the authors' code names tensors and configuration fields, there and back.

A published checkpoint is one flat list of modules, `sequential`: the embedding at 0, block i of L at i + 2, the final
norm at L + 3. It holds no tau: that code takes the root of the number of tokens.

Nothing here reads or writes files.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from tokenformer.errors import UserError
from tokenformer.pattention import BASE

if TYPE_CHECKING:
    from tokenformer.models.configuration_tokenformer import TokenFormerConfig

EMBEDDING = "sequential.0.word_embeddings.weight"
# ours: theirs
NORMALIZATIONS = {"l2_gelu": "l2_norm_gelu", "gelu_l2": "gelu_l2_norm", "softmax": "softmax"}
COUNTS = {"qkv": "qkv_slot_num", "output": "proj_slot_num", "ffn": "ffn_slot_num"}
LEAVES = {"key": "key_param_tokens", "value": "value_param_tokens"}
# path in our block: (path in theirs, kind)
PATTENTIONS = {
    "attention.query": ("attention.query", "qkv"),
    "attention.key": ("attention.key", "qkv"),
    "attention.value": ("attention.value", "qkv"),
    "attention.output": ("attention.proj", "output"),
    "ffn": ("mlp", "ffn"),
}

# What their code can do and ours cannot: fields that may be absent, but not have another value.
_FIXED: dict[str, Any] = {
    "pos_emb": "rotary",
    "norm": "layernorm_nonparam",
    "final_norm": "layernorm",
    "no_weight_tying": False,
    "gpt_j_residual": False,
    "use_bias_in_attn_linear": False,
    "rotary_interleaved": False,
    "use_mup": False,
}
# What the weights do not tell, and nobody should guess.
_REQUIRED = ("num_attention_heads", "norm_activation_type", "rotary_pct", "max_position_embeddings")
_MATCH = "use the config and the weights that were saved together"

Shapes = Mapping[str, tuple[int, ...]]


def is_published(fields: Mapping[str, Any]) -> bool:
    """Whether a configuration is written in the published names."""
    return "model_type" not in fields and any(name in fields for name in COUNTS.values())


def is_published_name(name: str) -> bool:
    """Whether a tensor has a published name."""
    return name.startswith("sequential.")


def tensor_names(num_layers: int) -> dict[str, str]:
    """Our name of each tensor, with the published one, for a model of one segment. Scales have none there."""
    names = {"model.embed_tokens.weight": EMBEDDING}
    for layer in range(num_layers):
        for path, (theirs, _) in PATTENTIONS.items():
            for leaf, their_leaf in LEAVES.items():
                ours = f"model.layers.{layer}.{path}.segments.{BASE}.{leaf}"
                names[ours] = f"sequential.{layer + 2}.{theirs}.{their_leaf}"
    for leaf in ("weight", "bias"):
        names[f"model.norm.{leaf}"] = f"sequential.{num_layers + 3}.norm.{leaf}"
    return names


def weights_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without the tables of the rotary embedding, which are computed and not learned."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def rename_tensors(tensors: Mapping[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Published tensors under our names, with the scale of each Pattention: the root of its number of tokens."""
    renamed = {ours: tensors[theirs] for ours, theirs in tensor_names(num_layers).items()}
    for layer in range(num_layers):
        for path in PATTENTIONS:
            key = renamed[f"model.layers.{layer}.{path}.segments.{BASE}.key"]
            dtype = torch.promote_types(key.dtype, torch.float32)
            renamed[f"model.layers.{layer}.{path}.scale"] = torch.tensor(len(key) ** 0.5, dtype=dtype)
    return renamed


def complete_fields(fields: Mapping[str, Any], shapes: Shapes, where: str, weights: str) -> dict[str, Any]:
    """A published configuration with the sizes that the weights give, once both agree to the last tensor.

    Args:
        fields: in published names; sizes may be missing.
        shapes: of the tensors in published names.
        where: what to call the configuration in errors.
        weights: what to call the weights in errors.

    Raises:
        UserError: tensors that are missing, superfluous, or of another shape; a size that the weights contradict.
    """
    sizes = _sizes(shapes, weights)
    for name, size in sizes.items():
        if name in fields and _count(fields, name, where) != size:
            raise UserError(f"{where}: {name} is {fields[name]}, but {weights} has {size}: {_MATCH}")
    expected = _shapes(sizes)
    if missing := [name for name in expected if name not in shapes]:
        raise UserError(f"{weights} lacks {_some(missing)}: copy the whole checkpoint again")
    if surplus := [name for name in shapes if name not in expected]:
        raise UserError(f"{weights} holds {_some(surplus)}, which a published TokenFormer does not have")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(f"{weights}: {name} has shape {shapes[name]}, but the rest of the model needs {shape}")
    return {**fields, **sizes}


def our_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a TokenFormerConfig for a published configuration.

    The dtype is left out: published folders say float16 and hold float32.

    Raises:
        UserError: a field is missing, of the wrong type, or asks for what this library does not implement.
    """
    given = {**fields}
    given.setdefault("max_position_embeddings", given.get("seq_length"))
    needed = (*_REQUIRED, "num_layers", "hidden_size", *COUNTS.values())
    if missing := [name for name in needed if given.get(name) is None]:
        raise UserError(
            f"{where} lacks {', '.join(missing)}, which the weights do not tell: give a JSON file with "
            f"{'it' if len(missing) == 1 else 'them'} (tokenformer convert MODEL OUT --config FILE)"
        )
    for name, value in _FIXED.items():
        if given.get(name, value) != value:
            raise UserError(f"{where}: {name} is {given[name]!r}, and this library implements {value!r} only")
    _check_attention(given, where)
    kind = given["norm_activation_type"]
    known = {theirs: ours for ours, theirs in NORMALIZATIONS.items()}
    if kind not in known:
        raise UserError(f"{where}: norm_activation_type is {kind!r}: use one of {', '.join(known)}")
    ours: dict[str, Any] = {
        "hidden_size": _count(given, "hidden_size", where),
        "num_hidden_layers": _count(given, "num_layers", where),
        "num_attention_heads": _count(given, "num_attention_heads", where),
        "segments": [{"name": BASE, **{kind: _count(given, name, where) for kind, name in COUNTS.items()}}],
        "rotary_pct": _number(given, "rotary_pct", where),
        "normalization": known[kind],
        "max_position_embeddings": _count(given, "max_position_embeddings", where),
    }
    if "vocab_size" in given:
        ours["vocab_size"] = _count(given, "vocab_size", where)
    if "layernorm_epsilon" in given:
        ours["layer_norm_eps"] = _number(given, "layernorm_epsilon", where)
    if "rotary_emb_base" in given:
        ours["rope_parameters"] = {"rope_theta": float(_number(given, "rotary_emb_base", where))}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"):
        if name in given:
            ours[name] = given[name]
    return ours


def published_fields(config: "TokenFormerConfig", dtype: torch.dtype) -> dict[str, Any]:
    """The published configuration of a model.

    Args:
        config: with one segment, and a tau that is the root of the number of tokens.
        dtype: of the weights.

    Raises:
        UserError: something that the published code cannot do.
    """
    fixed: dict[str, Any] = {"activation": "gelu", "layer_norm_eps": 1e-5, "tie_word_embeddings": True}
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise UserError(f"{name} is {getattr(config, name)!r}, and the published code knows {value!r} only")
    if config.normalization not in NORMALIZATIONS:
        known = ", ".join(NORMALIZATIONS)
        raise UserError(f"normalization is {config.normalization!r}, and the published code knows {known} only")
    theta = config.rope_parameters["rope_theta"]
    if theta != 10000:
        raise UserError(f"the rotary embedding has base {theta:g}, and the published code takes 10000")
    fields = {
        "architectures": ["TokenFormerForCausalLM"],
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        **{name: config.num_tokens(kind) for kind, name in COUNTS.items()},
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_pct": config.rotary_pct,
        **{name: _FIXED[name] for name in ("pos_emb", "norm", "final_norm", "no_weight_tying", "gpt_j_residual")},
        "output_layer_parallelism": "column",
        "use_bias_in_attn_linear": False,
        "attention_config": [[["tokenformer"], config.num_hidden_layers]],
        "norm_activation_type": NORMALIZATIONS[config.normalization],
        "init_method": "normal",
        "output_layer_init_method": "wang_init",
        "use_cache": config.use_cache,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (value := getattr(config, name)) is not None:
            fields[name] = value
    return fields


def _sizes(shapes: Shapes, weights: str) -> dict[str, int]:
    """Layers, channels, vocabulary and tokens, in published names, from the first tensor that tells each."""
    layers = [int(found[1]) for name in shapes if (found := re.match(r"sequential\.(\d+)\.(?:attention|mlp)\.", name))]
    if EMBEDDING not in shapes or not layers:
        lacking = EMBEDDING if EMBEDDING not in shapes else "sequential.2.attention.query.key_param_tokens"
        raise UserError(f"{weights} lacks {lacking}: is it a published TokenFormer, and whole?")
    sizes = {"num_layers": len(set(layers))}  # a gap shows as a missing tensor
    for tensor, names in (
        (EMBEDDING, ("vocab_size", "hidden_size")),
        *((f"sequential.2.{theirs}.key_param_tokens", (COUNTS[kind],)) for theirs, kind in PATTENTIONS.values()),
    ):
        if tensor not in shapes:
            raise UserError(f"{weights} lacks {tensor}: copy the whole checkpoint again")
        if len(shapes[tensor]) != 2:
            raise UserError(f"{weights}: {tensor} has shape {shapes[tensor]}, not two dimensions")
        for name, size in zip(names, shapes[tensor], strict=False):
            sizes.setdefault(name, size)
    return sizes


def _shapes(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    hidden = sizes["hidden_size"]
    counts = {theirs: sizes[COUNTS[kind]] for theirs, kind in PATTENTIONS.values()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in tensor_names(sizes["num_layers"]).values():
        path = name.split(".", 2)[2]
        theirs = path.rpartition(".")[0]
        shapes[name] = (counts[theirs], hidden) if theirs in counts else (hidden,)
    return {**shapes, EMBEDDING: (sizes["vocab_size"], hidden)}


def _check_attention(fields: Mapping[str, Any], where: str) -> None:
    """Refuse layers of another kind: attention_config is [[[kind, ...], repetitions], ...]."""
    config = fields.get("attention_config")
    if config is None:
        return
    try:
        kinds = [kind for kinds, times in config for kind in kinds * (1 if times == "all" else times)]
        all_layers = any(times == "all" for _, times in config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: attention_config {config!r} is not a list of [[kind, ...], times]") from error
    if other := sorted({str(kind) for kind in kinds if kind != "tokenformer"}):
        raise UserError(f"{where}: attention_config has layers of kind {other[0]!r}: only 'tokenformer' is implemented")
    if not all_layers and len(kinds) != fields["num_layers"]:
        layers = fields["num_layers"]
        raise UserError(f"{where}: attention_config has {len(kinds)} layers, and num_layers is {layers}: {_MATCH}")


def _count(fields: Mapping[str, Any], name: str, where: str) -> int:
    value = fields[name]
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {name} must be a whole number of at least 1, got {value!r}")
    return value


def _number(fields: Mapping[str, Any], name: str, where: str) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {name} must be a number, got {value!r}")
    return value


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
