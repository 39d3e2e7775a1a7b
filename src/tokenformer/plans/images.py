"""Plans for image classifiers, and the ViTs beside them."""

import dataclasses
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForImageClassification, PreTrainedConfig

from tokenformer.baselines.vit import matching_vit
from tokenformer.errors import UserError
from tokenformer.images import ImageData, open_images
from tokenformer.models import TokenFormerVisionConfig
from tokenformer.models.cost import tokens_per_image, training_flops_per_image, trunk_parameters
from tokenformer.plans.estimate import Memory, image_training_memory, measured_image_rate
from tokenformer.plans.plan import Growth, ImagePlan
from tokenformer.plans.quality import TOP1_ERROR
from tokenformer.plans.task import Counts, PlanTask, ResolvedStage, Sizes
from tokenformer.training.image_building import classifier_config
from tokenformer.training.image_recipe import ImageDataRecipe, ImageModelRecipe, ImageRecipe, ImageTrainingRecipe
from tokenformer.training.image_schedule import image_schedule


class ImagePlans(PlanTask[ImagePlan]):
    """Image classifiers; a row is an image."""

    quality = TOP1_ERROR

    def open(self, plan: ImagePlan) -> Sizes:
        """Classes, which all images have in common, pixels along each side and number of the plan's own."""
        data = _open(_data_recipe(plan, plan.data.train))
        others = {stage.data for stage in plan.all_stages.values() if stage.data} - {plan.data.train}
        for source in sorted(others):
            classes = _open(_data_recipe(plan, source)).classes
            if classes != data.classes:
                only = [
                    f"'{name}'" for name in (*classes, *data.classes) if (name in classes) != (name in data.classes)
                ]
                raise UserError(
                    f"{source} has other classes than {plan.data.train} ({', '.join(only[:3]) or 'in another order'}): "
                    "a plan trains on images of the same classes"
                )
        for source in plan.measure.values():
            _open(_measure_recipe(plan, source))
        return {"classes": data.classes, "image_size": max(data.image_size), "images": len(data.train)}

    def missing(self, plan: ImagePlan) -> list[str]:
        """Folders and files; what is on the Hub is not there either, as nothing is downloaded to look."""
        own = [stage.data for stage in plan.all_stages.values() if stage.data]
        held_out = [] if plan.data.held_out is None or _is_fraction(plan.data.held_out) else [str(plan.data.held_out)]
        return [
            source or "data.train"
            for source in dict.fromkeys([plan.data.train, *held_out, *own, *plan.measure.values()])
            if source != "digits" and not (source and (Path(source).exists() or glob(source)))
        ]

    def assumed(self, plan: ImagePlan) -> Sizes:
        """Number of classes, pixels and images."""
        given = plan.assumed
        classes = tuple(map(str, range(given.classes)))
        return {"classes": classes, "image_size": given.image_size, "images": given.images}

    def source(self, plan: ImagePlan) -> str:
        """A folder, files, or a name."""
        return plan.data.train

    def rows(self, plan: ImagePlan, source: str) -> int:
        """Images."""
        return len(_open(_data_recipe(plan, source)).train)

    def check(self, recipe: ImageRecipe, rows: int) -> None:
        """A batch needs as many images, and a warm-up ends."""
        recipe.validate()
        image_schedule(recipe, rows)

    def new_config(self, recipe: ImageModelRecipe, sizes: Sizes) -> PreTrainedConfig:
        """A TokenFormerVisionConfig or a ViTConfig."""
        config: PreTrainedConfig = classifier_config(
            recipe, classes=sizes["classes"], image_size=recipe.image_size or sizes["image_size"]
        )
        return config

    def alike(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Depth, heads and patches; of a TokenFormer what its classifier reads, and its norms."""
        names = ["num_hidden_layers", "num_attention_heads", "image_size", "patch_size"]
        if isinstance(config, TokenFormerVisionConfig):
            names += ["pooling", "norm_affine"]
        return {name: getattr(config, name) for name in names}

    def matching(
        self, recipe: ImageModelRecipe, other: PreTrainedConfig, hidden_size: int | None, sizes: Sizes
    ) -> ImageModelRecipe:
        """A ViT with as many parameters in its blocks."""
        found = matching_vit(
            trunk_parameters(_model(other)),
            image_size=cast(int, recipe.image_size),
            patch_size=recipe.patch_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            num_labels=len(sizes["classes"]),
            hidden_size=hidden_size,
        )
        return dataclasses.replace(recipe, hidden_size=found.hidden_size, intermediate_size=found.intermediate_size)

    def wider(self, config: PreTrainedConfig, grow: Growth, like: PreTrainedConfig | None) -> PreTrainedConfig:
        """None."""
        raise UserError("grow: a ViT cannot be grown here; begin a larger one under train, or grow a TokenFormer")

    def counts(self, config: PreTrainedConfig, sizes: Sizes) -> Counts:
        """With the FLOPs of an image."""
        model = _model(config)
        return Counts(
            parameters=sum(p.numel() for p in model.parameters()),
            non_embedding_parameters=trunk_parameters(model),
            row_tokens=tokens_per_image(config),
            flops_per_row=training_flops_per_image(model),
        )

    def trained_on(self, training: ImageTrainingRecipe, rows: int, tokens: int) -> ImageTrainingRecipe:
        """Images."""
        return dataclasses.replace(training, images=rows)

    def recipe(self, plan: ImagePlan, resolved: ResolvedStage, path: str | None) -> ImageRecipe:
        """Of an image classifier."""
        family, drop_path = cast(Any, resolved.family), plan.model.drop_path
        return ImageRecipe(
            out=plan.out,
            model=resolved.model if path is None else ImageModelRecipe(path=path, family=family, drop_path=drop_path),
            data=dataclasses.replace(_data_recipe(plan, resolved.data), skip_images=resolved.rows_before),
            augmentation=plan.augmentation,
            optimizer=resolved.optimizer,
            training=resolved.training,
        )

    def held_out_losses(
        self,
        plan: ImagePlan,
        resolved: ResolvedStage,
        folder: Path,
        sources: Sequence[str | None],
        device: torch.device,
    ) -> list[float]:
        """Nats per image."""
        from tokenformer.training.images import ImageTask  # kornia is no dependency of plans for language models

        recipe = self.recipe(plan, resolved, str(folder))
        losses = []
        for source in sources:
            data = recipe.data if source is None else _measure_recipe(plan, source)
            task = ImageTask(dataclasses.replace(recipe, data=data))
            losses.append(task.evaluate(task.model, device=device)["loss"])
        return losses

    def budget(self, resolved: ResolvedStage) -> dict[str, Any]:
        """In images."""
        return {
            "images": resolved.rows,
            "tokens": resolved.tokens,
            "flops_per_image": resolved.counts.flops_per_row,
            "cumulative_images": resolved.cumulative_rows,
            "cumulative_tokens": resolved.cumulative_tokens,
        }

    def description(self, plan: ImagePlan, resolved: ResolvedStage) -> dict[str, Any]:
        """How images are looked at and changed, and what is measured."""
        config: Any = resolved.config
        names = ["image_size", "patch_size", "num_labels"]
        if isinstance(config, TokenFormerVisionConfig):
            names += ["pooling", "norm_affine", "normalization", "activation"]
        data = plan.data
        return {
            "model": {**{name: getattr(config, name) for name in names}, "drop_path": plan.model.drop_path},
            "held_out_images": data.held_out_images,
            "pixels": {"mean": data.mean, "std": data.std, "resize": data.resize},
            "augmentation": dataclasses.asdict(plan.augmentation),
        }

    def figures(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Errors in percent."""
        return {
            "eval_loss": summary["eval_loss"],
            **self.point(summary),
            f"eval_{self.quality.second_key}": _error(summary["eval_top5"]),
            "images_per_second": summary["images_per_second"],
            "mfu": summary["mfu"],
        }

    def point(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """The error, which does not follow from the loss."""
        return {f"eval_{self.quality.key}": _error(line["eval_top1"])}

    def memory(self, resolved: ResolvedStage, rows: int, precision: str) -> Memory:
        """By the model's modules."""
        return image_training_memory(
            _model(resolved.config),
            images=rows,
            precision=precision,
            gradient_checkpointing=resolved.training.gradient_checkpointing,
            recompute=resolved.training.recompute,
            average=resolved.training.ema > 0,
        )

    def measured_rate(self, resolved: ResolvedStage, precision: str) -> float:
        """On images of the model's size."""
        return measured_image_rate(resolved.config, flops_per_image=resolved.counts.flops_per_row, precision=precision)

    def warmup_steps(self, resolved: ResolvedStage, sizes: Sizes) -> float:
        """A share, or epochs."""
        optimizer, training = resolved.optimizer, resolved.training
        warmup = image_schedule(ImageRecipe(optimizer=optimizer, training=training), sizes["images"]).warmup
        return float(warmup * resolved.steps / (optimizer.schedule_to - optimizer.schedule_from))


def _data_recipe(plan: ImagePlan, source: str) -> ImageDataRecipe:
    """The images of a stage: the plan's, or other ones with what they hold out, or as large a part of them."""
    if source == plan.data.train:
        return plan.data
    held_out = plan.data.held_out if _is_fraction(plan.data.held_out) else None
    return dataclasses.replace(plan.data, train=source, held_out=held_out)


def _measure_recipe(plan: ImagePlan, source: str) -> ImageDataRecipe:
    """Other images to measure."""
    return dataclasses.replace(plan.data, held_out=source)


def _error(share: float) -> float:
    """In percent, without the last digits of what is not exact in binary."""
    return round(100 * (1 - share), 9)


def _is_fraction(held_out: float | str | None) -> bool:
    try:
        return held_out is not None and float(held_out) > 0
    except ValueError:
        return False


def _open(recipe: ImageDataRecipe) -> ImageData:
    if not recipe.train:
        raise UserError("data.train: give digits, a folder, a Parquet file or a dataset on the Hub")
    return open_images(
        recipe.train,
        held_out=recipe.held_out,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        on_bad_image=recipe.bad_images,
    )


def _model(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForImageClassification.from_config(config)
