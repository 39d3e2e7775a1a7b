"""The plan of a model's life, and of what it is compared with: typed, written as YAML."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias, cast

import yaml

from tokenformer.errors import UserError
from tokenformer.training.image_recipe import (
    AugmentationRecipe,
    ImageDataRecipe,
    ImageModelRecipe,
    ImageOptimizerRecipe,
    ImageTrainingRecipe,
)
from tokenformer.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, TrainingRecipe

Family = Literal["tokenformer", "gpt_neox", "vit"]


@dataclass
class Start:
    """Sizes of a model that is trained from the beginning. What is not given is that of the plan's `model`.

    Args:
        like: a stage whose size it has: a TokenFormer has the same tokens, a Transformer as many parameters without
            embeddings, by its width, and a ViT as many in its blocks.
        preset: a size of the paper, for a TokenFormer.
        qkv: parameter tokens of each query, key and value layer.
        output: parameter tokens of each output projection.
        ffn: parameter tokens of each feed-forward.
        hidden_size: channels of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: heads.
        normalization: of a TokenFormer's scores: l2_gelu, gelu_l2, gelu_l1 or softmax.
        norm_affine: whether the norms in the blocks of an image classifier have weight and bias.
        value_initializer_range: standard deviation of a TokenFormer's first values.
        intermediate_size: units of the feed-forward of a Transformer or ViT.
    """

    like: str | None = None
    preset: str | None = None
    qkv: int | None = None
    output: int | None = None
    ffn: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    normalization: str | None = None
    norm_affine: bool | None = None
    value_initializer_range: float | None = None
    intermediate_size: int | None = None


@dataclass
class Growth:
    """How a stage grows the model of the stage before it. A ViT does not grow.

    Args:
        like: a stage whose size it grows to: the same tokens, or for a Transformer as many parameters.
        qkv: tokens of each query, key and value layer after growing.
        output: tokens of each output projection after growing.
        ffn: tokens of each feed-forward after growing.
        keys: zero changes no output while the scale is kept; random initialises keys as in a new model.
        scale: keep leaves tau; sqrt sets it to the root of the number of tokens at once, as the paper does; anneal
            goes there over the first part of the stage.
        anneal: that part, as a share of the stage's steps.
        noise: standard deviation of the noise added to old tokens, as a share of each tensor's root mean square; none
            if not given. For a Transformer, on the copies of its weights: 0.3 for hypercloning and 0.05 for net2net if
            not given, because copies that begin equal stay equal.
        old_tokens: learning rate of everything but the new tokens, as a share of the stage's: 1 trains them alike, 0
            freezes them.
        optimizer: fresh moments, or carried: exactly those of the stage before for what was there.
        method: of a Transformer: net2net and hypercloning keep its function, width does not.
        hidden_size: of a Transformer after growing; a whole multiple.
        intermediate_size: of a Transformer's feed-forward after growing.
    """

    like: str | None = None
    qkv: int | None = None
    output: int | None = None
    ffn: int | None = None
    keys: Literal["zero", "random"] = "zero"
    scale: Literal["keep", "sqrt", "anneal"] = "keep"
    anneal: float = 0.5
    noise: float | None = None
    old_tokens: float = 1.0
    optimizer: Literal["fresh", "carried"] = "fresh"
    method: Literal["net2net", "hypercloning", "width"] = "hypercloning"
    hidden_size: int | None = None
    intermediate_size: int | None = None


@dataclass
class Stage:
    """One stretch of training, with a folder of its own.

    Args:
        name: of the stage and its folder; each stage of a plan has another.
        label: in reports; the name if not given.
        family: tokenformer; or transformers' own models, gpt_neox for language and vit for images. That of the stage
            before if there is one.
        after: the stage whose model this one goes on from. In `stages` that is the one before it; a baseline begins
            anew unless it says so.
        train: sizes of a new model, where there is no stage before.
        grow: how the model grows first. A stage with neither trains on what there is.
        tokens: training tokens of this stage.
        images: training images of this stage, in a plan for images.
        flops_of: in place of either: train until the FLOPs, stages before included, are those of that stage ...
        flops_times: ... times this.
        learning_rate: one, or several: then the first seed tries all and the best goes on, for the other seeds too.
        schedule: restart begins the plan's schedule anew; continue takes it up where the stage before left it, one
            schedule over both; constant stays at the peak after the warm-up.
        data: prepared folder, if not the plan's, made with the same tokenizer; or other images of the same classes.
        seeds: if not the plan's.
        optimizer: fields that differ from the plan's `optimizer`.
        training: fields that differ from the plan's `training`.
    """

    name: str = ""
    label: str | None = None
    family: Family | None = None
    after: str | None = None
    train: Start | None = None
    grow: Growth | None = None
    tokens: int | None = None
    images: int | None = None
    flops_of: str | None = None
    flops_times: float = 1.0
    learning_rate: float | list[float] = 1e-3
    schedule: Literal["restart", "continue", "constant"] = "restart"
    data: str | None = None
    seeds: list[int] | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def learning_rates(self) -> list[float]:
        """Those to try, in order."""
        return self.learning_rate if isinstance(self.learning_rate, list) else [self.learning_rate]

    @property
    def title(self) -> str:
        """What reports call it."""
        return self.label or self.name


@dataclass
class Assumed:
    """What a dry run takes for granted while the data are not there.

    Args:
        vocab_size: of the tokenizer.
        sequence_length: tokens in a row.
    """

    vocab_size: int = 50304
    sequence_length: int = 1024


@dataclass
class AssumedImages:
    """What a dry run takes for granted while the images are not there. The defaults are those of ImageNet-1K.

    Args:
        classes: that are told apart.
        image_size: pixels along each side, where the model does not say.
        images: to train on.
    """

    classes: int = 1000
    image_size: int = 224
    images: int = 1_281_167


# What a stage says itself, outside its `optimizer` and `training`.
_SET_BY_STAGES = frozenset(
    {"learning_rate", "schedule", "schedule_from", "schedule_to", "state", "old_tokens", "anneal_scale", "seed"}
)


class _Plan:
    """What every plan has, whatever it trains."""

    unit: ClassVar[Literal["tokens", "images"]]  # what budgets count
    families: ClassVar[tuple[Family, ...]]
    set_by_stages: ClassVar[frozenset[str]]

    out: str
    title: str
    measure: dict[str, str]
    model: Any
    optimizer: Any
    training: Any
    seeds: list[int]
    stages: list[Stage]
    baselines: list[Stage]

    @property
    def all_stages(self) -> dict[str, Stage]:
        """Stages, then baselines, by name."""
        return {stage.name: stage for stage in (*self.stages, *self.baselines)}

    def before(self, stage: Stage) -> Stage | None:
        """The stage whose model `stage` goes on from."""
        if stage.after:
            return self.all_stages[stage.after]
        position = next((i for i, other in enumerate(self.stages) if other is stage), 0)
        return self.stages[position - 1] if position else None

    def chain(self, name: str) -> list[Stage]:
        """All stages that lead to one, in order, itself last."""
        chain: list[Stage] = []
        stage: Stage | None = self.all_stages[name]
        while stage is not None:
            if stage in chain:
                raise UserError(f"stage '{name}' comes after itself: {' after '.join(s.name for s in (*chain, stage))}")
            chain.append(stage)
            stage = self.before(stage)
        return chain[::-1]

    def family(self, name: str) -> Family:
        """The kind of model that a stage trains."""
        return self.chain(name)[0].family or "tokenformer"

    def budget(self, stage: Stage) -> int | None:
        """What a stage trains on, in the plan's unit, where it says so itself."""
        found: int | None = getattr(stage, self.unit)
        return found

    def seeds_of(self, stage: Stage) -> list[int]:
        """The seeds that a stage is run with."""
        return self.seeds if stage.seeds is None else stage.seeds

    def validate(self) -> None:
        """Raise `UserError` on what cannot be in any world, naming stage and field."""
        if not self.stages:
            raise UserError("stages: a plan has at least one")
        names = [stage.name for stage in (*self.stages, *self.baselines)]
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
                raise UserError(f"stages: a name is made of letters, digits, '-', '_' and '.', got '{name}'")
            if names.count(name) > 1:
                raise UserError(f"stage '{name}': the name stands twice")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: give each seed once, got {self.seeds}")
        if self.model.path:
            raise UserError(f"model.path: a plan begins with new models; leave out {self.model.path}")
        for stage in (*self.stages, *self.baselines):
            with naming(stage):
                self._check(stage)

    def _check(self, stage: Stage) -> None:
        for field_name in ("after", "flops_of"):
            other = getattr(stage, field_name)
            if other is not None and other not in self.all_stages:
                raise UserError(f"{field_name}: there is no stage '{other}'")
        before = self.before(stage)
        self.chain(stage.name)
        if stage.family not in (None, *self.families):
            raise UserError(f"family: {stage.family} is not of this kind of plan; use {' or '.join(self.families)}")
        if before is None and stage.train is None:
            raise UserError("it comes after no stage: give the sizes to begin with under train")
        if before is not None and stage.train is not None:
            raise UserError(f"it goes on from '{before.name}': give grow, or neither, in place of train")
        if before is not None and stage.family not in (None, self.family(stage.name)):
            raise UserError(f"family: {self.family(stage.name)} before cannot become {stage.family}")
        for name, value in vars(stage.train).items() if stage.train else ():
            if value is not None and name != "like" and not hasattr(self.model, name):
                raise UserError(f"train.{name}: no model of a plan in {self.unit} has it; leave it out")
        if before is None and stage.schedule == "continue":
            raise UserError("schedule: nothing comes before that could be continued")
        (other_unit,) = {"tokens", "images"} - {self.unit}
        if getattr(stage, other_unit) is not None:
            raise UserError(f"{other_unit}: the budgets of this plan are {self.unit}")
        budget = self.budget(stage)
        if (budget is None) == (stage.flops_of is None):
            raise UserError(f"give its budget as {self.unit} or as flops_of")
        if budget is not None and budget < 1:
            raise UserError(f"{self.unit} must be at least 1, got {budget}")
        if not stage.flops_times > 0:
            raise UserError(f"flops_times must be positive, got {stage.flops_times}")
        rates = stage.learning_rates
        if not rates or len(set(rates)) < len(rates) or min(rates) <= 0:
            raise UserError(f"learning_rate: give one or several positive ones, each once, got {rates}")
        seeds = self.seeds_of(stage)
        if not seeds or len(set(seeds)) < len(seeds):
            raise UserError(f"seeds: give each seed once, got {seeds}")
        if before is not None and not set(seeds) <= set(self.seeds_of(before)):
            raise UserError(f"seeds: {seeds} are not all among those of '{before.name}', {self.seeds_of(before)}")
        for section in ("optimizer", "training"):
            known = {f.name for f in dataclasses.fields(getattr(self, section))} - self.set_by_stages
            for name in getattr(stage, section):
                if name not in known:
                    raise UserError(f"{section}.{name}: not a field; use one of {', '.join(sorted(known))}")
        if stage.grow is not None:
            if not 0 < stage.grow.anneal <= 1:
                raise UserError(f"grow.anneal must lie in (0, 1], got {stage.grow.anneal}")
            for name in ("noise", "old_tokens"):
                if (getattr(stage.grow, name) or 0) < 0:
                    raise UserError(f"grow.{name} must not be negative, got {getattr(stage.grow, name)}")
            if stage.grow.noise and self.family(stage.name) == "gpt_neox" and stage.grow.method == "width":
                raise UserError("grow.noise: the new weights of 'width' are random already; leave it out")
            if self.family(stage.name) == "gpt_neox":
                for name in ("qkv", "output", "ffn"):
                    if getattr(stage.grow, name) is not None:
                        raise UserError(f"grow.{name}: a Transformer has no parameter tokens")

    def to_yaml(self) -> str:
        """The plan as it is written into its folder."""
        return yaml.safe_dump(dataclasses.asdict(cast(Any, self)), sort_keys=False)

    @staticmethod
    def from_yaml(text: str) -> "AnyPlan":
        """The plan that `to_yaml` wrote."""
        tree = yaml.safe_load(text)
        kind: Any = plan_kind(tree)
        for section in dataclasses.fields(kind):
            if dataclasses.is_dataclass(section.default_factory):
                tree[section.name] = section.default_factory(**tree[section.name])
        for name in ("stages", "baselines"):
            tree[name] = [Stage(**stage) for stage in tree[name]]
            for stage in tree[name]:
                stage.train = Start(**stage.train) if stage.train else None
                stage.grow = Growth(**stage.grow) if stage.grow else None
        plan: AnyPlan = kind(**tree)
        return plan


