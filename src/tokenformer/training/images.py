"""Image classifiers: augmented images and soft targets in, held-out accuracy out."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from tokenformer.evaluation.images import PixelImages, evaluate_images, read_pixels
from tokenformer.images import ImageSet, TrainingImages, collate_images, image_processor, open_images
from tokenformer.images.augmentation import Augment
from tokenformer.images.mixing import soft_cross_entropy
from tokenformer.models.cost import tokens_per_image, training_flops_per_image, trunk_parameters
from tokenformer.training.image_building import build_classifier
from tokenformer.training.image_recipe import ImageRecipe
from tokenformer.training.image_schedule import image_schedule
from tokenformer.training.order import RowOrder
from tokenformer.training.task import Task
from tokenformer.training.trainer import RunTrainer

_AVERAGE_FILE = "average.safetensors"
# Learned, and not the weights of a product: decaying them would pull positions together.
_NOT_DECAYED = re.compile(r"position_embedding|cls_token|class_token")


class ImageTask(Task):
    """An image classifier and its images, as a recipe names them.

    Args:
        recipe: of the run.

    Raises:
        UserError: images or model that are missing, damaged, or do not fit together.
    """

    unit = "images"
    trainer_class: type["ImageTrainer"]

    def __init__(self, recipe: ImageRecipe) -> None:
        self.recipe = recipe
        given, training = recipe.data, recipe.training
        self.data = open_images(
            given.train,
            held_out=given.held_out,
            image_column=given.image_column,
            label_column=given.label_column,
            on_bad_image=given.bad_images,
        )
        schedule = image_schedule(recipe, len(self.data.train))
        self.steps, self.warmup = schedule.steps, schedule.warmup
        set_seed(training.seed)
        self.model = build_classifier(recipe, self.data)
        size = self.model.config.image_size
        self.processor = image_processor(size, resize=given.resize, mean=given.mean, std=given.std)
        augmentation = recipe.augmentation
        self.train_rows = TrainingImages(
            self.data.train, image_size=size, crop=augmentation.crop, flip=augmentation.flip, seed=training.seed
        )
        self.held_out_rows = self.data.held_out
        self._pixels: PixelImages | None = None
        batch, tokens = training.batch_size, tokens_per_image(self.model.config)
        self.per_step = {
            "images": batch,
            "tokens": batch * tokens,
            "flops": batch * training_flops_per_image(self.model),
        }
        self.micro_batch = training.micro_batch_size or batch
        self.learning_rate = recipe.learning_rate
        self.fingerprints, self.source = self.data.fingerprints, str(given.train)

    def trainer(self, evaluate: Callable[[nn.Module], dict[str, float]], **options: Any) -> RunTrainer:
        """An ImageTrainer."""
        given, augmentation = self.recipe.data, self.recipe.augmentation
        augment = Augment(
            num_labels=len(self.data.classes),
            mean=given.mean,
            std=given.std,
            randaugment_ops=augmentation.randaugment_ops,
            randaugment_magnitude=augmentation.randaugment_magnitude,
            randaugment_std=augmentation.randaugment_std,
            mixup=augmentation.mixup,
            cutmix=augmentation.cutmix,
            mix_switch=augmentation.mix_switch,
            erasing=augmentation.erasing,
            label_smoothing=augmentation.label_smoothing,
        )
        return self.trainer_class(
            augment=augment,
            ema=self.recipe.training.ema,
            evaluate_with=evaluate,
            rates=layer_rates(self.model, self.recipe.optimizer.layer_decay),
            skip_rows=given.skip_images,
            **options,
        )

    def evaluate(self, model: nn.Module, *, device: torch.device) -> dict[str, float]:
        """Cross-entropy in nats per image, top-1 and top-5 accuracy in [0, 1], and the number of images."""
        limit, size = self.recipe.data.held_out_images, self.model.config.image_size
        count = min(limit or len(self.data.held_out), len(self.data.held_out))
        images: ImageSet | PixelImages = self.data.held_out
        if count * 3 * size**2 * torch.float32.itemsize <= _MOST_PIXEL_BYTES:
            if self._pixels is None:
                self._pixels = read_pixels(self.data.held_out, self.processor, limit=limit)
            images, limit = self._pixels, None
        batch = max(self.micro_batch, _EVALUATION_BATCH)
        figures = evaluate_images(model, images, self.processor, batch_size=batch, device=device, limit=limit)
        return {name: figures[name] for name in ("loss", "top1", "top5", "images")}

    def example_loss(self, model: nn.Module, device: torch.device) -> torch.Tensor:
        """Of black images."""
        config = self.model.config
        pixels = torch.zeros(self.micro_batch, config.num_channels, config.image_size, config.image_size, device=device)
        labels = torch.zeros(self.micro_batch, dtype=torch.long, device=device)
        return nn.functional.cross_entropy(model(pixel_values=pixels).logits.float(), labels)

    def summary(self, last: Mapping[str, Any]) -> dict[str, Any]:
        """Held-out figures and sizes."""
        return {
            **{name: value for name, value in last.items() if name.startswith("eval_")},
            "epochs": self.steps * self.recipe.training.batch_size / len(self.data.train),
            "unreadable_images": self.data.train.unreadable + self.data.held_out.unreadable,
            "parameters": self.model.num_parameters(),
            "non_embedding_parameters": trunk_parameters(self.model),
        }

    def save(self, run: Path, trainer: RunTrainer) -> None:
        """The model (the moving average of its weights, where there is one), and its image processor."""
        average = cast(ImageTrainer, trainer).average
        model = self.model if average is None else cast(PreTrainedModel, average.module)
        model.save_pretrained(run)
        self.processor.save_pretrained(run)


class ImageTrainer(RunTrainer):
    """Trains an image classifier on augmented images with soft targets.

    Args:
        augment: makes pixel values and targets of a batch of images and labels, on the device of training.
        ema: decay of the moving average of the weights; 0 keeps none.
        kwargs: those of `RunTrainer`.

    Attributes:
        average: the moving average as a model of its own, or None.
    """

    def __init__(self, *, augment: Augment, ema: float, **kwargs: Any) -> None:
        super().__init__(data_collator=collate_images, **kwargs)
        self.augment = augment
        self.average: AveragedModel | None = None
        self._batch = (-1, 0)
        if ema > 0:
            model = cast(nn.Module, self.model)
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema))
            self.add_callback(_Averaging(self.average, model))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Mean cross-entropy between logits and soft targets, in nats per image."""
        pixels, targets = self.augment(inputs["images"], inputs["labels"], self._generator())
        return soft_cross_entropy(model(pixel_values=pixels).logits, targets)

    def _generator(self) -> torch.Generator:
        """Random numbers of this pass: they depend on seed, step and pass alone, so a resumed run has the same."""
        step, passed = self._batch
        self._batch = (step, passed + 1) if step == self.state.global_step else (self.state.global_step, 0)
        (state,) = np.random.SeedSequence([self.args.seed, *self._batch]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state) >> 1)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but biases, norms, positions and the class token."""
        return [name for name in super().get_decay_parameter_names(model) if not _NOT_DECAYED.search(name)]

    def measure(self) -> dict[str, float]:
        """Figures of the moving average, and of the weights themselves as `raw_`; or of the weights alone."""
        figures = super().measure()
        if self.average is None:
            return figures
        return self.evaluate_with(self.average.module) | {f"raw_{name}": value for name, value in figures.items()}

    def save_beside(self, checkpoint: Path) -> None:
        """Put the moving average into a checkpoint."""
        if self.average is not None:
            save_file({k: v.contiguous() for k, v in self.average.state_dict().items()}, checkpoint / _AVERAGE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load_state_dict(load_file(Path(resume_from_checkpoint) / _AVERAGE_FILE))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        return _WithPositions(self.row_order(whole_steps=True))


ImageTask.trainer_class = ImageTrainer


class _Averaging(TrainerCallback):
    """Takes the weights into their moving average after each step."""

    def __init__(self, average: AveragedModel, model: nn.Module) -> None:
        self.average, self.model = average, model

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before what the step is followed by: evaluation and checkpoint."""
        self.average.update_parameters(self.model)


