"""Decoding: a TokenFormer and an equally large Transformer generate text, one token at a time.

`model.generate` as people run it, greedy, for one prompt and a fixed number of tokens: eager with the cache that grows,
compiled with the static one. The logits of every step are compared with a float64 evaluation of the finished text
without a cache before anything is timed.

A step at batch size 1 reads every weight once and does little else, so the memory sets a limit. A copy of a large
buffer and a sum over it, taken in turns with the rest, say how fast that memory is.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from tokenformer.benchmarks.conditions import DTYPES, check_options
from tokenformer.benchmarks.models import (
    build_models,
    decode_bytes,
    default_config,
    finish,
    new_models_record,
    prepare,
    random_ids,
)
from tokenformer.benchmarks.report import Timings
from tokenformer.benchmarks.timing import Timing, interleave
from tokenformer.errors import UserError
from tokenformer.generation import static_cache_options
from tokenformer.hardware import set_threads
from tokenformer.models import TokenFormerConfig

BUFFER_BYTES = 256 * 2**20  # more than the caches of a processor hold


class Stamps(BaseStreamer):
    """Notes when each token comes; the first to come is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt and with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by `generate` at the end."""


@dataclass
class Generation:
    """Greedy generation of a fixed number of tokens for one prompt.

    Attributes:
        model: that generates.
        ids: the prompt, (1, T).
        config: of the generation.
        prompt: of each call, seconds until the first token.
        decode: of each call, seconds of one of the tokens after the first.
    """

    model: Any  # a PreTrainedModel with GenerationMixin
    ids: torch.Tensor
    config: GenerationConfig
    prompt: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        """Generate once and note the times."""
        stamps = Stamps()
        start = time.perf_counter()
        self.model.generate(self.ids, generation_config=self.config, streamer=stamps)
        _, first, *others = stamps.times
        assert len(others) == self.config.max_new_tokens - 1
        self.prompt.append(first - start)
        self.decode.append((others[-1] - first) / len(others))

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt and all tokens but the last, and the logits of each step."""
        config = copy.deepcopy(self.config)
        config.output_logits = config.return_dict_in_generate = True
        output = self.model.generate(self.ids, generation_config=config)
        return output.sequences[:, :-1], torch.stack(output.logits, dim=1)


def measure(
    config: TokenFormerConfig | None = None,
    *,
    prompt: int = 128,
    tokens: int = 64,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    threads: int | None = None,
    repeats: int = 5,
    compiler: str = "inductor",
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Check, then time generation by both models.

    Args:
        config: of the TokenFormer; the 150M model if not given, and only then targets are judged.
        prompt: tokens of the prompt.
        tokens: to generate.
        dtypes: of weights and cache: `float32`, `bfloat16`.
        threads: of torch; one per physical core if not given.
        repeats: rounds.
        compiler: backend of torch.compile.
        progress: called with a line on what is being done.

    Returns:
        The record (see benchmarks/README.md).

    Raises:
        UserError: an option out of range, or logits that are wrong; then nothing was timed.
    """
    check_options(dtypes, prompt=prompt, repeats=repeats)
    if tokens < 2:
        raise UserError(f"tokens must be at least 2, of which the first belongs to the prompt, got {tokens}")
    judge, config = config is None, config or default_config()
    threads = set_threads(threads)
    options = {"prompt": prompt, "tokens": tokens, "dtypes": list(dtypes), "repeats": repeats, "compiler": compiler}
    record = new_models_record("decode", options, threads)
    ids = random_ids(config, 1, prompt)
    timings: Timings = {}
    for dtype in dtypes:
        models = build_models(config, DTYPES[dtype])
        torch.compiler.reset()
        configs = generation_configs(tokens, compiler)
        cases = {
            f"{name}_{mode}": Generation(model, ids, generation)
            for name, model in models.items()
            for mode, generation in configs.items()
        }
        cases = prepare(models, cases, dtype, record, progress)
        progress(f"{dtype}: timing, {repeats} rounds")
        whole = interleave({**cases, **_memory_calls()}, repeats)
        # The first calls noted their times too.
        timings[dtype] = {
            "prompt": {case: Timing(tuple(run.prompt[-repeats:])) for case, run in cases.items()},
            "decode": {case: Timing(tuple(run.decode[-repeats:])) for case, run in cases.items()},
        }
        bandwidth = {"copy": 2 * BUFFER_BYTES / whole["copy"].median, "read": BUFFER_BYTES / whole["read"].median}
        bytes_per_token = {name: decode_bytes(model, prompt + tokens // 2) for name, model in models.items()}
        record.setdefault("memory", {})[dtype] = {
            "bytes_per_second": bandwidth,
            "decode_bytes_per_token": bytes_per_token,
            "fraction": {
                case: {
                    name: bytes_per_token[case.rsplit("_", 1)[0]] / timing.median / speed
                    for name, speed in bandwidth.items()
                }
                for case, timing in timings[dtype]["decode"].items()
            },
        }
    finish(record, timings, {"prompt": prompt, "decode": 1}, "decode", judge=judge)
    return record


def generation_configs(tokens: int, compiler: str) -> dict[str, GenerationConfig]:
    """By mode: greedy, `tokens` of them whatever they are."""
    compiled = static_cache_options()
    compiled["compile_config"].backend = compiler
    return {
        "eager": GenerationConfig(max_new_tokens=tokens, do_sample=False),
        "compiled": GenerationConfig(max_new_tokens=tokens, do_sample=False, **compiled),
    }


def _memory_calls() -> dict[str, Callable[[], object]]:
    # Written, not zeros: untouched pages of zeros all lie in one place.
    source = torch.ones(BUFFER_BYTES // 4)
    target = torch.ones_like(source)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "read": source.sum}
    for call in calls.values():
        call()
    return calls
