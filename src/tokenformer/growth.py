"""Growing: append parameter tokens to every Pattention of a model (TokenFormer, section 3.3).

With zero keys and the scale kept, the grown model computes exactly what it computed before: a new token scores 0, which
adds nothing to the norm and, as f(0) = 0, nothing to the output; its random value is what learning starts from. The
released code instead derives tau from the number of tokens, which changes every output (44-50 % when doubling); that
is `scale="sqrt"` here.
"""

import math
import re
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tokenformer.errors import UserError
from tokenformer.folders import new_folder, whole_checkpoints
from tokenformer.ops import get_activation
from tokenformer.pattention import ParameterTokens, Pattention, check_segment_name
from tokenformer.sparse import refuse_sparse

KeyInit = Literal["zero", "random"]
ScaleRule = Literal["keep", "sqrt"]

# Frames from warn_if_function_changes to the caller of grow; the decorator is one of them.
_CALLER = 4


@torch.no_grad()
def grow(
    model: nn.Module,
    *,
    qkv: int | None = None,
    output: int | None = None,
    ffn: int | None = None,
    tokens: int | None = None,
    keys: KeyInit = "zero",
    scale: ScaleRule = "keep",
    noise: float = 0.0,
    name: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Append a segment of new tokens to the Pattention layers of `model`, in place.

    Args:
        model: a TokenFormer, or any module that contains Pattention layers.
        qkv: tokens that each query, key and value layer has *after* growing; None leaves them alone.
        output: likewise for the output projection of attention.
        ffn: likewise for the feed-forward.
        tokens: likewise for layers of no kind (`Pattention.kind` is None), as in a module of your own.
        keys: `zero` changes no output (with `scale="keep"`); `random` initialises keys as in a new model, as the paper
            does, and the loss jumps.
        scale: `keep` leaves tau as it is; `sqrt` sets it to the root of the new number of tokens, as the paper does.
        noise: standard deviation of Gaussian noise added to the old keys and values of the layers that grow, as a share
            of each tensor's root mean square; 0 leaves them alone. Drawn after the new tokens, which do not depend on
            it.
        name: of the new segment; `grown1`, `grown2`, ... if not given.
        optimizer: an optimizer over the model's parameters: the new ones join it, each in the group that holds the old
            tokens of its layer, and the state of the old parameters stays as it is. Without it, make a new one.

    Returns:
        `model`.

    Raises:
        UserError: nothing to grow, a count that is not larger than what a layer has, a segment name that is taken or
            not usable, an unknown rule for keys or scale, a noise that is negative or not finite, or given to a model
            that lies in parts, or an optimizer that does not hold the model's tokens. Model and optimizer are then
            unchanged.
    """
    for label, rule, known in (("keys", keys, get_args(KeyInit)), ("scale", scale, get_args(ScaleRule))):
        if rule not in known:
            raise UserError(f"unknown {label} '{rule}': use one of {', '.join(known)}")
    if not 0 <= noise < math.inf:
        raise UserError(f"noise must be 0 or a positive share of the tokens' root mean square, got {noise}")
    if noise > 0 and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UserError("noise needs the whole model in one process: grow its folder, or set noise to 0")
    targets = {"qkv": qkv, "output": output, "ffn": ffn, None: tokens}
    refuse_sparse(model, "grown")
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Pattention)}
    plan = _plan(layers, targets)
    name = _segment_name(layers, name)
    groups = {layer: _groups_of(optimizer, layer) for layer, _ in plan} if optimizer is not None else {}
    if noise == 0 and keys == "zero" and scale == "keep":
        warn_if_function_changes(layers.values())

    paths = {layer: path for path, layer in layers.items()}
    initializers = {layer: whole._init_weights for whole in _whole_models(model) for layer in whole.modules()}
    for layer, added in plan:
        segment = layer.add_segment(name, added)
        if layer in initializers:
            initializers[layer](segment)
        if keys == "zero":
            segment.key.zero_()
        _place_like_old(layer, segment)
        if scale == "sqrt":
            layer.scale.fill_(layer.num_tokens**0.5)
        for group, (leaf, parameter) in zip(groups.get(layer, ()), segment.named_parameters(), strict=False):
            group["params"].append(parameter)
            if "param_names" in group:
                group["param_names"].append(f"{paths[layer]}.segments.{name}.{leaf}".lstrip("."))
    if noise > 0:
        for layer, _ in plan:
            _add_noise(layer, name, noise)
    _record(model, name, plan)
    return model


def _place_like_old(layer: Pattention, segment: ParameterTokens) -> None:
    """Cut a new segment over processes as the layer's first one is, if it is: one tensor at a time is whole."""
    old = next(tokens for tokens in layer.modules() if isinstance(tokens, ParameterTokens))
    for name, parameter in list(segment.named_parameters()):
        like = getattr(old, name)
        if isinstance(like, DTensor):
            # Every process has drawn the same: nothing needs to be sent.
            part = distribute_tensor(parameter.detach(), like.device_mesh, like.placements, src_data_rank=None)
            setattr(segment, name, nn.Parameter(part))


def _add_noise(layer: Pattention, newest: str, noise: float) -> None:
    for segment_name, segment in layer.segments.items():
        if segment_name != newest:
            for parameter in segment.parameters():
                size = parameter.float().square().mean().sqrt().mul(noise)
                parameter.add_(torch.randn_like(parameter) * size.to(parameter.dtype))


def _plan(layers: dict[str, Pattention], targets: dict[str | None, int | None]) -> list[tuple[Pattention, int]]:
    """Which layer gets how many tokens; raises before anything is changed."""
    if not layers:
        raise UserError("the model has no Pattention layers: nothing can grow")
    if adapters := next((layer.adapters for layer in layers.values() if layer.adapters), None):
        raise UserError(
            f"'{adapters[0]}' is an adapter, made for the model as it is: merge or delete it before growing"
        )
    if all(target is None for target in targets.values()):
        raise UserError("nothing to grow: give the number of tokens after growing, as qkv=, output= or ffn=")
    for kind, target in targets.items():
        if target is None:
            continue
        label = kind or "tokens"
        counts = {layer.num_tokens for layer in layers.values() if layer.kind == kind}
        if target < 1:
            raise UserError(f"{label} must be at least 1, got {target}")
        if not counts:
            raise UserError(f"{label}={target}: the model has no layers of that kind")
        if target < max(counts):
            raise UserError(
                f"{label}={target} is fewer than the {max(counts)} tokens there are: growing cannot shrink, "
                f"so give a number above {max(counts)}"
            )
    plan = [
        (layer, target - layer.num_tokens)
        for layer in layers.values()
        if (target := targets.get(layer.kind)) is not None and target > layer.num_tokens
    ]
    if not plan:
        raise UserError("nothing to grow: every layer already has the number of tokens asked for")
    return plan


def _segment_name(layers: dict[str, Pattention], name: str | None) -> str:
    taken = {segment for layer in layers.values() for segment in layer.segments}
    if name is None:
        used = [int(found[1]) for segment in taken if (found := re.fullmatch(r"grown(\d+)", segment))]
        return f"grown{max(used, default=0) + 1}"
    if name in taken:
        raise UserError(f"segment '{name}' exists already: choose another name")
    check_segment_name(name)
    return name


def warn_if_function_changes(layers: Iterable[Pattention]) -> None:
    """Warn where zero keys and a kept scale promise what the layer's mathematics cannot give."""
    for layer in layers:
        if layer.normalization == "softmax":
            warnings.warn(
                "with softmax a token of zero score takes weight: growing changes the outputs", stacklevel=_CALLER
            )
            return
        if get_activation(layer.activation)(torch.zeros(())).item() != 0:
            warnings.warn(f"{layer.activation}(0) is not 0: growing changes the outputs", stacklevel=_CALLER)
            return


def _groups_of(optimizer: torch.optim.Optimizer, layer: Pattention) -> list[dict[str, Any]]:
    """The parameter groups that hold the key and the value of a segment of the layer."""
    for segment in layer.modules():
        if isinstance(segment, ParameterTokens):
            groups = [
                next((group for group in optimizer.param_groups if any(p is like for p in group["params"])), None)
                for like in (segment.key, segment.value)
            ]
            if None not in groups:
                return cast(list[dict[str, Any]], groups)
    raise UserError("the optimizer does not hold the model's parameters: pass the one that trains this model")


def _whole_models(model: nn.Module) -> list[Any]:
    """The transformers models in `model`, itself included: what initialises parameters and has a configuration to save.

    A block of a model has the configuration too, but does not stand for all layers.
    """
    return [module for module in model.modules() if hasattr(module, "_init_weights")]


def _record(model: nn.Module, name: str, plan: list[tuple[Pattention, int]]) -> None:
    """Write the new segment into the configuration, from which from_pretrained rebuilds the shapes."""
    counts = dict(plan)
    recorded = set()
    for whole in _whole_models(model):
        config = getattr(whole, "config", None)
        if config is None or not hasattr(config, "segments") or id(config) in recorded:
            continue
        recorded.add(id(config))
        added = {layer.kind: counts[layer] for layer in whole.modules() if layer in counts}
        if added:
            config.segments = [
                *config.segments,
                {"name": name, **{kind: added.get(kind, 0) for kind in ("qkv", "output", "ffn")}},
            ]


def grow_folder(
    model: str,
    out: str,
    *,
    qkv: int | None = None,
    output: int | None = None,
    ffn: int | None = None,
    keys: KeyInit = "zero",
    scale: ScaleRule = "keep",
    noise: float = 0.0,
    name: str | None = None,
    optimizer: Literal["fresh", "carried"] = "fresh",
    seed: int = 0,
) -> dict[str, Any]:
    """Grow the model in a folder and write it to a new one, with its tokenizer or image processor.

    Args:
        model: folder of the model, such as a training run.
        out: folder to write; must not hold anything yet.
        qkv: tokens of each query, key and value layer after growing; left alone if not given.
        output: tokens of each output projection of attention after growing.
        ffn: tokens of each feed-forward after growing.
        keys: zero keeps every output as it is; random initialises keys as in a new model, and the loss jumps.
        scale: keep leaves tau as it is; sqrt sets it to the root of the new number of tokens, as the paper does.
        noise: standard deviation of noise added to the old keys and values, as a share of their root mean square.
        name: of the new segment; grown1, grown2, ... if not given.
        optimizer: carried copies the moments of the old tokens from the run's last checkpoint, for training with
            optimizer.state carried; fresh does not.
        seed: of the new tokens' random values and of the noise.

    Returns:
        `out`, the `model_type`, the `segment`'s name, and the parameters `before` and `after`.

    Raises:
        UserError: as `grow`; a model that cannot be loaded; a folder that is not empty; no optimizer state to carry.
    """
    # Not at the top: growing a module of one's own does not need the models.
    from transformers.utils.logging import disable_progress_bar

    from tokenformer.models.loading import copy_preprocessing, load_tokenformer, model_folder

    source = Path(model)
    disable_progress_bar()
    with new_folder(Path(out)) as partial:
        whole = load_tokenformer(source)
        moments = optimizer_file(source) if optimizer == "carried" else None
        before = whole.num_parameters()
        torch.manual_seed(seed)
        grow(whole, qkv=qkv, output=output, ffn=ffn, keys=keys, scale=scale, noise=noise, name=name)
        vars(whole.config).pop("auto_map", None)  # of an exported folder: its code does not come along
        whole.save_pretrained(partial)
        copy_preprocessing(model_folder(model), partial)
        if moments is not None:
            shutil.copy2(moments, partial / "optimizer.pt")
    return {
        "out": out,
        "model_type": whole.config.model_type,
        "segment": whole.config.segments[-1]["name"],
        "before": before,
        "after": whole.num_parameters(),
    }


def optimizer_file(folder: Path) -> Path:
    """The optimizer state that belongs to the model in `folder`: its own, or that of the run's last checkpoint.

    Raises:
        UserError: there is none.
    """
    candidates = [folder / "optimizer.pt", *(path / "optimizer.pt" for path in reversed(whole_checkpoints(folder)))]
    for path in candidates[:2]:
        if path.is_file():
            return path
    raise UserError(f"{folder} holds no optimizer state (checkpoints/): grow with optimizer 'fresh'")
