"""Checkpoints of a model that is laid out over processes: each writes its part, and any other layout reads them.

The format is torch.distributed.checkpoint's. Tensors are known by the names that they have in the whole model, so that
neither the number of processes nor the order of the optimizer's groups is part of it.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tokenformer.errors import UserError

SHARDS = "shards"
_MODEL, _OPTIMIZER = "model/", "optimizer/"


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers that a model saves, by name; tied ones once."""
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {name: tensor for name, tensor in model.state_dict().items() if name in own}


def named_parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of an optimizer that was given names with them."""
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def save_shards(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write model and optimizer into `checkpoint`; all processes take part, on a disk that all of them see."""
    state: dict[str, Any] = {_MODEL + name: tensor for name, tensor in saved_tensors(model).items()}
    if optimizer is not None:
        for name, parameter in named_parameters_of(optimizer):
            for key, value in optimizer.state[parameter].items():
                state[f"{_OPTIMIZER}{name}/{key}"] = value
    dcp.save(state, checkpoint_id=checkpoint / SHARDS, no_dist=not dist.is_initialized())


def is_sharded(checkpoint: Path) -> bool:
    """Whether `save_shards` wrote it."""
    return (checkpoint / SHARDS).is_dir()


def load_shards(checkpoint: Path, model: nn.Module) -> None:
    """Read the parts of `model` that this process holds, whatever layout wrote them.

    Raises:
        UserError: the checkpoint is of another model, or damaged.
    """
    tensors = {_MODEL + name: tensor for name, tensor in saved_tensors(model).items()}
    sizes = {name: entry.size for name, entry in _entries(checkpoint).items() if name.startswith(_MODEL)}
    for name, tensor in tensors.items():
        if sizes.get(name) != tensor.shape:
            raise UserError(
                f"{checkpoint} is of another model: {name.removeprefix(_MODEL)} is "
                f"{tuple(sizes.get(name, ()))} there and {tuple(tensor.shape)} here"
            )
    _read(checkpoint, tensors)


def load_optimizer_shards(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Read the state of the parameters that this process holds parts of; a parameter without one keeps none.

    Raises:
        UserError: the checkpoint is damaged.
    """
    of_parameter: dict[str, dict[str, TensorStorageMetadata]] = defaultdict(dict)
    for name, entry in _entries(checkpoint).items():
        if name.startswith(_OPTIMIZER):
            owner, _, key = name.removeprefix(_OPTIMIZER).rpartition("/")
            of_parameter[owner][key] = entry
    wanted: dict[str, torch.Tensor] = {}
    for owner, parameter in named_parameters_of(optimizer):
        state = {}
        for key, entry in of_parameter[owner].items():
            # Moments lie as their parameter does; the count of steps is a number of its own.
            like = entry.size == parameter.shape and parameter.dim() > 0
            state[key] = torch.zeros_like(parameter) if like else torch.zeros(entry.size, dtype=entry.properties.dtype)
            wanted[f"{_OPTIMIZER}{owner}/{key}"] = state[key]
        if state:
            optimizer.state[parameter] = state
    _read(checkpoint, wanted)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Names, shapes and dtypes of the model in a checkpoint, as tensors on the meta device."""
    return {
        name.removeprefix(_MODEL): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in _entries(checkpoint).items()
        if name.startswith(_MODEL)
    }


def read_tensors(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors with those of the same names, in this process alone."""
    _read(checkpoint, {_MODEL + name: tensor for name, tensor in tensors.items()}, alone=True)


def _entries(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    try:
        metadata = FileSystemReader(checkpoint / SHARDS).read_metadata()
    except Exception as error:  # it is a pickle: what damage to it raises has no bounds
        raise UserError(f"{checkpoint} cannot be read ({error}): bring a copy back, or remove it") from error
    return cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)


def _read(checkpoint: Path, tensors: dict[str, torch.Tensor], *, alone: bool = False) -> None:
    try:
        # Every process reads the part that it needs; nothing is sent.
        dcp.load(
            cast(dict[str, Any], tensors),
            checkpoint_id=checkpoint / SHARDS,
            no_dist=alone or not dist.is_initialized(),
        )
    except CheckpointException as error:
        what = next(iter(error.failures.values()))[0]
        raise UserError(f"{checkpoint} cannot be read ({what}): bring a copy back, or remove it") from error
