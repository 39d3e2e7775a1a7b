"""`tokenformer plan-scale RECIPE.yaml [--processes N] [--any.field value]`."""

import dataclasses
import json
from typing import Any

from tokenformer.cli.parser import Parser, add_signature
from tokenformer.errors import UserError

# What a recipe does to save memory, in the words of the table's heading.
_SAVING = {"gradient_checkpointing": "blocks recomputed", "recompute": "weights recomputed", "fused_loss": "fused loss"}
_USAGE = "tokenformer plan-scale [RECIPE.yaml] [--processes N] [--field value ...]"
_EXAMPLE = """\
  tokenformer plan-scale recipes/language/pile-1.5B.yaml --processes 8 --gpu h100
  tokenformer plan-scale recipes/language/pile-1.5B.yaml --parallel.shard 8 --training.gradient_checkpointing true
  tokenformer plan-scale recipes/language/scale-20B.yaml --processes 256 --json -"""


def main(argv: list[str]) -> None:
    """Show memory, traffic and speed of every layout."""
    from tokenformer.cli.train import recipe_from
    from tokenformer.plans.scale import Machines, plan_scale
    from tokenformer.training.recipe import Recipe

    summary = "Plan a run on many processes: memory of each, bytes that they send, expected speed. Nothing is run."
    parser = Parser("plan-scale", summary, _EXAMPLE, usage=_USAGE)
    parser.add_argument("recipe", nargs="?", help="YAML file of a training run; its data need not be there")
    add_signature(parser, Machines)
    add_signature(parser, plan_scale, skip=("recipe", "machines"))
    parser.add_argument("--json", type=str, help="file for the plan, or - for standard output")
    parser.add_class_arguments(Recipe)
    recipe, options = recipe_from(parser, Recipe, argv)
    json_file = options.pop("json")
    machine = {field.name: options.pop(field.name) for field in dataclasses.fields(Machines)}
    plan = plan_scale(recipe, Machines(**machine), **options)
    if json_file == "-":
        print(json.dumps(plan, indent=2))
        return
    if json_file is not None:
        from pathlib import Path

        from tokenformer.folders import write_atomically

        if Path(json_file).is_dir():
            raise UserError(f"--json {json_file} is a folder: give a file")
        write_atomically(Path(json_file), json.dumps(plan, indent=2) + "\n")
    _show(plan)


def _show(plan: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tokenformer.plans.units import bytes_text, count_text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file has no width: do not fold the table
    machines = plan["machines"]
    console.print(
        f"{count_text(plan['parameters'])} parameters ({count_text(plan['non_embedding_parameters'])} without "
        f"embedding), {plan['precision']}, {plan['batch_size']:,} rows of {plan['sequence_length']:,} tokens a step, "
        + ", ".join([f"{count_text(plan['tokens'])} tokens", *(text for name, text in _SAVING.items() if plan[name])])
    )
    table = Table(box=box.SIMPLE)
    for name in ("data", "shard", "tensor", "rows", "memory", "weights", "activations", "gathered", "sent a step"):
        table.add_column(name, justify="right", style="bold" if name == "memory" else None)
    for name in ("step", "tokens/s", "MFU", "days", "fits"):
        table.add_column(name, justify="right")
    for layout in plan["layouts"]:
        memory, time = layout["memory"], layout["time"]
        weights = sum(memory[name] for name in ("parameters", "gradients", "moments", "copies"))
        table.add_row(
            *(str(layout[name]) for name in ("data", "shard", "tensor")),
            f"{layout['micro_batches']} x {layout['micro_batch_size']}",
            *(bytes_text(n) for n in (memory["total"], weights, memory["activations"], memory["gathered"])),
            bytes_text(sum(layout["traffic"].values())),
            f"{time['step']:.3g} s",
            count_text(time["tokens_per_second"]),
            f"{100 * time['mfu']:.0f} %",
            f"{layout['days']:.3g}",
            "yes" if layout["fits"] else "no",
        )
    console.print(table)
    console.print(
        f"Of one process on one {machines['gpu']} with {machines['memory']:g} GB; times assume {machines['mfu']:g} of "
        f"its peak, {machines['inside']:g} GB/s inside a machine of {machines['per_node']} and {machines['between']:g} "
        "GB/s between machines: measure yours."
    )
