"""TokenFormer language model (Wang et al., ICLR 2025, section 3) for transformers.

A pre-norm decoder whose every projection is a Pattention (Eq. 5-10); partial rotary positions, tied embeddings,
non-parametric layer norms in the blocks and a parametric one at the end.

Shapes: B batch, T positions, D channels, V vocabulary.
"""

import os
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from tokenformer.models.checkpoints import find_published, read_published
from tokenformer.models.configuration_tokenformer import TokenFormerConfig
from tokenformer.models.cost import CostMixin
from tokenformer.models.loss import fused_cross_entropy
from tokenformer.models.segments import SegmentedModel
from tokenformer.modules import OutputEmbedding, TokenFormerBlock, rotary_angles
from tokenformer.sparse import apply_sparsity


class TokenFormerPreTrainedModel(CostMixin, SegmentedModel):
    """What the language models share: the blocks' part is in `SegmentedModel`, reading published folders is here."""

    config: TokenFormerConfig
    config_class = TokenFormerConfig
    _skip_keys_device_placement = ["past_key_values"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`; a published folder or Hub model is renamed while it is read.

        The Auto classes cannot do that: they need the `model_type` that published configurations lack.

        Raises:
            UserError: a published folder whose weights are missing, damaged, do not fit its configuration, or ask to
                run code.
        """
        folder = find_published(pretrained_model_name_or_path, kwargs)
        if folder is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        fields, tensors = read_published(folder)
        for name in ("revision", "subfolder", "variant", "use_safetensors"):  # where to look, and that is done
            kwargs.pop(name, None)
        if config is not None and not isinstance(config, TokenFormerConfig):
            config = TokenFormerConfig.from_pretrained(config)
        if config is None:
            # The dtype is for the weights: from_dict would take it for a field.
            dtypes: dict[str, Any] = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            config, kwargs = TokenFormerConfig.from_dict(fields, return_unused_kwargs=True, **kwargs)
            kwargs |= dtypes
        loaded = super().from_pretrained(None, *args, config=config, state_dict=tensors, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.name_or_path = os.fspath(pretrained_model_name_or_path or "")
        return loaded


class TokenFormerModel(TokenFormerPreTrainedModel):
    """The backbone: embedding, blocks and final norm; gives hidden states (B, T, D)."""

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TokenFormerBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        if config.sparsity:
            apply_sparsity(self, config.sparsity)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch of sequences.

        Args:
            input_ids: (B, T) token ids; or give `inputs_embeds` (B, T, D).
            attention_mask: (B, T past and present), 0 where padded.
            position_ids: (B, T); positions that restart within a row mark packed documents, which then do not see
                each other; only without `attention_mask` and without a given cache.
            inputs_embeds: embeddings in place of ids.
            past_key_values: cache of earlier positions.
            use_cache: return the cache.
            kwargs: passed to the attention function.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            # Only positions that a caller gave can restart; ours would cost a mask to find that they do not.
            position_ids=position_ids,
        )
        # After the mask: with a cache, even a new one, create_causal_mask does not look for packed documents.
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        position_embeddings = rotary_angles(
            position_ids, self.config.rotary_dim, self.config.rope_parameters["rope_theta"], inputs_embeds.dtype
        )

        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class TokenFormerForCausalLM(TokenFormerPreTrainedModel, GenerationMixin):
    """The language model: backbone and tied output embedding; gives logits (B, T, V).

    Attributes:
        fused_loss: in training, compute the loss of `labels` a few positions at a time and give no logits. Not saved.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config)
        self.model = TokenFormerModel(config)
        self.lm_head = OutputEmbedding(config.hidden_size, config.vocab_size, bias=False)
        self.fused_loss = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the mean next-token loss in nats where `labels` are given.

        With `fused_loss`, in training, the loss alone: `logits` are then None.

        Args:
            input_ids: (B, T) token ids; or give `inputs_embeds`.
            attention_mask: (B, T past and present), 0 where padded.
            position_ids: (B, T); see `TokenFormerModel.forward`.
            inputs_embeds: (B, T, D).
            past_key_values: cache of earlier positions.
            labels: (B, T), the ids themselves (they are shifted here); -100 is left out of the loss.
            use_cache: return the cache.
            logits_to_keep: compute logits of the last so many positions (0: all), or of those indices.
            kwargs: passed to the attention and loss functions.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, keep, :]
        logits, loss = None, None
        if labels is not None and self.fused_loss and self.training and self._has_plain_head():
            loss = self._fused_loss(hidden_states, labels, **kwargs)
        else:
            logits = self.lm_head(hidden_states)
        if labels is not None and loss is None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _has_plain_head(self) -> bool:
        # An adapter around it, or a sharded or quantised weight, knows how to multiply; torch's fused loss does not.
        return type(self.lm_head) is OutputEmbedding and type(self.lm_head.weight) in (torch.Tensor, nn.Parameter)

    def _fused_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        *,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """What `loss_function` gives for the logits of (B, T, D); the arguments are its own."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
        return fused_cross_entropy(
            hidden_states.flatten(0, 1),
            self.lm_head.weight,
            shift_labels.flatten(),
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
        )
