"""`tokenformer bench compare`."""


def run(old: str, new: str, *, threshold: float = 0.05) -> None:
    """Compare two records of one benchmark.

    Args:
        old: record that `--json` wrote before.
        new: record that it wrote now, with the same options.
        threshold: share by which the median of a case must differ to count; the middle halves of the rounds must lie
            apart as well.
    """
    from tokenformer.benchmarks import comparing
    from tokenformer.benchmarks.showing import show_comparison
    from tokenformer.cli.bench.running import a_console

    show_comparison(comparing.compare(comparing.read(old), comparing.read(new), threshold=threshold), a_console())
