"""A training step: forward, backward and AdamW of a TokenFormer and of an equally large Transformer.

Weights are float32, and `bfloat16` is autocast, as `train` has it. Both models, eager and compiled, take turns in one
process with the limit: the matrix products of the TokenFormer alone. Loss, logits and all gradients are compared with a
float64 evaluation before anything is timed; the memory of each case is counted after it.

Shapes: B batch, T positions, D channels, N parameter tokens, V vocabulary.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from tokenformer.benchmarks import checking
from tokenformer.benchmarks.conditions import DTYPES, check_options, warm_up
from tokenformer.benchmarks.memory import held_bytes, peak_bytes
from tokenformer.benchmarks.models import (
    build_models,
    default_config,
    describe,
    finish,
    new_models_record,
    random_ids,
)
from tokenformer.benchmarks.report import Timings
from tokenformer.benchmarks.targets import Target
from tokenformer.benchmarks.timing import interleave
from tokenformer.benchmarks.training import TOLERANCES, TrainingStep, new_optimizer, wait
from tokenformer.errors import UserError
from tokenformer.hardware import peak_flops, pick_device, set_threads
from tokenformer.models import TokenFormerConfig, TokenFormerForCausalLM
from tokenformer.models.cost import training_flops_per_token
from tokenformer.pattention import ParameterTokens

MODES = ("eager", "compiled")
PRODUCTS = "products"
TARGETS = (
    Target("tokenformer_compiled", "gpt_neox_compiled", ("bfloat16",), at_most=1.0),
    Target("tokenformer_compiled", "gpt_neox_compiled", ("float32",)),
    Target("tokenformer_eager", "gpt_neox_eager"),
    Target("tokenformer_recompute_compiled", "gpt_neox_compiled", ("bfloat16",), at_most=1.0),
    Target("tokenformer_recompute_eager", "gpt_neox_eager", ("bfloat16",)),
    Target("tokenformer_compiled", PRODUCTS),
)
MEMORY_TARGETS = (
    Target("tokenformer_compiled", "gpt_neox_compiled", ("bfloat16",), at_most=1.0),
    Target("tokenformer_compiled", "gpt_neox_compiled", ("float32",)),
    Target("tokenformer_eager", "gpt_neox_eager"),
    Target("tokenformer_recompute_compiled", "gpt_neox_compiled", ("bfloat16",), at_most=1.0),
    Target("tokenformer_recompute_eager", "gpt_neox_eager", ("bfloat16",)),
)


def _recompute(model: TokenFormerForCausalLM) -> None:
    model.set_recompute()


def _fuse_loss(model: TokenFormerForCausalLM) -> None:
    model.fused_loss = True


# Other ways to compute the TokenFormer, run where they are asked for: what makes a copy with the same weights do so.
VARIANTS: dict[str, Callable[[TokenFormerForCausalLM], None]] = {
    "tokenformer_recompute": _recompute,
    "tokenformer_fused_loss": _fuse_loss,
}
# Every model in every mode, and the limit.
CASES = (*(f"{model}_{mode}" for model in ("tokenformer", "gpt_neox") for mode in MODES), PRODUCTS)
ALL_CASES = (*CASES, *(f"{variant}_{mode}" for variant in VARIANTS for mode in MODES))


class Products:
    """The matrix products of a step alone: forward, and backward to inputs and weights, on random inputs.

    Args:
        model: a TokenFormer; its weights are copied in `dtype`.
        tokens: rows of the inputs.
        dtype: of the products.
    """

    def __init__(self, model: PreTrainedModel, tokens: int, dtype: torch.dtype) -> None:
        layers = [(layer.key, layer.value) for layer in model.modules() if isinstance(layer, ParameterTokens)]
        head = model.get_output_embeddings().weight
        self.weights = [
            tuple(weight.detach().to(dtype, copy=True).requires_grad_() for weight in weights)
            for weights in (*layers, (head,))
        ]
        widths = {weights[0].shape[1] for weights in self.weights} | {w[-1].shape[1] for w in self.weights[:-1]}
        widths.add(head.shape[0])
        generator = torch.Generator().manual_seed(0)
        self.rows = {
            width: torch.randn(tokens, width, generator=generator).to(head.device, dtype) for width in sorted(widths)
        }

    def __call__(self) -> None:
        """All products once."""
        for weights in self.weights:
            x = self.rows[weights[0].shape[1]].detach().requires_grad_()
            output = x @ weights[0].T
            for value in weights[1:]:
                output = output @ value
            torch.autograd.grad(output, (x, *weights), self.rows[output.shape[1]])
        wait(self.rows[output.shape[1]].device)


def measure(
    config: TokenFormerConfig | None = None,
    *,
    batch: int = 2,
    length: int = 512,
    cases: tuple[str, ...] = CASES,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    threads: int | None = None,
    repeats: int = 5,
    compiler: str = "inductor",
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Check, then time training steps and count their memory, on the accelerator if there is one.

    Args:
        config: of the TokenFormer; the 150M model if not given, and only then targets are judged.
        batch: sequences of a step.
        length: tokens of each.
        cases: which of `ALL_CASES` to run.
        dtypes: of the products: `float32`, or `bfloat16` by autocast over float32 weights.
        threads: of torch; one per physical core if not given.
        repeats: rounds.
        compiler: backend of torch.compile.
        progress: called with a line on what is being done.

    Returns:
        The record (see benchmarks/README.md), with `peak_memory` and `memory_ratios`, and `mfu` where the peak of the
        device is known.

    Raises:
        UserError: an option out of range, or a result that is wrong; then nothing was timed.
    """
    check_options(dtypes, batch=batch, repeats=repeats)
    if length < 2:
        raise UserError(f"length must be at least 2, so that there is a next token to learn, got {length}")
    _check_cases(cases)
    judge, config = config is None, copy.deepcopy(config or default_config())
    config.max_position_embeddings = max(config.max_position_embeddings, length)
    threads, device = set_threads(threads), pick_device()
    options = {"batch": batch, "length": length, "cases": list(cases), "dtypes": list(dtypes), "repeats": repeats}
    record = new_models_record("train-step", {**options, "compiler": compiler}, threads)
    record["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    progress("building")
    models = _models(config, cases, device)
    record["models"] = {name: describe(model) for name, model in models.items()}
    ids = random_ids(config, batch, length).to(device)
    steps = _steps(models, ids, cases, dtypes, compiler)
    _prepare(steps, models, record, progress)
    calls: dict[str, dict[str, Callable[[], object]]] = {dtype: {**steps[dtype]} for dtype in dtypes}
    if PRODUCTS in cases:
        for dtype in dtypes:
            calls[dtype][PRODUCTS] = Products(models["tokenformer"], batch * length, DTYPES[dtype])
    timings: Timings = {}
    for dtype in dtypes:
        progress(f"{dtype}: timing, {repeats} rounds")
        interleave(calls[dtype], 1)  # the first step makes the moments
        timings[dtype] = {"step": interleave(calls[dtype], repeats)}
        progress(f"{dtype}: counting memory")
        record.setdefault("peak_memory", {})[dtype] = {case: _memory(step) for case, step in steps[dtype].items()}
    finish(record, timings, {"step": batch * length}, "step", judge=judge, targets=TARGETS)
    record["memory_ratios"] = _memory_ratios(record["peak_memory"], judge=judge)
    record["mfu"] = _mfu(record, models, length, peak_flops(device))
    return record


def _check_cases(cases: tuple[str, ...]) -> None:
    for case in cases:
        if case not in ALL_CASES:
            raise UserError(f"unknown case '{case}': use {', '.join(ALL_CASES)}")
    if not cases or len(set(cases)) != len(cases):
        raise UserError(f"cases must be one or more of {', '.join(ALL_CASES)}, each once")


def _models(config: TokenFormerConfig, cases: tuple[str, ...], device: torch.device) -> dict[str, PreTrainedModel]:
    """The models of the cases, ready to train; variants hold the same weights, and the limit takes its sizes there."""
    built = build_models(config, torch.float32)
    wanted = {case.rpartition("_")[0] for case in cases if case != PRODUCTS}
    if PRODUCTS in cases or wanted & VARIANTS.keys():
        wanted.add("tokenformer")
    models: dict[str, PreTrainedModel] = {}
    for name, model in built.items():
        if name in wanted:
            models[name] = model.to(device).train()  # type: ignore[arg-type]  # transformers hides torch's signature
    for name in sorted(wanted & VARIANTS.keys()):
        model = models["tokenformer"]
        tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        models[name] = copy.deepcopy(model, tensors)
        VARIANTS[name](cast(TokenFormerForCausalLM, models[name]))
    return models


def _steps(
    models: Mapping[str, PreTrainedModel],
    ids: torch.Tensor,
    cases: tuple[str, ...],
    dtypes: tuple[str, ...],
    compiler: str,
) -> dict[str, dict[str, TrainingStep]]:
    """By dtype and case; the cases and variants of a model train the same weights."""
    torch.compiler.reset()
    optimizers = {name: new_optimizer(model) for name, model in models.items() if name not in VARIANTS}
    steps: dict[str, dict[str, TrainingStep]] = {dtype: {} for dtype in dtypes}
    for dtype in dtypes:
        for case in cases:
            if case == PRODUCTS:
                continue
            name, _, mode = case.rpartition("_")
            model = models[name]
            compiled = torch.compile(model, dynamic=False, backend=compiler) if mode == "compiled" else None
            optimizer = optimizers["tokenformer" if name in VARIANTS else name]
            steps[dtype][case] = TrainingStep(model, optimizer, ids, DTYPES[dtype], compiled)
    return steps


def _prepare(
    steps: Mapping[str, dict[str, TrainingStep]],
    models: Mapping[str, PreTrainedModel],
    record: dict[str, Any],
    progress: Callable[[str], None],
) -> None:
    """Compile and check all cases before a step changes a weight, and take out those that do not compile.

    Raises:
        UserError: a result that is wrong.
    """
    exact: dict[str, dict[str, torch.Tensor]] = {}
    for dtype, cases in steps.items():
        progress(f"{dtype}: compiling")
        rows = len(next(iter(cases.values())).ids) if cases else 0
        # All rows: for fewer, the compiler would have to run once more.
        results = {case: _Results(step, rows) for case, step in cases.items()}
        seconds, failed = warm_up(results, [case for case in cases if case.endswith("_compiled")])
        for case in failed:
            del cases[case]
        progress(f"{dtype}: checking against float64")
        errors: dict[str, dict[str, dict[str, float]]] = {}
        for case, step in cases.items():
            # A variant must have the results of the plain model; it may give fewer of them.
            name = case.rpartition("_")[0]
            plain = "tokenformer" if name in VARIANTS else name
            if plain not in exact:
                exact[plain] = replace(step, model=models[plain]).exact_results(rows)
            errors[case] = {
                what: checking.check(result, exact[plain][what], TOLERANCES[dtype], f"{case} in {dtype}", what)
                for what, result in results[case].found.items()
            }
            results[case].found.clear()
        record.setdefault("checks", {})[dtype] = checking.summary(TOLERANCES[dtype], errors, seconds, failed)


class _Results:
    """Calls `results` of a step and keeps what it gives."""

    def __init__(self, step: TrainingStep, rows: int) -> None:
        self.step, self.rows = step, rows
        self.found: dict[str, torch.Tensor] = {}

    def __call__(self) -> None:
        self.found = self.step.results(self.rows)


def _memory(step: TrainingStep) -> dict[str, int]:
    """Bytes that are held between steps, bytes that a step adds at its peak, and both."""
    held, peak = held_bytes(step.model, step.optimizer), peak_bytes(step, step.ids.device)
    return {"held": held, "step": peak, "total": held + peak}


def _memory_ratios(memory: Mapping[str, Mapping[str, Mapping[str, int]]], *, judge: bool) -> list[dict[str, Any]]:
    rows = []
    for target in MEMORY_TARGETS:
        for dtype in target.dtypes:
            cases = memory.get(dtype, {})
            if target.numerator in cases and target.denominator in cases:
                value = cases[target.numerator]["total"] / cases[target.denominator]["total"]
                rows.append(target.row(dtype, value, judge=judge))
    return rows


def _mfu(
    record: Mapping[str, Any], models: Mapping[str, PreTrainedModel], length: int, peak: float | None
) -> dict[str, dict[str, float]]:
    """Share of the device's peak in bfloat16 that the FLOPs of the paper's Table 3 make; empty where it is unknown."""
    speeds = record["tokens_per_second"].get("bfloat16")
    if peak is None or speeds is None:
        return {}
    flops = {name: training_flops_per_token(model, length) for name, model in models.items()}
    return {
        "bfloat16": {
            case: speed * flops[case.rpartition("_")[0]] / peak
            for case, speed in speeds["step"].items()
            if case != PRODUCTS
        }
    }
