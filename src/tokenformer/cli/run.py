"""`tokenformer run PLAN.yaml [--dry-run] [--any.field value]`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenformer.cli.parser import Parser, task_of
from tokenformer.errors import UserError

if TYPE_CHECKING:
    from tokenformer.plans.plan import AnyPlan

_USAGE = "tokenformer run PLAN.yaml [--dry-run] [--field value ...]"
_EXAMPLE = """\
  tokenformer run recipes/growth/books-small.yaml --data.path data/books --dry-run
  tokenformer run recipes/growth/books-small.yaml --data.path data/books --jobs 2
  tokenformer run recipes/growth/books-small.yaml --data.path data/books --jobs 2  # again: goes on
  tokenformer report runs/books-small
  tokenformer run recipes/vision/digits-growth.yaml"""


def parse(argv: list[str]) -> tuple["AnyPlan", dict[str, Any]]:
    """The plan that a command line describes, and the options that are not part of it."""
    from tokenformer.plans.plan import ImagePlan, Plan

    kind: Any = Plan if task_of(argv) is None else ImagePlan
    summary = "Carry out a plan: train, grow, train on, and run its baselines. The same command goes on."
    parser = Parser("run", summary, _EXAMPLE, usage=_USAGE)
    parser.add_argument("plan", nargs="?", help="YAML file with the fields below")
    parser.add_argument("--dry-run", action="store_true", help="show sizes, costs and memory, and do nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs done at the same time, sharing the cores")
    parser.add_argument("--gpu", type=str, default="a100", help="of the dry run's hours; cpu measures this machine")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that the dry run assumes")
    parser.add_argument("--rate", type=float | None, default=None, help="FLOP/s, in place of a peak and a share of it")
    parser.add_argument("--json", type=str | None, default=None, help="file to write the dry run's figures to")
    parser.add_class_arguments(kind)
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    if not argv or argv[0].startswith("-"):
        raise UserError("give the plan first, for instance recipes/growth/books-small.yaml")
    path, rest = Path(argv[0]), argv[1:]
    if not path.is_file():
        raise UserError(f"plan {path} not found")
    try:
        from_file = parser.parse_path(path, defaults=True)
    except UnicodeDecodeError as error:
        raise UserError(f"plan {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except UserError as error:
        raise UserError(f"plan {path}: {error}") from error
    values = vars(parser.instantiate(parser.parse_args(rest, namespace=from_file)))
    if values.pop("plan") is not None:
        raise UserError("give one plan, and everything else as --field value")
    options = {name: values.pop(name) for name in ("dry_run", "jobs", "gpu", "mfu", "rate", "json")}
    plan: AnyPlan = kind(**values)
    plan.out = plan.out or f"runs/{path.stem}"
    plan.title = plan.title or path.stem
    return plan, options


def main(argv: list[str]) -> None:
    """Run the plan, and say where its report is."""
    plan, options = parse(argv)
    if options.pop("dry_run"):
        _dry_run(plan, options)
        return
    from tokenformer.plans import run_plan
    from tokenformer.reports.growth import write_growth_report

    results = run_plan(plan, jobs=options["jobs"])
    files = write_growth_report(results, Path(plan.out))
    print(f"report: {files[0]}")


def _dry_run(plan: "AnyPlan", options: dict[str, Any]) -> None:
    from tokenformer.folders import write_atomically
    from tokenformer.plans.dry_run import dry_run, print_dry_run

    report = dry_run(plan, gpu=options["gpu"], mfu=options["mfu"], rate=options["rate"])
    print_dry_run(report)
    if options["json"] is not None:
        write_atomically(Path(options["json"]), json.dumps(report, indent=2) + "\n")
