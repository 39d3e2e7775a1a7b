"""What happens beside the steps of a training run: metrics, progress, interruption."""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenformer.errors import UserError
from tokenformer.folders import saving, write_atomically
from tokenformer.parallel.mesh import Ranks
from tokenformer.pattention import Pattention

METRICS_FILE = "metrics.jsonl"


class Metrics(TrainerCallback):
    """Appends one line of JSON per log to metrics.jsonl: step, tokens, FLOPs, seconds and what was measured.

    Args:
        run: folder of the run.
        done: how much of `tokens`, `flops` and the like so many steps are.

    `seconds` counts time spent training, over all sessions of the run. Lines after the checkpoint that a run resumes
    from are dropped, so that the file reads as if the run had never stopped.
    """

    def __init__(self, run: Path, done: Callable[[int], Mapping[str, int]]) -> None:
        self.path = run / METRICS_FILE
        self.done = done
        self.seconds_before = 0.0
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, earlier sessions included and evaluations left out."""
        return self.seconds_before + time.perf_counter() - self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for what is not training."""
        paused_at = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused_at

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop what lies after the resumed step, and take up the clock where it stood."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
        if kept or self.path.exists():
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log wherever a checkpoint is written: the loss since the last log is not part of a checkpoint."""
        if control.should_save or control.should_training_stop:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line."""
        logs = dict(logs or {})
        logs.pop("epoch", None)
        if "train_runtime" in logs:
            return
        line = {"step": state.global_step, **self.done(state.global_step), "seconds": round(self.seconds, 3), **logs}
        with saving(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # noqa: PERF203 (one bad line ends the loop)
            break
    return lines


class ProgressBar(TrainerCallback):
    """A progress bar on stderr with the loss and the speed.

    Args:
        title: before the bar.
        unit: what the speed counts, such as tokens.
        per_step: how many of them a step is.
    """

    def __init__(self, title: str, unit: str, per_step: int) -> None:
        self.unit, self.per_step = unit, per_step
        self.progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
        )
        self.clock = (0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar, from the step that the run resumes at."""
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, note="")
        self.clock = (state.global_step, time.perf_counter())
        self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance."""
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss."""
        step, since = self.clock
        if logs and "loss" in logs:
            speed = (state.global_step - step) * self.per_step / max(time.perf_counter() - since, 1e-9)
            self.progress.update(self.task, note=f"loss {logs['loss']:.3f}  {speed:,.0f} {self.unit}/s")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the finished bar."""
        self.progress.stop()


class MoreCheckpoints(TrainerCallback):
    """Asks for checkpoints beside those after so many steps: at milestones, and so long after the last one.

    Stands before `Metrics` among the callbacks, which logs wherever a checkpoint was asked for.

    Args:
        minutes: from one checkpoint to the next at most, counted at the end of a step; 0 for any number.
        milestone_every: steps from one milestone to the next; 0 for none.
    """

    def __init__(self, minutes: float, milestone_every: int) -> None:
        self.seconds = 60 * minutes
        self.milestone_every = milestone_every
        self.last = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The time counts from here, also where a run is resumed."""
        self.last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the Trainer to save."""
        late = self.seconds > 0 and time.monotonic() - self.last >= self.seconds
        if late or (self.milestone_every and state.global_step % self.milestone_every == 0):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The next one is due so long after this one was written, whatever asked for it."""
        self.last = time.monotonic()


class AnnealScale(TrainerCallback):
    """Takes the scale (tau) of every Pattention linearly from where it is to the root of the number of tokens.

    The scale is a function of the step alone, so that a resumed run has the same: make this before a checkpoint is
    loaded into `model`.

    Args:
        model: as it is before the first step.
        steps: optimizer steps to take for it, at least the first one; the scale then stays.

    Raises:
        UserError: the model has no Pattention layers.
    """

    def __init__(self, model: nn.Module, steps: float) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, Pattention)]
        if not layers:
            raise UserError("optimizer.anneal_scale: the model has no Pattention layers, so no scale; set it to 0")
        self.ways = [(layer, layer.scale.item(), layer.num_tokens**0.5) for layer in layers]
        self.steps = steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the scale of the first step."""
        self._set(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the scale of the next step, which is also that of the checkpoint and of the evaluation after this one."""
        self._set(state.global_step)

    @torch.no_grad()
    def _set(self, done: int) -> None:
        for layer, start, end in self.ways:
            # In place: a compiled model reads the buffer that it was compiled with.
            layer.scale.fill_(end if done >= self.steps else start + (end - start) * done / self.steps)


class SameOnAllRanks(TrainerCallback):
    """What one process decides to do after a step, all do: a signal or a clock need not reach them at the same step.

    Stands after the callbacks that decide, and before `Metrics`.

    Args:
        ranks: the processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the others."""
        control.should_save, control.should_training_stop = self.ranks.any(
            control.should_save, control.should_training_stop
        )


@contextmanager
def signals_to(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM call `handle` meanwhile; outside the main thread Python allows no handlers."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopOnSignal(TrainerCallback):
    """Finish the step, save, stop, once `ask` was called; a second call stops at once, without saving."""

    def __init__(self) -> None:
        self.stopped = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """The handler of Ctrl-C and SIGTERM."""
        if self.stopped:
            raise KeyboardInterrupt("stopped at once; the same command resumes from the last checkpoint")
        self.stopped = True
        sys.stderr.write("\nstopping after this step; once more to stop at once\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the Trainer to save and stop."""
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True
