"""Language models: packed rows of tokens in, held-out perplexity out."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Subset
from transformers import set_seed

from tokenformer.data import TrainingData, open_data
from tokenformer.errors import UserError
from tokenformer.evaluation import evaluate_perplexity
from tokenformer.evaluation.perplexity import evenly_spaced, perplexity_figures
from tokenformer.models.cost import non_embedding_parameters, training_flops_per_token
from tokenformer.parallel.folders import write_model
from tokenformer.training.building import build_in_parts, build_model
from tokenformer.training.recipe import Recipe
from tokenformer.training.task import Task
from tokenformer.training.trainer import LanguageTrainer, RunTrainer, collate


class LanguageTask(Task):
    """A language model and its prepared data, as a recipe names them.

    Args:
        recipe: of the run.
        progress: show a bar while the bytes behind the held-out tokens are counted.

    Raises:
        UserError: data or model that are missing, damaged, or do not fit together.
    """

    unit = "tokens"
    trainer_class: type[LanguageTrainer] = LanguageTrainer

    def __init__(self, recipe: Recipe, *, progress: bool) -> None:
        options = dataclasses.asdict(recipe.data)
        held_out_rows = options.pop("held_out_rows")
        self.skip_rows = options.pop("skip_rows")
        self.data = open_data(**options)
        self.train_rows = self.data.train
        rows = evenly_spaced(self.data.held_out, held_out_rows)
        self._held_out, self.held_out_rows = rows, rows
        self.steps = _steps(recipe, self.data)
        set_seed(recipe.training.seed)
        if recipe.layout.processes == 1:
            self.model = build_model(recipe, self.data)
        else:
            self.model, self.fill = build_in_parts(recipe, self.data)
        self.tokens_per_byte = self.data.tokens_per_byte("held_out", progress=progress)
        tokens = recipe.training.batch_size * self.data.sequence_length
        self.per_step = {
            "tokens": tokens,
            "flops": tokens * training_flops_per_token(self.model, self.data.sequence_length),
        }
        self.micro_batch = recipe.micro_batch_size
        self.learning_rate, self.warmup = recipe.optimizer.learning_rate, recipe.optimizer.warmup
        self.fingerprints, self.source = self.data.fingerprints, str(self.data.path)

    def trainer(self, evaluate: Callable[[torch.nn.Module], dict[str, float]], **options: Any) -> RunTrainer:
        """A LanguageTrainer."""
        return self.trainer_class(evaluate_with=evaluate, skip_rows=self.skip_rows, **options)

    def evaluate(self, model: torch.nn.Module, *, device: torch.device) -> dict[str, float]:
        """Loss in nats per token, perplexity, bits per byte and the number of tokens."""
        measure = partial(evaluate_perplexity, tokens_per_byte=self.tokens_per_byte, batch_size=self.micro_batch)
        rows, ranks = self._held_out, self.ranks
        if ranks is None:
            return measure(model, rows)
        # Each forward pass needs all processes, so that they read equally many rows: what is left over, all of them do.
        parts = ranks.layout.batch_parts
        even = len(rows) - len(rows) % parts
        total = count = 0.0
        if even:
            mine = measure(model, cast(Any, Subset(cast(Any, rows), range(ranks.batch_part, even, parts))))
            total, count = ranks.sums(mine["loss"] * mine["tokens"], mine["tokens"])
        if even < len(rows):
            rest = measure(model, cast(Any, Subset(cast(Any, rows), range(even, len(rows)))))
            total, count = total + rest["loss"] * rest["tokens"], count + rest["tokens"]
        return perplexity_figures(total, round(count), self.tokens_per_byte)

    def example_loss(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        """Of the first rows."""
        batch = collate([self.data.train[i] for i in range(self.micro_batch)])
        return cast(torch.Tensor, model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False).loss)

    def summary(self, last: Mapping[str, Any]) -> dict[str, Any]:
        """Held-out figures and sizes."""
        names = ("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_tokens")
        return {
            **{name: last[name] for name in names},
            "parameters": self.model.num_parameters(),
            "non_embedding_parameters": non_embedding_parameters(self.model),
        }

    def save(self, run: Path, trainer: RunTrainer) -> None:
        """The model, loadable with from_pretrained, and its tokenizer."""
        self.model.config.use_cache = True
        if self.ranks is None:
            self.model.save_pretrained(run)
        else:
            write_model(self.model, run, self.ranks)
        if self.ranks is None or self.ranks.main:
            self.data.save_tokenizer(run)


def _steps(recipe: Recipe, data: TrainingData) -> int:
    batch = recipe.training.batch_size
    if len(data.train) < batch:
        raise UserError(
            f"{data.path} has {len(data.train)} training rows, fewer than training.batch_size {batch}: "
            "use a smaller batch, shorter sequences or more text"
        )
    return math.ceil(recipe.training.tokens / (batch * data.sequence_length))
