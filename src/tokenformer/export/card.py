"""The model card of an exported folder: what the model is and costs, how it was trained, how to use and grow it."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from huggingface_hub import ModelCardData

from tokenformer import __version__
from tokenformer.evaluation.tables import markdown
from tokenformer.export.figures import Evaluation
from tokenformer.modules import KINDS

PAPER = "https://arxiv.org/abs/2410.23168"

_GENERATE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
"""
_CLASSIFY = """\
from transformers import pipeline

classify = pipeline("image-classification", model="{name}", trust_remote_code=True)
print(classify("photo.jpg"))
"""


def model_card(
    report: dict[str, Any],
    name: str,
    *,
    license: str | None = None,
    training: Sequence[tuple[str, str]] = (),
    evaluations: Sequence[Evaluation] = (),
) -> str:
    """A README.md for the Hub.

    Args:
        report: what `tokenformer.inspection.inspect_model` says of the exported folder.
        name: of the model on the Hub, for the snippets.
        license: the Hub's identifier.
        training: from `read_training`.
        evaluations: from `read_evaluation`.
    """
    vision = report["model_type"] == "tokenformer_vision"
    what = "image classifier: a ViT" if vision else "language model: a Transformer"
    results = [result for evaluation in evaluations for result in evaluation.results]
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if vision else "text-generation",
        license=license,
        tags=["tokenformer", "pattention"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name.rpartition('/')[2]}",
        f"A [TokenFormer]({PAPER}) {what} whose every projection is attention over learned key-value *parameter "
        "tokens*. It is made larger by appending tokens, and goes on from what it has learned.",
        f"## Use\n\n```python\n{(_CLASSIFY if vision else _GENERATE).format(name=name)}```\n\n"
        f"The code in this folder is that of the Python package `tokenformer` {__version__} (Apache-2.0).",
        _sizes(report),
        _segments(report),
    ]
    if training:
        parts.append("## Training\n\n" + markdown(["", ""], training).rstrip())
    if evaluations:
        parts.append("\n".join(["## Evaluation\n", *(evaluation.text for evaluation in evaluations)]).rstrip())
    parts.append(_growing(report, name))
    return "\n\n".join(parts) + "\n"


def _sizes(report: dict[str, Any]) -> str:
    parameters, weights, heads = report["parameters"], report["weights"], report["num_attention_heads"]
    special = _of_image_classifier if report["model_type"] == "tokenformer_vision" else _of_language_model
    rows = [
        ("parameters", f"{parameters['total']:,}"),
        ("in parameter tokens", f"{parameters['parameter_tokens']:,}"),
        ("in the embedding", f"{parameters['embedding']:,}"),
        ("layers", f"{report['num_hidden_layers']} of {report['hidden_size']} channels"),
        ("heads", f"{heads} of {report['hidden_size'] // heads} channels"),
        ("normalization", f"{report['normalization']}, {report['activation']}"),
        ("weights", f"{weights['dtype']}, {weights['bytes'] / 1e6:,.1f} MB"),
        *special(report),
    ]
    return "## Sizes\n\n" + markdown(["", ""], rows).rstrip()


def _of_language_model(report: dict[str, Any]) -> list[tuple[str, str]]:
    rotary, flops, length = report["rotary"], report["flops_per_token"], report["sequence_length"]
    return [
        ("rotary", f"{rotary['channels_per_head']} channels of each head, base {rotary['theta']:g}"),
        ("context", f"{length:,} tokens"),
        ("vocabulary", f"{report['vocab_size']:,}"),
        (f"FLOPs per token, forward, at length {length:,}", f"{flops['forward']:.3g}"),
        ("FLOPs per token, training", f"{flops['training']:.3g}"),
        ("bytes read per generated token, empty cache", f"{report['decode_bytes_per_token']['empty_cache']:.3g}"),
    ]


def _of_image_classifier(report: dict[str, Any]) -> list[tuple[str, str]]:
    flops, size = report["flops_per_image"], report["image_size"]
    return [
        ("image size", f"{size} x {size} pixels, patches of {report['patch_size']}"),
        ("classes", f"{len(report['classes']):,}"),
        ("FLOPs per image, forward", f"{flops['forward']:.3g}"),
        ("FLOPs per image, training", f"{flops['training']:.3g}"),
    ]


def _segments(report: dict[str, Any]) -> str:
    segments = report["segments"]
    added = [sum(segment["parameters"].values()) for segment in segments]
    rows = [
        (segment["name"], *(f"{segment['tokens'][kind]:,}" for kind in KINDS), f"{count:,}", f"{total:,}")
        for segment, count, total in zip(segments, added, accumulate(added), strict=True)
    ]
    scales = []
    for kind, scale in report["scale"].items():
        if scale["sqrt_of"] is not None:
            scales.append(f"{scale['min']:.6g} = sqrt({scale['sqrt_of']:,}) for {kind}")
        else:
            scales.append(f"{scale['min']:.6g} to {scale['max']:.6g} for {kind}")
    times = len(segments) - 1
    grown = f", grown {'once' if times == 1 else f'{times} times'} from `base`" if times else ""
    table = markdown(["segment", *(f"{kind} tokens" for kind in KINDS), "parameters", "total"], rows).rstrip()
    return (
        f"## Segments{grown}\n\nIn the order in which they were added: the tokens of each layer by kind, and the "
        f"parameters of all layers.\n\n{table}\n\nThe scale (tau) of the layers is {', '.join(scales)}."
    )


def _growing(report: dict[str, Any], name: str) -> str:
    now = {kind: sum(segment["tokens"][kind] for segment in report["segments"]) for kind in KINDS}
    options = " ".join(f"--{kind} {2 * count}" for kind, count in now.items())
    return f"""## Grow

With the package `tokenformer` installed:

```bash
tokenformer grow {name} grown {options}
```

This doubles the tokens of every layer. New ones get zero keys and the scale is kept, which leaves every output as it
was; `grow` warns where a normalization or activation does not allow that."""
