"""Prefill: a TokenFormer and an equally large Transformer read a prompt into a cache.

What `generate` does before the first token: one forward pass over the prompt, which fills a new cache and gives the
logits of the last position. Both models, eager and compiled, take turns in one process; their logits are compared with
a float64 evaluation before anything is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tokenformer.benchmarks.conditions import DTYPES, check_options
from tokenformer.benchmarks.models import (
    build_models,
    default_config,
    finish,
    new_models_record,
    prepare,
    random_ids,
)
from tokenformer.benchmarks.report import Timings
from tokenformer.benchmarks.timing import interleave
from tokenformer.hardware import set_threads
from tokenformer.models import TokenFormerConfig


@dataclass(frozen=True)
class Prefill:
    """A forward pass over a prompt.

    Attributes:
        model: eager or compiled.
        ids: the prompts, (B, T).
    """

    model: Callable[..., Any]
    ids: torch.Tensor

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Logits (B, 1, V) of the last position."""
        logits: torch.Tensor = self.model(self.ids, use_cache=True, logits_to_keep=1).logits
        return logits

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts and what the call gave for them."""
        return self.ids, self()


def measure(
    config: TokenFormerConfig | None = None,
    *,
    batch: int = 1,
    length: int = 512,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    threads: int | None = None,
    repeats: int = 10,
    compiler: str = "inductor",
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Check, then time the forward pass of both models.

    Args:
        config: of the TokenFormer; the 150M model if not given, and only then targets are judged.
        batch: prompts read at once.
        length: tokens of each.
        dtypes: of the weights: `float32`, `bfloat16`.
        threads: of torch; one per physical core if not given.
        repeats: rounds.
        compiler: backend of torch.compile.
        progress: called with a line on what is being done.

    Returns:
        The record (see benchmarks/README.md).

    Raises:
        UserError: an option out of range, or logits that are wrong; then nothing was timed.
    """
    check_options(dtypes, batch=batch, length=length, repeats=repeats)
    judge, config = config is None, config or default_config()
    threads = set_threads(threads)
    options = {"batch": batch, "length": length, "dtypes": list(dtypes), "repeats": repeats, "compiler": compiler}
    record = new_models_record("forward", options, threads)
    ids = random_ids(config, batch, length)
    timings: Timings = {}
    for dtype in dtypes:
        models = build_models(config, DTYPES[dtype])
        torch.compiler.reset()
        cases: dict[str, Prefill] = {}
        for name, model in models.items():
            compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=compiler)
            cases |= {f"{name}_eager": Prefill(model, ids), f"{name}_compiled": Prefill(compiled, ids)}
        cases = prepare(models, cases, dtype, record, progress)
        progress(f"{dtype}: timing, {repeats} rounds")
        timings[dtype] = {"prefill": interleave(cases, repeats)}
    finish(record, timings, {"prefill": batch * length}, "prefill", judge=judge)
    return record
