"""The long-context argument (paper, Figure 5): what a step costs over the length of its sequences.

A TokenFormer grows in parameter tokens. Width and depth stay, so that token-token attention, 4 L D T FLOPs per token
(Table 3), costs what it did before. A Transformer that grows gets wider, and its attention grows along. Both are grown
here from the same number of parameters to the same larger ones, and trained for a few steps of equally many tokens, cut
into sequences of different lengths.

FLOPs are counted twice: by Table 3, and by torch from the products that run. The logits and gradients of each model are
compared with a float64 evaluation before a dtype is timed.

Shapes: L layers, D channels, B batch, T positions, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from tokenformer.baselines import matching_transformer, num_parameters
from tokenformer.benchmarks import checking
from tokenformer.benchmarks.conditions import DTYPES, check_options, warm_up
from tokenformer.benchmarks.models import describe, new_models_record, random_ids
from tokenformer.benchmarks.report import Timings, as_seconds
from tokenformer.benchmarks.targets import Target, ratios
from tokenformer.benchmarks.timing import interleave
from tokenformer.benchmarks.training import TOLERANCES, TrainingStep, new_optimizer
from tokenformer.errors import UserError
from tokenformer.growth import grow
from tokenformer.hardware import set_threads
from tokenformer.models import TokenFormerConfig, TokenFormerForCausalLM
from tokenformer.models.cost import training_flops_per_token

LENGTHS = (128, 512, 1024, 2048, 4096)
GROWTHS = (1, 2, 4)  # parameters without embeddings, as multiples of those before growing
TARGETS = tuple(Target(f"tokenformer_x{growth}", f"gpt_neox_x{growth}") for growth in GROWTHS)


def default_config() -> TokenFormerConfig:
    """The TokenFormer before growing: as wide as a Transformer with as many parameters (2.4 M without embeddings)."""
    base = {"name": "base", "qkv": 192, "output": 192, "ffn": 768}
    return TokenFormerConfig(
        vocab_size=4096, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, segments=[base]
    )


def small_config() -> TokenFormerConfig:
    """A model that shows in seconds that the benchmark runs."""
    base = {"name": "base", "qkv": 96, "output": 96, "ffn": 384}
    return TokenFormerConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, segments=[base]
    )


def measure(
    config: TokenFormerConfig | None = None,
    *,
    lengths: tuple[int, ...] = LENGTHS,
    tokens: int = 4096,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    threads: int | None = None,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Count FLOPs, check results, then time training steps of all models at all lengths.

    Args:
        config: of the TokenFormer before growing; `default_config` if not given.
        lengths: of the sequences, T.
        tokens: of a step, at every length.
        dtypes: of the products: `float32`, or `bfloat16` by autocast over float32 weights.
        threads: of torch; one per physical core if not given.
        repeats: rounds.
        progress: called with a line on what is being done.

    Returns:
        The record (see benchmarks/README.md).

    Raises:
        UserError: an option out of range, no Transformer of the same size, or a result that is wrong; then no times are
            reported.
    """
    check_options(dtypes, tokens=tokens, repeats=repeats)
    lengths = tuple(sorted(lengths))
    _check_lengths(lengths, tokens)
    config = copy.deepcopy(config or default_config())
    config.max_position_embeddings = max(config.max_position_embeddings, lengths[-1])
    models = build_models(config)
    threads = set_threads(threads)
    options = {"lengths": list(lengths), "tokens": tokens, "dtypes": list(dtypes), "repeats": repeats}
    record = new_models_record("long-context", options, threads)
    record["models"] = {name: _sizes(model) for name, model in models.items()}
    progress("counting FLOPs")
    record["flops_per_token"] = {
        name: {str(length): flops_per_token(model, length) for length in lengths} for name, model in models.items()
    }
    timings: Timings = {}
    for dtype in dtypes:
        for length in lengths:
            steps = _steps(models, random_ids(config, tokens // length, length), DTYPES[dtype])
            if length == lengths[0]:
                progress(f"{dtype}: checking against float64")
                errors = check(steps, dtype)
                record.setdefault("checks", {})[dtype] = checking.summary(TOLERANCES[dtype], errors, {}, {})
            progress(f"{dtype}: timing {length} positions, {repeats} rounds")
            warm_up(steps, ())
            timings.setdefault(dtype, {})[str(length)] = interleave(steps, repeats)
    _finish(record, timings, tokens)
    return record


def build_models(config: TokenFormerConfig) -> dict[str, PreTrainedModel]:
    """TokenFormers and Transformers by `<name>_x<growth>`, with random weights, ready to train.

    A TokenFormer is grown from the one before. Its new keys are random, not zeros: a segment that is left out would
    show in its results.

    Raises:
        UserError: no Transformer of the depth of `config` has as many parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenformer = TokenFormerForCausalLM(config)
        tokenformers: dict[str, PreTrainedModel] = {}
        transformers: dict[str, PreTrainedModel] = {}
        for growth in GROWTHS:
            if growth > 1:
                tokenformer = copy.deepcopy(tokenformer)
                qkv, output, ffn = (growth * config.num_tokens(kind) for kind in ("qkv", "output", "ffn"))
                grow(tokenformer, qkv=qkv, output=output, ffn=ffn, keys="random")
            wider = wider_transformer(config, growth, num_parameters(tokenformer))
            tokenformers[f"tokenformer_x{growth}"] = tokenformer
            transformers[f"gpt_neox_x{growth}"] = AutoModelForCausalLM.from_config(wider)
    return {name: model.train() for name, model in (tokenformers | transformers).items()}


def wider_transformer(config: TokenFormerConfig, growth: int, parameters: int) -> GPTNeoXConfig:
    """The GPTNeoX of the depth of `config` with `parameters` parameters, embeddings left out.

    Parameters grow with the square of the width, and heads with the width, rounded down, so that they keep their size.

    Raises:
        UserError: no width gives as many parameters.
    """
    return matching_transformer(
        parameters,
        vocab_size=config.vocab_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=math.isqrt(config.num_attention_heads**2 * growth),
        rotary_pct=config.rotary_pct,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def flops_per_token(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """FLOPs of one token in a sequence of `length`, by Table 3 and as counted by torch.

    Returns:
        `forward` and `training`, each with `parameters` (products with weights, the output embedding included) and
        `attention` (token-token, its causal half counted in full); `counted`, what torch counts for both; and
        `deviation`, the larger relative difference of the two.
    """
    training = {"parameters": training_flops_per_token(model, 0)}
    training["attention"] = training_flops_per_token(model, length) - training["parameters"]
    forward = {part: flops // 3 for part, flops in training.items()}
    counted = counted_flops_per_token(model, length)
    stated = {"forward": forward, "training": training}
    deviation = max(abs(counted[name] / sum(parts.values()) - 1) for name, parts in stated.items())
    return {**stated, "counted": counted, "deviation": deviation}


def counted_flops_per_token(model: PreTrainedModel, length: int) -> dict[str, float]:
    """What torch's FlopCounterMode counts for one token of a sequence, `forward` and `training`.

    A copy of the model on the meta device runs: nothing is computed, and any length costs the same. Its attention is
    eager, because the fused one of CPUs is not known to FlopCounterMode, which would leave it out.
    """
    with torch.device("meta"):
        shapes: PreTrainedModel = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
        ids = torch.zeros((1, length), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        # With a cache, because transformers looks into the positions for packed documents without one, and on the
        # meta device there is nothing to see.
        loss = shapes(input_ids=ids, labels=ids, use_cache=True).loss
        forward = counter.get_total_flops()
        loss.backward()
    return {"forward": forward / length, "training": counter.get_total_flops() / length}


def check(steps: Mapping[str, TrainingStep], dtype: str) -> dict[str, dict[str, dict[str, float]]]:
    """Errors of logits and gradients, by model, against a float64 evaluation of the equation.

    Raises:
        UserError: an error above the tolerance of the dtype.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case, step in steps.items():
        exact = step.exact_results()
        found[case] = {
            name: checking.check(result, exact[name], TOLERANCES[dtype], f"{case} in {dtype}", name)
            for name, result in step.results().items()
        }
    return found


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    fields = ("segments",) if isinstance(model, TokenFormerForCausalLM) else ("intermediate_size",)
    return {**describe(model), **{field: getattr(model.config, field) for field in fields}}


def _steps(models: Mapping[str, PreTrainedModel], ids: torch.Tensor, dtype: torch.dtype) -> dict[str, TrainingStep]:
    return {name: TrainingStep(model, new_optimizer(model), ids, dtype) for name, model in models.items()}


def _check_lengths(lengths: tuple[int, ...], tokens: int) -> None:
    if not lengths or len(set(lengths)) != len(lengths):
        raise UserError(f"lengths must be one or more, each once, got '{','.join(map(str, lengths))}'")
    for length in lengths:
        if length < 2:
            raise UserError(f"lengths must be at least 2, so that there is a next token to learn, got {length}")
        if tokens % length:
            raise UserError(
                f"length {length} does not divide the {tokens} tokens of a step: change lengths or tokens, so that "
                "each step has equally many"
            )


def _finish(record: dict[str, Any], timings: Timings, tokens: int) -> None:
    """Write times, tokens a second and ratios into the record; a pass is a length."""
    record["seconds"] = as_seconds(timings)
    record["tokens_per_second"] = {
        dtype: {
            length: {case: tokens / timing.median for case, timing in cases.items()} for length, cases in passes.items()
        }
        for dtype, passes in timings.items()
    }
    record["ratios"] = [
        {**row, "length": int(length)}
        for dtype, passes in timings.items()
        for length, cases in passes.items()
        for row in ratios({dtype: cases}, TARGETS, judge=False)
    ]
