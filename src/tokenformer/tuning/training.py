"""Training an adapter: a run like any other, of which the adapter alone is trained, checkpointed and saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel, set_seed

from tokenformer.data import open_data
from tokenformer.errors import UserError
from tokenformer.models.cost import training_flops_per_token
from tokenformer.models.loading import holds_image_classifier, model_folder
from tokenformer.training import train
from tokenformer.training.image_recipe import (
    AugmentationRecipe,
    ImageDataRecipe,
    ImageModelRecipe,
    ImageOptimizerRecipe,
    ImageTrainingRecipe,
)
from tokenformer.training.language import LanguageTask
from tokenformer.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, TrainingRecipe
from tokenformer.training.trainer import LanguageTrainer, RunTrainer
from tokenformer.tuning.adapters import add_adapter, list_adapters
from tokenformer.tuning.checkpoints import AdapterTrainer
from tokenformer.tuning.files import write_adapter
from tokenformer.tuning.recipe import AdapterRecipe, ImageTuneRecipe, TuneRecipe


def tune(
    model: str,
    out: str,
    *,
    data: str,
    held_out: float | str | None = None,
    qkv: int = 0,
    output: int = 0,
    ffn: int = 0,
    name: str = "tuned",
    epochs: float = 1.0,
    batch_size: int = 16,
    learning_rate: float = 1e-2,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    eval_every: int = 0,
    save_every: int = 500,
    seed: int = 0,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Add parameter tokens to a model, train them alone, and save them alone: an adapter. The same call resumes.

    Args:
        model: folder of a language model or an image classifier, or its name on the Hub; it stays as it is.
        out: folder of the run and of the adapter.
        data: for a language model a folder of `tokenformer data prepare`, made with the model's tokenizer; for images
            digits, a folder with a folder for each class, Parquet files or a dataset on the Hub, with the model's
            classes.
        held_out: of images: another of these, or the fraction to hold out; what data brings itself if not given.
        qkv: new tokens of each query, key and value layer.
        output: new tokens of each output projection of attention.
        ffn: new tokens of each feed-forward.
        name: of the adapter; requests and `load_adapter` know it by this name.
        epochs: passes over the data.
        batch_size: rows or images per step.
        learning_rate: at the peak of a cosine that goes down to a tenth.
        warmup: share of the steps spent warming up.
        weight_decay: of keys and values.
        precision: auto takes bf16 where the hardware multiplies it fast, else fp32; fp16 needs a GPU.
        compile: torch.compile; auto compiles when the run is long enough to earn the compile time back.
        eval_every: steps between evaluations on the held-out part; 0 for the end only.
        save_every: steps between checkpoints; 0 for the end only.
        seed: of the new tokens and of the order of the data.
        threads: CPU threads; all cores if not given.
        progress: show a progress bar.

    Returns:
        The summary of the run (see `tokenformer.training.train`), and `adapter_parameters`.

    Raises:
        UserError: anything that cannot work, before anything is written.
    """
    if not 0 < epochs < float("inf"):
        raise UserError(f"epochs must be positive, got {epochs}")
    adapter = AdapterRecipe(name=name, qkv=qkv, output=output, ffn=ffn)
    steps: dict[str, Any] = {
        "batch_size": batch_size,
        "precision": precision,
        "compile": compile,
        "eval_every": eval_every,
        "save_every": save_every,
        "seed": seed,
        "threads": threads,
    }
    optimizer: dict[str, Any] = {"learning_rate": learning_rate, "warmup": warmup, "weight_decay": weight_decay}
    folder = model_folder(model)
    if holds_image_classifier(folder):
        recipe: TuneRecipe | ImageTuneRecipe = ImageTuneRecipe(
            out=out,
            model=ImageModelRecipe(path=model),
            data=_image_data(folder, data, held_out),
            # What a base was trained with makes up for few epochs of much data; a few tokens cannot learn by heart.
            augmentation=AugmentationRecipe("none", 0.0, randaugment_ops=0, mixup=0.0, cutmix=0.0, label_smoothing=0.0),
            optimizer=ImageOptimizerRecipe(**optimizer),
            training=ImageTrainingRecipe(epochs=epochs, **steps),
            adapter=adapter,
        )
    else:
        if held_out is not None:
            raise UserError("held_out is for images: the folder of `tokenformer data prepare` has a held-out part")
        rows = open_data(data)
        recipe = TuneRecipe(
            out=out,
            model=ModelRecipe(path=model),
            data=DataRecipe(path=data),
            optimizer=OptimizerRecipe(**optimizer),
            training=TrainingRecipe(tokens=max(1, round(epochs * len(rows.train) * rows.sequence_length)), **steps),
            adapter=adapter,
        )
    return train(recipe, progress=progress, title="tune")


def _image_data(folder: Path, data: str, held_out: float | str | None) -> ImageDataRecipe:
    """The images, made into pixels as the model in `folder` knows them."""
    from tokenformer.images import load_processor

    processor: Any = load_processor(folder)
    options: dict[str, Any] = {}
    if processor.image_mean is not None and processor.image_std is not None:
        options = {"mean": list(processor.image_mean), "std": list(processor.image_std)}
    if (size := getattr(processor, "size", None)) and size.get("shortest_edge"):
        options["resize"] = size["shortest_edge"]
    return ImageDataRecipe(train=data, held_out=held_out, **options)


class AdapterLanguageTrainer(AdapterTrainer, LanguageTrainer):
    """Trains an adapter of a language model; arguments are those of `RunTrainer`."""


class AdapterLanguageTask(LanguageTask):
    """A language model with a new adapter, and the data that it is trained on.

    Args:
        recipe: of the run.
        progress: show a bar while the bytes behind the held-out tokens are counted.

    Raises:
        UserError: as `LanguageTask` and `add_adapter`.
    """

    trainer_class = AdapterLanguageTrainer

    def __init__(self, recipe: TuneRecipe, *, progress: bool) -> None:
        super().__init__(recipe, progress=progress)
        self._adapter, self._base = recipe.adapter, str(recipe.model.path)
        attach(self.model, recipe.adapter, recipe.training.seed)
        tokens = self.per_step["tokens"]
        flops = training_flops_per_token(self.model, self.data.sequence_length) - 2 * frozen_weights(self.model)
        self.per_step = {"tokens": tokens, "flops": tokens * flops}

    def summary(self, last: Mapping[str, Any]) -> dict[str, Any]:
        """Held-out figures and sizes, those of the adapter among them."""
        return super().summary(last) | adapter_size(self.model)

    def save(self, run: Path, trainer: RunTrainer) -> None:
        """The adapter."""
        write_adapter(self.model, self._adapter.name, run, base=self._base)


def attach(model: PreTrainedModel, adapter: AdapterRecipe, seed: int) -> None:
    """Add the adapter of a recipe to a model that has just been loaded."""
    set_seed(seed)
    add_adapter(model, adapter.name, qkv=adapter.qkv, output=adapter.output, ffn=adapter.ffn)


def frozen_weights(model: nn.Module) -> int:
    """Weights of products whose gradients are not computed."""
    return sum(p.numel() for p in model.parameters() if p.dim() >= 2 and not p.requires_grad)


def adapter_size(model: nn.Module) -> dict[str, int]:
    """For the summary of a run."""
    return {"adapter_parameters": sum(adapter.parameters for adapter in list_adapters(model))}