@dataclass
class Plan(_Plan):
    """The life of a model in stages, and baselines run by the same machinery on the same data.

    Args:
        out: folder of all stages; runs/ and the name of the plan's file if not given.
        title: of the report.
        data: on what is trained.
        measure: prepared folders by name, on whose held-out parts each stage is measured too.
        model: sizes of every model that does not say otherwise.
        optimizer: of every stage; the learning rate is the stage's.
        training: of every stage; tokens and seed are the stage's.
        seeds: of initialisation and data order; the first one also tries the learning rates.
        stages: the life of the model.
        baselines: what it is compared with: other models, other beginnings, other ways to grow.
        assumed: for a dry run without data.
    """

    out: str = ""
    title: str = ""
    data: DataRecipe = field(default_factory=DataRecipe)
    measure: dict[str, str] = field(default_factory=dict)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    seeds: list[int] = field(default_factory=lambda: [0])
    stages: list[Stage] = field(default_factory=list)
    baselines: list[Stage] = field(default_factory=list)
    assumed: Assumed = field(default_factory=Assumed)

    unit = "tokens"
    families = ("tokenformer", "gpt_neox")
    set_by_stages = _SET_BY_STAGES | {"tokens"}


@dataclass
class ImagePlan(_Plan):
    """The life of an image classifier in stages, and baselines run by the same machinery on the same images.

    Args:
        task: image-classification; tells this plan from that of a language model.
        out: folder of all stages; runs/ and the name of the plan's file if not given.
        title: of the report.
        data: on what is trained, and what is held out.
        measure: other images of the same classes by name, on whose held-out parts, or on all of which where they have
            none, each stage is measured too.
        model: sizes of every model that does not say otherwise.
        augmentation: how training images are changed on the way, for every stage.
        optimizer: of every stage; the learning rate is the stage's.
        training: of every stage; images and seed are the stage's.
        seeds: of initialisation and data order; the first one also tries the learning rates.
        stages: the life of the model.
        baselines: what it is compared with: other models, other beginnings.
        assumed: for a dry run without images.
    """

    task: Literal["image-classification"] = "image-classification"
    out: str = ""
    title: str = ""
    data: ImageDataRecipe = field(default_factory=ImageDataRecipe)
    measure: dict[str, str] = field(default_factory=dict)
    model: ImageModelRecipe = field(default_factory=ImageModelRecipe)
    augmentation: AugmentationRecipe = field(default_factory=AugmentationRecipe)
    optimizer: ImageOptimizerRecipe = field(default_factory=ImageOptimizerRecipe)
    training: ImageTrainingRecipe = field(default_factory=ImageTrainingRecipe)
    seeds: list[int] = field(default_factory=lambda: [0])
    stages: list[Stage] = field(default_factory=list)
    baselines: list[Stage] = field(default_factory=list)
    assumed: AssumedImages = field(default_factory=AssumedImages)

    unit = "images"
    families = ("tokenformer", "vit")
    set_by_stages = _SET_BY_STAGES | {"epochs", "images", "base_learning_rate"}

    def validate(self) -> None:
        """As for every plan."""
        if self.optimizer.base_learning_rate is not None:
            raise UserError("optimizer.base_learning_rate: in a plan each stage gives its learning_rate; leave it out")
        super().validate()


AnyPlan: TypeAlias = Plan | ImagePlan


def plan_kind(tree: object) -> type[AnyPlan]:
    """The class of the plan whose YAML has been read: one with a task is for images."""
    return ImagePlan if isinstance(tree, dict) and "task" in tree else Plan


@contextmanager
def naming(stage: Stage) -> Iterator[None]:
    """Put the stage's name before what is wrong with it."""
    try:
        yield
    except UserError as error:
        known = str(error).startswith("stage '")
        raise (error if known else UserError(f"stage '{stage.name}': {error}")) from error
