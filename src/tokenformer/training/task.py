"""What a run trains and measures, behind one interface: language models and image classifiers are run alike."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tokenformer.parallel.mesh import Ranks
from tokenformer.parallel.opening import Fill
from tokenformer.training.nested import FLOPS_PER_WEIGHT, Nesting
from tokenformer.training.trainer import RunTrainer


class Task(ABC):
    """A model with the data it is trained on. Making one reads data and model, and writes nothing.

    Attributes:
        model: to be trained, in its first state.
        train_rows: what the Trainer draws its batches from.
        held_out_rows: what is measured.
        steps: optimizer steps of the whole run.
        unit: what progress counts, such as tokens.
        per_step: how much of `tokens`, `flops` and, for images, `images` a step is; a nested step is taken as a whole.
        learning_rate: at the peak.
        warmup: share of the schedule spent warming up.
        fingerprints: of the data, to see that they have not changed since the run began.
        source: where the data come from, for messages.
        nesting: the sizes at which the model is trained; None for its own alone.
        ranks: the processes that train it; None where there is one.
        fill: what gives a model without values those of the parts that a process holds; None if it has its values.
    """

    model: PreTrainedModel
    train_rows: Sized
    held_out_rows: Sized
    steps: int
    unit: str
    per_step: Mapping[str, int]
    learning_rate: float
    warmup: float
    fingerprints: Mapping[str, Any]
    source: str
    nesting: Nesting | None = None
    ranks: Ranks | None = None
    fill: Fill | None = None

    def done(self, steps: int) -> dict[str, int]:
        """How much of everything in `per_step` so many steps are; a nested step costs what its prefixes cost."""
        done = {name: steps * count for name, count in self.per_step.items()}
        if self.nesting is not None:
            passes = self.nesting.passes
            left_out = self.nesting.left_out_before(steps * passes)
            done["flops"] -= FLOPS_PER_WEIGHT * (self.per_step["tokens"] // passes) * left_out
        return done

    @abstractmethod
    def trainer(self, evaluate: Callable[[torch.nn.Module], dict[str, float]], **options: Any) -> RunTrainer:
        """The Trainer of this task; `options` are those of `RunTrainer`."""

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, *, device: torch.device) -> dict[str, float]:
        """Figures on the held-out rows, `loss` among them, in the precision around the call."""

    @abstractmethod
    def example_loss(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        """The loss of one micro-batch, for compiling."""

    @abstractmethod
    def summary(self, last: Mapping[str, Any]) -> dict[str, Any]:
        """What the summary of the run says beside what every run says, from the last line of its metrics."""

    @abstractmethod
    def save(self, run: Path, trainer: RunTrainer) -> None:
        """Write the trained model into `run`, and what is needed to use it."""
