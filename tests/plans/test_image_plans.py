"""Plans for image classifiers: against sums and training by hand, stopped, changed, and given what cannot work."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from conftest import image_plan
from tokenformer.cli import main
from tokenformer.cli.run import parse
from tokenformer.errors import UserError
from tokenformer.growth import grow_folder
from tokenformer.images import open_images
from tokenformer.plans import ImagePlan, Plan, Stage, collect, resolve, run_plan
from tokenformer.plans import runner as runner_module
from tokenformer.plans.dry_run import dry_run
from tokenformer.plans.plan import Start
from tokenformer.training import train
from tokenformer.training.image_building import load_any_classifier
from tokenformer.training.image_recipe import ImageModelRecipe, ImageOptimizerRecipe, ImageRecipe
from tokenformer.training.images import ImageTrainer

MakePlan = Callable[..., ImagePlan]
STEP = 16
ROOT = Path(__file__).parents[2]


def quiet(plan: ImagePlan) -> dict[str, Any]:
    return run_plan(plan, progress=False)


def solve(plan: ImagePlan) -> Any:
    return resolve(plan, classes=tuple("0123456789"), image_size=8, images=1438)


def same(one: Path, two: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What a plan comes to


def trunk(qkv: int, output: int, ffn: int, width: int = 32, layers: int = 2) -> int:
    """PAPER: 2 L d (3 n_qkv + n_o + n_ffn); the norms of the blocks have no parameters."""
    return 2 * layers * width * (3 * qkv + output + ffn)


def flops(trunk_products: int, width: int = 32, layers: int = 2, patches: int = 4, patch: int = 4) -> int:
    """Of an image with a class token and ten classes; no gradient flows into its pixels."""
    tokens, projection = patches + 1, 2 * patches * width * 3 * patch**2
    forward = tokens * 2 * trunk_products + 4 * layers * width * tokens**2 + projection + 2 * width * 10
    return 3 * forward - projection


def test_sizes_and_costs_by_hand(make_image_plan: MakePlan) -> None:
    resolved = solve(make_image_plan())
    base, grown, vit, scratch = (resolved[name] for name in ("base", "grown", "vit", "scratch"))
    assert base.counts.non_embedding_parameters == trunk(16, 16, 48)
    assert grown.counts.non_embedding_parameters == scratch.counts.non_embedding_parameters == trunk(24, 24, 64)
    others = 32 * 3 * 16 + 32 + 32 + 5 * 32 + 2 * 32 + 32 * 10 + 10  # patches, class token, positions, norm, classes
    assert base.counts.parameters == trunk(16, 16, 48) + others
    assert (base.steps, base.rows, base.tokens) == (6, 96, 96 * 5)
    assert base.counts.flops_per_row == flops(trunk(16, 16, 48))
    assert (base.flops, grown.flops) == (96 * flops(trunk(16, 16, 48)), 64 * flops(trunk(24, 24, 64)))
    assert grown.cumulative_flops == base.flops + grown.flops
    assert (grown.cumulative_rows, grown.rows_before) == (160, 96)
    d, f = vit.config.hidden_size, vit.config.intermediate_size
    by_hand = 2 * (4 * d * d + 4 * d + 2 * d * f + d + f + 4 * d)
    assert vit.counts.non_embedding_parameters == by_hand == pytest.approx(trunk(24, 24, 64), rel=0.02)
    assert (vit.config.image_size, vit.config.patch_size, vit.config.num_labels) == (8, 4, 10)
    assert vit.counts.flops_per_row == flops(2 * (4 * d * d + 2 * d * f), width=d)
    for stage, times in ((vit, 1.0), (scratch, 0.5)):
        wanted = times * grown.cumulative_flops
        assert abs(stage.cumulative_flops - wanted) <= 0.51 * STEP * stage.counts.flops_per_row


def test_a_continued_schedule_is_shared(make_image_plan: MakePlan) -> None:
    plan = make_image_plan()
    plan.stages[1].schedule = "continue"
    resolved = solve(plan)
    spans = [(resolved[n].optimizer.schedule_from, resolved[n].optimizer.schedule_to) for n in ("base", "grown")]
    assert spans == [(0.0, 0.6), (0.6, 1.0)]


def test_what_is_like_a_preset_has_its_patches(make_image_plan: MakePlan) -> None:
    plan = make_image_plan(
        model=ImageModelRecipe(preset="base-matched"),
        stages=[Stage(name="base", train=Start(), images=STEP)],
        baselines=[
            Stage(name="vit", family="vit", train=Start(like="base"), images=STEP),
            Stage(name="again", train=Start(like="base"), images=STEP),
        ],
    )
    resolved = resolve(plan, classes=tuple(map(str, range(1000))), image_size=32, images=100)
    base, vit, again = resolved.values()
    assert (vit.config.image_size, vit.config.patch_size) == (224, 16)
    assert (vit.config.hidden_size, vit.config.intermediate_size) == (768, pytest.approx(3072, rel=0.02))
    assert again.counts == base.counts


def test_stages_differ_in_the_blocks_themselves(make_image_plan: MakePlan) -> None:
    plan = make_image_plan()
    plan.baselines += [
        Stage(name="affine", train=Start(like="base", norm_affine=True), images=STEP),
        Stage(name="softmax", train=Start(like="base", normalization="softmax"), images=STEP),
    ]
    base, affine, softmax = (solve(plan)[name] for name in ("base", "affine", "softmax"))
    assert affine.counts.parameters == base.counts.parameters + 2 * 2 * 2 * 32  # layers, norms, weight and bias
    assert [stage.config.norm_affine for stage in (base, affine, softmax)] == [False, True, False]
    assert [stage.config.normalization for stage in (base, affine, softmax)] == ["l2_gelu", "l2_gelu", "softmax"]
    assert softmax.config.segments == affine.config.segments == base.config.segments


def test_dry_run_by_hand(make_image_plan: MakePlan) -> None:
    report = dry_run(make_image_plan(optimizer=ImageOptimizerRecipe(warmup_epochs=0.03)), gpu="h100", mfu=0.5)
    base, grown = report["stages"]["base"], report["stages"]["grown"]
    assert (report["unit"], report["assumed"]) == ("images", None)
    assert (base["images"], base["steps"], base["cumulative_images"], grown["cumulative_images"]) == (96, 6, 96, 160)
    assert base["warmup_steps"] == round(0.03 * (1438 // STEP))
    assert base["hours"] == pytest.approx(96 * flops(trunk(16, 16, 48)) / (0.5 * 989e12) / 3600)
    assert report["totals"]["images"] == 2 * 96 + 64 + sum(
        report["stages"][name]["images"] for name in ("vit", "scratch")
    )
    memory = base["memory"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert memory["moments"] == 8 * base["parameters"]


def test_dry_run_without_images(make_image_plan: MakePlan, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = make_image_plan()
    plan.data.train, plan.data.held_out = "nowhere/train", "nowhere/test"
    plan.assumed.classes, plan.assumed.images = 7, 12_345
    path = tmp_path / "plan.yaml"
    path.write_text(plan.to_yaml())
    assert main(["run", str(path), "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "none at nowhere/train, nowhere/test; 12,345 images of 7 classes" in shown
    assert "in blocks images steps" in shown
    assert [file.name for file in tmp_path.iterdir()] == ["plan.yaml"]


def test_yaml_there_and_back(make_image_plan: MakePlan) -> None:
    plan = make_image_plan(seeds=[3, 4])
    assert Plan.from_yaml(plan.to_yaml()) == plan


# Carried out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImagePlan, dict[str, Any]]:
    """A plan with a measure, two seeds of the life and a ViT that is trained on, for tests that only look at it."""
    plan = image_plan(tmp_path_factory.mktemp("finished") / "plan", seeds=[0, 5], measure={"same": "digits"})
    plan.baselines = [
        Stage(name="vit", family="vit", train=Start(like="grown"), flops_of="base", seeds=[0]),
        Stage(name="vit-on", after="vit", images=2 * STEP, seeds=[0]),
    ]
    return plan, quiet(plan)


def test_equals_train_and_grow_by_hand(finished: tuple[ImagePlan, dict[str, Any]], tmp_path: Path) -> None:
    plan, results = finished
    found = {}
    for rate in (1e-3, 3e-3):
        recipe = ImageRecipe(
            out=str(tmp_path / f"base-{rate:g}"),
            model=dataclasses.replace(plan.model, qkv=16, output=16, ffn=48),
            data=plan.data,
            augmentation=plan.augmentation,
            optimizer=dataclasses.replace(plan.optimizer, learning_rate=rate),
            training=dataclasses.replace(plan.training, images=96, seed=0),
        )
        found[rate] = train(recipe, progress=False)["eval_loss"]
    best = min(found, key=lambda rate: found[rate])
    assert results["stages"]["base"]["sweep"] == {f"{rate:g}": loss for rate, loss in found.items()}
    grow_folder(str(tmp_path / f"base-{best:g}"), str(tmp_path / "start"), qkv=24, output=24, ffn=64, seed=0)
    recipe = ImageRecipe(
        out=str(tmp_path / "grown"),
        model=ImageModelRecipe(path=str(tmp_path / "start")),
        data=dataclasses.replace(plan.data, skip_images=96),
        augmentation=plan.augmentation,
        optimizer=dataclasses.replace(plan.optimizer, learning_rate=2e-3),
        training=dataclasses.replace(plan.training, images=64, seed=0),
    )
    train(recipe, progress=False)
    assert same(tmp_path / "grown", Path(plan.out) / "grown" / "seed-0" / "lr-0.002")


def test_growing_changes_no_loss(finished: tuple[ImagePlan, dict[str, Any]]) -> None:
    stages = finished[1]["stages"]
    ends = {run["seed"]: run["eval_loss"] for run in stages["base"]["runs"] if run["chosen"]}
    starts = {run["seed"]: run["start_loss"] for run in stages["grown"]["runs"]}
    assert starts.keys() == {0, 5}
    assert starts == ends
    assert stages["vit-on"]["runs"][0]["start_loss"] == stages["vit"]["runs"][0]["eval_loss"]


def test_results_add_up(finished: tuple[ImagePlan, dict[str, Any]]) -> None:
    plan, results = finished
    assert results == collect(Path(plan.out)) == json.loads((Path(plan.out) / "results.json").read_text())
    assert (results["complete"], results["missing"]) == (True, [])
    assert results["quality"]["name"] == "top-1 error (%)"
    grown, vit = results["stages"]["grown"], results["stages"]["vit"]
    for run in grown["runs"]:
        summary = json.loads((Path(plan.out) / f"grown/seed-{run['seed']}/lr-0.002/summary.json").read_text())
        assert run["eval_error"] == pytest.approx(100 * (1 - summary["eval_top1"]))
        assert run["eval_top5_error"] == pytest.approx(100 * (1 - summary["eval_top5"]))
        assert run["held_out"][-1]["eval_error"] == run["eval_error"]
        assert run["held_out"][-1]["cumulative_flops"] == grown["cumulative_flops"]
        assert run["measures"]["same"] == {"start": run["start_loss"], "end": run["eval_loss"]}
    assert grown["eval_error"]["mean"] == pytest.approx(sum(run["eval_error"] for run in grown["runs"]) / 2)
    assert (grown["images"], grown["cumulative_images"], vit["sequence_length"]) == (64, 160, 5)


def test_the_error_is_that_of_the_saved_model(finished: tuple[ImagePlan, dict[str, Any]]) -> None:
    """Of the plan's ViT, on pixels taken from scikit-learn, normalised by hand."""
    plan, results = finished
    plan_images = open_images("digits").held_out
    labels = np.asarray(plan_images.labels)
    every = np.stack([np.asarray(plan_images[i][0]) for i in range(len(plan_images))])
    known = {image.tobytes() for image in np.rint(load_digits().images * (255 / 16)).astype(np.uint8)}
    assert all(image[..., 0].tobytes() in known for image in every)
    by_class = np.argsort(labels, kind="stable")
    chosen = by_class[[i * len(labels) // 60 for i in range(60)]]
    pixels = torch.tensor((every[chosen] / 255 - 0.3) / 0.35, dtype=torch.float32).permute(0, 3, 1, 2)
    (folder,) = (Path(plan.out) / "vit" / "seed-0").glob("lr-*")
    with torch.no_grad():
        logits = load_any_classifier(folder)(pixel_values=pixels).logits
    wrong = (logits.argmax(1).numpy() != labels[chosen]).mean()
    assert results["stages"]["vit"]["runs"][0]["eval_error"] == pytest.approx(100 * wrong)


def test_what_is_done_is_not_done_again(
    finished: tuple[ImagePlan, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "do", None)
    assert quiet(finished[0]) == finished[1]


def test_stopped_anywhere_it_ends_with_the_same_bits(
    finished: tuple[ImagePlan, dict[str, Any]], make_image_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan whose process ends in the middle of the fourth step of some run, again and again."""
    plan = dataclasses.replace(
        finished[0], out=make_image_plan().out, baselines=[], seeds=[0], measure={"same": "digits"}
    )
    plan.stages = [dataclasses.replace(plan.stages[0], learning_rate=[1e-3, 3e-3]), plan.stages[1]]
    original, seen = ImageTrainer.training_step, 0

    def step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == 4:
            seen = 0
            raise SystemExit("killed")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ImageTrainer, "training_step", step)
    stops = 0
    while stops < 50:
        try:
            quiet(plan)
            break
        except SystemExit:
            stops += 1
    assert 3 <= stops < 50
    run = Path("grown/seed-0/lr-0.002")
    assert same(Path(plan.out) / run, Path(finished[0].out) / run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda plan: setattr(plan.augmentation, "mixup", 0.2),
            r"stage 'base' has begun with another plan \(augmentation.mixup is 0.0 there and 0.2 here\)",
        ),
        (
            lambda plan: setattr(plan.stages[0], "images", 80),
            r"stage 'base' .*\(images is 96 there and 80 here\).*remove .*base",
        ),
        (
            lambda plan: setattr(plan.stages[1].grow, "ffn", 72),
            r"stage 'grown' has begun with another plan \(grow.ffn is 64 there and 72 here\)",
        ),
        (lambda plan: setattr(plan.model, "patch_size", 2), r"stage 'base' .*model.patch_size is 4 there and 2 here"),
    ],
)
def test_a_changed_plan_is_noticed(
    finished: tuple[ImagePlan, dict[str, Any]], change: Callable[[ImagePlan], None], message: str
) -> None:
    before = (Path(finished[0].out) / "plan.yaml").read_text()
    changed = ImagePlan.from_yaml(before)
    assert isinstance(changed, ImagePlan)
    changed.out = finished[0].out
    change(changed)
    with pytest.raises(UserError, match=message):
        quiet(changed)
    assert (Path(finished[0].out) / "plan.yaml").read_text() == before


# What cannot work


def stage(**fields: Any) -> dict[str, Any]:
    return {"name": "new", "images": STEP} | fields


# Fields of the plan's YAML that are replaced, or a stage that is added to the baselines; and words of the message.
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "shrinks": (stage(after="grown", grow={"qkv": 20}), ["'new': grow.qkv: 20 is fewer than the 24", "cannot shrink"]),
    "below one step": (
        stage(images=15, after="base"),
        ["'new': its budget of 15 images is below one step (16 images)"],
    ),
    "flops below one step": (
        {"name": "new", "flops_of": "base", "after": "base"},
        ["'new': its budget of 0 images is below one step"],
    ),
    "no such ViT": (
        stage(family="vit", train={"like": "base", "hidden_size": 512}),
        ["stage 'new'", "ViT", "2.00%", "hidden_size"],
    ),
    "grows a ViT": (stage(after="vit", grow={"like": "grown"}), ["stage 'new': grow: a ViT cannot be grown here"]),
    "tokens of a ViT": (stage(after="vit", grow={"qkv": 64}), ["stage 'new': grow: a ViT cannot be grown here"]),
    "size of a ViT": (stage(train={"like": "vit"}), ["stage 'new': train.like: 'vit' is a ViT; name a TokenFormer"]),
    "counts tokens": (
        {"name": "new", "tokens": 100, "after": "base"},
        ["stage 'new': tokens: the budgets of this plan are images"],
    ),
    "no budget": ({"name": "new", "after": "base"}, ["stage 'new': give its budget as images or as flops_of"]),
    "a language model": (
        stage(family="gpt_neox", train={"qkv": 8}),
        ["stage 'new': family: gpt_neox is not of this kind of plan; use tokenformer or vit"],
    ),
    "its own epochs": (stage(after="base", training={"epochs": 1}), ["stage 'new': training.epochs: not a field"]),
    "too large a batch": (
        stage(after="base", images=3000, training={"batch_size": 1500}),
        ["stage 'new'", "1438 training images, fewer than training.batch_size 1500"],
    ),
    "endless warm-up": (
        stage(after="base", optimizer={"warmup_epochs": 1.0}),
        ["stage 'new': optimizer.warmup_epochs 1 are more than"],
    ),
    "unknown normalization": (
        stage(train={"like": "base", "normalization": "l3"}),
        ["stage 'new': unknown normalization 'l3'", "gelu_l1"],
    ),
    "other images": (stage(after="base", data="nowhere/images"), ["nowhere/images"]),
    "missing images": ({"data": {"train": "nowhere/train"}}, ["nowhere/train"]),
    "no images": ({"data": {"train": ""}}, ["data.train: give digits, a folder"]),
    "missing measure": ({"measure": {"other": "nowhere/measure"}}, ["nowhere/measure"]),
    "patches do not fit": ({"model": {"image_size": 8, "patch_size": 3}}, ["8 x 8 pixels", "patches of 3"]),
    "two learning rates": (
        {"optimizer": {"base_learning_rate": 1e-4}},
        ["optimizer.base_learning_rate", "leave it out"],
    ),
    "a model to go on from": ({"model": {"path": "runs/other"}}, ["model.path: a plan begins with new models"]),
    "no augmentation": ({"augmentation": {"mixup": -1.0}}, ["stage 'base': augmentation.mixup must not be negative"]),
    "unknown field": ({"augmentation": {"mixed": 1.0}}, ["augmentation.mixed", "augmentation.mixup"]),
    "unknown task": ({"task": "segmentation"}, ["task", "image-classification", "segmentation"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_named_before_anything_is_done(
    make_image_plan: MakePlan, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    change, parts = BAD[case]
    plan = yaml.safe_load(make_image_plan().to_yaml())
    if "name" in change:
        plan["baselines"].append(change)
    else:
        ((name, value),) = change.items()
        plan[name] = plan[name] | value if isinstance(value, dict) else value
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    assert main(["run", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line
    assert [file.name for file in tmp_path.iterdir()] == ["plan.yaml"]


def test_images_of_other_classes(make_image_plan: MakePlan, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "animals" / name / f"{i}.png")
    plan = make_image_plan()
    plan.data.held_out = 0.5
    plan.stages[1].data = str(tmp_path / "animals")
    with pytest.raises(UserError, match=r"animals has other classes than digits \('cat', 'dog', '0'\)"):
        quiet(plan)
    plan.stages[1].data = None
    plan.measure = {"animals": str(tmp_path / "animals")}
    with pytest.raises(UserError, match="animals' has classes that the training images have not"):
        quiet(plan)
    assert not Path(plan.out).exists()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "vision").glob("*-growth.yaml")), ids=lambda p: p.stem)
def test_shipped_plans_come_to_what_they_say(path: Path) -> None:
    plan, _ = parse([str(path)])
    assert isinstance(plan, ImagePlan)
    report = dry_run(plan)
    rows = report["stages"]
    end = plan.stages[-1].name
    for baseline in plan.baselines:
        assert rows[baseline.name]["cumulative_flops"] == pytest.approx(rows[end]["cumulative_flops"], rel=0.02)
    vit = next(row for row in rows.values() if row["family"] == "vit")
    assert vit["non_embedding_parameters"] == pytest.approx(rows[end]["non_embedding_parameters"], rel=0.02)
    assert len(rows[end]["learning_rates"]) >= 2
