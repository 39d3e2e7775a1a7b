"""`sparsify`: a trained model whose layers compute, for each input, the tokens that speak loudest.

Two passes over calibration text, block by block. The first, through the dense model, groups the tokens of each layer,
fits its router, and measures its error over the number of groups; from these curves come the budgets. The second goes
through the model as it becomes sparse, and fits the remainder of each layer to what it leaves out there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from tokenformer.errors import UserError
from tokenformer.folders import new_folder
from tokenformer.models.cost import shares
from tokenformer.models.loading import copy_tokenizer, holds_image_classifier, load_model, model_folder, quiet
from tokenformer.models.modeling_tokenformer import TokenFormerForCausalLM
from tokenformer.modules import KINDS
from tokenformer.ops import get_activation
from tokenformer.pattention import BASE, ParameterTokens, Pattention
from tokenformer.sparse import SparsePattention, dense_like, norm_factor, refuse_sparse, sparse_layers, sparse_like
from tokenformer.sparsity.budgets import Curve, dense_elements, equal_error, sparse_elements
from tokenformer.sparsity.calibration import Walk, read_rows
from tokenformer.sparsity.fitting import Activities, Regression, Router, centroid_router, choose, recall
from tokenformer.sparsity.grouping import group_sizes, group_tokens

Grouping = Literal["activity", "keys", "random"]
RouterKind = Literal["learned", "centroid"]

# Layers of a block in the order in which they run; those of a line read the same input.
_STAGES = (("attention.query", "attention.key", "attention.value"), ("attention.output",), ("ffn",))
_FRACTIONS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
# Inputs that grouping and error curves are made from: they cost M N D.
_INPUTS = 4096
_PARTS = 8


@dataclass
class _Plan:
    """What the first pass finds about a layer."""

    order: torch.Tensor
    group_size: int
    router: Router
    curve: Curve


@torch.no_grad()
def sparsify(
    model: TokenFormerForCausalLM,
    rows: torch.Tensor,
    *,
    keep: float = 0.25,
    group_size: int = 2,
    rank: int | None = None,
    router_rank: int | None = None,
    grouping: Grouping = "activity",
    router: RouterKind = "learned",
    budgets: Literal["equal-error", "uniform"] = "equal-error",
    dense_above: float = 0.9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Make layers of `model` sparse, in place.

    Args:
        model: a trained language model with `l2_gelu`; its segments become one.
        rows: token ids (B, T) of calibration text.
        keep: share of the tokens of sparse layers that an input computes.
        group_size: tokens that are chosen together; the largest divisor of a layer's tokens up to this.
        rank: of the remainder, the map for what is left out; an eighth of the channels if not given.
        router_rank: channels through which the router sees the input; an eighth of the channels if not given.
        grouping: by activity groups tokens that speak on the same inputs; keys, those with like keys; random, any.
        router: learned predicts from the input how loudly each group will speak; centroid compares the input with the
            mean key of a group.
        budgets: equal-error gives layers as many tokens as equal errors need; uniform, equal shares.
        dense_above: a layer stays dense if it would read more than this share of its weights; a large number makes
            every layer sparse, whatever it costs.
        progress: called with blocks done and to do.

    Returns:
        `keep`, the `computed` share of all parameter tokens, the `read` share of all their memory, the `dense` kinds,
        and for each layer its tokens, groups, error and recall.

    Raises:
        UserError: an option out of range, another normalisation, a model that is sparse already, an activation whose
            value at 0 is not 0, or no layer for which it pays. The model is then unchanged.
    """
    config = model.config
    _check(model, keep, group_size, rank, router_rank, grouping, router, budgets, dense_above)
    rank = max(1, config.hidden_size // 8) if rank is None else rank
    router_rank = max(1, config.hidden_size // 8) if router_rank is None else router_rank
    kinds = paying_kinds(model, keep=keep, group_size=group_size, rank=rank, router_rank=router_rank, above=dense_above)
    if not kinds:
        raise UserError(
            f"no layer would read less than {dense_above:g} of its weights: the norm alone costs half of the square of "
            f"the {config.hidden_size} channels, so use fewer channels for rank, or a model with more tokens"
        )
    model.merge_segments()
    blocks = list(model.model.layers)
    total = 2 * len(blocks)
    wanted = [[name for name in stage if _kind(name) in kinds] for stage in _STAGES]

    walk, plans = Walk(model, rows), {}
    for i, block in enumerate(blocks):
        names = [name for stage in wanted for name in stage]
        for name, inputs in walk.inputs(block, names).items():
            plans[f"layers.{i}.{name}"] = _plan(
                block.get_submodule(name), inputs, group_size, rank, router_rank, grouping, router
            )
        walk.advance(block)
        progress(i + 1, total)

    curves = {name: plan.curve for name, plan in plans.items()}
    steps = {name: _PARTS // math.gcd(_PARTS, plan.group_size) for name, plan in plans.items()}
    if budgets == "uniform":
        counts = {name: max(1, round(keep * plan.curve.active[-1])) for name, plan in plans.items()}
    else:
        counts = equal_error(curves, keep, steps)

    walk, report = Walk(model, rows), {}
    for i, block in enumerate(blocks):
        for names in wanted:
            for name, inputs in walk.inputs(block, names).items():
                path = f"layers.{i}.{name}"
                dense = block.get_submodule(name)
                sparse, error, recalled = _fit(dense, inputs, plans[path], counts[path], rank, router_rank)
                block.set_submodule(name, sparse)
                report[path] = {**sparse.sizes(), "error": error, "recall": recalled}
        walk.advance(block)
        progress(len(blocks) + i + 1, total)
    config.sparsity = {name: layer.sizes() for name, layer in sparse_layers(model.model).items()}
    return {"keep": keep, **shares(model), "dense": [kind for kind in KINDS if kind not in kinds], "layers": report}


def paying_kinds(
    model: TokenFormerForCausalLM, *, keep: float, group_size: int, rank: int, router_rank: int, above: float
) -> list[str]:
    """The kinds of layers that would read at most the share `above` of their weights if they were sparse."""
    kinds = []
    for kind in KINDS:
        layer = next(layer for layer in model.modules() if isinstance(layer, Pattention) and layer.kind == kind)
        size = group_sizes(layer.num_tokens, group_size)
        read = sparse_elements(layer, keep=keep, group_size=size, rank=rank, router_rank=router_rank)
        if read <= above * dense_elements(layer):
            kinds.append(kind)
    return kinds


@torch.no_grad()
def densify(model: TokenFormerForCausalLM) -> TokenFormerForCausalLM:
    """Give all layers all their tokens again, in place: the model that `sparsify` was given, up to rounding.

    The tokens of a layer stay in the order of the groups, which changes nothing but the order of summation.

    Raises:
        UserError: the model is not sparse.
    """
    layers = sparse_layers(model)
    if not layers:
        raise UserError("the model has no sparse layers: it is dense already")
    for name, layer in layers.items():
        model.set_submodule(name, dense_like(layer))
    model.config.sparsity = None
    return model


def _check(
    model: TokenFormerForCausalLM,
    keep: float,
    group_size: int,
    rank: int | None,
    router_rank: int | None,
    grouping: str,
    router: str,
    budgets: str,
    dense_above: float,
) -> None:
    if not isinstance(model, TokenFormerForCausalLM):
        raise UserError("sparsify takes a TokenFormer language model")
    if not 0 < keep < 1:
        raise UserError(f"keep must lie between 0 and 1, got {keep:g}")
    if group_size < 1:
        raise UserError(f"group_size must be at least 1, got {group_size}")
    if not dense_above > 0:
        raise UserError(f"dense_above must be above 0, got {dense_above:g}")
    for name, size, least in (("rank", rank, 0), ("router_rank", router_rank, 1)):
        if size is not None and not least <= size <= model.config.hidden_size:
            raise UserError(f"{name} must lie between {least} and the {model.config.hidden_size} channels, got {size}")
    known = {"grouping": (grouping, get_args(Grouping)), "router": (router, get_args(RouterKind))}
    known["budgets"] = (budgets, ("equal-error", "uniform"))
    for label, (choice, choices) in known.items():
        if choice not in choices:
            raise UserError(f"unknown {label} '{choice}': use one of {', '.join(choices)}")
    refuse_sparse(model, "made sparse again")
    if model.config.normalization != "l2_gelu":
        raise UserError(
            f"normalization '{model.config.normalization}' needs all scores for its norm: only l2_gelu can be sparse"
        )
    if any(layer.adapters for layer in model.modules() if isinstance(layer, Pattention)):
        raise UserError("the model has adapters: merge or delete them before it is made sparse")


def _kind(name: str) -> str:
    return {"ffn": "ffn", "attention.output": "output"}.get(name, "qkv")


def _activities(layer: Pattention, inputs: torch.Tensor) -> Activities:
    """In float32: bfloat16 would give the regressions three digits."""
    wide = torch.promote_types(inputs.dtype, torch.float32)
    base = cast(ParameterTokens, layer.segments[BASE])
    key, value = base.key.to(wide), base.value.to(wide)
    inputs = inputs.to(wide)
    total = (inputs @ norm_factor(key).T).square().sum(-1, keepdim=True)
    directions = inputs * (layer.scale / torch.sqrt(total + layer.eps))
    return Activities(directions, get_activation(layer.activation)(directions @ key.T), value)


def _plan(
    layer: Any,
    inputs: torch.Tensor,
    group_size: int,
    rank: int,
    router_rank: int,
    grouping: str,
    router: str,
) -> _Plan:
    size = group_sizes(layer.num_tokens, group_size)
    groups = layer.num_tokens // size
    whole = _activities(layer, _spread(inputs, _INPUTS))
    # Every fourth input judges what the others teach.
    judged = torch.arange(len(whole.weights)) % 4 == 0
    learned = whole.part(~judged)
    if grouping == "random":
        order = torch.randperm(layer.num_tokens, generator=torch.Generator().manual_seed(0))
    else:
        key = layer.segments[BASE].key
        order = group_tokens(learned.loudness().T if grouping == "activity" else key.detach(), size)
    regression, energies = Regression(learned.directions), whole.energies(order, size)
    if router == "centroid":
        chosen_by = centroid_router(layer.segments[BASE].key.to(whole.directions.dtype), order, size)
    else:
        chosen_by = regression.fit_low_rank(energies[~judged], min(router_rank, groups))
    preferences = prefer(chosen_by, whole.directions)
    active: list[int] = []
    errors: list[float] = []
    for fraction in _FRACTIONS:
        count = max(1, round(fraction * groups))
        if active and count <= active[-1]:
            continue
        chosen = choose(preferences, count)
        left = whole.left_out(chosen, order, size)
        down, up, bias = regression.fit_low_rank(left[~judged], rank)
        rest = left[judged] - (whole.directions[judged].double() @ (up @ down).T + bias).to(left.dtype)
        active.append(count)
        errors.append(rest.square().sum().item() / whole.variance(judged))
    falling = [min(errors[: i + 1]) for i in range(len(errors))]
    curve = Curve(tuple(active), tuple(falling), size, layer.num_tokens)
    return _Plan(order, size, chosen_by, curve)


def prefer(router: Router, directions: torch.Tensor) -> torch.Tensor:
    """Preferences (M, G) of a router for inputs with these directions (M, D_in)."""
    down, up, bias = router
    return directions.double() @ down.T @ up.T + bias


def _fit(
    dense: Any, inputs: torch.Tensor, plan: _Plan, active: int, rank: int, router_rank: int
) -> tuple[SparsePattention, float, float]:
    """The sparse layer, its squared error as a share of the output's variance, and the recall of its router."""
    down, up, bias = plan.router
    sparse = sparse_like(dense, group_size=plan.group_size, active=active, rank=rank, router_rank=len(down))
    base = dense.segments[BASE]
    for target, source in (
        (sparse.key, base.key[plan.order]),
        (sparse.value, base.value[plan.order]),
        (sparse.factor, norm_factor(base.key.double())),
        (sparse.router_down, down),
        (sparse.router_up, up),
        (sparse.router_bias, bias),
    ):
        target.copy_(source)
    whole = _activities(dense, inputs)
    chosen = torch.zeros(len(inputs), sparse.num_groups, dtype=torch.bool)
    # As the layer itself will choose, in its own dtype.
    chosen.scatter_(1, sparse.choose(sparse.directions(inputs)).cpu(), True)
    left = whole.left_out(chosen, plan.order, plan.group_size)
    fitted = Regression(whole.directions).fit_low_rank(left, rank)
    for parameter, tensor in zip((sparse.down, sparse.up, sparse.bias), fitted, strict=True):
        parameter.copy_(tensor)
    everything = torch.ones(len(inputs), dtype=torch.bool)
    output = whole.weights @ whole.value
    error = (sparse(inputs).to(output.dtype) - output).square().sum().item() / whole.variance(everything)
    return sparse, error, recall(whole.energies(plan.order, plan.group_size), chosen)


def _spread(inputs: torch.Tensor, count: int) -> torch.Tensor:
    return inputs[:: max(1, -(-len(inputs) // count))]


def sparsify_folder(
    model: str,
    out: str,
    *,
    calibration: str,
    keep: float = 0.25,
    tokens: int = 16384,
    group_size: int = 2,
    rank: int | None = None,
    router_rank: int | None = None,
    grouping: Grouping = "activity",
    router: RouterKind = "learned",
    budgets: Literal["equal-error", "uniform"] = "equal-error",
    dense_above: float = 0.9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Make the language model in a folder sparse and write it to a new one, with its tokenizer.

    Args:
        model: folder of the model, such as a training run.
        out: folder to write; must not hold anything yet.
        calibration: text file, or a folder written by tokenformer data prepare, of which the training part is read.
        keep: share of the tokens of sparse layers that an input computes.
        tokens: of the calibration text to read.
        group_size: tokens that are chosen together.
        rank: of the map for what is left out; an eighth of the channels if not given.
        router_rank: channels through which the router sees the input; an eighth of the channels if not given.
        grouping: activity groups tokens that speak on the same inputs; keys, those with like keys; random, any.
        router: learned predicts how loudly each group will speak; centroid compares the input with its mean key.
        budgets: equal-error gives layers as many tokens as equal errors need; uniform, equal shares.
        dense_above: a layer stays dense if it would read more than this share of its weights; 9 for none.
        progress: called with blocks done and to do.

    Returns:
        What `sparsify` does, and `out`.

    Raises:
        UserError: as `sparsify`; a model or text that cannot be read; a folder that is not empty.
    """
    if tokens < 1:
        raise UserError(f"tokens must be at least 1, got {tokens}")
    folder = model_folder(model)
    if holds_image_classifier(folder):
        raise UserError(f"{model} holds an image classifier: sparsify takes language models")
    with new_folder(Path(out)) as partial:
        whole = load_model(folder)
        _check(whole, keep, group_size, rank, router_rank, grouping, router, budgets, dense_above)
        rows = read_rows(
            Path(calibration),
            folder,
            vocab_size=whole.config.vocab_size,
            longest=whole.config.max_position_embeddings,
            num_tokens=tokens,
        )
        report = sparsify(
            whole,
            rows,
            keep=keep,
            group_size=group_size,
            rank=rank,
            router_rank=router_rank,
            grouping=grouping,
            router=router,
            budgets=budgets,
            dense_above=dense_above,
            progress=progress,
        )
        vars(whole.config).pop("auto_map", None)  # of an exported folder: its code does not come along
        with quiet():
            whole.save_pretrained(partial)
        copy_tokenizer(folder, partial)
    return {"out": out, **report}
