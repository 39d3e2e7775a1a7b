"""Tuning by adding tokens as a method of PEFT: `get_peft_model(model, TokensConfig(qkv=8, output=8, ffn=32))`.

Importing this module registers it. PEFT keeps its methods in dictionaries by type (`peft.mapping`). Its function
`register_peft_method` fills them for the types of its own closed enumeration only, so they are filled here, by a type
that is a string enumeration like PEFT's and equals the string in `adapter_config.json`. Nothing of PEFT is changed.

Folders are those of `tokenformer.tuning.files`, with more fields: both sides read what the other one wrote.
"""

import enum
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from tokenformer.errors import UserError, require_extra
from tokenformer.modules import KINDS
from tokenformer.pattention import ParameterTokens, Pattention, check_segment_name
from tokenformer.tuning.adapters import kind_of
from tokenformer.tuning.files import PEFT_TYPE, check_base_model
from tokenformer.tuning.identity import WRAPPED, WRAPPERS_TOKENS, base_hashes

require_extra("peft", "peft")

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig  # noqa: E402 (checked above)
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge  # noqa: E402


class TokensType(str, enum.Enum):
    """The type of this method; PEFT reads its `value`."""

    TOKENS = PEFT_TYPE


@dataclass
class TokensConfig(PeftConfig):
    """How many tokens are added.

    Args:
        qkv: new tokens of each query, key and value layer.
        output: new tokens of each output projection of attention.
        ffn: new tokens of each feed-forward.
        tokens: new tokens of layers of no kind, as in a module of your own.
        target_modules: names of the layers, or ends of names; all of a kind that has new tokens if not given.
        exclude_modules: names of layers to leave out, likewise.
        base_hashes: of the model that the adapter is made for; filled in, and compared when it is loaded.
    """

    qkv: int = 0
    output: int = 0
    ffn: int = 0
    tokens: int = 0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    base_hashes: dict[str, str] | None = field(default=None)
    # Written by `save_adapter`; PEFT has names of its own.
    name: str | None = None

    def __post_init__(self) -> None:
        """Check the counts."""
        super().__post_init__()
        self.peft_type = TokensType.TOKENS
        counts = [getattr(self, kind) for kind in (*KINDS, "tokens")]
        if min(counts) < 0 or not any(counts):
            raise UserError("give the number of new tokens, as qkv=, output= or ffn=")


class TokensLayer(nn.Module, BaseTunerLayer):
    """A Pattention with the tokens of adapters beside its own segments, all under one norm.

    Args:
        base_layer: the layer.
    """

    adapter_layer_names = (WRAPPERS_TOKENS,)
    other_param_names = ()

    def __init__(self, base_layer: Pattention) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.tokens_adapter = nn.ModuleDict()
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    @property
    def in_features(self) -> int:
        """Channels of the input."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Channels of the output."""
        return self.base_layer.out_features

    def add_tokens(self, name: str, num_tokens: int) -> ParameterTokens:
        """A new segment for an adapter."""
        like = next(self.base_layer.parameters())
        segment = ParameterTokens(num_tokens, self.in_features, self.out_features, device=like.device, dtype=like.dtype)
        self.tokens_adapter[name] = segment
        return segment

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Pattention over the segments of the layer and those of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            output: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return output
        names: list[str] = self.active_adapters  # type: ignore[assignment,unused-ignore]  # PEFT says Any, or is not there
        active = {name: self.tokens_adapter[name] for name in names if name in self.tokens_adapter}
        return self.base_layer.attend(x, {**dict(self.base_layer.segments.items()), **active}, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters among the segments of the layer; nothing is added up, so that it is safe and exact."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.tokens_adapter:
                check_segment_name(name)
                if name in self.base_layer.segments:
                    raise UserError(f"the model has a segment '{name}' already: load the adapter under another name")
                self.base_layer.segments[name] = self.tokens_adapter[name]
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take them out again."""
        while self.merged_adapters:
            self.base_layer.segments.pop(self.merged_adapters.pop())


class TokensModel(BaseTuner):
    """What `get_peft_model` wraps a model in; the arguments are those of PEFT's tuners."""

    prefix = "tokens_"
    tuner_layer_cls = TokensLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        layers = {_plain(path): layer for path, layer in self.model.named_modules() if isinstance(layer, Pattention)}
        if not layers:
            raise UserError("the model has no Pattention layers: it takes no adapters of tokens")
        for kind in (*KINDS, "tokens"):
            if getattr(peft_config, kind) and not any(kind_of(layer) == kind for layer in layers.values()):
                raise UserError(f"{kind}={getattr(peft_config, kind)}: the model has no layers of that kind")
        if peft_config.base_hashes is None:
            peft_config.base_hashes = base_hashes(self.model)
        else:
            check_base_model(self.model, {**vars(peft_config)}, "the adapter")
        if peft_config.target_modules is None:
            peft_config.target_modules = [
                path for path, layer in layers.items() if getattr(peft_config, kind_of(layer)) > 0
            ]
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, TokensLayer) else None
        base = target.base_layer if layer is not None else target
        if not isinstance(base, Pattention):
            raise UserError(f"'{current_key}' is no Pattention: name layers that are in target_modules")
        count = getattr(peft_config, kind_of(base))
        if count == 0:
            return
        if layer is None:
            layer = TokensLayer(base)
            self._replace_module(parent, target_name, layer.train(target.training), target)
        segment = layer.add_tokens(adapter_name, count)
        with torch.no_grad():
            for whole in self.model.modules():
                if hasattr(whole, "_init_weights"):
                    whole._init_weights(segment)
                    break
            segment.key.zero_()
        if adapter_name not in self.active_adapters:
            segment.requires_grad_(False)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As PEFT's, for layers that have no `weight`."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: the tokens share a product's dtype with those of the model."""

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """As PEFT's, and a merged adapter is recorded in the model's configuration, which rebuilds its shapes."""
        merged: dict[str, dict[str, int]] = {}
        for layer in self.model.modules():
            if isinstance(layer, TokensLayer):
                if merge:
                    layer.merge(adapter_names=adapter_names)
                else:
                    layer.unmerge()
                for name in layer.merged_adapters:
                    counts = merged.setdefault(name, dict.fromkeys(KINDS, 0))
                    counts[kind_of(layer.base_layer)] = cast(
                        ParameterTokens, layer.base_layer.segments[name]
                    ).num_tokens
        config: Any = getattr(self.model, "config", None)
        if hasattr(config, "segments"):
            config.segments = [*config.segments, *({"name": name, **counts} for name, counts in merged.items())]
        # The layers are merged: what is left is to take the wrappers away.
        super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        return self.model


def _plain(path: str) -> str:
    return path.removesuffix(WRAPPED)


_REGISTRY: list[tuple[dict[Any, Any], Any]] = [
    (PEFT_TYPE_TO_CONFIG_MAPPING, TokensConfig),
    (PEFT_TYPE_TO_TUNER_MAPPING, TokensModel),
    (PEFT_TYPE_TO_PREFIX_MAPPING, TokensModel.prefix),
]
for _methods, _entry in _REGISTRY:
    _methods[TokensType.TOKENS] = _entry
