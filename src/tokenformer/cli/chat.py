"""`tokenformer chat`: a conversation with a served model."""

from tokenformer.cli.parser import Parser, add_signature
from tokenformer.serving.chat import chat

EXAMPLE = """\
  tokenformer chat http://127.0.0.1:8000
  tokenformer chat --adapter law
  echo 'Who are you?' | tokenformer chat --greedy --max-tokens 50
"""


def main(argv: list[str]) -> None:
    """Run `tokenformer chat`."""
    parser = Parser("chat", "Talk to a served model. Reads lines, prints the answers as they come.", EXAMPLE)
    parser.add_argument("server", nargs="?", default="http://127.0.0.1:8000", help="address of tokenformer serve")
    add_signature(parser, chat, skip=["server"])
    chat(**parser.parse_args(argv).as_dict())
