"""`tokenformer bench decode`."""

from functools import partial

from tokenformer.cli.bench.running import carry_out, names


def run(
    *,
    prompt: int = 128,
    tokens: int = 64,
    dtypes: str = "float32,bfloat16",
    threads: int | None = None,
    repeats: int = 5,
    quick: bool = False,
    json: str | None = None,
    compare: str | None = None,
    command: str | None = None,
) -> None:
    """Measure generation and print the figures.

    Args:
        prompt: tokens of the prompt.
        tokens: tokens to generate, one at a time.
        dtypes: of weights and cache, separated by commas.
        threads: of torch; one per physical core if not given.
        repeats: rounds; every case runs once in each.
        quick: a small model, at most 16 tokens each and 3 rounds, to see that it runs.
        json: file for the record, a folder to give it its usual name there, or - for standard output.
        compare: record of an earlier run; what became slower or faster since is shown.
        command: written into the record.
    """
    from tokenformer.benchmarks.decode import measure
    from tokenformer.benchmarks.models import small_config
    from tokenformer.benchmarks.showing import show_models

    config = small_config() if quick else None
    if quick:
        prompt, tokens, repeats = min(prompt, 16), min(tokens, 16), min(repeats, 3)
    measured = partial(
        measure, config, prompt=prompt, tokens=tokens, dtypes=names(dtypes), threads=threads, repeats=repeats
    )
    carry_out("decode", measured, show_models, json=json, compare=compare, command=command)
