"""What a plan comes to: sizes, steps and FLOPs of every stage, worked out before any compute is spent."""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tokenformer.baselines import matching_transformer
from tokenformer.errors import UserError
from tokenformer.models import TokenFormerConfig
from tokenformer.models.cost import non_embedding_parameters, training_flops_per_token
from tokenformer.plans.plan import Family, Growth, Plan, Stage, naming
from tokenformer.training.building import model_config
from tokenformer.training.recipe import ModelRecipe, OptimizerRecipe, TrainingRecipe

_KINDS = ("qkv", "output", "ffn")
# On the copies of a Transformer's weights: equal ones get equal gradients, so the new parameters would never be used.
_NOISE = {"hypercloning": 0.3, "net2net": 0.05, "width": 0.0}


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with everything that follows from the plan.

    Attributes:
        stage: as the plan has it.
        family: of its model.
        chain: names of the stages that lead to it, itself last.
        model: sizes of the model that it begins with, if no stage comes before.
        config: of the model that it trains, grown already.
        parameters: of that model.
        non_embedding_parameters: likewise, without embeddings.
        tokens: trained on, in whole steps.
        steps: of the optimizer.
        flops_per_token: of training (Table 3).
        flops: of this stage.
        cumulative_tokens: of this stage and all before it.
        cumulative_flops: likewise.
        optimizer: rule, with the stage's own fields; the learning rate is the first of those to try.
        training: budget, with the stage's own fields; the seed is the first.
        data: what it is trained on.
        rows_before: training rows of these data that the stages before have read; this one goes on behind them.
    """

    stage: Stage
    family: Family
    chain: tuple[str, ...]
    model: ModelRecipe | None
    config: PreTrainedConfig
    parameters: int
    non_embedding_parameters: int
    tokens: int
    steps: int
    flops_per_token: int
    flops: int
    cumulative_tokens: int
    cumulative_flops: int
    optimizer: OptimizerRecipe
    training: TrainingRecipe
    data: str
    rows_before: int


def resolve(plan: Plan, *, vocab_size: int, sequence_length: int) -> dict[str, ResolvedStage]:
    """Every stage of a plan by name, each after those that it depends on.

    Args:
        plan: to be resolved; checked first.
        vocab_size: of the tokenizer.
        sequence_length: tokens in a row.

    Raises:
        UserError: a plan that cannot be carried out: sizes that shrink or do not fit together, budgets below one step,
            a baseline that cannot match, stages that wait for each other.
    """
    plan.validate()
    resolver = _Resolver(plan, vocab_size, sequence_length)
    for name in plan.all_stages:
        resolver.stage(name)
    resolved = resolver.stages
    _spread_schedules(plan, resolved)
    return resolved


class _Resolver:
    def __init__(self, plan: Plan, vocab_size: int, sequence_length: int) -> None:
        self.plan, self.vocab_size, self.sequence_length = plan, vocab_size, sequence_length
        self.models: dict[str, ModelRecipe] = {}
        self.configs: dict[str, PreTrainedConfig] = {}
        self.stages: dict[str, ResolvedStage] = {}
        self.waiting: list[tuple[str, str]] = []

    def stage(self, name: str) -> ResolvedStage:
        if name not in self.stages:
            self._enter("budget", name)
            stage = self.plan.all_stages[name]
            with naming(stage):
                self.stages[name] = self._resolve(stage)
            self.waiting.pop()
        return self.stages[name]

    def _enter(self, what: str, name: str) -> None:
        if name not in self.plan.all_stages:
            raise UserError(f"there is no stage '{name}'")
        if (what, name) in self.waiting:
            through = " -> ".join(waiting for _, waiting in self.waiting)
            raise UserError(f"stage '{name}': its {what} depends on itself: {through} -> {name}")
        self.waiting.append((what, name))

    def config(self, name: str) -> PreTrainedConfig:
        """Of the model of a stage, which may be asked for before its budget is known."""
        if name not in self.configs:
            self._enter("size", name)
            self.configs[name] = self._config(self.plan.all_stages[name])
            self.waiting.pop()
        return self.configs[name]

    def _config(self, stage: Stage) -> PreTrainedConfig:
        before = self.plan.before(stage)
        if before is None:
            self.models[stage.name] = self._first(stage)
            return self._new(self.models[stage.name])
        config = copy.deepcopy(self.config(before.name))
        if stage.grow is None:
            return config
        if isinstance(config, TokenFormerConfig):
            return _grown(config, self._targets(stage.grow))
        return self._wider(config, stage.grow)

    def _first(self, stage: Stage) -> ModelRecipe:
        """Sizes of a new model."""
        assert stage.train is not None
        given = {name: value for name, value in dataclasses.asdict(stage.train).items() if value is not None}
        like = given.pop("like", None)
        recipe = dataclasses.replace(self.plan.model, **given, family=self.plan.family(stage.name))
        if stage.train.preset is None and given.keys() & {"hidden_size", "num_hidden_layers", *_KINDS}:
            recipe = dataclasses.replace(recipe, preset=None)
        if like is None:
            return recipe
        other: Any = self.config(like)
        same: dict[str, Any] = {
            "num_hidden_layers": other.num_hidden_layers,
            "num_attention_heads": other.num_attention_heads,
        }
        recipe = dataclasses.replace(recipe, preset=None, **(same | given))
        if recipe.family == "gpt_neox":
            found = matching_transformer(
                _parameters(other)[1],
                vocab_size=other.vocab_size,
                num_hidden_layers=recipe.num_hidden_layers,
                num_attention_heads=recipe.num_attention_heads,
                hidden_size=stage.train.hidden_size,
                rotary_pct=recipe.rotary_pct,
            )
            return dataclasses.replace(recipe, hidden_size=found.hidden_size, intermediate_size=found.intermediate_size)
        if not isinstance(other, TokenFormerConfig):
            raise UserError(f"train.like: '{like}' is a Transformer; name a TokenFormer, or give the sizes")
        return dataclasses.replace(recipe, **_totals(other), hidden_size=other.hidden_size)

    def _new(self, recipe: ModelRecipe) -> PreTrainedConfig:
        config: PreTrainedConfig = model_config(
            recipe, vocab_size=self.vocab_size, sequence_length=self.sequence_length
        )
        if self.sequence_length > config.max_position_embeddings:
            raise UserError(
                f"the data are packed to {self.sequence_length} tokens, the model takes "
                f"{config.max_position_embeddings}: prepare them with a shorter --sequence-length"
            )
        return config

    def _targets(self, grow: Growth) -> dict[str, int]:
        targets = {kind: getattr(grow, kind) for kind in _KINDS if getattr(grow, kind) is not None}
        if grow.like is None:
            return targets
        other = self.config(grow.like)
        if not isinstance(other, TokenFormerConfig):
            raise UserError(f"grow.like: '{grow.like}' is a Transformer; name a TokenFormer, or give the tokens")
        return _totals(other) | targets

    def _wider(self, config: PreTrainedConfig, grow: Growth) -> PreTrainedConfig:
        """The wider Transformer; where only a number of parameters is wanted, the multiple nearest to a usual ffn."""
        if grow.like is None:
            width = grow.hidden_size or config.hidden_size
            if width % config.hidden_size:
                raise UserError(
                    f"grow.hidden_size {width} is not a whole multiple of {config.hidden_size}, so the layer norms "
                    f"would change: give {(width // config.hidden_size + 1) * config.hidden_size}"
                )
            ffn = grow.intermediate_size or config.intermediate_size * width // config.hidden_size
            if ffn < config.intermediate_size:
                raise UserError(
                    f"grow.intermediate_size {ffn} is fewer than {config.intermediate_size}: growing cannot shrink"
                )
            if (width, ffn) == (config.hidden_size, config.intermediate_size):
                raise UserError("grow: nothing grows; give like, hidden_size or intermediate_size")
            return _widened(config, width, ffn)
        wanted = _parameters(self.config(grow.like))[1]
        candidates = []
        for multiple in range(1, 9) if grow.hidden_size is None else [grow.hidden_size // config.hidden_size]:
            try:
                found = matching_transformer(
                    wanted,
                    vocab_size=config.vocab_size,
                    num_hidden_layers=config.num_hidden_layers,
                    num_attention_heads=config.num_attention_heads * multiple,
                    hidden_size=config.hidden_size * multiple,
                    rotary_pct=config.rope_parameters["partial_rotary_factor"],
                    max_position_embeddings=config.max_position_embeddings,
                )
            except UserError:
                continue
            if found.intermediate_size >= config.intermediate_size:
                candidates.append(found)
        if not candidates:
            raise UserError(
                f"a Transformer of width {config.hidden_size} and {config.intermediate_size} feed-forward units cannot "
                f"be widened to the {wanted} parameters of '{grow.like}' within 2 %: begin with another size, or give "
                "hidden_size and intermediate_size"
            )
        return min(candidates, key=lambda found: abs(math.log(found.intermediate_size / (4 * found.hidden_size))))

    def _resolve(self, stage: Stage) -> ResolvedStage:
        config = self.config(stage.name)
        before = self.plan.before(stage)
        previous = self.stage(before.name) if before is not None else None
        parameters, non_embedding, flops_per_token = _parameters(config, self.sequence_length)
        optimizer, training = self._recipes(stage)
        per_step = training.batch_size * self.sequence_length
        spent = previous.cumulative_flops if previous else 0
        if stage.tokens is not None:
            tokens = stage.tokens
            steps = math.ceil(tokens / per_step)
        else:
            assert stage.flops_of is not None
            budget = self.stage(stage.flops_of).cumulative_flops * stage.flops_times - spent
            tokens = int(budget // flops_per_token)
            steps = round(tokens / per_step)
        if tokens < per_step:
            raise UserError(
                f"its budget of {tokens} tokens is below one step ({training.batch_size} rows of "
                f"{self.sequence_length} tokens): give more tokens, or a smaller training.batch_size"
            )
        tokens = steps * per_step
        flops = tokens * flops_per_token
        return ResolvedStage(
            stage=stage,
            family=self.plan.family(stage.name),
            chain=tuple(other.name for other in self.plan.chain(stage.name)),
            model=self.models.get(stage.name),
            config=config,
            parameters=parameters,
            non_embedding_parameters=non_embedding,
            tokens=tokens,
            steps=steps,
            flops_per_token=flops_per_token,
            flops=flops,
            cumulative_tokens=tokens + (previous.cumulative_tokens if previous else 0),
            cumulative_flops=flops + spent,
            optimizer=optimizer,
            training=dataclasses.replace(training, tokens=tokens),
            data=stage.data or self.plan.data.path,
            rows_before=sum(
                other.tokens // self.sequence_length
                for other in (self.stage(one.name) for one in self.plan.chain(stage.name)[:-1])
                if other.data == (stage.data or self.plan.data.path)
            ),
        )

    def _recipes(self, stage: Stage) -> tuple[OptimizerRecipe, TrainingRecipe]:
        optimizer = dataclasses.replace(self.plan.optimizer, **stage.optimizer, learning_rate=stage.learning_rates[0])
        if stage.schedule == "constant":
            optimizer = dataclasses.replace(optimizer, schedule="constant")
        grow = stage.grow
        if grow is not None and self.plan.family(stage.name) == "tokenformer":
            optimizer = dataclasses.replace(
                optimizer,
                state=grow.optimizer,
                old_tokens=grow.old_tokens,
                anneal_scale=grow.anneal if grow.scale == "anneal" else 0.0,
            )
        training = dataclasses.replace(self.plan.training, **stage.training, seed=self.plan.seeds_of(stage)[0])
        return optimizer, training


def _spread_schedules(plan: Plan, resolved: dict[str, ResolvedStage]) -> None:
    """Give each stage of a continued schedule its part of it."""
    following: dict[str, list[Stage]] = {name: [] for name in resolved}
    for stage in plan.all_stages.values():
        before = plan.before(stage)
        if before is not None:
            following[before.name].append(stage)
    spans: dict[str, tuple[str, float, float]] = {}
    for name, stage in plan.all_stages.items():
        if stage.schedule != "continue" or any(after.schedule == "continue" for after in following[name]):
            continue
        linked = [stage]
        while linked[0].schedule == "continue":
            linked.insert(0, plan.before(linked[0]))  # type: ignore[arg-type]  # a first stage continues nothing
        total, done = sum(resolved[link.name].steps for link in linked), 0
        for link in linked:
            first, done = done, done + resolved[link.name].steps
            ended = [after.name for after in following[link.name] if after.schedule != "continue"]
            other, begin, end = spans.setdefault(link.name, (name, first / total, done / total))
            if (begin, end) != (first / total, done / total) or (ended and link is not stage):
                raise UserError(
                    f"stage '{name}': '{link.name}' cannot leave its schedule unfinished for it and do as "
                    f"'{ended[0] if ended else other}' needs too, which goes on from there: give it a stage of its own "
                    "to begin with"
                )
    for name, (_, begin, end) in spans.items():
        optimizer = dataclasses.replace(resolved[name].optimizer, schedule_from=begin, schedule_to=end)
        resolved[name] = dataclasses.replace(resolved[name], optimizer=optimizer)


def _grown(config: TokenFormerConfig, targets: dict[str, int]) -> TokenFormerConfig:
    """The configuration after `tokenformer.grow`, which appends one segment."""
    present = _totals(config)
    if not targets:
        raise UserError("grow: nothing grows; give qkv, output or ffn, or like")
    for kind, target in targets.items():
        if target < present[kind]:
            raise UserError(
                f"grow.{kind}: {target} is fewer than the {present[kind]} tokens there are: growing cannot shrink"
            )
    added = {kind: targets.get(kind, present[kind]) - present[kind] for kind in _KINDS}
    if not any(added.values()):
        raise UserError("grow: nothing grows; every layer already has the number of tokens asked for")
    config.segments = [*config.segments, {"name": f"grown{len(config.segments)}", **added}]
    return config


def _widened(config: PreTrainedConfig, width: int, ffn: int) -> PreTrainedConfig:
    heads = config.num_attention_heads * width // config.hidden_size
    wider = copy.deepcopy(config)
    wider.hidden_size, wider.intermediate_size, wider.num_attention_heads = width, ffn, heads
    return wider


def noise_of(grow: Growth, family: Family) -> float:
    """The noise of a growth: what is given, or what its method needs."""
    if grow.noise is not None:
        return grow.noise
    return _NOISE[grow.method] if family == "gpt_neox" else 0.0


def _totals(config: TokenFormerConfig) -> dict[str, Any]:
    return {kind: sum(segment.get(kind, 0) for segment in config.segments) for kind in _KINDS}


def _parameters(config: PreTrainedConfig, sequence_length: int = 1) -> tuple[int, int, int]:
    """Parameters, those without embeddings, and training FLOPs per token."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    return (
        sum(p.numel() for p in model.parameters()),
        non_embedding_parameters(model),
        training_flops_per_token(model, sequence_length),
    )
