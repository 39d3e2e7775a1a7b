"""A model laid out over processes: parameter tokens by token, everything else by FSDP2.

`tensor` cuts keys and values along the tokens (Shard(0)): each process computes the scores of its tokens, the row
statistic is summed over the processes, and so are the outputs. `shard` cuts what is left once more, and gathers a block
when it is computed; `data` replicates. Both are torch's `fully_shard`, whose mesh has a replicated dimension.

Shapes: N parameter tokens, D channels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tokenformer.errors import UserError
from tokenformer.parallel.mesh import DATA, SHARD, TENSOR, Layout, Ranks
from tokenformer.pattention import ParameterTokens, Pattention


def check_model(model: nn.Module, layout: Layout) -> None:
    """See that a layout fits a model.

    Raises:
        UserError: fewer tokens than processes that share them, or no tokens; channels that cannot be cut evenly.
    """
    if layout.tensor == 1:
        return
    layers = {path: module for path, module in model.named_modules() if isinstance(module, ParameterTokens)}
    if not layers:
        raise UserError(f"parallel.tensor {layout.tensor}: the model has no parameter tokens: use data and shard")
    for path, tokens in layers.items():
        if tokens.num_tokens < layout.tensor:
            raise UserError(f"parallel.tensor {layout.tensor}: {path} has only {tokens.num_tokens} tokens to share")
        if any(parameter.shape[1] % layout.shard for parameter in (tokens.key, tokens.value)):
            raise UserError(
                f"parallel.shard {layout.shard} beside parallel.tensor must divide the {tokens.key.shape[1]} channels"
            )


def shard_model(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Cut the parameters of `model` in place, so that each process of `ranks` holds its part.

    Every process gives the same model, which `check_model` has found to fit.
    """
    layout, mesh = ranks.layout, ranks.mesh
    if layout.tensor > 1:
        share_tokens(model, mesh[TENSOR])
    if layout.batch_parts > 1:
        # One dimension where one will do: HSDP is a second reduction.
        inner = mesh[DATA, SHARD] if layout.data > 1 else mesh[SHARD]
        place = _along_channels(model) if layout.tensor > 1 else None
        for block in blocks_of(model):
            fully_shard(block, mesh=inner, shard_placement_fn=place)
        fully_shard(model, mesh=inner, shard_placement_fn=place)
    return model


def share_tokens(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut every segment of `model` along its tokens over the processes of a mesh of one dimension, in place."""
    for layer in model.modules():
        if isinstance(layer, Pattention):
            for segment in layer.segments.values():
                share_segment(segment, mesh)
            layer.register_forward_pre_hook(_replicated_input(mesh))
            layer.register_forward_hook(_summed_output)


def share_segment(segment: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the keys and values of one segment along its tokens, in place."""
    for name, parameter in list(segment.named_parameters(recurse=False)):
        # Every process has the whole tensor: nothing needs to be sent.
        shared = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        setattr(segment, name, nn.Parameter(shared, requires_grad=parameter.requires_grad))


def _replicated_input(mesh: DeviceMesh) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        # Its gradient comes as one summand per process, and leaves as the sum.
        return DTensor.from_local(x, mesh, [Replicate()], run_check=False), *others

    return hook


def _summed_output(layer: nn.Module, args: tuple[Any, ...], output: DTensor) -> torch.Tensor:
    local: torch.Tensor = output.redistribute(placements=[Replicate()]).to_local()
    return local


def _along_channels(model: nn.Module) -> Any:
    # The tokens are cut already. Cutting them once more would interleave the processes' parts.
    tokens = {id(p) for layer in model.modules() if isinstance(layer, ParameterTokens) for p in layer.parameters()}
    return lambda parameter: Shard(1) if id(parameter) in tokens else Shard(0)


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are gathered one at a time."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return (module for module in model.modules() if type(module).__name__ in names)


def groups_by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group of an optimizer's (name, parameter) pairs as one group per mesh, which one fused update can take."""
    parts: dict[Any, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in group["params"]:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        parts.setdefault(mesh, []).append((name, parameter))
    return [group | {"params": pairs} for pairs in parts.values()]


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float, ranks: Ranks) -> torch.Tensor:
    """Scale the gradients of a model down to a norm, and return what it was.

    It is that of the whole model and the same number on each process, so that parts which several of them hold stay
    equal: torch.nn.utils.clip_grad_norm_ reduces over one dimension of a mesh after the other, and takes no parameters
    of several meshes.
    """
    gradients, shares = [], []
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is not None:
            gradients.append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
            shares.append(1 / _copies(gradient, ranks))
    squares = torch.stack(torch._foreach_norm(gradients)).double().square()
    total = ranks.total((squares * squares.new_tensor(shares)).sum()).sqrt().float()
    # As in torch.nn.utils.clip_grad_norm_.
    torch._foreach_mul_(gradients, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total


def _copies(tensor: torch.Tensor, ranks: Ranks) -> int:
    """How many processes hold what this one holds of a tensor."""
    copies = ranks.layout.processes
    if isinstance(tensor, DTensor):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            copies //= size if isinstance(placement, Shard) else 1
    return copies


def like_parameter(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor that lies on device and processes as `parameter` does."""
    value = value.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
