"""Training an adapter of an image classifier."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from tokenformer.models.cost import tokens_per_image, training_flops_per_image
from tokenformer.training.images import ImageTask, ImageTrainer
from tokenformer.training.trainer import RunTrainer
from tokenformer.tuning.checkpoints import AdapterTrainer
from tokenformer.tuning.files import write_adapter
from tokenformer.tuning.recipe import ImageTuneRecipe
from tokenformer.tuning.training import adapter_size, attach, frozen_weights


class AdapterImageTrainer(AdapterTrainer, ImageTrainer):
    """Trains an adapter of an image classifier; arguments are those of `ImageTrainer`."""


class AdapterImageTask(ImageTask):
    """An image classifier with a new adapter, and the images that it is trained on.

    Args:
        recipe: of the run.

    Raises:
        UserError: as `ImageTask` and `add_adapter`.
    """

    trainer_class = AdapterImageTrainer

    def __init__(self, recipe: ImageTuneRecipe) -> None:
        super().__init__(recipe)
        self._adapter, self._base = recipe.adapter, str(recipe.model.path)
        attach(self.model, recipe.adapter, recipe.training.seed)
        blocks = cast(nn.ModuleList, self.model.base_model.layers)
        frozen = frozen_weights(blocks) * tokens_per_image(self.model.config)
        flops = self.per_step["images"] * (training_flops_per_image(self.model) - 2 * frozen)
        self.per_step = {**self.per_step, "flops": flops}

    def summary(self, last: Mapping[str, Any]) -> dict[str, Any]:
        """Held-out figures and sizes, those of the adapter among them."""
        return super().summary(last) | adapter_size(self.model)

    def save(self, run: Path, trainer: RunTrainer) -> None:
        """The adapter."""
        write_adapter(self.model, self._adapter.name, run, base=self._base)
