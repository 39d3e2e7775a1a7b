"""Language models: packed rows of tokens in, held-out perplexity out."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import set_seed

from tokenformer.data import TrainingData, open_data
from tokenformer.errors import UserError
from tokenformer.evaluation import evaluate_perplexity
from tokenformer.evaluation.perplexity import evenly_spaced
from tokenformer.models.cost import non_embedding_parameters, training_flops_per_token
from tokenformer.training.building import build_model
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
        self.model = build_model(recipe, self.data)
        self.tokens_per_byte = self.data.tokens_per_byte("held_out", progress=progress)
        tokens = recipe.training.batch_size * self.data.sequence_length
        self.per_step = {
            "tokens": tokens,
            "flops": tokens * training_flops_per_token(self.model, self.data.sequence_length),
        }
        self.micro_batch = recipe.training.micro_batch_size or recipe.training.batch_size
        self.learning_rate, self.warmup = recipe.optimizer.learning_rate, recipe.optimizer.warmup
        self.fingerprints, self.source = self.data.fingerprints, str(self.data.path)

    def trainer(self, evaluate: Callable[[torch.nn.Module], dict[str, float]], **options: Any) -> RunTrainer:
        """A LanguageTrainer."""
        return self.trainer_class(evaluate_with=evaluate, skip_rows=self.skip_rows, **options)

    def evaluate(self, model: torch.nn.Module, *, device: torch.device) -> dict[str, float]:
        """Loss in nats per token, perplexity, bits per byte and the number of tokens."""
        return evaluate_perplexity(
            model, self._held_out, tokens_per_byte=self.tokens_per_byte, batch_size=self.micro_batch
        )

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
        self.model.save_pretrained(run)
        self.data.save_tokenizer(run)


def _steps(recipe: Recipe, data: TrainingData) -> int:
    batch = recipe.training.batch_size
    if len(data.train) < batch:
        raise UserError(
            f"{data.path} has {len(data.train)} training rows, fewer than training.batch_size {batch}: "
            "use a smaller batch, shorter sequences or more text"
        )
    return math.ceil(recipe.training.tokens / (batch * data.sequence_length))
