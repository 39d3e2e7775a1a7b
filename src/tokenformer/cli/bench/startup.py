"""`tokenformer bench startup`."""

from functools import partial

from tokenformer.cli.bench.running import carry_out


def run(
    *,
    threads: int | None = None,
    repeats: int = 10,
    quick: bool = False,
    json: str | None = None,
    compare: str | None = None,
    command: str | None = None,
) -> None:
    """Measure how long commands take to start and print the figures.

    Args:
        threads: that each process may use; one per physical core if not given.
        repeats: rounds; every command is started once in each.
        quick: a small model to explain and at most 3 rounds, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        compare: record of an earlier run; what became slower or faster since is shown.
        command: written into the record.
    """
    from tokenformer.benchmarks.models import small_config
    from tokenformer.benchmarks.showing import show_startup
    from tokenformer.benchmarks.startup import measure

    measured = partial(
        measure, small_config() if quick else None, threads=threads, repeats=min(repeats, 3) if quick else repeats
    )
    carry_out("startup", measured, show_startup, json=json, compare=compare, command=command)
