"""Plans for language models, and the Transformers beside them."""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tokenformer.baselines import matching_transformer
from tokenformer.data import TrainingData, open_data
from tokenformer.errors import UserError
from tokenformer.evaluation import evaluate_perplexity
from tokenformer.evaluation.perplexity import evenly_spaced
from tokenformer.models.cost import non_embedding_parameters, training_flops_per_token
from tokenformer.plans.estimate import Memory, measured_rate, training_memory
from tokenformer.plans.plan import Growth, Plan
from tokenformer.plans.quality import PERPLEXITY
from tokenformer.plans.task import Counts, PlanTask, ResolvedStage, Sizes
from tokenformer.training import Recipe
from tokenformer.training.building import load_any, model_config
from tokenformer.training.recipe import DataRecipe, ModelRecipe, TrainingRecipe


class LanguagePlans(PlanTask[Plan]):
    """Language models on prepared text; a row is a sequence."""

    quality = PERPLEXITY

    def open(self, plan: Plan) -> Sizes:
        """Vocabulary and length of rows, which all data have in common."""
        if not plan.data.path:
            raise UserError("data.path: give a folder written by `tokenformer data prepare`")
        data = _open(plan, plan.data.path)
        others = {stage.data for stage in plan.all_stages.values() if stage.data} | set(plan.measure.values())
        for path in sorted(others - {plan.data.path}):
            other = _open(plan, path)
            if other.tokenizer_hash != data.tokenizer_hash:
                raise UserError(
                    f"{path} was prepared with another tokenizer than {plan.data.path}: "
                    f"prepare it with --tokenizer {plan.data.path}/tokenizer"
                )
            if other.sequence_length != data.sequence_length:
                raise UserError(
                    f"{path} is cut into rows of {other.sequence_length}, {plan.data.path} of "
                    f"{data.sequence_length}: prepare both alike"
                )
        return {"vocab_size": data.vocab_size, "sequence_length": data.sequence_length}

    def missing(self, plan: Plan) -> list[str]:
        """Prepared folders and tokenised files."""
        own = [stage.data for stage in plan.all_stages.values() if stage.data]
        return [
            path or "data.path"
            for path in dict.fromkeys([plan.data.path, *own, *plan.measure.values()])
            if not path or not (Path(path).exists() or Path(f"{path}.bin").exists())
        ]

    def assumed(self, plan: Plan) -> Sizes:
        """Vocabulary and length of rows."""
        return dataclasses.asdict(plan.assumed)

    def source(self, plan: Plan) -> str:
        """A prepared folder."""
        return plan.data.path

    def rows(self, plan: Plan, source: str) -> int:
        """Sequences."""
        return len(_open(plan, source).train)

    def check(self, recipe: Recipe, rows: int) -> None:
        """A batch needs as many rows."""
        if rows < recipe.training.batch_size:
            raise UserError(
                f"{recipe.data.path} has {rows} training rows, fewer than training.batch_size "
                f"{recipe.training.batch_size}"
            )
        recipe.validate()

    def new_config(self, recipe: ModelRecipe, sizes: Sizes) -> PreTrainedConfig:
        """A TokenFormerConfig or a GPTNeoXConfig."""
        config: PreTrainedConfig = model_config(recipe, **sizes)
        if sizes["sequence_length"] > config.max_position_embeddings:
            raise UserError(
                f"the data are packed to {sizes['sequence_length']} tokens, the model takes "
                f"{config.max_position_embeddings}: prepare them with a shorter --sequence-length"
            )
        return config

    def alike(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Depth and heads."""
        return {"num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads}

    def matching(
        self, recipe: ModelRecipe, other: PreTrainedConfig, hidden_size: int | None, sizes: Sizes
    ) -> ModelRecipe:
        """A Transformer."""
        found = matching_transformer(
            _parameters(other),
            vocab_size=other.vocab_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            hidden_size=hidden_size,
            rotary_pct=recipe.rotary_pct,
        )
        return dataclasses.replace(recipe, hidden_size=found.hidden_size, intermediate_size=found.intermediate_size)

    def wider(self, config: PreTrainedConfig, grow: Growth, like: PreTrainedConfig | None) -> PreTrainedConfig:
        """The wider Transformer; where only a number of parameters is wanted, the multiple nearest to a usual ffn."""
        if like is None:
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
        wanted = _parameters(like)
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

    def counts(self, config: PreTrainedConfig, sizes: Sizes) -> Counts:
        """With the FLOPs of Table 3."""
        model, length = _model(config), sizes["sequence_length"]
        return Counts(
            parameters=sum(p.numel() for p in model.parameters()),
            non_embedding_parameters=non_embedding_parameters(model),
            row_tokens=length,
            flops_per_row=length * training_flops_per_token(model, length),
        )

    def trained_on(self, training: TrainingRecipe, rows: int, tokens: int) -> TrainingRecipe:
        """Tokens."""
        return dataclasses.replace(training, tokens=tokens)

    def recipe(self, plan: Plan, resolved: ResolvedStage, path: str | None) -> Recipe:
        """Of a language model."""
        return Recipe(
            out=plan.out,
            model=resolved.model if path is None else ModelRecipe(path=path, family=cast(Any, resolved.family)),
            data=dataclasses.replace(_data_recipe(plan, resolved.data), skip_rows=resolved.rows_before),
            optimizer=resolved.optimizer,
            training=resolved.training,
        )

    def held_out_losses(
        self, plan: Plan, resolved: ResolvedStage, folder: Path, sources: Sequence[str | None], device: torch.device
    ) -> list[float]:
        """Nats per token."""
        model = load_any(folder).to(device)  # type: ignore[arg-type]  # transformers hides torch's signature
        losses = []
        for source in sources:
            path = source or resolved.data
            rows = evenly_spaced(_open(plan, path).held_out, _data_recipe(plan, path).held_out_rows)
            figures = evaluate_perplexity(model, rows, tokens_per_byte=1.0, batch_size=resolved.training.batch_size)
            losses.append(figures["loss"])
        return losses

    def budget(self, resolved: ResolvedStage) -> dict[str, Any]:
        """In tokens."""
        return {
            "tokens": resolved.tokens,
            "flops_per_token": resolved.counts.flops_per_row // resolved.counts.row_tokens,
            "cumulative_tokens": resolved.cumulative_tokens,
        }

    def description(self, plan: Plan, resolved: ResolvedStage) -> dict[str, Any]:
        """The vocabulary, how a TokenFormer's scores become weights, and what is measured."""
        config: Any = resolved.config
        model = {"vocab_size": config.vocab_size}
        # The paper's go without saying, as they did in folders of version 0.1.0.
        if getattr(config, "normalization", "l2_gelu") != "l2_gelu":
            model["normalization"] = config.normalization
        return {"model": model, "held_out_rows": plan.data.held_out_rows}

    def figures(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Perplexity and bits per byte."""
        kept = ("eval_loss", "eval_perplexity", "eval_bits_per_byte", "tokens_per_second", "mfu")
        return {name: summary[name] for name in kept}

    def point(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """The loss says it all."""
        return {}

    def memory(self, resolved: ResolvedStage, rows: int, precision: str) -> Memory:
        """By the configuration alone."""
        return training_memory(
            resolved.config,
            parameters=resolved.counts.parameters,
            non_embedding_parameters=resolved.counts.non_embedding_parameters,
            rows=rows,
            sequence_length=resolved.counts.row_tokens,
            precision=precision,
            gradient_checkpointing=resolved.training.gradient_checkpointing,
            recompute=resolved.training.recompute,
            fused_loss=resolved.training.fused_loss,
        )

    def measured_rate(self, resolved: ResolvedStage, precision: str) -> float:
        """On rows of the plan's length."""
        counts = resolved.counts
        return measured_rate(
            resolved.config,
            flops_per_token=counts.flops_per_row // counts.row_tokens,
            sequence_length=counts.row_tokens,
            precision=precision,
        )


def _data_recipe(plan: Plan, path: str) -> DataRecipe:
    """The data of a stage: the plan's, or other ones read in the same way."""
    if path == plan.data.path:
        return plan.data
    return DataRecipe(path=path, held_out_rows=plan.data.held_out_rows)


def _open(plan: Plan, path: str) -> TrainingData:
    options = dataclasses.asdict(_data_recipe(plan, path))
    del options["held_out_rows"], options["skip_rows"]
    return open_data(**options)


def _widened(config: PreTrainedConfig, width: int, ffn: int) -> PreTrainedConfig:
    heads = config.num_attention_heads * width // config.hidden_size
    wider = copy.deepcopy(config)
    wider.hidden_size, wider.intermediate_size, wider.num_attention_heads = width, ffn, heads
    return wider


def _model(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _parameters(config: PreTrainedConfig) -> int:
    """Without embeddings."""
    return non_embedding_parameters(_model(config))
