"""A TokenFormer beside a Transformer of equal size: what the benchmarks of whole models share.

The Transformer is transformers' GPTNeoX: the same width, heads, rotary share, vocabulary and tied embedding, and as
many layers as make its other parameters equal. Weights are random: they do not change the speed.

Shapes: B batch, T positions, V vocabulary.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import transformers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from tokenformer.baselines.transformer import num_parameters, transformer_config
from tokenformer.benchmarks import checking
from tokenformer.benchmarks.conditions import warm_up
from tokenformer.benchmarks.report import Timings, as_seconds, new_record
from tokenformer.benchmarks.targets import Target, ratios
from tokenformer.errors import UserError
from tokenformer.models import TokenFormerConfig, TokenFormerForCausalLM
from tokenformer.ops import pattention
from tokenformer.pattention import Pattention

TARGETS = tuple(Target(f"tokenformer_{mode}", f"gpt_neox_{mode}", at_most=1.0) for mode in ("eager", "compiled"))
# Largest errors of logits, relative to the root mean square and to the largest. Each layer adds its roundings to the
# residual stream, and a bfloat16 keeps 8 bits.
TOLERANCES = {"float32": (1e-5, 5e-5), "bfloat16": (3e-2, 5e-2)}
# by which the parameters of the two models may differ, embeddings left out
PARAMETER_TOLERANCE = 0.02


def default_config() -> TokenFormerConfig:
    """The 150M model of the paper."""
    return TokenFormerConfig.preset("150M")


def small_config() -> TokenFormerConfig:
    """A model that shows in seconds that a benchmark runs: 3 layers of 256 channels, 4096 words."""
    return TokenFormerConfig(vocab_size=4096, hidden_size=256, num_hidden_layers=3, num_attention_heads=4)


def equal_transformer(config: TokenFormerConfig) -> GPTNeoXConfig:
    """The GPTNeoX whose parameters, embeddings left out, are as many as those of the TokenFormer of `config`.

    Raises:
        UserError: no number of layers comes within two percent.
    """

    def transformer(layers: int) -> GPTNeoXConfig:
        return transformer_config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=config.num_attention_heads,
            rotary_pct=config.rotary_pct,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
        )

    wanted = num_parameters(config)
    one, two = (num_parameters(transformer(layers)) for layers in (1, 2))
    layers = max(1, round((wanted - one) / (two - one)) + 1)
    found = one + (layers - 1) * (two - one)
    if abs(found / wanted - 1) > PARAMETER_TOLERANCE:
        raise UserError(
            f"a GPTNeoX of {layers} layers has {found} parameters without embeddings, the TokenFormer {wanted}: change "
            "its tokens or layers until they agree within 2 %"
        )
    return transformer(layers)


def decode_bytes(model: PreTrainedModel, context_length: int) -> int:
    """Bytes read from memory to generate one token at batch size 1.

    All parameters once (the tied embedding is read to make logits), one row of the input embedding, and the keys and
    values of `context_length` cached positions: what `TokenFormerForCausalLM.decode_bytes_per_token` counts, for any
    model with a tied embedding.
    """
    config = model.config
    cache = 2 * config.num_hidden_layers * config.hidden_size * context_length
    return model.dtype.itemsize * (sum(p.numel() for p in model.parameters()) + config.hidden_size + cache)


def build_models(config: TokenFormerConfig, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """Both models with random weights, ready to evaluate; nothing they generate ends them early."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {
            "tokenformer": TokenFormerForCausalLM(config),
            "gpt_neox": GPTNeoXForCausalLM(equal_transformer(config)),
        }
    for model in models.values():
        model.to(dtype).eval()  # type: ignore[arg-type]  # transformers hides torch's signature
        model.generation_config.eos_token_id = None
    return models


def new_models_record(benchmark: str, options: dict[str, Any], threads: int) -> dict[str, Any]:
    """`new_record` with the version of transformers, which holds the Transformer and the caches of both models."""
    record = new_record(benchmark, options, threads)
    record["versions"]["transformers"] = transformers.__version__
    return record


def random_ids(config: TokenFormerConfig, batch: int, length: int) -> torch.Tensor:
    """Token ids (B, T), the same in every run."""
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def exact_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, every Pattention by the equation instead of the operator that is measured."""
    exact = copy.deepcopy(model).double()
    for layer in exact.modules():
        if isinstance(layer, Pattention):
            layer.forward = partial(_by_equation, layer)  # type: ignore[method-assign]  # of this copy alone
    return exact


class Case(Protocol):
    """One model in one mode."""

    def __call__(self) -> object:
        """What is timed."""

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, T), and the logits (B, K, V) that were computed for the last K of them on the way that is timed."""


C = TypeVar("C", bound=Case)


def prepare(
    models: Mapping[str, PreTrainedModel],
    cases: Mapping[str, C],
    dtype: str,
    record: dict[str, Any],
    progress: Callable[[str], None],
) -> dict[str, C]:
    """Compile and check all cases, and write into the record what they are and how far they are off.

    Args:
        models: by name.
        cases: by `<model>_<mode>`.
        dtype: of the models.
        record: gets `models` and `checks`.
        progress: called with a line on what is being done.

    Returns:
        The cases, without those that do not compile.

    Raises:
        UserError: logits that are wrong.
    """
    record["models"] = {name: describe(model) for name, model in models.items()}
    progress(f"{dtype}: compiling")
    compile_seconds, failed = warm_up(cases, [case for case in cases if case.endswith("_compiled")])
    progress(f"{dtype}: checking against float64")
    compiling = {name: case for name, case in cases.items() if name not in failed}
    errors = {}
    for name, model in models.items():
        exact = exact_copy(model)
        for case in [case for case in compiling if case.startswith(name)]:
            ids, logits = compiling[case].results()
            with torch.no_grad():
                truth = exact(ids, use_cache=False, logits_to_keep=logits.shape[1]).logits
            errors[case] = {"logits": checking.check(logits, truth, TOLERANCES[dtype], f"{case} in {dtype}", "logits")}
    record.setdefault("checks", {})[dtype] = checking.summary(TOLERANCES[dtype], errors, compile_seconds, failed)
    return compiling


def finish(
    record: dict[str, Any],
    timings: Timings,
    tokens: Mapping[str, int],
    judged: str,
    *,
    judge: bool,
    targets: Sequence[Target] = TARGETS,
) -> None:
    """Write times, tokens a second and ratios into the record.

    Args:
        record: gets `seconds`, `tokens_per_second` and `ratios`.
        timings: by dtype, pass and case.
        tokens: by pass, how many one of its times is for.
        judged: the pass of the ratios.
        judge: whether to say if the targets are met.
        targets: the ratios.
    """
    record["seconds"] = as_seconds(timings)
    record["tokens_per_second"] = {
        dtype: {
            name: {case: tokens[name] / timing.median for case, timing in cases.items()}
            for name, cases in passes.items()
        }
        for dtype, passes in timings.items()
    }
    record["ratios"] = ratios({dtype: passes[judged] for dtype, passes in timings.items()}, targets, judge=judge)


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What a record says of a model: class, sizes, attention."""
    config = model.config
    return {
        "class": type(model).__name__,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_without_embeddings": num_parameters(model),
        "attention": config._attn_implementation,
    }


def _by_equation(layer: Pattention, x: torch.Tensor) -> torch.Tensor:
    keys, values = zip(*(segment(x) for segment in layer.segments.values()), strict=True)
    return pattention(
        x,
        keys,
        values,
        layer.scale,
        normalization=layer.normalization,
        activation=layer.activation,
        eps=layer.eps,
        backend="reference",
    )
