"""What language models and image classifiers each do in their own way in a plan, behind one interface."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedConfig

from tokenformer.plans.estimate import Memory
from tokenformer.plans.plan import AnyPlan, Family, Growth, ImagePlan, Plan, Stage
from tokenformer.plans.quality import Quality

# What the data fix of every model: vocab_size and sequence_length, or classes and image_size.
Sizes = Mapping[str, Any]
P = TypeVar("P", Plan, ImagePlan)


@dataclass(frozen=True)
class Counts:
    """What a model comes to.

    Attributes:
        parameters: all of them.
        non_embedding_parameters: by which models are compared: those without embeddings, or in the blocks.
        row_tokens: tokens of a sequence; patches and class token of an image.
        flops_per_row: of training on one of these.
    """

    parameters: int
    non_embedding_parameters: int
    row_tokens: int
    flops_per_row: int


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with everything that follows from the plan.

    Attributes:
        stage: as the plan has it.
        family: of its model.
        chain: names of the stages that lead to it, itself last.
        model: sizes of the model that it begins with, if no stage comes before.
        config: of the model that it trains, grown already.
        counts: of that model.
        steps: of the optimizer.
        rows: sequences or images trained on, in whole steps.
        flops: of this stage.
        cumulative_rows: of this stage and all before it.
        cumulative_tokens: likewise.
        cumulative_flops: likewise.
        optimizer: rule, with the stage's own fields; the learning rate is the first of those to try.
        training: budget, with the stage's own fields; the seed is the first.
        data: what it is trained on.
        rows_before: training rows of these data that the stages before have read; this one goes on behind them.
    """

    stage: Stage
    family: Family
    chain: tuple[str, ...]
    model: Any
    config: PreTrainedConfig
    counts: Counts
    steps: int
    rows: int
    flops: int
    cumulative_rows: int
    cumulative_tokens: int
    cumulative_flops: int
    optimizer: Any
    training: Any
    data: str
    rows_before: int

    @property
    def tokens(self) -> int:
        """Tokens trained on; those of an image are its patches and class token."""
        return self.rows * self.counts.row_tokens


class PlanTask(ABC, Generic[P]):
    """Everything about a plan that depends on what it trains. It has no state.

    Attributes:
        quality: what the results are called.
    """

    quality: Quality

    # What is trained on

    @abstractmethod
    def open(self, plan: P) -> Sizes:
        """See that all data of the plan are there and belong together; returns the sizes that they fix.

        Raises:
            UserError: naming data that do not.
        """

    @abstractmethod
    def missing(self, plan: P) -> list[str]:
        """Data that are not there."""

    @abstractmethod
    def assumed(self, plan: P) -> Sizes:
        """The sizes that a dry run takes for granted in their place."""

    @abstractmethod
    def source(self, plan: P) -> str:
        """What stages are trained on that do not say otherwise."""

    @abstractmethod
    def rows(self, plan: P, source: str) -> int:
        """Training rows of some data."""

    @abstractmethod
    def check(self, recipe: Any, rows: int) -> None:
        """Raise `UserError` on what no run on so many training rows can have."""

    # Models

    @abstractmethod
    def new_config(self, recipe: Any, sizes: Sizes) -> PreTrainedConfig:
        """The configuration of a new model.

        Raises:
            UserError: sizes that do not fit together.
        """

    @abstractmethod
    def alike(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Fields of the recipe of a model that is like another one, beside its width and its tokens."""

    @abstractmethod
    def matching(self, recipe: Any, other: PreTrainedConfig, hidden_size: int | None, sizes: Sizes) -> Any:
        """The recipe of a model of the other family with as many parameters as `other`.

        Raises:
            UserError: there is none.
        """

    @abstractmethod
    def wider(self, config: PreTrainedConfig, grow: Growth, like: PreTrainedConfig | None) -> PreTrainedConfig:
        """A model of the other family after growing.

        Raises:
            UserError: it cannot grow so.
        """

    @abstractmethod
    def counts(self, config: PreTrainedConfig, sizes: Sizes) -> Counts:
        """Parameters and FLOPs of a model."""

    @abstractmethod
    def trained_on(self, training: Any, rows: int, tokens: int) -> Any:
        """A training recipe with its budget."""

    # Jobs

    @abstractmethod
    def recipe(self, plan: P, resolved: ResolvedStage, path: str | None) -> Any:
        """The recipe of a stage, for one of its runs to set out, learning rate and seed.

        Args:
            plan: of the stage.
            resolved: the stage.
            path: folder of the model that it begins with, if it does not begin with a new one.
        """

    @abstractmethod
    def held_out_losses(
        self, plan: P, resolved: ResolvedStage, folder: Path, sources: Sequence[str | None], device: torch.device
    ) -> list[float]:
        """Losses of the model in a folder on held-out data, measured as at the end of its training.

        Args:
            plan: of the stage.
            resolved: the stage.
            folder: of the model.
            sources: others to measure, or None for what is held out of the stage's own data.
            device: to compute on.

        Returns:
            Nats per token or per image, one for each source.
        """

    # Results

    @abstractmethod
    def budget(self, resolved: ResolvedStage) -> dict[str, Any]:
        """What a stage trains on and what one of these costs, and all of it since the model was begun."""

    @abstractmethod
    def description(self, plan: P, resolved: ResolvedStage) -> dict[str, Any]:
        """What stages.json says of a stage beside what it says of every one."""

    @abstractmethod
    def figures(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Figures of a finished run from its summary; `eval_loss`, that of `quality`, speed and `mfu` among them."""

    @abstractmethod
    def point(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """What a line of metrics says of the held-out data beside the loss."""

    # Estimates

    @abstractmethod
    def memory(self, resolved: ResolvedStage, rows: int, precision: str) -> Memory:
        """To train a stage on micro-batches of so many rows."""

    @abstractmethod
    def measured_rate(self, resolved: ResolvedStage, precision: str) -> float:
        """FLOP/s at which this CPU trains the stage."""

    def warmup_steps(self, resolved: ResolvedStage, sizes: Sizes) -> float:
        """Steps of warm-up of the whole schedule, of which the stage may be a part."""
        optimizer = resolved.optimizer
        return float(optimizer.warmup * resolved.steps / (optimizer.schedule_to - optimizer.schedule_from))


def task_of(plan: AnyPlan) -> PlanTask[Any]:
    """What a plan trains."""
    from tokenformer.plans.images import ImagePlans
    from tokenformer.plans.language import LanguagePlans

    return ImagePlans() if isinstance(plan, ImagePlan) else LanguagePlans()
