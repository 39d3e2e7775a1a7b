"""Adapters in the checkpoints of a Trainer, which holds what `state_dict` holds: the model without them."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenformer.errors import UserError
from tokenformer.training.trainer import RunTrainer
from tokenformer.tuning.adapters import list_adapters
from tokenformer.tuning.files import restore_adapter, write_adapter

_FOLDER = "adapters"


class AdapterCheckpoints(TrainerCallback):
    """Writes the adapters of a model into each checkpoint of transformers' Trainer, and reads them when it resumes.

    Without it a resumed Trainer goes on with adapters that are new. `tokenformer tune` needs no callback.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Read them, where training is resumed.

        Raises:
            UserError: the checkpoint holds none.
        """
        if state.global_step == 0 or model is None:
            return
        for name in _trainable(model):
            folder = _checkpoint(args, state) / _FOLDER / name
            if not folder.is_dir():
                raise UserError(f"there is no adapter {folder}: resume from a checkpoint of this Trainer's output_dir")
            restore_adapter(model, name, folder)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Write them."""
        if model is None:
            return
        for name in _trainable(model):
            folder = _checkpoint(args, state) / _FOLDER / name
            folder.mkdir(parents=True, exist_ok=True)
            write_adapter(model, name, folder)


class AdapterTrainer(RunTrainer):
    """A trainer whose checkpoints hold the adapter alone: the rest is frozen, and stands in the base model's folder."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        assert isinstance(self.model, nn.Module)
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        for name in _trainable(self.model):
            write_adapter(self.model, name, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert isinstance(self.model, nn.Module)
        for name in _trainable(self.model):
            restore_adapter(self.model, name, Path(resume_from_checkpoint))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _trainable(model: nn.Module) -> list[str]:
    return [adapter.name for adapter in list_adapters(model) if not adapter.merged]
