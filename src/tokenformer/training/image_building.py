"""The classifier of a run: new, of the recipe's sizes, or from a folder; a TokenFormer, or the ViT beside it."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ViTForImageClassification

from tokenformer.baselines.vit import add_drop_path, load_vit, vit_config
from tokenformer.errors import UserError
from tokenformer.images import ImageData
from tokenformer.models import TokenFormerForImageClassification, TokenFormerVisionConfig
from tokenformer.models.loading import load_image_classifier
from tokenformer.training.building import kind_of_model, recompute_weights
from tokenformer.training.image_recipe import ImageModelRecipe, ImageRecipe


def build_classifier(recipe: ImageRecipe, data: ImageData) -> PreTrainedModel:
    """A new model of the recipe's sizes, or the one in model.path, checked against the images.

    Raises:
        UserError: sizes that do not fit together, a folder that cannot be loaded, or one that knows other classes.
    """
    given = recipe.model
    if given.path:
        model = load_any_classifier(given.path)
        _fit_classes(model, given, data)
        _fit_image_size(model, given)
    else:
        config = classifier_config(given, classes=data.classes, image_size=given.image_size or max(data.image_size))
        kind: Any = TokenFormerForImageClassification if given.family == "tokenformer" else ViTForImageClassification
        model = kind(config)
    if given.drop_path is not None:
        if isinstance(model, TokenFormerForImageClassification):
            model.set_drop_path(given.drop_path)
        elif given.drop_path > 0:
            add_drop_path(model, given.drop_path)
    if recipe.training.gradient_checkpointing:
        # transformers 5.21 renamed the method.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if recipe.training.recompute:
        recompute_weights(model)
    return model


def classifier_config(given: ImageModelRecipe, *, classes: tuple[str, ...], image_size: int) -> Any:
    """The configuration of a new model: a TokenFormerVisionConfig, or a ViTConfig.

    Args:
        given: its sizes.
        classes: names, in the order of the logits.
        image_size: pixels along each side, where neither `given` nor its preset says.
    """
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
    }
    options: dict[str, Any] = {
        "pooling": given.pooling,
        "norm_affine": given.norm_affine,
        "normalization": given.normalization,
        "activation": given.activation,
        "value_initializer_range": given.value_initializer_range,
    }
    if given.preset:
        size = {"image_size": given.image_size} if given.image_size else {}
        return TokenFormerVisionConfig.preset(given.preset, **size, **labels, **options)
    common: dict[str, Any] = {
        "image_size": given.image_size or image_size,
        "patch_size": given.patch_size,
        "hidden_size": given.hidden_size,
        "num_hidden_layers": given.num_hidden_layers,
        "num_attention_heads": given.num_attention_heads,
    }
    if given.family == "vit":
        config = vit_config(**common, intermediate_size=given.intermediate_size or 4 * given.hidden_size)
        config.id2label, config.label2id = labels["id2label"], labels["label2id"]
        return config
    return TokenFormerVisionConfig(
        **common,
        **labels,
        segments=[{"name": "base", "qkv": given.qkv, "output": given.output, "ffn": given.ffn}],
        **options,
    )


def load_any_classifier(folder: str | Path) -> PreTrainedModel:
    """The TokenFormer or the ViT in a folder, in evaluation mode."""
    return load_vit(folder) if kind_of_model(folder) == "vit" else load_image_classifier(folder)


def _fit_classes(model: Any, given: ImageModelRecipe, data: ImageData) -> None:
    """See that the model's classes are those of the images, or give it a new classifier if that is asked for."""
    classes = list(data.classes)
    if given.reset_classifier and given.family == "vit":
        raise UserError(f"model.reset_classifier: {given.path} is a ViT, which is trained here as it is; leave it out")
    if given.reset_classifier:
        model.reset_classifier(len(classes))
        model.config.id2label = dict(enumerate(classes))
        model.config.label2id = {name: index for index, name in enumerate(classes)}
        return
    known = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if len(known) != len(classes):
        raise UserError(
            f"{given.path} tells {len(known)} classes apart, the images have {len(classes)}: set "
            "model.reset_classifier true for a new classifier"
        )
    if known != classes:
        first = next(index for index, name in enumerate(classes) if known[index] != name)
        raise UserError(
            f"class {first} is '{known[first]}' in {given.path} and '{classes[first]}' in the images: bring the "
            "classes into the same order, or set model.reset_classifier true for a new classifier"
        )


def _fit_image_size(model: Any, given: ImageModelRecipe) -> None:
    size = given.image_size
    if size is None or size == model.config.image_size:
        return
    if given.family == "vit":
        raise UserError(
            f"model.image_size: {given.path} takes {model.config.image_size} pixels and is a ViT; leave it out"
        )
    model.set_image_size(size)
