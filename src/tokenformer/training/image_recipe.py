"""The recipe of an image classifier: typed, written as YAML, every field overridable on the command line."""

from dataclasses import dataclass, field
from typing import Any, Literal

from tokenformer.errors import UserError
from tokenformer.training.recipe import SIZES, OptimizerRecipe, RunRecipe, StepsRecipe, require_positive

# Peak learning rates of the vision literature are stated for batches of so many images.
_RATE_BATCH = 256


@dataclass
class ImageModelRecipe:
    """What is trained: a folder to go on from, a preset of the paper, or sizes.

    Args:
        path: model folder to go on from, such as one written by `tokenformer grow`; the sizes are then its own.
        reset_classifier: give the model in path a new classifier, for other classes than its own.
        family: tokenformer, or vit: transformers' ViT, to compare with.
        preset: a size of the paper (base-matched, base, large-matched, large) in place of the sizes below.
        image_size: pixels along each side; if not given that of path or preset, otherwise the larger side of the first
            training image.
        patch_size: pixels along each side of a patch; must divide image_size.
        hidden_size: channels of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: heads; must divide hidden_size.
        qkv: parameter tokens of each query, key and value layer.
        output: parameter tokens of each output projection.
        ffn: parameter tokens of each feed-forward.
        pooling: cls classifies by a token of its own, mean by the mean over patches.
        norm_affine: layer norms of the blocks have weight and bias; the paper's have not.
        drop_path: share of the residual branches that the last block leaves out, those before it fewer, linearly; that
            of path, or none, if not given.
        normalization: l2_gelu (the paper's), gelu_l2, gelu_l1 or softmax.
        activation: nonlinearity of Pattention.
        value_initializer_range: standard deviation of the first values; the published one if not given.
        intermediate_size: units of a ViT's feed-forward; 4 hidden_size if not given.
    """

    path: str | None = None
    reset_classifier: bool = False
    family: Literal["tokenformer", "vit"] = "tokenformer"
    preset: str | None = None
    image_size: int | None = None
    patch_size: int = 4
    hidden_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    qkv: int = 128
    output: int = 128
    ffn: int = 512
    pooling: Literal["cls", "mean"] = "cls"
    norm_affine: bool = False
    drop_path: float | None = None
    normalization: str = "l2_gelu"
    activation: str = "gelu"
    value_initializer_range: float | None = None
    intermediate_size: int | None = None


@dataclass
class ImageDataRecipe:
    """What it is trained on.

    Args:
        train: digits (of scikit-learn), a folder with a folder for each class, Parquet files, or a dataset on the Hub.
        held_out: another of these, or the fraction of the training images to hold out; what train brings itself if not
            given.
        image_column: of Parquet files and of the Hub; found if not given.
        label_column: likewise.
        held_out_images: so many of them are measured, evenly spaced over all; all if not given.
        mean: of the pixels by channel, on a scale of 0 to 1; subtracted.
        std: standard deviation of the pixels by channel; divided by.
        resize: shorter side in pixels to which a held-out image is scaled before its centre is cut out; image_size if
            not given.
        bad_images: an image that cannot be read ends the run with an error, or is skipped and counted.
        workers: processes that read and crop images; 0 does it between the steps.
        skip_images: training images to pass over first, in the order of the seed: those that the model has seen.
    """

    train: str = "digits"
    held_out: float | str | None = None
    image_column: str | None = None
    label_column: str | None = None
    held_out_images: int | None = None
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    resize: int | None = None
    bad_images: Literal["error", "skip"] = "error"
    workers: int = 0
    skip_images: int = 0


@dataclass
class AugmentationRecipe:
    """What is done to a training image; 0 leaves a part out. The defaults are those of the paper.

    Args:
        crop: resized takes a part of random area and shape; pad takes the centre, shifted by up to an eighth; none the
            centre alone.
        flip: probability of mirroring left and right.
        randaugment_ops: operations of RandAugment for each image, each with its own draw, each left out half the time.
        randaugment_magnitude: their strength, from 0 to 10; some, such as inverting, act at 0 too.
        randaugment_std: standard deviation of the strength.
        mixup: alpha of the beta distribution by which two images are blended.
        cutmix: alpha of the beta distribution of the area that a rectangle of another image takes.
        mix_switch: probability of cutmix where both are on.
        erasing: probability that a random rectangle becomes noise.
        label_smoothing: share of the target that is spread over all classes.
    """

    crop: Literal["resized", "pad", "none"] = "resized"
    flip: float = 0.5
    randaugment_ops: int = 2
    randaugment_magnitude: float = 9.0
    randaugment_std: float = 0.5
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_switch: float = 0.5
    erasing: float = 0.0
    label_smoothing: float = 0.1


