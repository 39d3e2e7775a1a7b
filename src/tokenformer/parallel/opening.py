"""A model that no process ever holds whole: described first, then cut, then filled with the parts that each holds.

The values are those that one process would have: what is drawn is drawn in the same order, one tensor at a time.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel

from tokenformer.parallel.checkpoints import saved_tensors
from tokenformer.parallel.folders import load_slices, local_part
from tokenformer.parallel.mesh import Ranks
from tokenformer.parallel.sharding import shard_model

Fill = Callable[[PreTrainedModel], None]
_RANDOM = ("normal_", "uniform_")
_WHOLE = (*_RANDOM, "fill_", "zero_")


def new_model(kind: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[PreTrainedModel, Fill]:
    """A model without values, and what gives the parts of it the values of a new model.

    The generator of the CPU moves on as if the model had been made whole.
    """
    draws = _Draws()
    with draws, torch.device("meta"), _initialised_on_meta():
        model = kind(config)
    values = {name: draws.of(tensor) for name, tensor in _tensors(model).items()}

    @torch.no_grad()
    def fill(cut: PreTrainedModel) -> None:
        after = torch.get_rng_state()
        for name, tensor in saved_tensors(cut).items():
            local, ranges = local_part(tensor)
            whole = values[name](tensor.shape, tensor.dtype)
            local.copy_(whole[ranges])
        torch.set_rng_state(after)

    return model, fill


def stored_model(kind: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> tuple[PreTrainedModel, Fill]:
    """A model without values, and what reads the parts of it from an ordinary folder."""
    with torch.device("meta"):
        model = kind(config)
    cast(nn.Module, model).to(config.dtype or torch.float32)
    return model, lambda cut: load_slices(cut, folder)


def lay_out(model: PreTrainedModel, fill: Fill | None, ranks: Ranks) -> PreTrainedModel:
    """Cut a model over the processes, in place, and fill what this one holds; without `fill` it has its values."""
    shard_model(model, ranks)
    if fill is not None:
        model.to_empty(device=ranks.device)
        model.tie_weights()
        fill(model)
        gc.collect()
    return model


@contextmanager
def _initialised_on_meta() -> Iterator[None]:
    """Let transformers initialise on the meta device too, where it sees no point in it; the draws are noted."""

    def init_weights(model: PreTrainedModel) -> None:
        model.initialize_weights()
        model.tie_weights(recompute_mapping=False)

    own = PreTrainedModel.init_weights
    setattr(PreTrainedModel, "init_weights", init_weights)  # noqa: B010 (mypy forbids assigning to a method)
    try:
        yield
    finally:
        setattr(PreTrainedModel, "init_weights", own)  # noqa: B010 (as above)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class _Draws(TorchDispatchMode):
    """Notes how each tensor of the meta device got its values, and lets the generator move on as if it had them."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[int, tuple[Any, tuple[Any, ...], dict[str, Any], torch.Tensor | None]] = {}
        # A storage that is freed would give its identity to the next one.
        self.alive: list[torch.Tensor] = []

    def of(self, tensor: torch.Tensor) -> Callable[[torch.Size, torch.dtype], torch.Tensor]:
        """What makes the values of a tensor again."""
        function, args, kwargs, state = self.last[_identity(tensor)]

        def make(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
            if state is not None:
                torch.set_rng_state(state)
            made: torch.Tensor = function(torch.empty(shape, dtype=dtype, device="cpu"), *args, **kwargs)
            return made

        return make

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation, and remember it if it sets a whole tensor."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name == "full" and result.is_meta:
            self._note(result, torch.ops.aten.fill_.Scalar, (args[1],), {}, None)
        elif name in _WHOLE and args[0].is_meta:
            assert args[0].numel() == args[0].untyped_storage().nbytes() // args[0].element_size(), "a part is set"
            state = None
            if name in _RANDOM:
                state = torch.get_rng_state()
                function(torch.empty(args[0].shape, dtype=args[0].dtype, device="cpu"), *args[1:], **kwargs)
            self._note(args[0], function, args[1:], kwargs, state)
        return result

    def _note(self, tensor: torch.Tensor, *how: Any) -> None:
        self.alive.append(tensor)
        self.last[_identity(tensor)] = how


def _identity(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
