"""`tokenformer bench interpret`."""

from functools import partial

from tokenformer.cli.bench.running import carry_out, names


def run(
    *,
    batch: int = 1,
    length: int = 512,
    top_k: int = 16,
    dtypes: str = "float32,bfloat16",
    threads: int | None = None,
    repeats: int = 10,
    quick: bool = False,
    json: str | None = None,
    compare: str | None = None,
    command: str | None = None,
) -> None:
    """Measure what capturing costs a forward pass and print the figures.

    Args:
        batch: texts read at once.
        length: tokens of each text.
        top_k: strongest tokens of each input and layer that are captured in one of the cases.
        dtypes: of the weights, separated by commas.
        threads: of torch; one per physical core if not given.
        repeats: rounds; every case runs once in each.
        quick: a small model, at most 64 tokens and 3 rounds, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        compare: record of an earlier run; what became slower or faster since is shown.
        command: written into the record.
    """
    from tokenformer.benchmarks.interpret import measure
    from tokenformer.benchmarks.models import small_config
    from tokenformer.benchmarks.showing import show_models

    config = small_config() if quick else None
    if quick:
        length, repeats = min(length, 64), min(repeats, 3)
    measured = partial(
        measure,
        config,
        batch=batch,
        length=length,
        top_k=top_k,
        dtypes=names(dtypes),
        threads=threads,
        repeats=repeats,
    )
    carry_out("interpret", measured, show_models, json=json, compare=compare, command=command)
