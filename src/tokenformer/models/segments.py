"""What language models and image classifiers share: sizes, the list of segments, and what a segment starts from.

The configuration lists the segments, so that `from_pretrained` rebuilds the shapes of a grown model.
"""

from dataclasses import field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from tokenformer.errors import UserError
from tokenformer.modules import KINDS, TokenFormerAttention, TokenFormerBlock
from tokenformer.ops import get_activation, get_normalization
from tokenformer.pattention import BASE, ParameterTokens, Pattention, check_segment_name
from tokenformer.sparse import refuse_sparse


@strict
class SegmentedConfig(PreTrainedConfig):
    """The fields that the blocks of every TokenFormer need; a base class, not a configuration of its own.

    Raises:
        UserError: sizes that do not fit together, naming the field.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    segments: list[dict[str, Any]] = field(default_factory=list)
    normalization: str = "l2_gelu"
    activation: str = "gelu"
    pattention_eps: float = 1e-12
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    value_initializer_range: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check that the sizes fit together and fill in the default segment."""
        self._check_sizes()
        if not self.segments:
            d = self.hidden_size
            self.segments = [{"name": BASE, "qkv": d, "output": d, "ffn": 4 * d}]
        self._check_segments()
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        self._require_positive("hidden_size", "num_hidden_layers", "num_attention_heads")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}: "
                "change one of them"
            )
        get_normalization(self.normalization)
        get_activation(self.activation)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    def _check_segments(self) -> None:
        names = [segment.get("name") for segment in self.segments]
        if not names or names[0] != BASE:
            raise UserError(f"segments must begin with one called '{BASE}', got {names}")
        if len(set(names)) != len(names):
            raise UserError(f"segment names must differ, got {names}")
        for segment in self.segments:
            if set(segment) != {"name", *KINDS}:
                raise UserError(f"a segment has the fields name, qkv, output and ffn, got {sorted(segment)}")
            check_segment_name(segment["name"])
            for kind in KINDS:
                count, least = segment[kind], 1 if segment["name"] == BASE else 0
                if type(count) is not int or count < least:
                    raise UserError(f"segment '{segment['name']}': {kind} must be at least {least}, got {count!r}")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads

    def num_tokens(self, kind: str) -> int:
        """Parameter tokens of a Pattention of `kind` (`qkv`, `output`, `ffn`), all segments together."""
        return sum(segment[kind] for segment in self.segments)


class SegmentedModel(PreTrainedModel):
    """What every TokenFormer shares: the initialisation of its tokens, and what transformers may do with its blocks."""

    config: SegmentedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenFormerBlock"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": TokenFormerBlock, "attentions": TokenFormerAttention}
    # tau multiplies every output: bfloat16 would keep three digits of it.
    _keep_in_fp32_modules_strict = ["scale"]

    def merge_segments(self) -> None:
        """Put the segments of every Pattention into one, in place: a re-arrangement that the configuration records.

        For deployment, and before handing a grown model to code that knows no segments.

        Raises:
            UserError: an adapter sits on a segment, or the model is sparse.
        """
        refuse_sparse(self, "merged")
        for layer in self.modules():
            if isinstance(layer, Pattention):
                layer.merge_segments()
        self.config.segments = [{"name": BASE, **{kind: self.config.num_tokens(kind) for kind in KINDS}}]

    def set_recompute(self, enable: bool = True) -> None:
        """Let every Pattention make its weights again in the backward pass instead of keeping them.

        Of what is as large as rows times parameter tokens, the scores alone are then kept; results and gradients are
        the same. Far cheaper than gradient checkpointing, which repeats the products too, and works beside it.
        """
        for layer in self.modules():
            if isinstance(layer, Pattention):
                layer.recompute = enable

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published initialisation unless the configuration says otherwise.

        Keys are normal(0, 0.02), values normal(0, 2 / (layers * sqrt(D))).
        """
        config = self.config
        if isinstance(module, ParameterTokens):
            init.normal_(module.key, std=config.initializer_range)
            published = 2 / (config.num_hidden_layers * config.hidden_size**0.5)
            given = config.value_initializer_range
            init.normal_(module.value, std=published if given is None else given)
        elif isinstance(module, Pattention):
            init.constant_(module.scale, module.initial_scale)
        else:
            super()._init_weights(module)
