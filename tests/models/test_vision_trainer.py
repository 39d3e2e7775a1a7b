"""The classifier under transformers' Trainer: what the loss says of a batch is not summed or counted a second time."""

from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from statement import TOLERANCE, error
from tiny_vision import tiny_classifier, tiny_pixels


def _trained(folder: Path, *, batch: int, accumulated: int) -> dict[str, torch.Tensor]:
    """Parameters after one step of gradient descent on four images with soft labels."""
    torch.manual_seed(0)
    model = tiny_classifier()
    targets = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)).softmax(1)
    images = [{"pixel_values": pixels, "labels": row} for pixels, row in zip(tiny_pixels(4), targets, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=images).train()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_accumulated_batches_train_as_one(tmp_path: Path) -> None:
    whole = _trained(tmp_path / "whole", batch=4, accumulated=1)
    parts = _trained(tmp_path / "parts", batch=1, accumulated=4)
    torch.manual_seed(0)
    before = dict(tiny_classifier().named_parameters())
    for name, parameter in whole.items():
        assert error(parts[name], parameter) < TOLERANCE[torch.float32], name
        assert not torch.equal(parameter, before[name]), name
