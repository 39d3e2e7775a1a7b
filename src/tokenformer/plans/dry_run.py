"""What a plan will cost, before any of it is spent: sizes, tokens, FLOPs, memory, disk and hours of every stage."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenformer.errors import UserError
from tokenformer.hardware import accelerator_peak, pick_precision, set_threads
from tokenformer.plans.estimate import checkpoint_bytes, measured_rate, training_memory
from tokenformer.plans.plan import Plan
from tokenformer.plans.resolve import ResolvedStage, resolve
from tokenformer.plans.runner import resolve_with_data

if TYPE_CHECKING:
    from rich.table import Table

_CPU = "cpu"


def dry_run(plan: Plan, *, gpu: str = "a100", mfu: float = 0.4, rate: float | None = None) -> dict[str, Any]:
    """Work out a plan and estimate its cost; trains nothing and writes nothing.

    Args:
        plan: to be carried out. Where its data are not there yet, `assumed` stands for them.
        gpu: an accelerator whose peak is known, such as `a100` or `h100`; or `cpu`: a few steps of training on this
            machine then measure its speed.
        mfu: share of the accelerator's peak that training is assumed to reach. An assumption: measure yours.
        rate: FLOP/s that training reaches, where that is known; in place of a peak and a share of it.

    Returns:
        `assumed` (what stands for missing data, or None), `rate`, `stages` by name, and `totals` over all runs. Memory
        and disk in bytes, times in hours of one device, without compiling, evaluating and saving.

    Raises:
        UserError: an accelerator that is not known, a share outside (0, 1], or a plan that cannot be carried out.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"mfu must lie in (0, 1], got {mfu}")
    if rate is not None and not 0 < rate < math.inf:
        raise UserError(f"rate must be positive and finite, got {rate}")
    device, peak = (_CPU, None) if gpu.lower() == _CPU else accelerator_peak(gpu)
    plan.validate()
    missing = _missing_data(plan)
    sizes = {"vocab_size": plan.assumed.vocab_size, "sequence_length": plan.assumed.sequence_length}
    resolved = resolve(plan, **sizes) if missing else resolve_with_data(plan)
    if rate is not None:
        how = {"how": "given", "mfu": rate / peak if peak else None}
    elif peak is not None:
        rate, how = peak * mfu, {"how": "assumed", "mfu": mfu}
    else:
        smallest = min(resolved.values(), key=lambda one: one.flops_per_token)
        rate, how = _measure(smallest), {"how": "measured", "mfu": None}
    stages = {name: _stage(plan, one, rate, on_cpu=device == _CPU) for name, one in resolved.items()}
    return {
        "title": plan.title,
        "assumed": {"missing": missing, **sizes} if missing else None,
        "rate": {"device": device, "peak": peak, "flops_per_second": rate, **how},
        "stages": stages,
        "totals": _totals(stages),
    }


def _missing_data(plan: Plan) -> list[str]:
    """The prepared folders and tokenised files that are not there."""
    paths = [plan.data.path, *(stage.data for stage in plan.all_stages.values() if stage.data), *plan.measure.values()]
    return [
        path or "data.path"
        for path in dict.fromkeys(paths)
        if not path or not (Path(path).exists() or Path(f"{path}.bin").exists())
    ]


def _length(stage: ResolvedStage) -> int:
    return stage.tokens // (stage.steps * stage.training.batch_size)


def _measure(stage: ResolvedStage) -> float:
    set_threads(stage.training.threads)
    return measured_rate(
        stage.config,
        flops_per_token=stage.flops_per_token,
        sequence_length=_length(stage),
        precision=_precision(stage, on_cpu=True),
    )


def _precision(stage: ResolvedStage, *, on_cpu: bool) -> str:
    if on_cpu:
        return pick_precision(stage.training.precision, torch.device(_CPU))
    # Every accelerator whose peak we know multiplies bf16.
    return "bf16" if stage.training.precision == "auto" else stage.training.precision


