"""`tokenformer bench checkpoint`."""

from functools import partial

from tokenformer.cli.bench.running import carry_out


def run(
    *,
    folder: str = ".",
    threads: int | None = None,
    repeats: int = 5,
    quick: bool = False,
    json: str | None = None,
    compare: str | None = None,
    command: str | None = None,
) -> None:
    """Measure how fast models and checkpoints are saved and loaded and print the figures.

    Args:
        folder: on the disk that is measured, with 5 GB free; what is written there is removed.
        threads: of torch; one per physical core if not given.
        repeats: rounds; every case runs once in each.
        quick: a small model and at most 3 rounds, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        compare: record of an earlier run; what became slower or faster since is shown.
        command: written into the record.
    """
    from tokenformer.benchmarks.checkpoint import measure
    from tokenformer.benchmarks.models import small_config
    from tokenformer.benchmarks.showing import show_checkpoint

    config, repeats = (small_config(), min(repeats, 3)) if quick else (None, repeats)
    measured = partial(measure, config, folder=folder, threads=threads, repeats=repeats)
    carry_out("checkpoint", measured, show_checkpoint, json=json, compare=compare, command=command)
