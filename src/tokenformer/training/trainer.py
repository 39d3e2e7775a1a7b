"""transformers' Trainer with whole-or-absent checkpoints, named optimizer state and a loss that must stay finite."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer

from tokenformer.errors import UserError
from tokenformer.folders import CHECKPOINTS, PARTIAL, publish, saving

OPTIMIZER_FILE = "optimizer.pt"


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of equal length to `input_ids` and `labels`, both (B, T)."""
    ids = torch.tensor([row["input_ids"] for row in rows], dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


class LanguageTrainer(Trainer):
    """Trains a causal language model on packed rows.

    Args:
        run: folder of the run; checkpoints go to `run/checkpoints`.
        keep_checkpoints: whole checkpoints kept.
        autocast: dtype of the forward pass, None for that of the parameters.
        evaluate_with: what `evaluate` returns, without its `eval_` prefix.
        carried: named optimizer state to start from (`carried_state`).
        kwargs: passed to transformers' Trainer.
    """

    def __init__(
        self,
        *,
        run: Path,
        keep_checkpoints: int,
        autocast: torch.dtype | None,
        evaluate_with: Callable[[nn.Module], dict[str, float]],
        carried: dict[str, dict[str, torch.Tensor]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_collator=collate, **kwargs)
        self.run = run
        self.keep_checkpoints = keep_checkpoints
        self.autocast = autocast
        self.evaluate_with = evaluate_with
        self.carried = carried
        # Rows are of one length, so the mean over micro-batches is the mean over tokens; counting labels instead would
        # divide by T where T - 1 tokens are predicted.
        self.model_accepts_loss_kwargs = False

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast around the forward pass alone, so that torch.compile sees the model and not a wrapper."""
        stack = super().compute_loss_context_manager()
        if self.autocast is not None:
            stack.enter_context(torch.autocast(self.args.device.type, dtype=self.autocast))
        return stack

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass; stops before a non-finite loss can reach the parameters.

        Raises:
            UserError: naming step, learning rate and what to try.
        """
        loss = super().training_step(*args, **kwargs)
        self._require_finite("loss", loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float | None:
        # A finite loss can have an infinite gradient, and a checkpoint written after it would be of no use.
        norm: torch.Tensor | float | None = super()._clip_grad_norm(model)
        if norm is not None and not self.args.fp16:  # the gradient scaler of fp16 skips such a step by itself
            self._require_finite("gradient norm", torch.as_tensor(norm))
        return norm

    def _require_finite(self, what: str, value: torch.Tensor) -> None:
        if not torch.isfinite(value):
            raise UserError(
                f"the {what} became {value.item()} at step {self.state.global_step + 1} with learning rate "
                f"{self._get_learning_rate():.3g}: try a lower optimizer.learning_rate, a longer optimizer.warmup, "
                "a lower optimizer.max_grad_norm or training.precision fp32; the checkpoints before it are whole"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW whose state knows the parameters' names, so that it can follow them into a grown model."""
        if self.optimizer is None:
            model = model or cast(nn.Module, self.model)
            decayed = set(self.get_decay_parameter_names(model))
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [(n, p) for n, p in named if n in decayed], "weight_decay": self.args.weight_decay},
                {"params": [(n, p) for n, p in named if n not in decayed], "weight_decay": 0.0},
            ]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(groups, **options)
            if self.carried is not None:
                _restore(self.optimizer, self.carried)
        return self.optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure on the held-out rows, log and return it under `eval_` names."""
        with self.compute_loss_context_manager(), torch.compiler.set_stance("force_eager"):
            metrics = {f"eval_{name}": value for name, value in self.evaluate_with(cast(nn.Module, self.model)).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The output embedding is the input embedding, so it is not in the file.
        if set(load_result.missing_keys) - {"lm_head.weight"} or load_result.unexpected_keys:
            super()._issue_warnings_after_load(load_result)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run / CHECKPOINTS / PARTIAL)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        partial = self.run / CHECKPOINTS / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        with saving(self.run / CHECKPOINTS):
            super()._save_checkpoint(model, trial)
            publish(partial / f"checkpoint-{self.state.global_step}", self.run, self.keep_checkpoints)


def carried_state(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Optimizer state by parameter name from `folder/optimizer.pt`.

    Raises:
        UserError: there is none, or it was not written by this library.
    """
    path = folder / OPTIMIZER_FILE
    if not path.is_file():
        raise UserError(f"{path} not found: grow with `--optimizer carried`, or set optimizer.state to fresh")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        names = [name for group in saved["param_groups"] for name in group["param_names"]]
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        return {name: saved["state"][index] for name, index in zip(names, indices, strict=True)}
    except Exception as error:
        raise UserError(
            f"{path} is not an optimizer state with names: train again, or set optimizer.state to fresh"
        ) from error


def _restore(optimizer: torch.optim.Optimizer, carried: dict[str, dict[str, torch.Tensor]]) -> None:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in carried:
                state = carried[name]
                if state["exp_avg"].shape != parameter.shape:
                    raise UserError(
                        f"carried optimizer state of {name} has another shape: set optimizer.state to fresh"
                    )
                optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                    for key, value in state.items()
                }
