"""`tokenformer serve`: an OpenAI-compatible server for one model."""

from tokenformer.cli.parser import Parser, call
from tokenformer.serving.server import serve

EXAMPLE = """\
  tokenformer serve runs/small --port 8000
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time"}'
  tokenformer serve runs/small --adapters runs/small-law verse=runs/small-poems
"""


def main(argv: list[str]) -> None:
    """Run `tokenformer serve`."""
    call(serve, Parser("serve", "Serve a model with the API of OpenAI.", EXAMPLE), argv)
