"""What the figures of a plan are called: how good a model is, on what, and what its training counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quality:
    """Words for the results of plans of one kind; lower is better, whatever it is.

    Attributes:
        name: of the figure that models are compared by, as a heading.
        key: in results: `eval_` and this.
        words: for it in a sentence.
        unit: behind its value.
        second: the figure beside it.
        second_key: as `key`.
        second_digits: behind its point.
        change: what tells two values apart: their `ratio`, or the `difference` of percentages, in points.
        measured_on: what is held out.
        counted: what a budget counts.
        one: of these; losses are in nats for each.
        parameters: which ones models are compared by.
        baseline: the other family.
        row: what the data are made of.
        held_out: field of the plan's data with the number of them that are measured.
        flops: what is counted as FLOPs, beside attention.
    """

    name: str
    key: str
    words: str
    unit: str
    second: str
    second_key: str
    second_digits: int
    change: str
    measured_on: str
    counted: str
    one: str
    parameters: str
    baseline: str
    row: str
    held_out: str
    flops: str


PERPLEXITY = Quality(
    name="perplexity",
    key="perplexity",
    words="perplexity",
    unit="",
    second="bits/byte",
    second_key="bits_per_byte",
    second_digits=3,
    change="ratio",
    measured_on="text",
    counted="tokens",
    one="token",
    parameters="without embeddings",
    baseline="Transformer",
    row="row",
    held_out="held_out_rows",
    flops="the paper's Table 3, token-token attention and the output embedding included",
)
TOP1_ERROR = Quality(
    name="top-1 error (%)",
    key="error",
    words="top-1 error",
    unit=" %",
    second="top-5 error (%)",
    second_key="top5_error",
    second_digits=2,
    change="difference",
    measured_on="images",
    counted="images",
    one="image",
    parameters="in the blocks",
    baseline="ViT",
    row="image",
    held_out="held_out_images",
    flops="every matrix product, patch embedding, token-token attention and classifier included",
)


def quality_of(results: Mapping[str, Any]) -> Quality:
    """The words for results of `tokenformer.plans.results.collect`; those of language models where they have none."""
    return Quality(**results["quality"]) if "quality" in results else PERPLEXITY
