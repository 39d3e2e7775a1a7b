"""`tokenformer info`: segments, parameters, FLOPs and bytes of a saved model."""

import math
import sys
from typing import Any

from tokenformer.cli.parser import Parser, call

EXAMPLE = """\
  tokenformer info runs/small
  tokenformer info runs/small --json --sequence-length 4096
  tokenformer info runs/cifar10
"""

# Names of classes that fit a line.
_CLASSES_SHOWN = 5


def main(argv: list[str]) -> None:
    """Run `tokenformer info`."""
    summary = "Show segments, parameters, scales, FLOPs and bytes of a saved model, without loading its weights."
    call(info, Parser("info", summary, EXAMPLE), argv)


def info(model: str, *, json: bool = False, sequence_length: int | None = None) -> None:
    """Describe a saved model.

    Args:
        model: folder with config.json and weights, or a name on the Hub.
        json: print JSON for machines.
        sequence_length: for FLOPs and cache bytes of a language model; the longest it was made for if not given.
    """
    from tokenformer.inspection import inspect_model

    report = inspect_model(model, sequence_length=sequence_length)
    if json:
        from json import dumps

        sys.stdout.write(dumps(report, indent=2) + "\n")
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file has no width: do not fold the tables
    kinds = list(report["segments"][0]["tokens"])

    segments = Table("segment", box=None, title="tokens per layer and parameters in all layers", title_justify="left")
    for heading in [*(f"{kind} tokens" for kind in kinds), "parameters", *(f"in {kind}" for kind in kinds)]:
        segments.add_column(heading, justify="right")
    for segment in report["segments"]:
        parameters = segment["parameters"]
        row = [*segment["tokens"].values(), sum(parameters.values()), *parameters.values()]
        segments.add_row(segment["name"], *(f"{count:,}" for count in row))

    facts = Table.grid(padding=(0, 3))
    for name, value in _facts(report):
        facts.add_row(name, value)
    console.print(segments)
    console.print()
    console.print(facts)


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    parameters, weights, heads = report["parameters"], report["weights"], report["num_attention_heads"]
    special = _of_image_classifier if report["model_type"] == "tokenformer_vision" else _of_language_model
    return [
        ("parameters", f"{parameters['total']:,}"),
        ("  in parameter tokens", f"{parameters['parameter_tokens']:,}"),
        ("  in the embedding", f"{parameters['embedding']:,}"),
        ("layers", f"{report['num_hidden_layers']} of {report['hidden_size']} channels"),
        ("heads", f"{heads} of {report['hidden_size'] // heads} channels"),
        ("normalization", f"{report['normalization']}, {report['activation']}"),
        *((f"scale of {kind}", _scale(figures)) for kind, figures in report["scale"].items()),
        *special(report),
        ("weights", f"{weights['dtype']}, {_si(weights['bytes'])}B in {', '.join(weights['files'])}"),
    ]


def _of_language_model(report: dict[str, Any]) -> list[tuple[str, str]]:
    rotary, length, entries = report["rotary"], report["sequence_length"], report["tokenizer"]
    flops, decode, sparsity = report["flops_per_token"], report["decode_bytes_per_token"], report["sparsity"]
    sparse = "an input computes {computed:.1%} of the parameter tokens and reads {read:.1%} of their memory"
    return [
        *([("sparse", sparse.format(**sparsity))] if sparsity else []),
        ("rotary", f"{rotary['channels_per_head']} channels of each head, base {rotary['theta']:g}"),
        ("longest sequence", f"{report['max_position_embeddings']:,} tokens"),
        (
            "vocabulary",
            f"{report['vocab_size']:,}" + (f", tokenizer {entries:,}" if entries else ", no tokenizer here"),
        ),
        ("training FLOPs", f"{_si(flops['training'])} per token at length {length:,}"),
        ("decoding reads", f"{_si(decode['empty_cache'])}B per token, {_si(decode['full_cache'])}B after {length:,}"),
    ]


def _of_image_classifier(report: dict[str, Any]) -> list[tuple[str, str]]:
    size, patch, classes = report["image_size"], report["patch_size"], report["classes"]
    pooling = "the class token" if report["pooling"] == "cls" else "the mean of patches"
    processor = "with its processor" if report["image_processor"] else "no image processor here"
    shown = ", ".join(classes[:_CLASSES_SHOWN]) + (", ..." if len(classes) > _CLASSES_SHOWN else "")
    return [
        ("layer norms", "with weight and bias" if report["norm_affine"] else "without weight and bias in blocks"),
        ("drop path", f"{report['drop_path_rate']:g} in the last block"),
        ("images", f"{size} x {size} pixels of {report['num_channels']} channels, {processor}"),
        ("tokens", f"{report['tokens_per_image']:,} of an image, patches of {patch} x {patch}, {pooling} classifies"),
        ("classes", f"{len(classes):,}: {shown}" if classes else "none: the model gives features"),
        ("training FLOPs", f"{_si(report['flops_per_image']['training'])} per image"),
    ]


def _scale(figures: dict[str, Any]) -> str:
    low, high, of, now = figures["min"], figures["max"], figures["sqrt_of"], figures["num_tokens"]
    value = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
    if of is None:
        return f"{value}, not the root of a number of tokens ({now:,} now)"
    return f"{value} = sqrt({of:,})" + ("" if of == now else f", the tokens before growing ({now:,} now)")


def _si(number: float) -> str:
    power = min(int(math.log10(max(number, 1)) // 3), 5)
    return f"{number / 1000**power:.4g} {' kMGTP'[power].strip()}"
