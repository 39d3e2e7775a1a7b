"""What a plan will cost, before any of it is spent: sizes, tokens, FLOPs, memory, disk and hours of every stage."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from tokenformer.hardware import set_threads
from tokenformer.plans.estimate import (
    CPU,
    assumed_precision,
    assumed_rate,
    check_rate,
    checkpoint_bytes,
)
from tokenformer.plans.plan import AnyPlan, naming
from tokenformer.plans.resolve import resolve
from tokenformer.plans.runner import resolve_with_data
from tokenformer.plans.task import PlanTask, ResolvedStage, Sizes, task_of
from tokenformer.plans.units import bytes_text, count_text, flops_text, hours_text, rate_text

if TYPE_CHECKING:
    from rich.table import Table


def dry_run(plan: AnyPlan, *, gpu: str = "a100", mfu: float = 0.4, rate: float | None = None) -> dict[str, Any]:
    """Work out a plan and estimate its cost; trains nothing and writes nothing.

    Args:
        plan: to be carried out. Where its data are not there yet, `assumed` stands for them.
        gpu: an accelerator whose peak is known, such as `a100` or `h100`; or `cpu`: a few steps of training on this
            machine then measure its speed.
        mfu: share of the accelerator's peak that training is assumed to reach. An assumption: measure yours.
        rate: FLOP/s that training reaches, where that is known; in place of a peak and a share of it.

    Returns:
        `unit` (what budgets count: tokens or images), `assumed` (what stands for missing data, or None), `rate`,
        `stages` by name, and `totals` over all runs. Memory and disk in bytes, times in hours of one device, without
        compiling, evaluating and saving.

    Raises:
        UserError: an accelerator that is not known, a share outside (0, 1], or a plan that cannot be carried out.
    """
    check_rate(gpu, mfu, rate)
    plan.validate()
    task = task_of(plan)
    missing = task.missing(plan)
    sizes = task.assumed(plan) if missing else task.open(plan)
    resolved = resolve(plan, **sizes) if missing else resolve_with_data(plan)
    smallest = min(resolved.values(), key=lambda one: one.counts.flops_per_row)
    speed = assumed_rate(gpu, mfu, rate, measure=lambda: _measure(task, smallest))
    stages = {
        name: _stage(plan, task, sizes, one, speed["flops_per_second"], on_cpu=speed["device"] == CPU)
        for name, one in resolved.items()
    }
    return {
        "title": plan.title,
        "unit": plan.unit,
        "assumed": {"missing": missing, **dataclasses.asdict(plan.assumed)} if missing else None,
        "rate": speed,
        "stages": stages,
        "totals": _totals(stages, plan.unit),
    }


def _measure(task: PlanTask[Any], stage: ResolvedStage) -> float:
    set_threads(stage.training.threads)
    return task.measured_rate(stage, assumed_precision(stage.training.precision, on_cpu=True))


def _stage(
    plan: AnyPlan, task: PlanTask[Any], sizes: Sizes, resolved: ResolvedStage, flops_per_second: float, *, on_cpu: bool
) -> dict[str, Any]:
    stage, training, counts = resolved.stage, resolved.training, resolved.counts
    with naming(stage):
        warmup = task.warmup_steps(resolved, sizes)
    seeds = plan.seeds_of(stage)
    rows = training.micro_batch_size or training.batch_size
    precision = assumed_precision(training.precision, on_cpu=on_cpu)
    memory = task.memory(resolved, rows, precision)
    # The first seed tries every rate, the others run at the best one.
    runs = len(stage.learning_rates) + len(seeds) - 1
    hours = resolved.flops / flops_per_second / 3600
    checkpoint = checkpoint_bytes(counts.parameters)
    saved = math.ceil(resolved.steps / training.save_every) if training.save_every else 1
    model = checkpoint // 3  # a checkpoint without the moments
    milestones = resolved.steps // training.milestone_every if training.milestone_every else 0
    kept = (min(saved, training.keep_checkpoints) + milestones) * checkpoint + model
    grown = 0 if stage.grow is None else checkpoint if stage.grow.optimizer == "carried" else model
    return {
        "label": stage.title,
        "family": resolved.family,
        "baseline": stage not in plan.stages,
        "chain": list(resolved.chain),
        "parameters": counts.parameters,
        "non_embedding_parameters": counts.non_embedding_parameters,
        **task.budget(resolved),
        "steps": resolved.steps,
        "warmup_steps": _warmup_steps(resolved, warmup),
        "batch_size": training.batch_size,
        "sequence_length": counts.row_tokens,
        "flops": resolved.flops,
        "cumulative_flops": resolved.cumulative_flops,
        "precision": precision,
        "micro_batch_size": rows,
        "memory": {**dataclasses.asdict(memory), "total": memory.total},
        "checkpoint_bytes": checkpoint,
        "disk_bytes": len(seeds) * (kept + grown),
        "sweep_disk_bytes": (len(stage.learning_rates) - 1) * kept + checkpoint,  # and one that is being written
        "hours": hours,
        "cumulative_hours": resolved.cumulative_flops / flops_per_second / 3600,
        "learning_rates": stage.learning_rates,
        "seeds": seeds,
        "runs": runs,
        "all_flops": runs * resolved.flops,
        "all_hours": runs * hours,
    }


def _warmup_steps(resolved: ResolvedStage, warmup: float) -> int:
    """Steps of this stage that warm up; of a continued schedule, whose warm-up is given, the part that falls here."""
    optimizer = resolved.optimizer
    whole = resolved.steps / (optimizer.schedule_to - optimizer.schedule_from)
    left = round(warmup) - round(optimizer.schedule_from * whole)
    return max(0, min(left, resolved.steps))


def _totals(stages: dict[str, dict[str, Any]], unit: str) -> dict[str, Any]:
    """Over all runs; memory is that of the largest, disk what is kept and the widest sweep beside it."""
    rows = stages.values()
    return {
        "runs": sum(row["runs"] for row in rows),
        unit: sum(row["runs"] * row[unit] for row in rows),
        "flops": sum(row["all_flops"] for row in rows),
        "hours": sum(row["all_hours"] for row in rows),
        "memory": max(row["memory"]["total"] for row in rows),
        "disk_bytes": sum(row["disk_bytes"] for row in rows) + max(row["sweep_disk_bytes"] for row in rows),
    }


def print_dry_run(report: dict[str, Any]) -> None:
    """Show what `dry_run` returned: sizes and budgets of the stages, what they cost, and what is taken for granted."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file has no width: do not fold the tables
    unit = report["unit"]
    compared = "non-emb." if unit == "tokens" else "in blocks"
    sizes = _table(report["title"] or "plan", ["after"], ["parameters", compared, unit, "steps", "memory"])
    costs = _table("training", [], ["FLOPs", "cumulative", "hours", "cumulative", "runs", "hours of all"])
    baselines = False
    for name, row in report["stages"].items():
        if row["baseline"] and not baselines:
            baselines = True
            sizes.add_row("")
            costs.add_row("")
        sizes.add_row(
            name,
            row["chain"][-2] if len(row["chain"]) > 1 else "",
            count_text(row["parameters"]),
            count_text(row["non_embedding_parameters"]),
            count_text(row[unit]),
            f"{row['steps']:,}",
            bytes_text(row["memory"]["total"]),
        )
        costs.add_row(
            name,
            flops_text(row["flops"]),
            flops_text(row["cumulative_flops"]),
            hours_text(row["hours"]),
            hours_text(row["cumulative_hours"]),
            str(row["runs"]),
            hours_text(row["all_hours"]),
        )
    for part in (sizes, "", costs, ""):
        console.print(part)
    for line in _notes(report):
        console.print(line, soft_wrap=True)


