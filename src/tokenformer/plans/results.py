"""What a plan has come to so far, read from its folder."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenformer.errors import UserError
from tokenformer.models.segments import SegmentedConfig
from tokenformer.plans.jobs import BEGINNING_FILE, FAILURE_FILE, MEASURES_FILE, Job, read_json
from tokenformer.plans.plan import AnyPlan, Plan, Stage
from tokenformer.plans.resolve import noise_of
from tokenformer.plans.task import PlanTask, ResolvedStage, task_of
from tokenformer.training.callbacks import METRICS_FILE, read_metrics
from tokenformer.training.recipe import CHECKPOINT_FIELDS
from tokenformer.training.run import SUMMARY_FILE

PLAN_FILE, STAGES_FILE, RESULTS_FILE = "plan.yaml", "stages.json", "results.json"
# What may differ when a plan goes on: it does not touch the numbers, or other folders hold it.
_FREE = {"data", "training.threads", "training.seed", "label", *CHECKPOINT_FIELDS}


def describe(plan: AnyPlan, resolved: ResolvedStage) -> dict[str, Any]:
    """A stage as stages.json has it: all that its numbers depend on but seeds and learning rates."""
    config: Any = resolved.config
    sizes = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    if isinstance(config, SegmentedConfig):
        sizes |= {"segments": config.segments, "value_initializer_range": config.value_initializer_range}
    else:
        sizes |= {"intermediate_size": config.intermediate_size}
    stage = resolved.stage
    optimizer = dataclasses.asdict(resolved.optimizer)
    del optimizer["learning_rate"]
    task = task_of(plan)
    described = task.description(plan, resolved)
    training = dataclasses.asdict(resolved.training)
    # Plans that began before there was nested training, or one of the ways to save memory, go on.
    if not training["nested"]:
        del training["nested"], training["nested_draw"]
    training = {name: value for name, value in training.items() if value or name not in ("recompute", "fused_loss")}
    return {
        "label": stage.title,
        "family": resolved.family,
        "after": resolved.chain[-2] if len(resolved.chain) > 1 else None,
        "chain": list(resolved.chain),
        "baseline": stage in plan.baselines,
        "grow": dataclasses.asdict(stage.grow) | {"noise": noise_of(stage.grow, resolved.family)}
        if stage.grow
        else None,
        "schedule": stage.schedule,
        **described,
        "model": {**described["model"], **sizes},
        "parameters": resolved.counts.parameters,
        "non_embedding_parameters": resolved.counts.non_embedding_parameters,
        **task.budget(resolved),
        "steps": resolved.steps,
        "sequence_length": resolved.counts.row_tokens,
        "flops": resolved.flops,
        "cumulative_flops": resolved.cumulative_flops,
        "data": resolved.data,
        "rows_before": resolved.rows_before,
        "optimizer": optimizer,
        "training": training,
    }


def difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str | None:
    """The first field in which two descriptions of a stage differ, as a sentence; None if none."""
    before, now = _flat(theirs), _flat(mine)
    for name in now | before:
        if name not in _FREE and before.get(name) != now.get(name):
            return f"{name} is {before.get(name)} there and {now.get(name)} here"
    return None


def chosen_rate(plan: AnyPlan, stage: Stage, seed: int, out: Path) -> float | None:
    """The learning rate at which a stage is done with a seed; None while it is not known or that run not done.

    The first seed tries all rates, and that of least held-out loss is taken for every seed.

    Raises:
        UserError: training collapsed at every rate.
    """
    first = plan.seeds_of(stage)[0]
    rates = stage.learning_rates
    losses = {rate: _final_loss(Job(stage.name, first, rate).folder(out)) for rate in rates}
    if any(loss is None for loss in losses.values()):
        return None
    best = min(rates, key=lambda rate: losses[rate] or math.inf)
    if losses[best] == math.inf:
        raise UserError(f"stage '{stage.name}': training collapsed at every learning rate: give lower ones")
    run = Job(stage.name, seed, best)
    return best if run.is_done(out) else None


def _final_loss(run: Path) -> float | None:
    if (run / FAILURE_FILE).is_file():
        return math.inf
    return read_json(run / SUMMARY_FILE)["eval_loss"] if (run / MEASURES_FILE).is_file() else None


def load_plan(folder: Path) -> AnyPlan:
    """The plan that a folder was made by.

    Raises:
        UserError: it holds none.
    """
    if not (folder / PLAN_FILE).is_file() or not (folder / STAGES_FILE).is_file():
        raise UserError(f"{folder} holds no plan: give the folder that `tokenformer run` wrote")
    plan = Plan.from_yaml((folder / PLAN_FILE).read_text(encoding="utf-8"))
    return dataclasses.replace(plan, out=str(folder))


def collect(folder: Path) -> dict[str, Any]:
    """All figures of a plan, finished or not.

    Args:
        folder: of the plan.

    Returns:
        `title`, `plan`, `quality` (what the figures are called), `machine`, `complete`, `missing` (runs still to do),
        `subject` (names of the plan's stages), and `stages`: for each its sizes, budgets and costs (`describe`), the
        losses of its learning rates (`sweep`), the one chosen, its `runs`, and means over seeds with sample standard
        deviations.

    Raises:
        UserError: the folder holds no plan.
    """
    plan = load_plan(folder)
    record = read_json(folder / STAGES_FILE)
    missing: list[str] = []
    stages = {}
    for name, stage in plan.all_stages.items():
        stages[name] = _stage(plan, stage, dict(record["stages"][name]), folder, missing)
    for name in stages:
        _add_cumulative_seconds(stages, name)
    return {
        "title": plan.title or folder.name,
        "plan": dataclasses.asdict(plan) | {"out": ""},
        "quality": dataclasses.asdict(task_of(plan).quality),
        "machine": record["machine"],
        "complete": not missing,
        "missing": missing,
        "subject": [stage.name for stage in plan.stages],
        "stages": stages,
    }


def _stage(plan: AnyPlan, stage: Stage, found: dict[str, Any], out: Path, missing: list[str]) -> dict[str, Any]:
    task, seeds = task_of(plan), plan.seeds_of(stage)
    first = seeds[0]
    losses = {r: _final_loss(Job(stage.name, first, r).folder(out)) for r in stage.learning_rates}
    collapsed = all(loss == math.inf for loss in losses.values())
    rate = None if collapsed else chosen_rate(plan, stage, first, out)
    wanted = [Job(stage.name, first, r) for r in stage.learning_rates]
    wanted += [Job(stage.name, seed, rate) for seed in seeds[1:]] if rate is not None else []
    missing += [str(job.folder(Path())) for job in wanted if not job.is_done(out)]
    if rate is None:
        missing += [f"{stage.name}/seed-{seed}" for seed in seeds[1:]]
    tried = [r for r in stage.learning_rates if losses[r] is not None]
    done = (_run(task, job, job.learning_rate == rate, found, out) for job in wanted if job.is_done(out))
    runs = [run for run in done if run is not None]
    chosen = [run for run in runs if run["chosen"]]
    return found | {
        "sweep": {f"{r:g}": losses[r] if losses[r] != math.inf else None for r in tried} if len(losses) > 1 else {},
        "learning_rate": rate,
        "at_edge": rate is not None and len(tried) > 1 and rate in (min(tried), max(tried)),
        "runs": runs,
        **{name: _mean([run[name] for run in chosen]) for name in ("eval_loss", f"eval_{task.quality.key}", "seconds")},
    }


def _run(task: PlanTask[Any], job: Job, chosen: bool, stage: dict[str, Any], out: Path) -> dict[str, Any] | None:
    folder = job.folder(out)
    summary = read_json(folder / SUMMARY_FILE)
    if (folder / FAILURE_FILE).is_file() or not summary:
        return None
    start = read_json(folder.parent / BEGINNING_FILE)
    end = read_json(folder / MEASURES_FILE)
    before = stage["cumulative_flops"] - stage["flops"]
    lines = read_metrics(folder / METRICS_FILE)

    def points(name: str) -> list[dict[str, Any]]:
        return [
            {key: line[key] for key in ("tokens", "flops", "seconds")}
            | {"cumulative_flops": before + line["flops"], "loss": line[name]}
            | (task.point(line) if name == "eval_loss" else {})
            for line in lines
            if name in line
        ]

    return {
        "seed": job.seed,
        "learning_rate": job.learning_rate,
        "chosen": chosen,
        **task.figures(summary),
        "start_loss": start.get("loss"),
        "measures": {
            name: {"start": start.get("measures", {}).get(name), "end": loss}
            for name, loss in end.get("measures", {}).items()
        },
        "seconds": summary["seconds"] + sum(skip["lost_seconds"] for skip in summary["skips"]),
        **{name: summary[name] for name in ("compile_seconds", "threads", "precision", "device")},
        "skips": summary["skips"],
        "curve": points("loss"),
        "held_out": points("eval_loss"),
    }


def _add_cumulative_seconds(stages: dict[str, Any], name: str) -> None:
    """Seconds of the chosen runs of a chain, seed by seed."""
    stage = stages[name]
    for run in stage["runs"]:
        before = 0.0
        for other in stage["chain"][:-1]:
            before += next(
                (r["seconds"] for r in stages[other]["runs"] if r["chosen"] and r["seed"] == run["seed"]), 0.0
            )
        run["cumulative_seconds"] = before + run["seconds"]
        for point in run["held_out"]:
            point["cumulative_seconds"] = before + point["seconds"]
    stage["cumulative_seconds"] = _mean([run["cumulative_seconds"] for run in stage["runs"] if run["chosen"]])


def _mean(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
