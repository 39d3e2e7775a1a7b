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
from tokenformer.data import open_data
from tokenformer.evaluation import evaluate_perplexity
from tokenformer.evaluation.perplexity import evenly_spaced
from tokenformer.folders import CHECKPOINTS, write_atomically
from tokenformer.growth import grow_folder
from tokenformer.hardware import autocast_dtype, pick_device, pick_precision, set_threads
from tokenformer.models.loading import WEIGHTS
from tokenformer.plans.plan import Growth, Plan
from tokenformer.plans.resolve import ResolvedStage, noise_of
from tokenformer.training import Recipe, train
from tokenformer.training.building import load_any
from tokenformer.training.recipe import DataRecipe, ModelRecipe
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


def begin(job: Job, plan: Plan, resolved: ResolvedStage, source: Path) -> None:
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


def train_one(job: Job, plan: Plan, resolved: ResolvedStage, source: Path | None, *, progress: bool) -> None:
    """Train a stage at one learning rate, and measure the other data."""
    run = job.folder(Path(plan.out))
    if not (run / SUMMARY_FILE).is_file():
        train(_recipe(job, plan, resolved, source), progress=progress, title=job.title)
    measured = _measure(plan, resolved, run, start=False)
    write_atomically(run / MEASURES_FILE, json.dumps(measured, indent=2) + "\n")


def _recipe(job: Job, plan: Plan, resolved: ResolvedStage, source: Path | None) -> Recipe:
    assert job.learning_rate is not None
    start = Job(job.stage, job.seed, None).folder(Path(plan.out))
    if source is None:
        assert resolved.model is not None
        model = resolved.model
    else:
        model = ModelRecipe(path=str(source if resolved.stage.grow is None else start), family=resolved.family)
    return Recipe(
        out=str(job.folder(Path(plan.out))),
        model=model,
        data=dataclasses.replace(data_recipe(plan, resolved.data), skip_rows=resolved.rows_before),
        optimizer=dataclasses.replace(resolved.optimizer, learning_rate=job.learning_rate),
        training=dataclasses.replace(resolved.training, seed=job.seed),
    )


def data_recipe(plan: Plan, path: str) -> DataRecipe:
    """The data of a stage: the plan's, or other ones read in the same way."""
    if path == plan.data.path:
        return plan.data
    return DataRecipe(path=path, held_out_rows=plan.data.held_out_rows)


def _measure(plan: Plan, resolved: ResolvedStage, folder: Path, *, start: bool) -> dict[str, Any]:
    """Held-out loss in nats per token on what the stage trains on (at the start), and on the plan's other data."""
    wanted: dict[str, DataRecipe] = {name: data_recipe(plan, path) for name, path in plan.measure.items()}
    losses: dict[str, float] = {}
    found: dict[str, Any] = {"measures": losses}
    if not start and not wanted:
        return found
    training = resolved.training
    set_threads(training.threads)
    device = pick_device()
    dtype = autocast_dtype(pick_precision(training.precision, device))
    model = load_any(folder).to(device)  # type: ignore[arg-type]  # transformers hides torch's signature
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        if start:
            found["loss"] = _loss(model, data_recipe(plan, resolved.data), training.batch_size)
        for name, recipe in wanted.items():
            losses[name] = _loss(model, recipe, training.batch_size)
    return found


def _loss(model: torch.nn.Module, recipe: DataRecipe, batch_size: int) -> float:
    options = dataclasses.asdict(recipe)
    count, _ = options.pop("held_out_rows"), options.pop("skip_rows")
    rows = evenly_spaced(open_data(**options).held_out, count)
    return evaluate_perplexity(model, rows, tokens_per_byte=1.0, batch_size=batch_size)["loss"]


def drop_weights(run: Path) -> None:
    """Remove what only going on from a run would need: its figures stay."""
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    for file in (*run.glob("*.safetensors"), run / f"{WEIGHTS}.index.json"):
        file.unlink(missing_ok=True)


def read_json(file: Path) -> Mapping[str, Any]:
    """A record of a run, empty if there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
