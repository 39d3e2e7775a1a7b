"""Decoding by a sparse model against the same model with all its tokens: `model.generate`, one prompt, greedy.

Weights, and with them the groups that a router chooses, are random, which changes nothing about how many bytes
are read. Before anything is timed, one layer of each kind is compared with the masked dense computation in float64:
for one row, eager and compiled, and for several.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from tokenformer.benchmarks import checking
from tokenformer.benchmarks.conditions import DTYPES, check_options, warm_up
from tokenformer.benchmarks.decode import Generation, generation_configs
from tokenformer.benchmarks.models import describe, finish, new_models_record, random_ids
from tokenformer.benchmarks.report import Timings
from tokenformer.benchmarks.targets import Target
from tokenformer.benchmarks.timing import Timing, interleave
from tokenformer.errors import UserError
from tokenformer.hardware import set_threads
from tokenformer.models import TokenFormerConfig, TokenFormerForCausalLM
from tokenformer.models.cost import shares
from tokenformer.pattention import BASE, ParameterTokens, Pattention
from tokenformer.sparse import SparsePattention, norm_factor
from tokenformer.sparsity.grouping import group_sizes
from tokenformer.sparsity.reference import masked_dense
from tokenformer.sparsity.sparsify import paying_kinds

TARGETS = (Target("dense_compiled", "sparse_compiled", at_least=2.0), Target("dense_eager", "sparse_eager"))
# Relative error, and the worst element over the largest: float32 sums of thousands of terms, and bfloat16 weights.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (3e-2, 1e-1)}


def measure(
    config: TokenFormerConfig | None = None,
    *,
    keep: float = 0.25,
    group_size: int = 2,
    rank: int | None = None,
    router_rank: int | None = None,
    prompt: int = 16,
    tokens: int = 16,
    dtypes: tuple[str, ...] = ("bfloat16",),
    threads: int | None = None,
    repeats: int = 5,
    compiler: str = "inductor",
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Check, then time generation by the dense and the sparse model.

    Args:
        config: of the dense model; the 1.5B model if not given, and only then targets are judged.
        keep: share of the tokens of sparse layers that an input computes.
        group_size: tokens that are chosen together.
        rank: of the remainder; an eighth of the channels if not given.
        router_rank: likewise, of the router.
        prompt: tokens of the prompt.
        tokens: to generate.
        dtypes: of weights and cache: `float32`, `bfloat16`.
        threads: of torch; one per physical core if not given.
        repeats: rounds.
        compiler: backend of torch.compile.
        progress: called with a line on what is being done.

    Returns:
        The record (see benchmarks/README.md), with `sparsity`: the shares of tokens computed and of memory read.

    Raises:
        UserError: an option out of range, sizes at which no layer saves anything, or a layer that is wrong; then
            nothing was timed.
    """
    check_options(dtypes, prompt=prompt, repeats=repeats, group_size=group_size)
    if tokens < 2:
        raise UserError(f"tokens must be at least 2, of which the first belongs to the prompt, got {tokens}")
    if not 0 < keep < 1:
        raise UserError(f"keep must lie between 0 and 1, got {keep:g}")
    judge, config = config is None, config or TokenFormerConfig.preset("1.5B")
    ranks = {"rank": rank, "router_rank": router_rank}
    sizes = {"keep": keep, "group_size": group_size}
    sizes |= {name: max(1, config.hidden_size // 8) if given is None else given for name, given in ranks.items()}
    threads = set_threads(threads)
    options = {**sizes, "prompt": prompt, "tokens": tokens, "dtypes": list(dtypes), "repeats": repeats}
    record = new_models_record("sparse", {**options, "compiler": compiler}, threads)
    ids = random_ids(config, 1, prompt)
    timings: Timings = {}
    for dtype in dtypes:
        progress(f"{dtype}: building")
        models = build(config, DTYPES[dtype], sizes)
        record["models"] = {name: describe(model) for name, model in models.items()}
        record["sparsity"] = shares(models["sparse"])
        torch.compiler.reset()
        progress(f"{dtype}: checking against float64")
        errors = check_layers(models["sparse"], dtype, compiler)
        cases = {
            f"{name}_{mode}": Generation(model, ids, generation)
            for name, model in models.items()
            for mode, generation in generation_configs(tokens, compiler).items()
        }
        progress(f"{dtype}: compiling")
        seconds, failed = warm_up(cases, [case for case in cases if case.endswith("_compiled")])
        record.setdefault("checks", {})[dtype] = checking.summary(TOLERANCES[dtype], errors, seconds, failed)
        cases = {name: case for name, case in cases.items() if name not in failed}
        progress(f"{dtype}: timing, {repeats} rounds")
        interleave(cases, repeats)
        timings[dtype] = {
            "prompt": {case: Timing(tuple(run.prompt[-repeats:])) for case, run in cases.items()},
            "decode": {case: Timing(tuple(run.decode[-repeats:])) for case, run in cases.items()},
        }
        del models, cases
    finish(record, timings, {"prompt": prompt, "decode": 1}, "decode", judge=judge, targets=TARGETS)
    return record


@torch.no_grad()
def build(config: TokenFormerConfig, dtype: torch.dtype, sizes: dict[str, Any]) -> dict[str, TokenFormerForCausalLM]:
    """A dense model with random weights, and a sparse one whose tokens lie in the same memory.

    Raises:
        UserError: no layer would read less.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # a float32 copy of the 1.5B model would be 6 GB
        try:
            dense = TokenFormerForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default)
        dense.generation_config.eos_token_id = None
        kinds = paying_kinds(dense, **sizes, above=1.0)
        if not kinds:
            raise UserError("no layer would read less than its dense form: keep fewer tokens, or use lower ranks")
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
        sparse = copy.deepcopy(dense, memo)
        for name, layer in dense.named_modules():
            if isinstance(layer, Pattention) and layer.kind in kinds:
                sparse.set_submodule(name, _sparse(layer, sizes))
    return {"dense": dense, "sparse": sparse}


def _sparse(layer: Pattention, sizes: dict[str, Any]) -> SparsePattention:
    """A sparse layer with the tokens of a dense one, and anything for the rest."""
    tokens = cast(ParameterTokens, layer.segments[BASE])
    like = tokens.key
    size = group_sizes(layer.num_tokens, sizes["group_size"])
    sparse = SparsePattention(
        layer.in_features,
        layer.out_features,
        layer.num_tokens,
        group_size=size,
        active=max(1, round(sizes["keep"] * layer.num_tokens / size)),
        rank=sizes["rank"],
        router_rank=sizes["router_rank"],
        activation=layer.activation,
        device="meta",
        dtype=like.dtype,
    )
    for name, parameter in list(sparse.named_parameters()):
        tensor = torch.randn(parameter.shape, dtype=like.dtype) * layer.in_features**-0.5
        setattr(sparse, name, nn.Parameter(tensor.triu() if name == "factor" else tensor))
    sparse.key, sparse.value, sparse.scale = like, tokens.value, layer.scale
    sparse.kind = layer.kind
    return sparse


@torch.no_grad()
def check_layers(model: TokenFormerForCausalLM, dtype: str, compiler: str) -> dict[str, dict[str, dict[str, float]]]:
    """Errors of one layer of each kind, by layer and path.

    Raises:
        UserError: one is wrong.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for layer in model.model.layers[0].modules():
        if not isinstance(layer, SparsePattention) or layer.kind in found:
            continue
        layer.factor = nn.Parameter(norm_factor(layer.key))
        # The same groups for all rows, far ahead of the others: no rounding of one path changes which are chosen.
        bias = torch.full_like(layer.router_bias, -1e4)
        bias[torch.randperm(len(bias), generator=torch.Generator().manual_seed(0))[: layer.active]] = 1e4
        layer.router_bias, kept = nn.Parameter(bias), layer.router_bias
        rows = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.key.dtype)
        kind = str(layer.kind)
        compiled = torch.compile(layer, backend=compiler)
        paths: dict[str, tuple[Any, torch.Tensor]] = {
            "one_row": (layer, rows[:1]),
            "one_row_compiled": (compiled, rows[:1]),
            "rows": (layer, rows),
        }
        found[kind] = {}
        for path, (function, x) in paths.items():
            exact = masked_dense(layer, x, layer.choose(layer.directions(x)))
            found[kind][path] = checking.check(function(x), exact, TOLERANCES[dtype], f"{kind} in {dtype}", path)
        layer.router_bias = kept
    return found
