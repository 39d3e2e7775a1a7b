"""`tokenformer bench`: the speed of the operator, of whole models and of what is around them, against their peers.

One module per benchmark, whose `run` is its options; `all` runs them one after the other, `compare` two records of one.
"""

import shlex
import sys
from difflib import get_close_matches
from importlib import import_module

from tokenformer.cli.parser import Parser, add_signature
from tokenformer.errors import UserError

BENCHMARKS = {
    "pattention": "one Pattention against the published order of operations, a GELU MLP and the bare products",
    "train-step": "a training step of a TokenFormer against transformers' GPTNeoX of equal size: time and peak memory",
    "forward": "prefill of a TokenFormer against transformers' GPTNeoX of equal size",
    "decode": "generation by a TokenFormer against GPTNeoX of equal size, and against the memory's bandwidth",
    "sparse": "decoding by a sparse model against the same model with all its tokens",
    "long-context": "training steps over sequence length: a grown TokenFormer against a wider GPTNeoX",
    "data": "the loader of packed rows against NumPy, and against the training step that it feeds",
    "images": "reading and cropping images by number of workers, against the training step of a classifier",
    "interpret": "a forward pass that is captured, or read into an index, against the plain one",
    "checkpoint": "saving and loading of models and training checkpoints against as many bytes in one file",
    "startup": "how long commands and imports take to start, against a bare interpreter",
}
VERBS = {
    "all": "run all of these, or those named, one after the other",
    "compare": "compare two records of one benchmark: what became slower, what faster",
}

EXAMPLE = """\
  tokenformer bench pattention --quick
  tokenformer bench pattention --threads 2 --json benchmarks/results/
  tokenformer bench train-step --quick
  tokenformer bench train-step --threads 2 --json benchmarks/results/
  tokenformer bench train-step --preset 450M --batch 8 --length 2048 --dtypes bfloat16
  tokenformer bench forward --quick
  tokenformer bench forward --threads 2 --json benchmarks/results/
  tokenformer bench forward --threads 2 --compare benchmarks/results/forward_amd-epyc-2t_2.13.0_2026-11-23.json
  tokenformer bench decode --quick
  tokenformer bench decode --threads 2 --json benchmarks/results/
  tokenformer bench sparse --quick
  tokenformer bench long-context --quick
  tokenformer bench long-context --threads 2 --json benchmarks/results/ --picture long-context.png
  tokenformer bench data --quick
  tokenformer bench data --threads 2 --json benchmarks/results/
  tokenformer bench images --quick
  tokenformer bench images --train cifar10/train.parquet --crop pad --model runs/cifar10
  tokenformer bench interpret --quick
  tokenformer bench interpret --threads 2 --json benchmarks/results/
  tokenformer bench checkpoint --quick
  tokenformer bench checkpoint --folder runs --json benchmarks/results/
  tokenformer bench startup --quick
  tokenformer bench startup --threads 2 --json benchmarks/results/
  tokenformer bench all --quick
  tokenformer bench all --only pattention,train-step,data --threads 2 --json benchmarks/results/
  tokenformer bench compare before.json after.json
"""


def _table(rows: dict[str, str]) -> str:
    return "\n".join(f"  {name:<12} {summary}" for name, summary in rows.items())


HELP = f"""\
usage: tokenformer bench BENCHMARK [options]

Measure speed: all cases in one process, interleaved, results checked first.

benchmarks:
{_table(BENCHMARKS)}

and:
{_table(VERBS)}

example:
{EXAMPLE}
`tokenformer bench BENCHMARK --help` shows the options.
"""


def main(argv: list[str]) -> None:
    """Run one benchmark; prints the list of them if none is given."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return
    name, rest = argv[0], argv[1:]
    known = BENCHMARKS | VERBS
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(known)}"
        raise UserError(f"unknown benchmark '{name}': {hint}")
    run = import_module(f"tokenformer.cli.bench.{name.replace('-', '_')}").run
    example = "".join(f"{line}\n" for line in EXAMPLE.splitlines() if line.split()[2] == name)
    summary = f"Measure {BENCHMARKS[name]}." if name in BENCHMARKS else f"{VERBS[name].capitalize()}."
    parser = Parser(f"bench {name}", summary, example)
    add_signature(parser, run, skip=("command",))
    given = vars(parser.parse_args(rest))
    if name in BENCHMARKS:
        given["command"] = shlex.join(["tokenformer", "bench", *argv])
    run(**given)
