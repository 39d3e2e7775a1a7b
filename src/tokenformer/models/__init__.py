"""Models for transformers. Importing this module registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BitImageProcessorPil,
)

from tokenformer.models.configuration_tokenformer import TokenFormerConfig
from tokenformer.models.configuration_tokenformer_vision import TokenFormerVisionConfig
from tokenformer.models.modeling_tokenformer import (
    TokenFormerForCausalLM,
    TokenFormerModel,
    TokenFormerPreTrainedModel,
)
from tokenformer.models.modeling_tokenformer_vision import (
    TokenFormerForImageClassification,
    TokenFormerVisionModel,
    TokenFormerVisionPreTrainedModel,
)

__all__ = [
    "TokenFormerConfig",
    "TokenFormerForCausalLM",
    "TokenFormerForImageClassification",
    "TokenFormerModel",
    "TokenFormerPreTrainedModel",
    "TokenFormerVisionConfig",
    "TokenFormerVisionModel",
    "TokenFormerVisionPreTrainedModel",
]

AutoConfig.register(TokenFormerConfig.model_type, TokenFormerConfig)
AutoModel.register(TokenFormerConfig, TokenFormerModel)
AutoModelForCausalLM.register(TokenFormerConfig, TokenFormerForCausalLM)

AutoConfig.register(TokenFormerVisionConfig.model_type, TokenFormerVisionConfig)
AutoModel.register(TokenFormerVisionConfig, TokenFormerVisionModel)
AutoModelForImageClassification.register(TokenFormerVisionConfig, TokenFormerForImageClassification)
# Shortest edge, centre crop, normalise: `tokenformer.images.image_processor` makes one with the sizes of a model.
AutoImageProcessor.register(TokenFormerVisionConfig, image_processor_classes={"pil": BitImageProcessorPil})
