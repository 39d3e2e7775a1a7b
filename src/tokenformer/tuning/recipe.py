"""Recipes of runs that train an adapter: those of `tokenformer.training`, and the tokens that are added."""

from dataclasses import dataclass, field
from typing import Any

from tokenformer.errors import UserError
from tokenformer.training.image_recipe import ImageRecipe
from tokenformer.training.recipe import Recipe


@dataclass
class AdapterRecipe:
    """What is added to the model, and trained.

    Args:
        name: of the adapter.
        qkv: new tokens of each query, key and value layer.
        output: new tokens of each output projection of attention.
        ffn: new tokens of each feed-forward.
    """

    name: str = "tuned"
    qkv: int = 0
    output: int = 0
    ffn: int = 0


@dataclass
class TuneRecipe(Recipe):
    """A run that trains an adapter of a language model.

    Args:
        adapter: what is added.
        kwargs: those of `Recipe`.
    """

    adapter: AdapterRecipe = field(default_factory=AdapterRecipe)

    def open(self, *, progress: bool = False) -> Any:
        """A LanguageTask with an adapter."""
        from tokenformer.tuning.training import AdapterLanguageTask  # which needs recipes

        return AdapterLanguageTask(self, progress=progress)

    def validate(self) -> None:
        """Raise `UserError` on the first value that cannot be, naming the field."""
        _validate(self)
        super().validate()


@dataclass
class ImageTuneRecipe(ImageRecipe):
    """A run that trains an adapter of an image classifier.

    Args:
        adapter: what is added.
        kwargs: those of `ImageRecipe`.
    """

    adapter: AdapterRecipe = field(default_factory=AdapterRecipe)

    def open(self, *, progress: bool = False) -> Any:
        """An ImageTask with an adapter."""
        from tokenformer.tuning.image_training import AdapterImageTask  # kornia is not needed for recipes

        return AdapterImageTask(self)

    def validate(self) -> None:
        """Raise `UserError` on the first value that cannot be, naming the field."""
        _validate(self)
        if self.training.ema > 0:
            raise UserError(f"training.ema must be 0 where an adapter is trained, got {self.training.ema}")
        if self.model.reset_classifier:
            raise UserError("model.reset_classifier: an adapter does not hold a classifier; train one first")
        super().validate()


def _validate(recipe: Any) -> None:
    if not recipe.model.path:
        raise UserError("model.path: give the folder of the model that the adapter is added to")
    optimizer = recipe.optimizer
    if optimizer.state == "carried" or optimizer.old_tokens != 1 or optimizer.anneal_scale > 0:
        raise UserError("optimizer.state, old_tokens and anneal_scale are for grown models, not for adapters")
    if recipe.training.nested:
        raise UserError("training.nested trains a model for many sizes: an adapter has one")
