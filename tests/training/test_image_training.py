"""Training an image classifier against the same steps written out by hand; resuming, averaging, and bad recipes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from tokenformer.cli import main
from tokenformer.cli.train import parse
from tokenformer.errors import UserError
from tokenformer.growth import grow_folder
from tokenformer.images import TrainingImages, open_images
from tokenformer.training import ImageRecipe, train
from tokenformer.training.callbacks import read_metrics
from tokenformer.training.image_building import build_classifier
from tokenformer.training.image_recipe import (
    AugmentationRecipe,
    ImageDataRecipe,
    ImageModelRecipe,
    ImageOptimizerRecipe,
    ImageTrainingRecipe,
)
from tokenformer.training.images import ImageTrainer, layer_rates

MakeRecipe = Callable[..., ImageRecipe]
STEPS, BATCH = 6, 16
MEAN, STD = [0.3, 0.3, 0.3], [0.35, 0.35, 0.35]


@pytest.fixture
def make_recipe(tmp_path: Path) -> MakeRecipe:
    """Six steps of 16 digits, not augmented, on a model of two blocks and 16 channels."""

    def make(out: str = "run", **fields: Any) -> ImageRecipe:
        recipe = ImageRecipe(
            out=str(tmp_path / out),
            model=ImageModelRecipe(
                image_size=8,
                patch_size=4,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                qkv=8,
                output=8,
                ffn=24,
            ),
            data=ImageDataRecipe(train="digits", held_out_images=40, mean=MEAN, std=STD),
            augmentation=AugmentationRecipe(
                crop="none", flip=0.0, randaugment_ops=0, mixup=0.0, cutmix=0.0, label_smoothing=0.1
            ),
            optimizer=ImageOptimizerRecipe(learning_rate=3e-3, warmup=0.5, min_ratio=0.0, weight_decay=0.2),
            training=ImageTrainingRecipe(
                images=STEPS * BATCH, batch_size=BATCH, save_every=2, log_every=1, precision="fp32", threads=1
            ),
        )
        for name, value in fields.items():
            section, _, field = name.partition("__")
            setattr(getattr(recipe, section), field, value)
        return recipe

    return make


def augmented(recipe: ImageRecipe) -> ImageRecipe:
    """The same with everything random that there is."""
    recipe.augmentation = AugmentationRecipe(crop="pad", randaugment_ops=1, erasing=0.3)
    recipe.model.drop_path = 0.2
    recipe.training.ema = 0.9
    return recipe


def losses(recipe: ImageRecipe) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(recipe.out) / "metrics.jsonl") if "loss" in line]


def weights(recipe: ImageRecipe) -> dict[str, torch.Tensor]:
    return load_file(Path(recipe.out) / "model.safetensors")


def by_hand(recipe: ImageRecipe) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Plain AdamW on normalised pixels with smoothed targets; losses, and the weights after each step."""
    data = open_images("digits")
    set_seed(recipe.training.seed)
    model = build_classifier(recipe, data).train()
    plain = {n for n, p in model.named_parameters() if p.dim() == 1 or "position" in n or "cls_token" in n}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if n not in plain], "weight_decay": 0.2},
            {"params": [p for n, p in model.named_parameters() if n in plain], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(recipe.training.seed)).tolist()
    found, states = [], []
    for step in range(STEPS):
        rate = step / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 3))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        items = [data.train[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        pixels = torch.stack([torch.tensor(np.asarray(image)).permute(2, 0, 1) for image, _ in items]) / 255
        targets = torch.full((BATCH, 10), 0.01)
        targets[range(BATCH), [label for _, label in items]] += 0.9
        logits = model((pixels - 0.3) / 0.35).logits
        loss = -(targets * logits.log_softmax(1)).sum(1).mean()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        states.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    return found, states


def test_losses_and_weights_equal_a_hand_written_loop(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    train(recipe, progress=False)
    expected, states = by_hand(recipe)
    assert losses(recipe) == pytest.approx(expected, rel=2e-5)
    for name, tensor in weights(recipe).items():
        torch.testing.assert_close(tensor, states[-1][name], rtol=1e-3, atol=2e-5)


def test_the_moving_average_is_that_of_the_weights(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training__ema=0.7)
    summary = train(recipe, progress=False)
    _, states = by_hand(recipe)
    average = states[0]
    for state in states[1:]:
        average = {name: 0.7 * average[name] + 0.3 * state[name] for name in average}
    for name, tensor in weights(recipe).items():
        if not name.endswith("scale"):
            torch.testing.assert_close(tensor, average[name], rtol=1e-3, atol=2e-5)
    assert summary["eval_loss"] != summary["eval_raw_loss"]


def test_micro_batches_add_up_to_the_batch(make_recipe: MakeRecipe) -> None:
    whole, split = make_recipe("whole"), make_recipe("split", training__micro_batch_size=4)
    train(whole, progress=False)
    train(split, progress=False)
    assert losses(split) == pytest.approx(losses(whole), rel=2e-5)


# transformers saves a ViT under other names than its parameters have.
@pytest.mark.parametrize(("family", "fatal"), [("tokenformer", 1), ("tokenformer", 4), ("tokenformer", 6), ("vit", 4)])
def test_a_killed_run_resumes_bit_identically(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, family: Any, fatal: int
) -> None:
    straight, killed = (
        augmented(make_recipe(name, model__family=family, model__intermediate_size=24 if family == "vit" else None))
        for name in ("straight", "killed")
    )
    train(straight, progress=False)
    original = ImageTrainer.training_step
    done = []

    def dying(self: ImageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        done.append(1)
        if len(done) == fatal:
            raise RuntimeError("killed")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ImageTrainer, "training_step", dying)
        with pytest.raises(RuntimeError, match="killed"):
            train(killed, progress=False)
    killed.data.workers = straight.data.workers
    train(killed, progress=False)
    assert losses(killed) == losses(straight)
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(killed)[name]), name
    first, second = (json.loads((Path(r.out) / "summary.json").read_text()) for r in (straight, killed))
    assert first["eval_loss"] == second["eval_loss"]
    assert first["eval_raw_loss"] == second["eval_raw_loss"]


def test_workers_change_nothing(make_recipe: MakeRecipe) -> None:
    alone, helped = augmented(make_recipe("alone")), augmented(make_recipe("helped", data__workers=2))
    train(alone, progress=False)
    train(helped, progress=False)
    assert losses(helped) == losses(alone)


def test_crops_follow_the_position_in_the_run(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    original = TrainingImages.__getitem__

    def remember(self: TrainingImages, item: Any) -> Any:
        asked.append(item)
        return original(self, item)

    monkeypatch.setattr(TrainingImages, "__getitem__", remember)
    recipe = make_recipe(training__images=None, training__epochs=2.0, training__batch_size=400)
    train(recipe, progress=False)
    assert [position for _, position in asked] == list(range(len(asked)))
    assert len(asked) == 2 * (len(open_images("digits").train) // 400) * 400


def test_what_a_run_leaves_loads_everywhere(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(data__held_out_images=None)
    summary = train(recipe, progress=False)
    model = AutoModelForImageClassification.from_pretrained(recipe.out).eval()
    processor = AutoImageProcessor.from_pretrained(recipe.out)
    held_out = open_images("digits").held_out
    images, labels = zip(*(held_out[i] for i in range(len(held_out))), strict=True)
    logits = model(**processor(list(images), return_tensors="pt")).logits.double()
    labels = torch.tensor(labels)
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert (logits.argmax(1) == labels).double().mean().item() == pytest.approx(summary["eval_top1"])
    assert model.config.id2label == {i: str(i) for i in range(10)}


def test_training_goes_on_from_a_grown_folder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first = make_recipe("first")
    before = train(first, progress=False)
    grow_folder(first.out, str(tmp_path / "grown"), qkv=16, ffn=48, optimizer="carried")
    fields = {"model__path": str(tmp_path / "grown"), "optimizer__state": "carried", "optimizer__old_tokens": 0.0}
    second = make_recipe("second", **fields, optimizer__learning_rate=1e-30)
    after = train(second, progress=False)
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)  # exact growth, and nothing learned
    assert after["parameters"] == before["parameters"] + 2 * 2 * 16 * (3 * 8 + 24)
    third = make_recipe("third", **fields)
    train(third, progress=False)
    old, new = weights(second), weights(third)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(".grown1." in name for name in changed)


def test_other_classes_need_a_new_classifier(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first = make_recipe("first")
    train(first, progress=False)
    config = Path(first.out) / "config.json"
    named = json.loads(config.read_text())
    named["id2label"] = {str(i): f"digit {i}" for i in range(10)}
    named["label2id"] = {name: int(i) for i, name in named["id2label"].items()}
    config.write_text(json.dumps(named))
    second = make_recipe("second", model__path=first.out)
    with pytest.raises(UserError, match=r"class 0 is 'digit 0' .* model\.reset_classifier"):
        train(second, progress=False)
    assert not Path(second.out).exists()
    second.model.reset_classifier = True
    train(second, progress=False)
    assert AutoModelForImageClassification.from_pretrained(second.out).config.id2label[3] == "3"


def test_layer_decay_counts_blocks_from_the_top(make_recipe: MakeRecipe) -> None:
    model = build_classifier(make_recipe(), open_images("digits"))
    rates = layer_rates(model, 0.5)
    assert {rate for name, rate in rates.items() if "embeddings" in name} == {0.125}
    assert {rate for name, rate in rates.items() if ".layers.0." in name} == {0.25}
    assert {rate for name, rate in rates.items() if ".layers.1." in name} == {0.5}
    assert {rate for name, rate in rates.items() if name.startswith(("classifier", "model.norm"))} == {1.0}
    assert set(rates) == {name for name, _ in model.named_parameters()}


def test_a_vit_is_trained_alike(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(model__family="vit", model__drop_path=0.1)
    summary = train(recipe, progress=False)
    assert AutoModelForImageClassification.from_pretrained(recipe.out).config.model_type == "vit"
    assert losses(recipe)[-1] < losses(recipe)[0]
    assert summary["tokens"] == STEPS * BATCH * 5


def test_the_paper_states_its_rate_for_256_images() -> None:
    recipe = ImageRecipe(
        optimizer=ImageOptimizerRecipe(base_learning_rate=1e-4), training=ImageTrainingRecipe(batch_size=4096)
    )
    assert recipe.learning_rate == pytest.approx(1.6e-3)


def test_the_command_trains_and_says_what_came_out(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe().to_yaml(), encoding="utf-8")
    assert main(["train", str(path), "--optimizer.learning_rate", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "top-1" in out
    assert "tokenformer eval" in out
    assert main(["train", str(path)]) == 2
    assert "optimizer.learning_rate is 0.001 there and 0.003 here" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("recipes/vision/*.yaml")), ids=lambda p: p.stem)
def test_shipped_vision_recipes_are_valid(path: Path) -> None:
    if "stages:" in path.read_text(encoding="utf-8"):
        pytest.skip("a plan, tested with the plans")
    parse([str(path), "--out", "run"]).validate()


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"training__epochs": 0.0}, "training.epochs must be positive"),
        ({"training__ema": 1.0}, "training.ema must be below 1"),
        ({"model__drop_path": 1.5}, "model.drop_path must lie between 0 and 1"),
        ({"augmentation__mixup": -1.0}, "augmentation.mixup must not be negative"),
        ({"augmentation__label_smoothing": 2.0}, "augmentation.label_smoothing must lie between 0 and 1"),
        ({"optimizer__layer_decay": 1.1}, "optimizer.layer_decay must lie between 0 and 1"),
        ({"data__std": [0.1, 0.0, 0.1]}, "data.std must be positive"),
        ({"data__mean": [0.1]}, "data.mean needs a value for each of the channels"),
        ({"model__family": "vit", "model__preset": "base"}, "model.preset"),
        ({"model__reset_classifier": True}, "model.reset_classifier needs model.path"),
        ({"model__patch_size": 3}, "8"),
        ({"training__batch_size": 5000}, "fewer than training.batch_size 5000"),
        ({"data__train": "nowhere/at/all"}, "nowhere/at/all"),
        ({"model__path": "nowhere"}, "nowhere"),
    ],
)
def test_bad_recipes_leave_nothing(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], part: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe(**fields).to_yaml(), encoding="utf-8")
    assert main(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tokenformer train: error: ")
    assert part in line
    assert not (tmp_path / "run").exists()
