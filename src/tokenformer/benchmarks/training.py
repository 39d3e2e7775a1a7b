"""A training step, and the Trainer around it: what the benchmarks of training share."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from tokenformer.benchmarks.models import exact_copy
from tokenformer.training.trainer import LanguageTrainer

# Largest errors of logits and gradients, relative to the root mean square and to the largest. Autocast rounds the
# operands of each product to the 8 bits of a bfloat16, on the way back once more.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (5e-2, 1e-1)}


@dataclass(frozen=True)
class TrainingStep:
    """Forward, backward and AdamW on the same sequences.

    Attributes:
        model: that is trained, with float32 weights.
        optimizer: of its parameters.
        ids: the sequences, (B, T).
        dtype: of the products: float32, or bfloat16 by autocast.
        compiled: the model as torch.compile gives it; None runs it eager.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    ids: torch.Tensor
    dtype: torch.dtype
    compiled: Callable[..., Any] | None = None

    def __call__(self) -> None:
        """One step."""
        self._loss(self.ids)[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait(self.ids.device)

    def results(self, rows: int = 1) -> dict[str, torch.Tensor]:
        """Logits (rows, T, V) of the first sequences, their loss, and its gradients, all in one row.

        A model that computes its loss piece by piece has no logits to give.
        """
        loss, logits = self._loss(self.ids[:rows])
        # Zeros for a parameter that took no part, which is an error to report like any other.
        gradients = torch.autograd.grad(loss, list(self.model.parameters()), materialize_grads=True)
        return {
            **({} if logits is None else {"logits": logits.detach()}),
            "loss": loss.detach(),
            "gradients": torch.cat([gradient.flatten() for gradient in gradients]),
        }

    def exact_results(self, rows: int = 1) -> dict[str, torch.Tensor]:
        """`results` in float64, by the equation."""
        return replace(self, model=exact_copy(self.model), dtype=torch.float32, compiled=None).results(rows)

    def _loss(self, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            run = self.model if self.compiled is None else self.compiled
            output = run(input_ids=ids, labels=ids, use_cache=False)
        return output.loss, output.logits


def new_optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    """AdamW in one kernel, as `train` uses it."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def new_trainer(model: PreTrainedModel, rows: Any, folder: Path, batch: int) -> LanguageTrainer:
    """A Trainer for one step, as `train` sets it up: the same loader, the same checkpoints, nothing printed.

    Args:
        model: to train.
        rows: training rows with a column `input_ids`.
        folder: of the run.
        batch: rows of a step.
    """
    trainer = LanguageTrainer(
        run=folder,
        keep_checkpoints=1,
        autocast=None,
        evaluate_with=lambda model: {},
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batch,
            max_steps=1,
            save_strategy="no",
            logging_strategy="no",
            seed=0,
            data_seed=0,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            dataloader_pin_memory=model.device.type == "cuda",
            use_cpu=model.device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=rows,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def wait(device: torch.device) -> None:
    """Return when the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
