"""`tokenformer convert MODEL OUT`: published checkpoints to ours and back; a Transformer to a TokenFormer."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

from tokenformer.cli.parser import Parser, add_signature
from tokenformer.errors import UserError

if TYPE_CHECKING:
    from tokenformer.convert.reading import Progress

_SUMMARY = "Convert a published checkpoint to a model of this library or back, or begin from a pretrained Transformer."
_EXAMPLE = """\
  tokenformer convert ./TokenFormer-150M ./tf150m
  tokenformer convert pytorch_model.bin ./tf150m --config config.json
  tokenformer convert runs/large ./for-the-published-code --to published
  tokenformer convert --from-transformer ./pythia-160m ./tf-from-pythia
"""


def main(argv: list[str]) -> None:
    """Convert a model folder and print what it now is."""
    from tokenformer.convert import convert
    from tokenformer.convert.transformer import from_transformer

    parser = Parser("convert", _SUMMARY, _EXAMPLE)
    add_signature(parser, convert, skip=["progress"])
    parser.add_argument("--from-transformer", action="store_true", help="MODEL is a GPT-NeoX, Pythia or GPT-2")
    group = parser.add_argument_group("with --from-transformer")
    add_signature(group, from_transformer, skip=["model", "out"])  # type: ignore[arg-type]  # adds as a parser does
    given = parser.parse_args(argv).as_dict()
    if given.pop("from_transformer"):
        _print_transformer(from_transformer(**_options(from_transformer, convert, given, "cannot go with")))
        return
    options = _options(convert, from_transformer, given, "goes only with")
    with _progress() as progress:
        done = convert(**options, progress=progress)
    (_print_published if done["to"] == "published" else _print_ours)(done)


def _options(function: Any, other: Any, given: dict[str, Any], verb: str) -> dict[str, Any]:
    """The options of `function`; those of the other one must stand at their defaults."""
    mine, others = signature(function).parameters, signature(other).parameters
    for name, parameter in others.items():
        if name not in mine and name in given and given[name] != parameter.default:
            raise UserError(f"--{name.replace('_', '-')} {verb} --from-transformer")
    return {name: value for name, value in given.items() if name in mine}


@contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar on stderr, where somebody is looking at it."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("converting", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_ours(done: dict[str, Any]) -> None:
    out = done["out"]
    print(f"converted: {_line(done)}")
    if not done["tokenizer"]:
        print("note:  no tokenizer lies beside the weights: copy tokenizer.json of GPT-NeoX-20B into the folder")
    print(f"next:  tokenformer eval {out} --tasks lambada_openai")
    print(f"       tokenformer serve {out}")


def _print_published(done: dict[str, Any]) -> None:
    print(f"converted: {_line(done)}, in the published format")
    if len(done["merged"]) > 1:
        print(f"note:  the segments {', '.join(done['merged'])} are one now")
    why = "because tau is not the root of the number of tokens, as it is there"
    if done["appended"]:
        counts = " and ".join(f"{count:,} tokens to each {kind} layer" for kind, count in done["appended"].items())
        print(f"note:  appended {counts}, {why}: with them the outputs stay the same")
    if done["rescaled"]:
        print(
            f"note:  scaled the values of the {' and '.join(done['rescaled'])} layers, {why}: the outputs stay the same"
        )


def _print_transformer(done: dict[str, Any]) -> None:
    counts = ", ".join(f"{count:,} {kind}" for kind, count in done["tokens"].items())
    print(f"converted: {done['out']}   {done['architecture']}: {done['before']:,} -> {done['after']:,} parameters")
    print(f"tokens per layer: {counts}")
    if fitted := done["calibration"]["tokens"]:
        before, after = done["calibration"]["loss_before"], done["calibration"]["loss_after"]
        text = "its own text" if done["calibration"]["text"] == "own" else done["calibration"]["text"]
        print(f"fitted on {fitted:,} tokens of {text}: loss {before:.3f} -> {after:.3f} on the rest of it")
    print(f"next:  tokenformer train RECIPE.yaml --model.path {done['out']} --data.path DATA --out RUN")


def _line(done: dict[str, Any]) -> str:
    (segment,) = done["segments"]
    counts = ", ".join(f"{segment[kind]:,} {kind}" for kind in ("qkv", "output", "ffn"))
    return (
        f"{done['out']}   {done['parameters']:,} parameters in {done['dtype']}, {done['layers']} layers of "
        f"{counts} tokens"
    )
