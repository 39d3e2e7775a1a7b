"""`tokenformer data prepare`: from text files to rows of token ids."""

import sys
from pathlib import Path
from typing import Any

from tokenformer.cli.parser import Parser, add_signature
from tokenformer.data import prepare
from tokenformer.data.prepared import MANIFEST
from tokenformer.data.split import SPLITS
from tokenformer.errors import UserError

EXAMPLE = """\
  tokenformer data prepare --input books/*.txt --tokenizer train:4096 --out prepared/books
  tokenformer data prepare --input web.jsonl.zst --tokenizer tokenizer.json --out prepared/web --held-out 0.01
  tokenformer data prepare --input web.jsonl.zst --tokenizer tokenizer.json --out prepared/neox --format megatron
"""

HELP = f"""\
usage: tokenformer data prepare [options]

Prepare text for training.

verbs:
  prepare      tokenise and pack text, hold out a part; the same command resumes

example:
{EXAMPLE}
`tokenformer data prepare --help` shows the options.
"""


def main(argv: list[str]) -> None:
    """Run `tokenformer data prepare`; prints the help of `data` if no sub-verb is given."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return
    if argv[0] != "prepare":
        raise UserError(f"unknown verb 'data {argv[0]}': did you mean 'data prepare'?")
    parser = Parser("data prepare", "Tokenise and pack text for training, and hold out a part of it.", EXAMPLE)
    add_signature(parser, prepare, positional=False, skip=["progress"])  # bars show on terminals only as it is
    arguments = parser.parse_args(argv[1:]).as_dict()
    out = arguments["out"]
    was_finished = (Path(out) / MANIFEST).exists()
    manifest = prepare(**arguments)
    if was_finished:
        sys.stdout.write(f"already done, nothing was changed: {out}\n")
    sys.stdout.write(_report(out, manifest))


def _report(out: str, manifest: dict[str, Any]) -> str:
    length = manifest["options"]["sequence_length"]
    lines = [f"{out}: vocabulary of {manifest['tokenizer']['vocab_size']} tokens, split by {manifest['split_by']}"]
    for name in SPLITS:
        split = manifest["splits"][name]
        lines.append(
            f"  {name:<9}{split['documents']:>10,} documents {split['bytes']:>15,} bytes {split['tokens']:>14,} tokens "
            f"{split['rows']:>10,} rows of {length} ({split['dropped_tokens']} tokens dropped)"
        )
    lines.append(f"next: tokenformer train recipes/language/small.yaml --data.path {out} --out RUN")
    return "\n".join(lines) + "\n"