def _stage(plan: Plan, resolved: ResolvedStage, flops_per_second: float, *, on_cpu: bool) -> dict[str, Any]:
    stage, training = resolved.stage, resolved.training
    seeds = plan.seeds_of(stage)
    rows = training.micro_batch_size or training.batch_size
    precision = _precision(resolved, on_cpu=on_cpu)
    memory = training_memory(
        resolved.config,
        parameters=resolved.parameters,
        non_embedding_parameters=resolved.non_embedding_parameters,
        rows=rows,
        sequence_length=_length(resolved),
        precision=precision,
        gradient_checkpointing=training.gradient_checkpointing,
    )
    # The first seed tries every rate, the others run at the best one.
    runs = len(stage.learning_rates) + len(seeds) - 1
    hours = resolved.flops / flops_per_second / 3600
    checkpoint = checkpoint_bytes(resolved.parameters)
    saved = math.ceil(resolved.steps / training.save_every) if training.save_every else 1
    model = checkpoint // 3  # a checkpoint without the moments
    kept = min(saved, training.keep_checkpoints) * checkpoint + model
    grown = 0 if stage.grow is None else checkpoint if stage.grow.optimizer == "carried" else model
    return {
        "label": stage.title,
        "family": resolved.family,
        "baseline": stage not in plan.stages,
        "chain": list(resolved.chain),
        "parameters": resolved.parameters,
        "non_embedding_parameters": resolved.non_embedding_parameters,
        "tokens": resolved.tokens,
        "steps": resolved.steps,
        "warmup_steps": _warmup_steps(resolved),
        "batch_size": training.batch_size,
        "sequence_length": _length(resolved),
        "flops_per_token": resolved.flops_per_token,
        "flops": resolved.flops,
        "cumulative_tokens": resolved.cumulative_tokens,
        "cumulative_flops": resolved.cumulative_flops,
        "precision": precision,
        "micro_batch_size": rows,
        "memory": {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "moments": memory.moments,
            "activations": memory.activations,
            "total": memory.total,
        },
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


def _warmup_steps(resolved: ResolvedStage) -> int:
    """Steps of this stage that warm up; of a continued schedule, whose share they are, the part that falls here."""
    optimizer = resolved.optimizer
    whole = resolved.steps / (optimizer.schedule_to - optimizer.schedule_from)
    left = round(optimizer.warmup * whole) - round(optimizer.schedule_from * whole)
    return max(0, min(left, resolved.steps))


def _totals(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Over all runs; memory is that of the largest, disk what is kept and the widest sweep beside it."""
    rows = stages.values()
    return {
        "runs": sum(row["runs"] for row in rows),
        "tokens": sum(row["runs"] * row["tokens"] for row in rows),
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
    sizes = _table(report["title"] or "plan", ["after"], ["parameters", "non-emb.", "tokens", "steps", "memory"])
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
            _count(row["parameters"]),
            _count(row["non_embedding_parameters"]),
            _count(row["tokens"]),
            f"{row['steps']:,}",
            _bytes(row["memory"]["total"]),
        )
        costs.add_row(
            name,
            _flops(row["flops"]),
            _flops(row["cumulative_flops"]),
            _hours(row["hours"]),
            _hours(row["cumulative_hours"]),
            str(row["runs"]),
            _hours(row["all_hours"]),
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
    device = "this CPU" if rate["device"] == _CPU else f"one {rate['device']}"
    speed = f"{_flops(rate['flops_per_second'])} FLOP/s"
    if rate["how"] == "assumed":
        speed += f", {rate['mfu']:g} of its peak (MFU), which is an assumption"
    else:
        speed += f", as {rate['how']}"
    batches = sorted({f"{row['micro_batch_size']} x {row['sequence_length']}" for row in stages.values()})
    precisions = sorted({row["precision"] for row in stages.values()})
    notes = [
        f"total   {runs}, {_count(totals['tokens'])} tokens, {_flops(totals['flops'])} FLOPs, "
        f"{_hours(totals['hours'])} hours ({_hours(totals['hours'] / 24)} days), "
        f"{_bytes(totals['disk_bytes'])} of disk",
        f"hours   of {device} at {speed}",
        f"memory  of one device, micro-batches of {', '.join(batches)} tokens, {', '.join(precisions)}, "
        "without torch.compile",
    ]
    if assumed is not None:
        notes.append(
            f"data    none at {', '.join(assumed['missing'])}; a vocabulary of {assumed['vocab_size']:,} and rows of "
            f"{assumed['sequence_length']:,} tokens are assumed"
        )
    return notes


def _count(number: float) -> str:
    power = min(int(math.log10(max(number, 1)) // 3), 4)
    return f"{number / 1000**power:.4g}{' kMBT'[power].strip()}"


def _flops(number: float) -> str:
    digits, power = f"{number:.2e}".split("e")
    return f"{digits}e{int(power)}"


def _bytes(number: float) -> str:
    power = min(int(math.log2(max(number, 1)) // 10), 5)
    return f"{number / 1024**power:.3g} {' KMGTP'[power].strip()}{'i' if power else ''}B"


def _hours(hours: float) -> str:
    if hours < 0.01:
        return "<0.01"
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
