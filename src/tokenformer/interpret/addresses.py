"""How the parts of a model are named here: a layer by its path, `layer/segment`, and `layer/segment/token`.

The path is that of `named_modules()`, such as `model.layers.3.ffn` or `model.layers.3.attention.query`; segment and
token follow behind slashes: `model.layers.3.ffn/base`, `model.layers.3.ffn/base/17`. Tokens count from 0. An end of the
path is enough where it names one layer only: `3.ffn/base/17`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import cast

from torch import nn

from tokenformer.errors import UserError
from tokenformer.pattention import ParameterTokens, Pattention
from tokenformer.sparse import refuse_sparse
from tokenformer.tuning.identity import WRAPPED, WRAPPERS_TOKENS

# What torch.compile and PEFT put in front of the paths of the model that they wrap.
_PREFIXES = ("_orig_mod.", "base_model.model.")


@dataclass(frozen=True)
class TokenAddress:
    """One parameter token.

    Attributes:
        layer: path of its Pattention in the model.
        segment: name of its segment.
        index: its place in the segment, from 0.
    """

    layer: str
    segment: str
    index: int

    def __str__(self) -> str:
        """The address, as `find_token` reads it."""
        return f"{self.layer}/{self.segment}/{self.index}"


def pattention_layers(model: nn.Module) -> dict[str, Pattention]:
    """The Pattention layers of a model by path; one that is used in several places has its first.

    Raises:
        UserError: there are none, or the model is sparse.
    """
    refuse_sparse(model, "looked into")
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Pattention)}
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no Pattention layer: there are no parameter tokens to look at (give a "
            "TokenFormer, or a model after tokenformer.replace_linear)"
        )
    return layers


def require_language_model(model: nn.Module) -> None:
    """See that a model reads text.

    Raises:
        UserError: it reads something else.
    """
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise UserError(f"{type(model).__name__} reads no text: give a language model")


def segment_modules(model: nn.Module, layer: str) -> dict[str, nn.Module]:
    """The segments of a layer by name, in the wrappers that PEFT may have put around them, and adapters with them.

    Args:
        model: that holds the layer.
        layer: its path.
    """
    found = cast(Pattention, model.get_submodule(layer))
    segments = dict(found.segments.items())
    if layer.endswith(WRAPPED):
        wrapper = model.get_submodule(layer.removesuffix(WRAPPED))
        segments |= dict(getattr(wrapper, WRAPPERS_TOKENS, nn.ModuleDict()).items())
    return segments


def segment_sizes(model: nn.Module, layer: str) -> dict[str, int]:
    """Tokens of each segment of a layer, those that take no part (`limit`) among them."""
    return {name: _bare(segment).num_tokens for name, segment in segment_modules(model, layer).items()}


def find_layer(model: nn.Module, name: str) -> str:
    """The path of the Pattention layer that `name` is, or is the end of.

    Raises:
        UserError: there is none, or several end so; no Pattention layers, or a sparse model.
    """
    layers = pattention_layers(model)
    if name in layers:
        return name
    plain = {layer: _plain(layer) for layer in layers}
    if found := [layer for layer in layers if plain[layer] == name]:
        return found[0]
    found = [layer for layer in layers if name and f".{plain[layer]}".endswith(f".{name}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"'{name}' is the end of {len(found)} layers: write more of the name, such as {found[0]}")
    raise UserError(f"unknown layer '{name}': {_nearest(name, layers)}")


def find_segment(model: nn.Module, text: str) -> tuple[str, str]:
    """Layer and segment that `text` (`layer/segment`) names.

    Raises:
        UserError: another form, an unknown layer, or a segment that the layer does not have.
    """
    layer, slash, segment = text.rpartition("/")
    if not slash:
        raise UserError(f"'{text}' names no segment: write LAYER/SEGMENT, such as 3.ffn/base")
    return _segment_of(model, layer, segment)


def find_token(model: nn.Module, text: str | TokenAddress) -> TokenAddress:
    """The token that `text` (`layer/segment/index`) names.

    Raises:
        UserError: another form, an unknown layer or segment, or an index that the segment does not have.
    """
    parts = str(text).rsplit("/", 2)
    if len(parts) != 3:
        raise UserError(f"'{text}' names no token: write LAYER/SEGMENT/INDEX, such as 3.ffn/base/17")
    layer, segment = _segment_of(model, parts[0], parts[1])
    size = segment_sizes(model, layer)[segment]
    if not parts[2].isdecimal() or int(parts[2]) >= size:
        raise UserError(f"no token '{parts[2]}' in {layer}/{segment}: it has the tokens 0 to {size - 1}")
    return TokenAddress(layer, segment, int(parts[2]))


def _segment_of(model: nn.Module, layer: str, segment: str) -> tuple[str, str]:
    layer = find_layer(model, layer)
    sizes = segment_sizes(model, layer)
    if segment not in sizes:
        raise UserError(f"no segment '{segment}' in {layer}: it has {', '.join(sizes)}")
    return layer, segment


def _bare(segment: nn.Module) -> ParameterTokens:
    # PEFT puts wrappers around a segment that carries LoRA.
    return next(module for module in segment.modules() if isinstance(module, ParameterTokens))


def _plain(layer: str) -> str:
    """The path as it was before anything wrapped model and layer."""
    for prefix in _PREFIXES:
        layer = layer.removeprefix(prefix)
    return layer.removesuffix(WRAPPED)


def _nearest(name: str, layers: Iterable[str]) -> str:
    """A hint at names like `name`: whole paths, or ends of them with as many dots."""
    ends = {".".join(layer.split(".")[-name.count(".") - 1 :]): layer for layer in layers}
    near = [ends[end] for end in get_close_matches(name, ends, n=3)]
    if near:
        return f"did you mean {' or '.join(near)}?"
    first = next(iter(layers))
    return f"give the path of a Pattention layer, such as {first}"
