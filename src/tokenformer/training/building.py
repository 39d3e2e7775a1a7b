"""The model of a run: new, of the recipe's sizes, or from a folder; a TokenFormer, or the Transformer beside it."""

import json
from pathlib import Path
from typing import Any

from transformers import GPTNeoXForCausalLM, PreTrainedModel

from tokenformer.baselines import load_transformer, transformer_config
from tokenformer.data import TrainingData, tokenizer_hash
from tokenformer.errors import UserError
from tokenformer.models import TokenFormerConfig, TokenFormerForCausalLM
from tokenformer.models.loading import load_config, load_model, model_folder
from tokenformer.models.loss import require_fused_loss
from tokenformer.models.segments import SegmentedModel
from tokenformer.parallel.folders import has_weights
from tokenformer.parallel.opening import Fill, new_model, stored_model
from tokenformer.training.recipe import ModelRecipe, Recipe


def build_model(recipe: Recipe, data: TrainingData) -> PreTrainedModel:
    """A new model of the recipe's sizes, or the one in model.path, checked against the data.

    Raises:
        UserError: sizes that do not fit together, a folder that cannot be loaded, or that other data belong to.
    """
    return _build(recipe, data, in_parts=False)[0]


def build_in_parts(recipe: Recipe, data: TrainingData) -> tuple[PreTrainedModel, Fill | None]:
    """As `build_model`, but a TokenFormer without its values, and what fills the parts that a process then holds.

    What is no TokenFormer in our own format is built whole, and has nothing to be filled.
    """
    return _build(recipe, data, in_parts=True)


def _build(recipe: Recipe, data: TrainingData, *, in_parts: bool) -> tuple[PreTrainedModel, Fill | None]:
    given, fill = recipe.model, None
    if given.path:
        model, fill = _stored(given.path) if in_parts else (load_any(given.path), None)
        tokenizer = Path(given.path) / "tokenizer.json"
        if tokenizer.is_file() and tokenizer_hash(tokenizer) != data.tokenizer_hash:
            raise UserError(
                f"the tokenizer of {given.path} is not that of {data.path}: prepare the data with --tokenizer "
                f"{given.path}, or give it as data.tokenizer if it made these files"
            )
    else:
        config = model_config(given, vocab_size=data.vocab_size, sequence_length=data.sequence_length)
        config.bos_token_id = config.eos_token_id = data.tokenizer.eos_token_id
        if in_parts and given.family == "tokenformer":
            model, fill = new_model(TokenFormerForCausalLM, config)
        else:
            model = (TokenFormerForCausalLM if given.family == "tokenformer" else GPTNeoXForCausalLM)(config)
    if recipe.training.gradient_checkpointing:
        # transformers 5.21 renamed the method.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if recipe.training.recompute:
        recompute_weights(model)
    if recipe.training.fused_loss:
        if not isinstance(model, TokenFormerForCausalLM):
            raise UserError("training.fused_loss: a TokenFormer has it, this model has not; leave it out")
        require_fused_loss()
        model.fused_loss = True
    if data.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{data.path} has a vocabulary of {data.vocab_size}, the model one of {model.config.vocab_size}: "
            "prepare the data with the model's tokenizer"
        )
    if data.sequence_length > model.config.max_position_embeddings:
        raise UserError(
            f"{data.path} is packed to {data.sequence_length} tokens, the model takes "
            f"{model.config.max_position_embeddings}: prepare the data with a shorter --sequence-length, "
            "or lower data.sequence_length of tokenised files"
        )
    return model, fill


def _stored(path: str) -> tuple[PreTrainedModel, Fill | None]:
    folder = model_folder(path)
    if kind_of_model(folder) != TokenFormerConfig.model_type or not has_weights(folder):
        return load_any(path), None
    return stored_model(TokenFormerForCausalLM, load_config(folder), folder)


def recompute_weights(model: PreTrainedModel) -> None:
    """What `training.recompute` asks of a model.

    Raises:
        UserError: it is not a TokenFormer.
    """
    if not isinstance(model, SegmentedModel):
        raise UserError(
            "training.recompute: a TokenFormer has it, this model has not; use training.gradient_checkpointing"
        )
    model.set_recompute()


def model_config(given: ModelRecipe, *, vocab_size: int, sequence_length: int) -> Any:
    """The configuration of a new model: a TokenFormerConfig, or a GPTNeoXConfig.

    Args:
        given: its sizes.
        vocab_size: of the tokenizer; the model's is the next multiple of 64, which keeps the largest matrix product
            aligned. The ids above the tokenizer's are never seen.
        sequence_length: the longest that it is trained on.
    """
    vocab_size = -(-vocab_size // 64) * 64
    if given.preset:
        return TokenFormerConfig.preset(given.preset, vocab_size=vocab_size)
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": given.hidden_size,
        "num_hidden_layers": given.num_hidden_layers,
        "num_attention_heads": given.num_attention_heads,
        "rotary_pct": given.rotary_pct,
        "max_position_embeddings": sequence_length,
    }
    if given.family == "gpt_neox":
        return transformer_config(**common, intermediate_size=given.intermediate_size or 4 * given.hidden_size)
    return TokenFormerConfig(
        **common,
        segments=[{"name": "base", "qkv": given.qkv, "output": given.output, "ffn": given.ffn}],
        normalization=given.normalization,
        activation=given.activation,
        value_initializer_range=given.value_initializer_range,
    )


def load_any(folder: str | Path) -> PreTrainedModel:
    """The TokenFormer or the Transformer in a folder, in evaluation mode."""
    return load_transformer(folder) if kind_of_model(folder) == "gpt_neox" else load_model(folder)


def kind_of_model(folder: str | Path) -> str | None:
    """The model_type of the configuration in a folder; None where there is none, or none that can be read."""
    file = Path(folder) / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None
    except (ValueError, AttributeError):  # what loads the model says what is wrong with it
        return None
    return kind if isinstance(kind, str) else None
