"""`tokenformer bench train-step`."""

from functools import partial

from tokenformer.cli.bench.running import carry_out, names


def run(
    *,
    preset: str = "150M",
    batch: int = 2,
    length: int = 512,
    cases: str | None = None,
    dtypes: str = "float32,bfloat16",
    threads: int | None = None,
    repeats: int = 5,
    quick: bool = False,
    json: str | None = None,
    compare: str | None = None,
    command: str | None = None,
) -> None:
    """Measure training steps and their peak memory and print the figures.

    Args:
        preset: size of the paper (150M, 450M, 900M, 1.5B); the targets are for 150M.
        batch: sequences of a step.
        length: tokens of each.
        cases: those to run, separated by commas; both models, eager and compiled, and the bare products if not given.
            Others are tokenformer_recompute and tokenformer_fused_loss, followed by _eager or _compiled: options of
            a training recipe that save memory.
        dtypes: of the products, separated by commas; weights are float32, and bfloat16 is autocast.
        threads: of torch; one per physical core if not given.
        repeats: rounds; every case runs once in each.
        quick: a small model, one sequence of at most 64 tokens and 3 rounds, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        compare: record of an earlier run; what became slower or faster since is shown.
        command: written into the record.
    """
    from tokenformer.benchmarks.models import small_config
    from tokenformer.benchmarks.showing import show_models
    from tokenformer.benchmarks.train_step import CASES, measure
    from tokenformer.models import TokenFormerConfig

    config = small_config() if quick else None if preset == "150M" else TokenFormerConfig.preset(preset)
    if quick:
        batch, length, repeats = 1, min(length, 64), min(repeats, 3)
    measured = partial(
        measure,
        config,
        batch=batch,
        length=length,
        cases=CASES if cases is None else names(cases),
        dtypes=names(dtypes),
        threads=threads,
        repeats=repeats,
    )
    carry_out("train-step", measured, show_models, json=json, compare=compare, command=command)
