"""`tokenformer export-hub MODEL OUT`."""

from tokenformer.cli.parser import Parser, call

_EXAMPLE = """\
  tokenformer export-hub runs/large hub/large --name me/tokenformer-large --license apache-2.0
  tokenformer eval runs/large --perplexity books.txt --out large.json
  tokenformer export-hub runs/large hub/large --eval large.json
  hf upload me/tokenformer-large hub/large"""


def main(argv: list[str]) -> None:
    """Write a folder for the Hub and print what is in it."""
    from tokenformer.export.hub import export_hub

    summary = "Write a folder for the Hub that loads where this package is not installed, with a model card."
    exported = call(export_hub, Parser("export-hub", summary, _EXAMPLE), argv)
    size = exported["bytes"] / 1e6
    print(f"exported: {exported['out']}   {exported['parameters']:,} parameters, {size:,.1f} MB")
    print(f"files:    {', '.join(exported['files'])}")
    print(f"next:     hf upload OWNER/NAME {exported['out']}")
