"""`tokenformer bench sparse`."""

from functools import partial

from tokenformer.cli.bench.running import carry_out, names


def run(
    *,
    preset: str = "1.5B",
    keep: float = 0.25,
    rank: int | None = None,
    router_rank: int | None = None,
    tokens: int = 16,
    dtypes: str = "bfloat16",
    threads: int | None = None,
    repeats: int = 5,
    quick: bool = False,
    json: str | None = None,
    compare: str | None = None,
    command: str | None = None,
) -> None:
    """Measure generation by a sparse model and print the figures.

    Args:
        preset: size of the paper (150M, 450M, 900M, 1.5B); the target is for 1.5B.
        keep: share of the tokens of sparse layers that an input computes.
        rank: of the remainder; an eighth of the channels if not given.
        router_rank: channels through which the router sees the input; likewise.
        tokens: tokens to generate, one at a time.
        dtypes: of weights and cache, separated by commas; float32 takes twice the memory.
        threads: of torch; one per physical core if not given.
        repeats: rounds; every case runs once in each.
        quick: a small model, at most 8 tokens and 3 rounds, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        compare: record of an earlier run; what became slower or faster since is shown.
        command: written into the record.
    """
    from tokenformer.benchmarks.models import small_config
    from tokenformer.benchmarks.showing import show_models
    from tokenformer.benchmarks.sparse import measure
    from tokenformer.models import TokenFormerConfig

    config = small_config() if quick else None if preset == "1.5B" else TokenFormerConfig.preset(preset)
    if quick:
        tokens, repeats = min(tokens, 8), min(repeats, 3)
    measured = partial(
        measure,
        config,
        keep=keep,
        rank=rank,
        router_rank=router_rank,
        tokens=tokens,
        dtypes=names(dtypes),
        threads=threads,
        repeats=repeats,
    )
    carry_out("sparse", measured, show_models, json=json, compare=compare, command=command)
