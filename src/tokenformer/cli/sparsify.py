"""`tokenformer sparsify MODEL OUT --keep 0.25 --calibration FILE`."""

import sys
from typing import Any

from tokenformer.cli.parser import Parser, add_signature

_EXAMPLE = """\
  tokenformer sparsify runs/small runs/small-sparse --keep 0.25 --calibration data/books
  tokenformer sparsify runs/small runs/small-sparse --keep 0.4 --calibration book.txt --group-size 4
  tokenformer eval runs/small-sparse --perplexity data/books
  tokenformer generate runs/small-sparse --prompt "The ship"
"""


def main(argv: list[str]) -> None:
    """Make the model in a folder sparse and print what it now computes."""
    from rich.console import Console
    from rich.progress import Progress

    from tokenformer.sparsity import sparsify_folder

    summary = "Make a language model sparse: each input computes the parameter tokens that a router chooses for it."
    parser = Parser("sparsify", summary, _EXAMPLE)
    add_signature(parser, sparsify_folder, skip=["progress"])
    options = parser.parse_args(argv).as_dict()
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("calibrating", total=None)
        report = sparsify_folder(**options, progress=lambda done, total: bar.update(task, completed=done, total=total))
    _print(report)


def _print(report: dict[str, Any]) -> None:
    print(f"sparse: {report['out']}")
    print(
        f"an input computes {100 * report['computed']:.1f} % of the parameter tokens and reads "
        f"{100 * report['read']:.1f} % of their memory, router, norm and remainder included"
    )
    for kind in report["dense"]:
        print(f"note:  the {kind} layers stay dense: they would read almost as much")
    for name, layer in report["layers"].items():
        tokens = layer["active"] * layer["group_size"]
        print(
            f"  {name:<28} {tokens:5d} of {layer['num_tokens']} tokens, error {100 * layer['error']:.2f} %, recall "
            f"{100 * layer['recall']:.0f} %"
        )
    print(f"next:  tokenformer eval {report['out']} --perplexity DATA")
    print(f"       tokenformer generate {report['out']} --prompt TEXT")
