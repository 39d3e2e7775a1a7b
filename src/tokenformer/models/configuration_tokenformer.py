"""Configuration of TokenFormer language models, with the sizes of the paper as presets."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict

from tokenformer.errors import UserError
from tokenformer.models.segments import SegmentedConfig
from tokenformer.pattention import BASE
from tokenformer.published import is_published, our_fields

# name: (layers, hidden size, heads, qkv and output tokens, ffn tokens, context); paper Tables 1, 6 and 9
_PRESETS = {
    "150M": (12, 768, 12, 768, 3072, 2048),
    "450M": (24, 1024, 16, 1024, 4096, 2048),
    "900M": (32, 1280, 16, 1280, 5120, 2048),
    "1.5B": (40, 1536, 16, 1536, 6144, 2048),
    # the family that is grown: one width, more and more tokens
    "124M": (12, 768, 12, 576, 2304, 1024),
    "354M": (12, 768, 12, 2140, 8560, 1024),
    "757M": (12, 768, 12, 4850, 19400, 1024),
    "1.4B": (12, 768, 12, 8620, 34480, 1024),
}


@strict
class TokenFormerConfig(SegmentedConfig):
    """Configuration of a TokenFormer language model.

    Args:
        vocab_size: entries of the (tied) embedding.
        hidden_size: channels of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: heads of token-token attention; must divide `hidden_size`.
        segments: parameter tokens of each Pattention, as a list of `{"name", "qkv", "output", "ffn"}` in the order in
            which they were added; the first is called `base`. Query, key and value have `qkv` tokens each. If empty:
            one segment of `hidden_size` tokens, four times as many for the ffn.
        rotary_pct: share of each head's channels that carries the rotary position embedding.
        normalization: `l2_gelu`, `gelu_l2`, `gelu_l1` or `softmax` (see `tokenformer.ops.pattention`).
        activation: nonlinearity of Pattention.
        pattention_eps: added to the sum of squares under the root.
        layer_norm_eps: of every layer norm.
        max_position_embeddings: longest sequence seen in training.
        sparsity: the layers that compute some of their tokens, as `tokenformer.sparsity.sparsify` makes them: by name
            in the backbone, the sizes of a `tokenformer.sparse.SparsePattention`.
        initializer_range: standard deviation of keys and embeddings at initialisation.
        value_initializer_range: of values; the published 2 / (layers * sqrt(hidden_size)) if not given, which is large
            for few and narrow layers.

    Raises:
        UserError: sizes that do not fit together, naming the field.
    """

    model_type = "tokenformer"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50304
    rotary_pct: float | int = 0.25
    max_position_embeddings: int = 2048
    sparsity: dict[str, Any] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    rope_parameters: dict[str, Any] = field(default_factory=dict)

    def _check_sizes(self) -> None:
        super()._check_sizes()
        self._require_positive("vocab_size")
        if not 0 <= self.rotary_pct <= 1:
            raise UserError(f"rotary_pct must lie between 0 and 1, got {self.rotary_pct}")
        if self.rotary_dim % 2:
            raise UserError(
                f"rotary size {self.rotary_dim} (rotary_pct {self.rotary_pct} of head size {self.head_dim}) is odd: "
                "it is rotated in pairs, so change rotary_pct or the number of heads"
            )

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Hand `rotary_pct` to transformers under its own name, so that other servers see the partial rotary."""
        self.rope_parameters = dict(self.rope_parameters)
        self.rope_parameters.setdefault("rope_theta", kwargs.pop("rope_theta", self.default_theta))
        self.rope_parameters["partial_rotary_factor"] = self.rotary_pct
        self.standardize_rope_params()
        if self.rope_parameters["rope_type"] != "default":
            raise UserError(f"rope_type '{self.rope_parameters['rope_type']}' is not supported: use 'default'")
        return kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`; also takes a published configuration, which names its fields otherwise.

        Such a configuration does not state the vocabulary: it is 50304, unless weights say otherwise
        (`TokenFormerForCausalLM.from_pretrained`).

        Raises:
            UserError: a published field is missing, or asks for what this library does not implement.
        """
        if is_published(config_dict):
            config_dict = our_fields(config_dict, "the published configuration")
        return super().from_dict(config_dict, **kwargs)

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated by position."""
        return int(self.head_dim * self.rotary_pct)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "TokenFormerConfig":
        """A size of the paper.

        `150M`, `450M`, `900M`, `1.5B` are the models trained on the Pile (Table 1); `124M`, `354M`, `757M`, `1.4B`
        the family grown on OpenWebText (Table 6), equal but for their tokens.

        Args:
            name: one of the above.
            overrides: fields that take another value.

        Raises:
            UserError: no such preset.
        """
        if name not in _PRESETS:
            raise UserError(f"unknown preset '{name}': use one of {', '.join(_PRESETS)}")
        layers, hidden, heads, attention_tokens, ffn_tokens, context = _PRESETS[name]
        fields: dict[str, Any] = {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "segments": [{"name": BASE, "qkv": attention_tokens, "output": attention_tokens, "ffn": ffn_tokens}],
            "max_position_embeddings": context,
        }
        return cls(**{**fields, **overrides})
