"""What looking on costs: the forward pass over a text, plain, with the weights of all layers captured, and indexed.

Eager, because that is what is captured. `index` reads the text into the tallies of a corpus index. Before anything is
timed, the logits of each case have to be those of the plain pass, bitwise, and the captured weights and shares of the
output those of the equation in float64.

Shapes: B batch, T positions, N parameter tokens of a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenformer.benchmarks import checking
from tokenformer.benchmarks.conditions import DTYPES, check_options, warm_up
from tokenformer.benchmarks.models import default_config, describe, finish, new_models_record, random_ids
from tokenformer.benchmarks.report import Timings
from tokenformer.benchmarks.targets import Target
from tokenformer.benchmarks.timing import interleave
from tokenformer.errors import UserError
from tokenformer.hardware import set_threads
from tokenformer.interpret import LayerRecord, capture, pattention_layers
from tokenformer.interpret.building import add_rows, empty_tallies
from tokenformer.interpret.tallies import Tally
from tokenformer.models import TokenFormerConfig, TokenFormerForCausalLM
from tokenformer.ops import pattention
from tokenformer.pattention import Pattention

CASES: dict[str, dict[str, Any]] = {
    "capture_top": {},  # top_k is an option
    "capture_weights": {},
    "capture_outputs": {"weights": False, "outputs": True},
}
INDEX = "index"
TARGETS = tuple(Target(case, "plain") for case in (*CASES, INDEX))
# Kept of each token: with one, the second pass over the same text finds none better, as most of a long corpus does.
_CONTEXTS = 1
# Relative error, and the worst element over the largest: float32 sums, and bfloat16 weights.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (3e-2, 1e-1)}


@dataclass(frozen=True)
class Reading:
    """A forward pass over texts that may be captured.

    Attributes:
        model: reads them.
        ids: the texts, (B, T).
        options: of `capture`; None to look on at nothing.
    """

    model: TokenFormerForCausalLM
    ids: torch.Tensor
    options: dict[str, Any] | None = field(default=None)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Logits (B, 1, V) of the last position."""
        if self.options is None:
            return self._logits()
        with capture(self.model, **self.options, consume=lambda record: None):
            return self._logits()

    def _logits(self) -> torch.Tensor:
        logits: torch.Tensor = self.model(self.ids, use_cache=False, logits_to_keep=1).logits
        return logits


@dataclass(frozen=True)
class Indexing:
    """A forward pass whose weights go into the tallies of an index.

    Attributes:
        model: reads the texts.
        ids: the texts, (B, T).
        tallies: of every segment.
    """

    model: TokenFormerForCausalLM
    ids: torch.Tensor
    tallies: dict[str, Tally]

    def __call__(self) -> None:
        """Read the texts once more."""
        add_rows(self.model, self.ids, self.tallies, 0)


def measure(
    config: TokenFormerConfig | None = None,
    *,
    batch: int = 1,
    length: int = 512,
    top_k: int = 16,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    threads: int | None = None,
    repeats: int = 10,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Check, then time the forward pass, plain and captured.

    Args:
        config: of the model; the 150M model if not given.
        batch: texts read at once.
        length: tokens of each.
        top_k: strongest tokens of each input and layer that are captured in the case `capture_top`.
        dtypes: of the weights: `float32`, `bfloat16`.
        threads: of torch; one per physical core if not given.
        repeats: rounds.
        progress: called with a line on what is being done.

    Returns:
        The record (see benchmarks/README.md).

    Raises:
        UserError: an option out of range, logits that capturing changes, or wrong records; then nothing was timed.
    """
    check_options(dtypes, batch=batch, length=length, top_k=top_k, repeats=repeats)
    config = config or default_config()
    threads = set_threads(threads)
    options = {"batch": batch, "length": length, "top_k": top_k, "dtypes": list(dtypes), "repeats": repeats}
    record = new_models_record("interpret", options, threads)
    ids = random_ids(config, batch, length)
    timings: Timings = {}
    for dtype in dtypes:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = TokenFormerForCausalLM(config).to(DTYPES[dtype]).eval()  # type: ignore[arg-type]  # transformers hides torch's signature
        record["models"] = {"tokenformer": describe(model)}
        chosen = {**CASES, "capture_top": {"top_k": top_k}}
        cases = {"plain": Reading(model, ids)}
        cases |= {case: Reading(model, ids, keywords) for case, keywords in chosen.items()}
        indexing = Indexing(model, ids, empty_tallies(model, _CONTEXTS))
        warm_up({**cases, INDEX: indexing}, [])
        progress(f"{dtype}: checking against the plain pass and float64")
        errors = _check(cases, dtype)
        record.setdefault("checks", {})[dtype] = checking.summary(TOLERANCES[dtype], errors, {}, {})
        progress(f"{dtype}: timing, {repeats} rounds")
        timings[dtype] = {"forward": interleave({**cases, INDEX: indexing}, repeats)}
    finish(record, timings, {"forward": batch * length}, "forward", judge=False, targets=TARGETS)
    return record


@torch.no_grad()
def _check(cases: dict[str, Reading], dtype: str) -> dict[str, dict[str, dict[str, float]]]:
    plain = cases["plain"]
    logits = plain()
    for case, reading in cases.items():
        if not torch.equal(reading(), logits):
            raise UserError(f"{case} in {dtype} is wrong: its logits are not bitwise those of the plain pass")
    layers = pattention_layers(plain.model)
    found: dict[str, dict[str, dict[str, float]]] = {}

    def compare(record: LayerRecord) -> None:
        if record.kind in found:
            return
        weights, output = _by_equation(layers[record.layer], record.input)
        results = {
            "weights": (torch.cat([r.weights for r in record.segments.values() if r.weights is not None], -1), weights),
            "output": (
                torch.stack([r.output for r in record.segments.values() if r.output is not None]).sum(0),
                output,
            ),
        }
        found[record.kind] = {
            name: checking.check(result, exact, TOLERANCES[dtype], f"{record.kind} in {dtype}", name)
            for name, (result, exact) in results.items()
        }

    with capture(plain.model, outputs=True, consume=compare):
        plain()
    return found


def _by_equation(layer: Pattention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (..., N) and outputs of all segments in float64: with values of ones on the diagonal, the weights."""
    pairs = [segment(x) for segment in layer.segments.values()]
    key, value = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    weights = pattention(
        x.double(),
        key,
        torch.eye(len(key), dtype=torch.float64, device=key.device),
        layer.scale.double(),
        normalization=layer.normalization,
        activation=layer.activation,
        eps=layer.eps,
        backend="reference",
    )
    return weights, weights @ value