class _WithPositions(Sampler[tuple[int, int]]):
    """Rows with their position in the order of the whole run, on which the crop of an image depends."""

    def __init__(self, rows: RowOrder) -> None:
        self.rows = rows

    def set_epoch(self, epoch: int) -> None:
        """Called before each pass."""
        self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self.rows.placed()


def layer_rates(model: nn.Module, decay: float) -> dict[str, float]:
    """Learning rate of each parameter as a share of that of the classifier: `decay` for each block in between.

    Embeddings lie below the first block, the final norm and the classifier above the last.
    """
    if decay == 1:
        return {}
    depths = {name: _depth(name) for name, _ in model.named_parameters()}
    top = max(depth for depth in depths.values() if depth is not None) + 1
    return {name: decay ** (top - (top if depth is None else depth)) for name, depth in depths.items()}


def _depth(name: str) -> int | None:
    """0 for embeddings, then the number of the block; None above the blocks."""
    if found := re.search(r"\blayers?\.(\d+)\.", name):
        return int(found[1]) + 1
    return 0 if re.search(r"embedding|cls_token|class_token", name) else None


_EVALUATION_BATCH = 128
# Held-out images are kept as pixel values where they take no more than this: the 10,000 of CIFAR-10 take 117 MiB.
_MOST_PIXEL_BYTES = 2**29
