"""`tokenformer shrink MODEL OUT --qkv N --output N --ffn N`."""

import tempfile
from pathlib import Path
from typing import Any

from tokenformer.cli.parser import Parser, add_signature
from tokenformer.errors import UserError

_EXAMPLE = """\
  tokenformer shrink runs/nested runs/quarter --qkv 32 --output 32 --ffn 128
  tokenformer shrink runs/small runs/half --ffn 512 --by importance --scale calibrated --fit --calibration books.txt
  tokenformer shrink runs/large runs/small-again --by segment --segment grown1
  tokenformer shrink runs/small runs/half --ffn 512 --heal-tokens 100000 --heal-data data/books
  tokenformer shrink runs/digits runs/digits-half --ffn 256 --by importance --fit --calibration digits"""


def main(argv: list[str]) -> None:
    """Shrink a model folder, heal it if asked to, and print what it now is."""
    from tokenformer.elastic import shrink_folder

    parser = Parser(
        "shrink", "Take parameter tokens out of a model: a prefix, the important ones, a segment.", _EXAMPLE
    )
    add_signature(parser, shrink_folder)
    parser.add_argument("--heal-tokens", type=int, default=0, help="train on so many tokens afterwards; 0 for none")
    parser.add_argument("--heal-data", type=str | None, default=None, help="folder of `tokenformer data prepare`")
    parser.add_argument("--heal-learning-rate", type=float, default=3e-4, help="at its peak; a cosine follows")
    options = parser.parse_args(argv).as_dict()
    healing = {name: options.pop(f"heal_{name}") for name in ("tokens", "data", "learning_rate")}
    if healing["tokens"] < 0:
        raise UserError(f"--heal-tokens must not be negative, got {healing['tokens']}")
    if (healing["data"] is not None) != (healing["tokens"] > 0):
        raise UserError("healing takes both --heal-tokens and --heal-data: give the other one too, or neither")
    done = _shrink_and_heal(options, healing) if healing["tokens"] else shrink_folder(**options)
    before, after = done["before"], done["after"]
    print(f"shrunk: {done['out']}   {before['parameters']:,} -> {after['parameters']:,} parameters")
    pairs = [f"{before['tokens'][kind]:,} -> {count:,} {kind}" for kind, count in after["tokens"].items()]
    print(f"tokens per layer: {', '.join(pairs)}")
    if "perplexity" in done:
        print(f"healed on {healing['tokens']:,} tokens: held-out perplexity {done['perplexity']:.2f}")
    if done["model_type"] == "tokenformer_vision":
        print(f"next:  tokenformer eval {done['out']} --images IMAGES")
        return
    print(f"next:  tokenformer eval {done['out']} --perplexity FILE")
    if "perplexity" not in done:
        print(f"       tokenformer train RECIPE.yaml --model.path {done['out']} --data.path DATA --out RUN")


def _shrink_and_heal(options: dict[str, Any], healing: dict[str, Any]) -> dict[str, Any]:
    from tokenformer.elastic import shrink_folder
    from tokenformer.folders import saving
    from tokenformer.training.healing import heal_folder

    out = Path(options["out"])
    if out.exists():
        raise UserError(f"{out} exists already: give another folder, or remove it")
    with saving(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
            # Under its own name, so that messages show what the user knows.
            shrunk = Path(work) / out.name
            done = shrink_folder(**{**options, "out": str(shrunk)})
            healed = heal_folder(str(shrunk), str(out), **healing)
    return {**done, "out": str(out), "perplexity": healed["eval_perplexity"]}
