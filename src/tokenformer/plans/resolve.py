"""What a plan comes to: sizes, steps and FLOPs of every stage, worked out before any compute is spent."""

import copy
import dataclasses
import math
from typing import Any, cast

from transformers import PreTrainedConfig

from tokenformer.errors import UserError
from tokenformer.models.loading import empty_model
from tokenformer.models.segments import SegmentedConfig
from tokenformer.plans.plan import AnyPlan, Family, Growth, Stage, naming
from tokenformer.plans.task import Counts, ResolvedStage, Sizes, task_of
from tokenformer.training.nested import FLOPS_PER_WEIGHT, Nesting

_KINDS = ("qkv", "output", "ffn")
# On the copies of a Transformer's weights: equal ones get equal gradients, so the new parameters would never be used.
_NOISE = {"hypercloning": 0.3, "net2net": 0.05, "width": 0.0}


def resolve(plan: AnyPlan, **sizes: Any) -> dict[str, ResolvedStage]:
    """Every stage of a plan by name, each after those that it depends on.

    Args:
        plan: to be resolved; checked first.
        sizes: what the data fix of every model: `vocab_size` of the tokenizer and `sequence_length`, the tokens in a
            row; for images their `classes` (names) and `image_size` (pixels along each side).

    Raises:
        UserError: a plan that cannot be carried out: sizes that shrink or do not fit together, budgets below one step,
            a baseline that cannot match, stages that wait for each other.
    """
    plan.validate()
    resolver = _Resolver(plan, sizes)
    for name in plan.all_stages:
        resolver.stage(name)
    resolved = resolver.stages
    _spread_schedules(plan, resolved)
    return resolved


class _Resolver:
    def __init__(self, plan: AnyPlan, sizes: Sizes) -> None:
        self.plan, self.task, self.sizes = plan, task_of(plan), sizes
        self.models: dict[str, Any] = {}
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
            return self.task.new_config(self.models[stage.name], self.sizes)
        config = copy.deepcopy(self.config(before.name))
        if stage.grow is None:
            return config
        if isinstance(config, SegmentedConfig):
            return _grown(config, self._targets(stage.grow))
        like = None if stage.grow.like is None else self.config(stage.grow.like)
        return self.task.wider(config, stage.grow, like)

    def _first(self, stage: Stage) -> Any:
        """Sizes of a new model."""
        assert stage.train is not None
        given = {name: value for name, value in dataclasses.asdict(stage.train).items() if value is not None}
        like = given.pop("like", None)
        recipe: Any = dataclasses.replace(cast(Any, self.plan.model), **given, family=self.plan.family(stage.name))
        if stage.train.preset is None and given.keys() & {"hidden_size", "num_hidden_layers", *_KINDS}:
            recipe = dataclasses.replace(recipe, preset=None)
        if like is None:
            return recipe
        other: Any = self.config(like)
        recipe = dataclasses.replace(recipe, preset=None, **(self.task.alike(other) | given))
        if recipe.family != "tokenformer":
            return self.task.matching(recipe, other, stage.train.hidden_size, self.sizes)
        if not isinstance(other, SegmentedConfig):
            raise UserError(
                f"train.like: '{like}' is a {self.task.quality.baseline}; name a TokenFormer, or give the sizes"
            )
        return dataclasses.replace(recipe, **_totals(other), hidden_size=other.hidden_size)

    def _targets(self, grow: Growth) -> dict[str, int]:
        targets = {kind: getattr(grow, kind) for kind in _KINDS if getattr(grow, kind) is not None}
        if grow.like is None:
            return targets
        other = self.config(grow.like)
        if not isinstance(other, SegmentedConfig):
            raise UserError(
                f"grow.like: '{grow.like}' is a {self.task.quality.baseline}; name a TokenFormer, or give the tokens"
            )
        return _totals(other) | targets

    def _resolve(self, stage: Stage) -> ResolvedStage:
        config = self.config(stage.name)
        before = self.plan.before(stage)
        previous = self.stage(before.name) if before is not None else None
        optimizer, training = self._recipes(stage)
        counts = _nested(self.task.counts(config, self.sizes), config, training)
        # Budgets are counted in tokens, of which a row has many, or in images, which are rows.
        per_row = counts.row_tokens if self.plan.unit == "tokens" else 1
        per_step = training.batch_size * per_row
        spent = previous.cumulative_flops if previous else 0
        budget = self.plan.budget(stage)
        if budget is not None:
            steps = math.ceil(budget / per_step)
        else:
            assert stage.flops_of is not None
            flops = self.stage(stage.flops_of).cumulative_flops * stage.flops_times - spent
            budget = int(flops // (counts.flops_per_row // per_row))
            steps = round(budget / per_step)
        if budget < per_step:
            step = f"{training.batch_size} rows of {per_row} tokens" if per_row > 1 else f"{training.batch_size} images"
            raise UserError(
                f"its budget of {budget} {self.plan.unit} is below one step ({step}): give more {self.plan.unit}, or a "
                "smaller training.batch_size"
            )
        rows = steps * training.batch_size
        tokens = rows * counts.row_tokens
        data = stage.data or self.task.source(self.plan)
        earlier = [self.stage(one.name) for one in self.plan.chain(stage.name)[:-1]]
        return ResolvedStage(
            stage=stage,
            family=self.plan.family(stage.name),
            chain=tuple(other.name for other in self.plan.chain(stage.name)),
            model=self.models.get(stage.name),
            config=config,
            counts=counts,
            steps=steps,
            rows=rows,
            flops=rows * counts.flops_per_row,
            cumulative_rows=rows + (previous.cumulative_rows if previous else 0),
            cumulative_tokens=tokens + (previous.cumulative_tokens if previous else 0),
            cumulative_flops=rows * counts.flops_per_row + spent,
            optimizer=optimizer,
            training=self.task.trained_on(training, rows, tokens),
            data=data,
            rows_before=sum(other.rows for other in earlier if other.data == data),
        )

    def _recipes(self, stage: Stage) -> tuple[Any, Any]:
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


def _spread_schedules(plan: AnyPlan, resolved: dict[str, ResolvedStage]) -> None:
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


def _nested(counts: Counts, config: PreTrainedConfig, training: Any) -> Counts:
    """With the mean cost of the sizes that a nested stage trains, in place of that of the whole model."""
    if not training.nested:
        return counts
    if not isinstance(config, SegmentedConfig):
        raise UserError("training.nested: only a TokenFormer has prefixes; leave it out")
    nesting = Nesting(empty_model(config), training.nested, training.nested_draw, training.seed)  # type: ignore[call-overload]
    left_out = round(FLOPS_PER_WEIGHT * counts.row_tokens * nesting.mean_left_out())
    return dataclasses.replace(counts, flops_per_row=counts.flops_per_row - left_out)


def _grown(config: SegmentedConfig, targets: dict[str, int]) -> SegmentedConfig:
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


def noise_of(grow: Growth, family: Family) -> float:
    """The noise of a growth: what is given, or what its method needs."""
    if grow.noise is not None:
        return grow.noise
    return _NOISE[grow.method] if family == "gpt_neox" else 0.0


def _totals(config: SegmentedConfig) -> dict[str, Any]:
    return {kind: sum(segment.get(kind, 0) for segment in config.segments) for kind in _KINDS}
