"""`tokenformer bench pattention`."""

from dataclasses import asdict
from functools import partial

from tokenformer.cli.bench.running import carry_out, names


def run(
    *,
    tokens: int = 2048,
    hidden_size: int = 768,
    parameter_tokens: int = 3072,
    dtypes: str = "float32,bfloat16",
    threads: int | None = None,
    repeats: int = 20,
    quick: bool = False,
    json: str | None = None,
    compare: str | None = None,
    command: str | None = None,
) -> None:
    """Measure one Pattention and print the figures.

    Args:
        tokens: inputs (rows) given at once.
        hidden_size: channels of inputs and outputs.
        parameter_tokens: parameter tokens, and hidden channels of the MLP.
        dtypes: of inputs and weights, separated by commas.
        threads: of torch; one per physical core if not given.
        repeats: rounds; every case runs once in each.
        quick: at most 256 inputs, 256 channels, 1024 parameter tokens and 3 rounds, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        compare: record of an earlier run; what became slower or faster since is shown.
        command: written into the record.
    """
    from tokenformer.benchmarks.pattention import Shape, measure
    from tokenformer.benchmarks.showing import show_pattention

    if quick:
        tokens, hidden_size, parameter_tokens = min(tokens, 256), min(hidden_size, 256), min(parameter_tokens, 1024)
        repeats = min(repeats, 3)
    shape = Shape(tokens, hidden_size, parameter_tokens)
    measured = partial(measure, shape, dtypes=names(dtypes), threads=threads, repeats=repeats)
    carry_out("pattention", measured, show_pattention, json=json, compare=compare, command=command, sizes=asdict(shape))
