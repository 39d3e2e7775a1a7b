"""Models for transformers. Importing this module registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tokenformer.models.configuration_tokenformer import TokenFormerConfig
from tokenformer.models.modeling_tokenformer import (
    TokenFormerForCausalLM,
    TokenFormerModel,
    TokenFormerPreTrainedModel,
)

__all__ = ["TokenFormerConfig", "TokenFormerForCausalLM", "TokenFormerModel", "TokenFormerPreTrainedModel"]

AutoConfig.register(TokenFormerConfig.model_type, TokenFormerConfig)
AutoModel.register(TokenFormerConfig, TokenFormerModel)
AutoModelForCausalLM.register(TokenFormerConfig, TokenFormerForCausalLM)
