"""A step of TokenFormer-Base/16 at 224 pixels by its ImageNet recipe, on images of noise."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from image_samples import write_class_folders
from tokenformer.cli.train import parse
from tokenformer.images import collate_images
from tokenformer.training.image_recipe import ImageRecipe
from tokenformer.training.images import ImageTask
from tokenformer.training.run import _arguments

RECIPE = Path(__file__).parents[2] / "recipes" / "vision" / "imagenet-b16.yaml"
LAYERS, WIDTH, TOKENS, FFN, CLASSES, IMAGES = 12, 768, 768, 3072, 1000, 2
PATCHES = (224 // 16) ** 2


def shapes_by_hand() -> dict[str, tuple[int, ...]]:
    """Every parameter of the paper's Base: no biases but in patch projection, final norm and classifier."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embeddings.cls_token": (1, 1, WIDTH),
        "model.embeddings.position_embeddings": (1, PATCHES + 1, WIDTH),
        "model.embeddings.patch_embeddings.weight": (WIDTH, 3, 16, 16),
        "model.embeddings.patch_embeddings.bias": (WIDTH,),
        "model.norm.weight": (WIDTH,),
        "model.norm.bias": (WIDTH,),
        "classifier.weight": (CLASSES, WIDTH),
        "classifier.bias": (CLASSES,),
    }
    layers = {f"attention.{name}": TOKENS for name in ("query", "key", "value", "output")} | {"ffn": FFN}
    for block in range(LAYERS):
        for layer, tokens in layers.items():
            for half in ("key", "value"):
                shapes[f"model.layers.{block}.{layer}.segments.base.{half}"] = (tokens, WIDTH)
    return shapes


@pytest.mark.slow
def test_first_step_of_base_16_on_generated_images(tmp_path: Path) -> None:
    """The recipe as it is, with all of its augmentation, but for the batch, and at the peak of its learning rate."""
    names = [f"{number:04}" for number in range(CLASSES)]
    for part in ("train", "val"):
        write_class_folders(tmp_path / "imagenet" / part, names, each=1)
    words = ["--data.train", str(tmp_path / "imagenet"), "--out", str(tmp_path / "run"), "--data.workers", "0"]
    recipe = parse([str(RECIPE), *words, "--training.batch_size", "2", "--training.micro_batch_size", "2"])
    assert isinstance(recipe, ImageRecipe)
    task = ImageTask(recipe)
    assert task.steps == 300 * CLASSES // 2
    model: Any = task.model.train()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes_by_hand()
    trainer = task.trainer(
        lambda model: {},
        run=tmp_path / "run",
        keep_checkpoints=1,
        autocast=None,
        model=model,
        args=_arguments(recipe, task, "fp32", torch.device("cpu")),
        train_dataset=task.train_rows,
        eval_dataset=task.held_out_rows,
    )
    seen: dict[str, tuple[int, ...]] = {}
    parts = {"embeddings": model.model.embeddings, "norm": model.model.norm, "classifier": model.classifier}
    parts |= {f"layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    for name, part in parts.items():
        part.register_forward_hook(lambda part, given, out, name=name: seen.update({name: tuple(out.shape)}))

    batch = collate_images([task.train_rows[(index, index)] for index in range(IMAGES)])
    assert tuple(batch["images"].shape) == (IMAGES, 3, 224, 224)
    loss = trainer.compute_loss(model, batch)
    assert seen.pop("classifier") == (IMAGES, CLASSES)
    assert set(seen.values()) == {(IMAGES, PATCHES + 1, WIDTH)}
    assert len(seen) == LAYERS + 2
    assert loss.item() == pytest.approx(math.log(CLASSES), abs=0.5)  # a new model takes all classes for equally likely
    loss.backward()

    optimizer = trainer.create_optimizer()
    rate, decayed = 1e-4 * IMAGES / 256, 0
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(rate)
        decay = group["weight_decay"]
        for parameter in group["params"]:
            assert torch.isfinite(parameter.grad).all()
            # In the first step of AdamW both moments are, but for their bias, the gradient and its square.
            parameter.wanted = parameter.detach() * (1 - rate * decay)
            parameter.wanted -= rate * parameter.grad / (parameter.grad.abs() + 1e-8)
            decayed += parameter.numel() if decay else 0
    weights = LAYERS * 2 * WIDTH * (4 * TOKENS + FFN) + WIDTH * 3 * 16 * 16 + CLASSES * WIDTH
    assert decayed == weights
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3, 0.0}
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            torch.testing.assert_close(parameter.detach(), parameter.wanted, rtol=1e-5, atol=1e-8)