def _table(title: str, words: list[str], numbers: list[str]) -> "Table":
    from rich.table import Table

    table = Table(box=None, title=title, title_justify="left", padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("stage", *words):
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _notes(report: dict[str, Any]) -> list[str]:
    rate, totals, assumed, stages = report["rate"], report["totals"], report["assumed"], report["stages"]
    runs = "1 run" if totals["runs"] == 1 else f"{totals['runs']} runs"
    unit = report["unit"]
    lengths = {
        f"{row['micro_batch_size']}" + f" x {row['sequence_length']}" * (unit == "tokens") for row in stages.values()
    }
    batches = sorted(lengths)
    precisions = sorted({row["precision"] for row in stages.values()})
    notes = [
        f"total   {runs}, {count_text(totals[unit])} {unit}, {flops_text(totals['flops'])} FLOPs, "
        f"{hours_text(totals['hours'])} hours ({hours_text(totals['hours'] / 24)} days), "
        f"{bytes_text(totals['disk_bytes'])} of disk",
        f"hours   {rate_text(rate)}",
        f"memory  of one device, micro-batches of {', '.join(batches)} {unit}, {', '.join(precisions)}, "
        "without torch.compile",
    ]
    if assumed is not None:
        stand_in = (
            f"a vocabulary of {assumed['vocab_size']:,} and rows of {assumed['sequence_length']:,} tokens"
            if unit == "tokens"
            else f"{assumed['images']:,} images of {assumed['classes']:,} classes, with {assumed['image_size']} pixels "
            "along each side where the model does not say,"
        )
        notes.append(f"data    none at {', '.join(assumed['missing'])}; {stand_in} are assumed")
    return notes