@dataclass
class ImageOptimizerRecipe(OptimizerRecipe):
    """AdamW and its schedule, as for language models, and what is customary for images.

    Args:
        base_learning_rate: peak learning rate for batches of 256 images, in place of learning_rate: the rate is it
            times batch_size / 256.
        warmup_epochs: epochs of linear warm-up, in place of warmup.
        layer_decay: learning rate of each block as a share of that of the block above; 1 trains all alike.
    """

    base_learning_rate: float | None = None
    warmup_epochs: float | None = None
    layer_decay: float = 1.0


@dataclass
class ImageTrainingRecipe(StepsRecipe):
    """How long an image classifier is trained, and the fields of `StepsRecipe`.

    Args:
        epochs: passes over the training images.
        images: training images, in place of epochs.
        ema: decay per step of a moving average of the weights, which is then measured beside them and is what is saved
            at the end; 0 keeps none.
    """

    epochs: float = 10.0
    images: int | None = None
    ema: float = 0.0


@dataclass
class ImageRecipe(RunRecipe):
    """A training run of an image classifier.

    Args:
        task: image-classification; tells this recipe from that of a language model.
        out: folder of the run: recipe, metrics, checkpoints and, at the end, the model and its image processor.
        model: what is trained.
        data: on what.
        augmentation: how its images are changed on the way.
        optimizer: by which rule.
        training: for how long.
    """

    task: Literal["image-classification"] = "image-classification"
    out: str = ""
    model: ImageModelRecipe = field(default_factory=ImageModelRecipe)
    data: ImageDataRecipe = field(default_factory=ImageDataRecipe)
    augmentation: AugmentationRecipe = field(default_factory=AugmentationRecipe)
    optimizer: ImageOptimizerRecipe = field(default_factory=ImageOptimizerRecipe)
    training: ImageTrainingRecipe = field(default_factory=ImageTrainingRecipe)

    def open(self, *, progress: bool = False) -> Any:
        """An ImageTask."""
        from tokenformer.training.images import ImageTask  # kornia and scikit-learn are no dependencies of recipes

        return ImageTask(self)

    @property
    def learning_rate(self) -> float:
        """At the peak."""
        base = self.optimizer.base_learning_rate
        return self.optimizer.learning_rate if base is None else base * self.training.batch_size / _RATE_BATCH

    def validate(self) -> None:
        """Raise `UserError` on the first value that cannot be, naming the field."""
        if not self.data.train:
            raise UserError("data.train: give digits, a folder, a Parquet file or a dataset on the Hub")
        if self.model.family == "vit" and self.model.preset:
            raise UserError("model.preset: the presets are TokenFormers; give the sizes of a vit")
        if self.model.family == "vit" and self.model.pooling != "cls":
            raise UserError("model.pooling: a vit classifies by its class token; leave it out")
        if self.model.reset_classifier and not self.model.path:
            raise UserError("model.reset_classifier needs model.path: a new model has a new classifier")
        self._validate_shared()
        require_positive(
            self,
            {
                "model": (*SIZES, "image_size", "patch_size"),
                "data": ("held_out_images", "resize"),
                "optimizer": ("base_learning_rate", "layer_decay"),
                "training": ("epochs", "images"),
            },
        )
        for section, names in _SHARES.items():
            for name in names:
                value = getattr(getattr(self, section), name)
                if value is not None and not 0 <= value <= 1:
                    raise UserError(f"{section}.{name} must lie between 0 and 1, got {value}")
        for section, names in _NOT_NEGATIVE.items():
            for name in names:
                value = getattr(getattr(self, section), name)
                if value is not None and value < 0:
                    raise UserError(f"{section}.{name} must not be negative, got {value}")
        if self.training.ema >= 1:
            raise UserError(f"training.ema must be below 1, got {self.training.ema}: 1 would never move")
        for name in ("mean", "std"):
            if len(getattr(self.data, name)) != _CHANNELS:
                raise UserError(f"data.{name} needs a value for each of the channels red, green and blue")
        if min(self.data.std) <= 0:
            raise UserError(f"data.std must be positive, got {self.data.std}")


_CHANNELS = 3
_SHARES = {
    "model": ("drop_path",),
    "augmentation": ("flip", "mix_switch", "erasing", "label_smoothing"),
    "optimizer": ("layer_decay",),
    "training": ("ema",),
}
_NOT_NEGATIVE = {
    "data": ("workers", "skip_images"),
    "augmentation": ("randaugment_ops", "randaugment_magnitude", "randaugment_std", "mixup", "cutmix"),
    "optimizer": ("warmup_epochs",),
}
