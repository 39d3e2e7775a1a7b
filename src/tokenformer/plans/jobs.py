"""One piece of a plan's work: grow the model that a stage begins with, or train it at one learning rate."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenformer.baselines import widen_folder
from tokenformer.folders import CHECKPOINTS, write_atomically
from tokenformer.growth import grow_folder
from tokenformer.hardware import autocast_dtype, pick_device, pick_precision, set_threads
from tokenformer.models.loading import WEIGHTS
from tokenformer.plans.plan import AnyPlan, Growth
from tokenformer.plans.resolve import noise_of
from tokenformer.plans.task import ResolvedStage, task_of
from tokenformer.training import train
from tokenformer.training.run import SUMMARY_FILE

START, BEGINNING_FILE, MEASURES_FILE, FAILURE_FILE = "start", "start.json", "measures.json", "failure.json"


@dataclass(frozen=True)
class Job:
    """Work that one process does without stopping.

    Attributes:
        stage: by name.
        seed: of initialisation and data order.
        learning_rate: to train at; None to make what the stage begins with.
    """

    stage: str
    seed: int
    learning_rate: float | None

    def folder(self, out: Path) -> Path:
        """Where its result goes."""
        seed = out / self.stage / f"seed-{self.seed}"
        return seed / START if self.learning_rate is None else seed / f"lr-{self.learning_rate:g}"

    def is_done(self, out: Path) -> bool:
        """Whether it need not be done again."""
        folder = self.folder(out)
        if self.learning_rate is None:
            return (folder.parent / BEGINNING_FILE).is_file()
        return (folder / MEASURES_FILE).is_file() or (folder / FAILURE_FILE).is_file()

    @property
    def title(self) -> str:
        """For progress."""
        what = "grow" if self.learning_rate is None else f"lr {self.learning_rate:g}"
        return f"{self.stage} seed {self.seed} {what}"


def begin(job: Job, plan: AnyPlan, resolved: ResolvedStage, source: Path) -> None:
    """Grow the model in `source`, if the stage grows, and measure what the stage begins with."""
    target = job.folder(Path(plan.out))
    grow = resolved.stage.grow
    if grow is not None and not target.exists():
        if resolved.family == "gpt_neox":
            widen_folder(
                str(source),
                str(target),
                method=grow.method,
                hidden_size=resolved.config.hidden_size,
                intermediate_size=resolved.config.intermediate_size,
                noise=noise_of(grow, resolved.family),
                seed=job.seed,
            )
        else:
            _grow(grow, resolved, source, target, job.seed)
    model = source if grow is None else target
    target.parent.mkdir(parents=True, exist_ok=True)
    measured = {"from": str(source.relative_to(plan.out)), **_measure(plan, resolved, model, start=True)}
    write_atomically(target.parent / BEGINNING_FILE, json.dumps(measured, indent=2) + "\n")


def _grow(grow: Growth, resolved: ResolvedStage, source: Path, target: Path, seed: int) -> None:
    totals = {kind: sum(part.get(kind, 0) for part in resolved.config.segments) for kind in ("qkv", "output", "ffn")}
    grow_folder(
        str(source),
        str(target),
        **totals,
        keys=grow.keys,
        scale="sqrt" if grow.scale == "sqrt" else "keep",
        noise=noise_of(grow, resolved.family),
        optimizer=grow.optimizer,
        seed=seed,
    )


def train_one(job: Job, plan: AnyPlan, resolved: ResolvedStage, source: Path | None, *, progress: bool) -> None:
    """Train a stage at one learning rate, and measure the other data."""
    run = job.folder(Path(plan.out))
    if not (run / SUMMARY_FILE).is_file():
        train(recipe_of(job, plan, resolved, source), progress=progress, title=job.title)
    measured = _measure(plan, resolved, run, start=False)
    write_atomically(run / MEASURES_FILE, json.dumps(measured, indent=2) + "\n")


def recipe_of(job: Job, plan: AnyPlan, resolved: ResolvedStage, source: Path | None) -> Any:
    """The recipe of a training run; `source` is what the stage goes on from, if it does."""
    start = Job(job.stage, job.seed, None).folder(Path(plan.out))
    model = source if resolved.stage.grow is None else start
    recipe = task_of(plan).recipe(plan, resolved, None if source is None else str(model))
    return dataclasses.replace(
        recipe,
        out=str(job.folder(Path(plan.out))),
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=job.learning_rate),
        training=dataclasses.replace(recipe.training, seed=job.seed),
    )


def _measure(plan: AnyPlan, resolved: ResolvedStage, folder: Path, *, start: bool) -> dict[str, Any]:
    """Held-out loss in nats on what the stage trains on (at the start), and on the plan's other data."""
    if not start and not plan.measure:
        return {"measures": {}}
    training = resolved.training
    set_threads(training.threads)
    device = pick_device()
    dtype = autocast_dtype(pick_precision(training.precision, device))
    sources = [*([None] if start else []), *plan.measure.values()]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        losses = task_of(plan).held_out_losses(plan, resolved, folder, sources, device)
    own = {"loss": losses.pop(0)} if start else {}
    return {"measures": dict(zip(plan.measure, losses, strict=True)), **own}


def drop_weights(run: Path) -> None:
    """Remove what only going on from a run would need: its figures stay."""
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    for file in (*run.glob("*.safetensors"), run / f"{WEIGHTS}.index.json"):
        file.unlink(missing_ok=True)


def read_json(file: Path) -> Mapping[str, Any]:
    """A record of a run, empty if there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
