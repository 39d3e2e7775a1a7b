"""A collapse of a run: noticed before it reaches the parameters, written down, and its batches left out of the order.

Skipping is resuming: the run writes down which batches to leave out and then goes on from its last whole checkpoint as
it would after a kill, so that a run killed at any moment skips the same batches.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from tokenformer.errors import UserError
from tokenformer.folders import write_atomically
from tokenformer.training.callbacks import METRICS_FILE, read_metrics

SKIPS_FILE = "skips.json"
# Steps over which the running mean of the loss forgets, and before which no rise is judged.
_MEMORY = 50
_MOST_SKIPS = 20
# Skips in a row that fail to pass one step.
_MOST_TRIES = 2
_CURES = (
    "a lower optimizer.learning_rate, a longer optimizer.warmup, a lower optimizer.max_grad_norm or training.precision "
    "fp32"
)


class Collapse(UserError):
    """The loss or its gradient is not finite, or the loss has risen too far.

    Attributes:
        what: what was seen, such as "the loss became nan".
        seen: the same with step and learning rate.
        step: of the optimizer, counted from 1; it was not taken.
        seconds: that the run has trained for, set by the run.
    """

    seconds = 0.0

    def __init__(self, what: str, step: int, learning_rate: float) -> None:
        self.seen = f"{what} at step {step} with learning rate {learning_rate:.3g}"
        super().__init__(
            f"{self.seen}: try {_CURES}, or training.on_collapse skip; the checkpoints before it are whole"
        )
        self.what = what
        self.step = step


@dataclass(frozen=True)
class Skip:
    """Batches that a run leaves out.

    Attributes:
        step: at which the run collapsed, counted from 1.
        what: what was seen there.
        checkpoint: step of the one that the run went back to; 0 is its start.
        skipped_batches: first and last batch left out, counted from 1 in the order that the skips before this one
            left; as many steps were trained for nothing.
        lost_seconds: that these steps took; neither they nor their FLOPs are in the figures of the run.
    """

    step: int
    what: str
    checkpoint: int
    skipped_batches: tuple[int, int]
    lost_seconds: float


def read_skips(run: Path) -> list[Skip]:
    """The skips of a run, in the order in which they came."""
    file = run / SKIPS_FILE
    if not file.exists():
        return []
    skips = json.loads(file.read_text(encoding="utf-8"))
    return [Skip(**skip | {"skipped_batches": tuple(skip["skipped_batches"])}) for skip in skips]


def skip_batches(run: Path, collapse: Collapse, checkpoint: int) -> Skip:
    """Write down that `run` goes back to `checkpoint` and leaves out the batches from there up to `collapse`.

    Raises:
        UserError: skipping does not help: the run has skipped too often, or does not get past this step.
    """
    skips = read_skips(run)
    if len(skips) >= _MOST_SKIPS:
        raise UserError(f"{collapse.seen}, after {len(skips)} skips: try {_CURES}") from collapse
    if len(skips) >= _MOST_TRIES and all(skip.step >= collapse.step for skip in skips[-_MOST_TRIES:]):
        raise UserError(
            f"{collapse.seen}, and {_MOST_TRIES} skips did not get the run past this step: try {_CURES}"
        ) from collapse
    kept = [line["seconds"] for line in read_metrics(run / METRICS_FILE) if line["step"] <= checkpoint]
    lost_seconds = round(collapse.seconds - max(kept, default=0.0), 3)
    skip = Skip(collapse.step, collapse.what, checkpoint, (checkpoint + 1, collapse.step), lost_seconds)
    write_atomically(run / SKIPS_FILE, json.dumps([asdict(each) for each in [*skips, skip]], indent=2) + "\n")
    return skip


class LossRise(TrainerCallback, ExportableState):
    """Tells when the loss of a step lies far above its running mean, which is part of every checkpoint.

    Args:
        nats: how far.
    """

    def __init__(self, nats: float) -> None:
        self.nats = nats
        self.mean = 0.0
        self.steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the mean where the checkpoint left it."""
        saved = cast(dict[str, Any], state.stateful_callbacks)
        vars(self).update(saved[type(self).__name__]["attributes"])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"nats": self.nats}, "attributes": {"mean": self.mean, "steps": self.steps}}

    def observe(self, loss: float) -> str | None:
        """Take the loss of a whole step in; say so if it is a collapse."""
        if self.steps >= _MEMORY and loss > self.mean + self.nats:
            return f"the loss rose to {loss:.3f}, {loss - self.mean:.3f} above its running mean,"
        self.steps += 1
        self.mean += (loss - self.mean) / min(self.steps, _MEMORY)
        return None
