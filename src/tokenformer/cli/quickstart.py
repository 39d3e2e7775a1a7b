"""`tokenformer quickstart`: the main job on an embedded corpus."""

from tokenformer.cli.parser import Parser, add_signature

_EXAMPLE = """\
  tokenformer quickstart --out runs/quickstart"""


def main(argv: list[str]) -> None:
    """Run the quickstart; end with its answer, its report and what to try next."""
    from tokenformer.quickstart import quickstart
    from tokenformer.reports.quickstart import answer

    parser = Parser(
        "quickstart",
        "Train a small TokenFormer on this Python's standard library, grow it, and compare with training from scratch.",
        _EXAMPLE,
    )
    add_signature(parser, quickstart)
    arguments = parser.parse_args(argv).as_dict()
    report = quickstart(**arguments)
    out = arguments["out"]
    qkv, output, ffn = (2 * tokens for tokens in report["plan"]["grown"])
    print(f"\n{answer(report)}\n")
    print("next, try:")
    print(f"  tokenformer generate {out}/grown --prompt 'def main('")
    print(f"  tokenformer grow {out}/grown {out}/grown-again --qkv {qkv} --output {output} --ffn {ffn}")
    print(f"  tokenformer info {out}/grown")
    print(f"  tokenformer explain {out}/grown --text 'def main('")
    print(f"\nreport: {out}/report.html")
