"""`tokenformer bench data`."""

from functools import partial

from tokenformer.cli.bench.running import carry_out


def run(
    *,
    rows: int = 16384,
    threads: int | None = None,
    repeats: int = 10,
    quick: bool = False,
    json: str | None = None,
    compare: str | None = None,
    command: str | None = None,
) -> None:
    """Measure how fast packed rows are read and print the figures.

    Args:
        rows: of random tokens, to read from.
        threads: of torch; one per physical core if not given.
        repeats: rounds; in each, 16 batches are read, and a step is taken.
        quick: a small model, at most 512 rows and 3 rounds, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        compare: record of an earlier run; what became slower or faster since is shown.
        command: written into the record.
    """
    from tokenformer.benchmarks.data import measure, small_needs
    from tokenformer.benchmarks.showing import show_data

    needs = small_needs() if quick else None
    if quick:
        rows, repeats = min(rows, 512), min(repeats, 3)
    measured = partial(measure, needs, rows=rows, threads=threads, repeats=repeats)
    carry_out("data", measured, show_data, json=json, compare=compare, command=command)
