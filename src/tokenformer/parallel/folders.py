"""Between an ordinary model folder, which from_pretrained takes, and a model or checkpoint that lies in parts.

Neither way is a whole model ever on one process: reading takes the slices that the process holds, and writing gathers
the tensors of one file.
"""

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from tokenformer.errors import UserError
from tokenformer.folders import new_folder
from tokenformer.parallel.checkpoints import is_sharded, read_tensors, saved_tensors, tensors_of
from tokenformer.parallel.mesh import Ranks

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_CONFIG = "config.json"
_LARGEST_FILE = "5GB"


def write_model(model: PreTrainedModel, folder: Path, ranks: Ranks, largest_file: str = _LARGEST_FILE) -> None:
    """Write `model` into `folder` as save_pretrained would; all processes take part, the main one writes.

    It holds the tensors of one file at a time.
    """
    tensors = saved_tensors(model)

    def gathered(names: Iterable[str]) -> dict[str, torch.Tensor]:
        whole = {}
        for name in names:
            tensor = tensors[name]
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if ranks.main:
                whole[name] = full.detach().cpu().contiguous()
        return whole

    _write_files(folder, tensors, gathered, write=ranks.main, largest_file=largest_file)
    if ranks.main:
        write_configuration(model, folder)


def write_configuration(model: PreTrainedModel, folder: Path) -> None:
    """Write what save_pretrained writes beside the weights."""
    config = copy.deepcopy(model.config)
    # fully_shard makes a class of its own of each that it cuts.
    own = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    config.architectures = [own.__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def export_checkpoint(checkpoint: str, out: str) -> dict[str, Any]:
    """Make an ordinary model folder of a checkpoint that several processes wrote; one process is enough.

    Args:
        checkpoint: such as runs/large/checkpoints/checkpoint-5000.
        out: folder to write; must not hold anything yet.

    Returns:
        `out`, and the number of `parameters` and `files`.

    Raises:
        UserError: no such checkpoint, or a damaged one; a folder that is not empty.
    """
    source = Path(checkpoint)
    if not is_sharded(source) or not (source / _CONFIG).is_file():
        raise UserError(
            f"{source} is no checkpoint of several processes: give one as runs/NAME/checkpoints/checkpoint-N"
        )
    tensors = tensors_of(source)

    def read(names: Iterable[str]) -> dict[str, torch.Tensor]:
        part = {name: torch.empty_like(tensors[name], device="cpu") for name in names}
        read_tensors(source, part)
        return part

    with new_folder(Path(out)) as partial:
        files = _write_files(partial, tensors, read)
        for path in source.glob("*.json"):
            # The configuration, that of generating, and the tokenizer; not what the Trainer and the manifest keep.
            if path.name.endswith("config.json") or path.name == "tokenizer.json":
                (partial / path.name).write_bytes(path.read_bytes())
    return {"out": out, "parameters": sum(tensor.numel() for tensor in tensors.values()), "files": files}


def _write_files(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    get: Callable[[Iterable[str]], dict[str, torch.Tensor]],
    *,
    write: bool = True,
    largest_file: str = _LARGEST_FILE,
) -> int:
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=largest_file)
    for file, names in plan.filename_to_tensors.items():
        part = get(names)
        if write:
            save_file(part, folder / file, metadata={"format": "pt"})
    if write and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return len(plan.filename_to_tensors)


def has_weights(folder: Path) -> bool:
    """Whether an ordinary folder with safetensors is there, from which `load_slices` can read."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


@torch.no_grad()
def load_slices(model: PreTrainedModel, folder: Path) -> None:
    """Read from an ordinary model folder the parts of `model` that this process holds.

    Raises:
        UserError: a tensor is missing or has another shape, or a file is damaged.
    """
    if (folder / INDEX).is_file():
        where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    else:
        where = dict.fromkeys(saved_tensors(model), WEIGHTS)
    opened: dict[str, Any] = {}
    for name, tensor in saved_tensors(model).items():
        try:
            file = where[name]
            if file not in opened:
                opened[file] = safe_open(folder / file, framework="pt")
            piece = opened[file].get_slice(name)
        except (KeyError, OSError, SafetensorError) as error:
            raise UserError(f"{folder}: cannot read {name} ({error}): bring a copy of the folder back") from error
        if tuple(piece.get_shape()) != tuple(tensor.shape):
            raise UserError(f"{folder}: {name} is {tuple(piece.get_shape())} there and {tuple(tensor.shape)} here")
        local, ranges = local_part(tensor)
        if local.numel():
            local.copy_(piece[ranges] if ranges else opened[file].get_tensor(name))


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """What this process holds of a tensor, and where that lies in the whole; no slices for a number."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    ranges = tuple(slice(offset, offset + size) for size, offset in zip(sizes, offsets, strict=True))
    return tensor.to_local(), ranges
