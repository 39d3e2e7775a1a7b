"""Growing a model that lies in parts: the new segments are cut as the old ones are, and nothing is gathered."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from tokenformer.errors import UserError
from tokenformer.folders import new_folder
from tokenformer.growth import KeyInit, ScaleRule, grow
from tokenformer.models import TokenFormerConfig, TokenFormerForCausalLM
from tokenformer.models.loading import copy_preprocessing, load_config, model_folder
from tokenformer.parallel.checkpoints import saved_tensors
from tokenformer.parallel.folders import has_weights, local_part, write_model
from tokenformer.parallel.mesh import Layout, Ranks, launched_processes
from tokenformer.parallel.opening import lay_out, stored_model


def grow_in_parts(model: PreTrainedModel, ranks: Ranks, **options: Any) -> PreTrainedModel:
    """Append a segment of new tokens to a language model that is laid out over processes.

    All of them call it, with their generators in the same state. The new tokens are those that `tokenformer.grow` gives
    the whole model; each process draws them one tensor at a time and keeps its part.

    Args:
        model: laid out by `shard_model`; not to be used afterwards.
        ranks: its processes.
        options: those of `tokenformer.grow` but `noise` and `optimizer`.

    Returns:
        The grown model, laid out in the same way.

    Raises:
        UserError: as `tokenformer.grow`; `model` is then as it was.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    grow(model, **options)
    if ranks.layout.batch_parts == 1:
        return model
    # FSDP2 gathers the parameters that a block had when it was cut: the grown blocks are cut anew.
    parts = {name: local_part(tensor)[0] for name, tensor in saved_tensors(model).items()}

    @torch.no_grad()
    def take_over(cut: PreTrainedModel) -> None:
        for name, tensor in saved_tensors(cut).items():
            local_part(tensor)[0].copy_(parts.pop(name))

    with torch.device("meta"):
        grown = TokenFormerForCausalLM(cast(TokenFormerConfig, model.config))
    grown.generation_config = model.generation_config
    cast(nn.Module, grown).to(model.dtype)
    return lay_out(grown, take_over, ranks)


def grow_folder_in_parts(
    model: str,
    out: str,
    *,
    qkv: int | None = None,
    output: int | None = None,
    ffn: int | None = None,
    keys: KeyInit = "zero",
    scale: ScaleRule = "keep",
    name: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Grow the language model in a folder and write it to a new one, by all processes of a launch together.

    Args:
        model: folder of the model, such as a training run.
        out: folder to write; must not hold anything yet.
        qkv: tokens of each query, key and value layer after growing; left alone if not given.
        output: tokens of each output projection of attention after growing.
        ffn: tokens of each feed-forward after growing.
        keys: zero keeps every output as it is; random initialises keys as in a new model, and the loss jumps.
        scale: keep leaves tau as it is; sqrt sets it to the root of the new number of tokens, as the paper does.
        name: of the new segment; grown1, grown2, ... if not given.
        seed: of the new tokens' random values.

    Returns:
        As `tokenformer.growth.grow_folder`.

    Raises:
        UserError: as `grow_folder`; a folder that is not in our own format.
    """
    source = model_folder(model)
    if not has_weights(source):
        raise UserError(f"{source} is grown by one process: run the same command without torchrun")
    cut, fill = stored_model(TokenFormerForCausalLM, load_config(source), source)
    ranks = Ranks(Layout(shard=launched_processes()), torch.device("cpu"))
    lay_out(cut, fill, ranks)
    before = cut.num_parameters()
    torch.manual_seed(seed)
    # Not laid out anew: it is not going to compute anything.
    grow(cut, qkv=qkv, output=output, ffn=ffn, keys=keys, scale=scale, name=name)
    vars(cut.config).pop("auto_map", None)  # of an exported folder: its code does not come along
    with new_folder(Path(out)) if ranks.main else nullcontext(Path(out)) as folder:
        write_model(cut, folder, ranks)
        if ranks.main:
            copy_preprocessing(source, folder)
    return {
        "out": out,
        "model_type": cut.config.model_type,
        "segment": cut.config.segments[-1]["name"],
        "before": before,
        "after": cut.num_parameters(),
    }
