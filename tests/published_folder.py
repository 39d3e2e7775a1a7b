"""Random checkpoints in the published format (PAPER.md, section 6, written out by hand), in every form they come in."""

import json
import os
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

TINY = {"layers": 2, "hidden": 32, "heads": 2, "qkv": 12, "proj": 10, "ffn": 20, "vocab": 320}


def published_config(
    *,
    layers: int,
    hidden: int,
    heads: int,
    qkv: int,
    proj: int,
    ffn: int,
    normalization: str = "l2_norm_gelu",
    rotary_pct: float = 0.25,
    context: int = 64,
    torch_dtype: str = "float16",
) -> dict[str, Any]:
    """What config.json holds on the Hub; there is no model_type and no vocabulary size."""
    return {
        "architectures": ["TokenFormerForCausalLM"],
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "qkv_slot_num": qkv,
        "proj_slot_num": proj,
        "ffn_slot_num": ffn,
        "seq_length": context,
        "max_position_embeddings": context,
        "pos_emb": "rotary",
        "rotary_pct": rotary_pct,
        "no_weight_tying": False,
        "norm": "layernorm_nonparam",
        "final_norm": "layernorm",
        "gpt_j_residual": False,
        "output_layer_parallelism": "column",
        "use_bias_in_attn_linear": False,
        "attention_config": [[["tokenformer"], layers]],
        "norm_activation_type": normalization,
        "init_method": "normal",
        "output_layer_init_method": "wang_init",
        "use_cache": True,
        "torch_dtype": torch_dtype,
        "transformers_version": "4.36.0",
    }


def published_tensors(
    *,
    layers: int,
    hidden: int,
    qkv: int,
    proj: int,
    ffn: int,
    vocab: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    key_std: float | None = None,
    value_std: float | None = None,
) -> dict[str, torch.Tensor]:
    """Random weights large enough that a mistake shows in the logits: scores and outputs are of the order of one.

    Larger ones would also magnify rounding, through token-token attention that is all but hard.
    """
    generator = torch.Generator().manual_seed(seed)
    key_std = hidden**-0.5 if key_std is None else key_std

    def normal(*shape: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return (mean + std * torch.randn(shape, generator=generator)).to(dtype)

    tensors = {"sequential.0.word_embeddings.weight": normal(vocab, hidden, std=0.5)}
    for layer in range(layers):
        tokens = {f"attention.{name}": qkv for name in ("query", "key", "value")}
        for path, count in {**tokens, "attention.proj": proj, "mlp": ffn}.items():
            tensors[f"sequential.{layer + 2}.{path}.key_param_tokens"] = normal(count, hidden, std=key_std)
            tensors[f"sequential.{layer + 2}.{path}.value_param_tokens"] = normal(
                count, hidden, std=count**-0.5 if value_std is None else value_std
            )
    tensors[f"sequential.{layers + 3}.norm.weight"] = normal(hidden, std=0.5, mean=1.0)
    tensors[f"sequential.{layers + 3}.norm.bias"] = normal(hidden, std=0.5)
    return tensors


def write_published(
    folder: Path,
    *,
    layers: int,
    hidden: int,
    heads: int,
    qkv: int,
    proj: int,
    ffn: int,
    vocab: int,
    normalization: str = "l2_norm_gelu",
    rotary_pct: float = 0.25,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    key_std: float | None = None,
    value_std: float | None = None,
) -> dict[str, torch.Tensor]:
    """Write config.json and pytorch_model.bin as on the Hub; returns the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"layers": layers, "hidden": hidden, "qkv": qkv, "proj": proj, "ffn": ffn}
    tensors = published_tensors(**sizes, vocab=vocab, seed=seed, dtype=dtype, key_std=key_std, value_std=value_std)
    torch.save(tensors, folder / "pytorch_model.bin")
    config = published_config(**sizes, heads=heads, normalization=normalization, rotary_pct=rotary_pct)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return tensors


def write_tiny(folder: Path, **fields: Any) -> dict[str, torch.Tensor]:
    """`write_published` with two layers of 32 channels and a vocabulary of 320."""
    return write_published(folder, **{**TINY, **fields})


def write_training_folder(folder: Path, tensors: dict[str, torch.Tensor], files: str = "layers") -> Path:
    """The same weights as DeepSpeed writes them during training; returns the folder of the step.

    Args:
        folder: gets `latest` and one folder.
        tensors: in published names.
        files: `layers` for one file per module, `ranks` for one file with all.
    """
    step = folder / "global_step10"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step10\n", encoding="utf-8")
    modules: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        _, index, path = name.split(".", 2)
        modules.setdefault(int(index), {})[path] = tensor
    if files == "layers":
        for index, module in modules.items():
            torch.save(module, step / f"layer_{index:02d}-model_00-model_states.pt")
    # What else is in there: states of generators, counters, settings. The weights are not, where layers are apart.
    state = {
        "module": tensors if files == "ranks" else None,
        "np_rng_state": np.random.get_state(),
        "random_rng_state": random.getstate(),
        "torch_rng_state": torch.get_rng_state(),
        "param_shapes": [OrderedDict(weight=torch.Size([2, 3]))],
        "sparse_tensor_module_names": set(),
        "args": {"hidden_size": 32},
        "global_steps": 10,
    }
    torch.save(state, step / "mp_rank_00_model_states.pt")
    (step / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"not read")
    return step


class Payload:
    """Pickled, it runs a command when it is loaded without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.target}'",)
