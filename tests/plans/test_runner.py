"""Plans carried out: against the same steps by hand, killed, changed, and given what cannot work."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tokenformer.errors import UserError
from tokenformer.growth import grow_folder
from tokenformer.plans import Plan, Stage, collect, run_plan
from tokenformer.plans import runner as runner_module
from tokenformer.plans.plan import Growth, Start
from tokenformer.training import Recipe, train
from tokenformer.training.collapse import Collapse
from tokenformer.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, TrainingRecipe
from tokenformer.training.trainer import LanguageTrainer

MakePlan = Callable[..., Plan]
STEP = 4 * 32


def quiet(plan: Plan, **options: Any) -> dict[str, Any]:
    return run_plan(plan, progress=False, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, two: Path) -> bool:
    first, second = weights(one), weights(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, words: Path) -> tuple[Plan, dict[str, Any]]:
    """A plan with two seeds and a measure, carried out once for the tests that only look at it."""
    plan = Plan(
        out=str(tmp_path_factory.mktemp("finished") / "plan"),
        seeds=[0, 5],
        data=DataRecipe(path=str(words), held_out_rows=8),
        measure={"same": str(words)},
        model=ModelRecipe(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, rotary_pct=0.5),
        optimizer=OptimizerRecipe(warmup=0.1),
        training=TrainingRecipe(
            batch_size=4, save_every=2, log_every=1, eval_every=3, precision="fp32", compile="off", threads=1
        ),
        stages=[
            Stage(name="base", train=Start(qkv=16, output=16, ffn=48), tokens=6 * STEP, learning_rate=[1e-3, 3e-3]),
            Stage(name="grown", grow=Growth(qkv=24, output=24, ffn=64), tokens=4 * STEP, learning_rate=2e-3),
        ],
        baselines=[
            Stage(name="transformer", family="gpt_neox", train=Start(like="base"), tokens=3 * STEP),
            Stage(
                name="wider", after="transformer", grow=Growth(intermediate_size=256, method="net2net"), tokens=2 * STEP
            ),
            Stage(name="trained-on", after="base", tokens=2 * STEP, learning_rate=1e-3),
        ],
    )
    return plan, quiet(plan)


def test_equals_train_and_grow_by_hand(finished: tuple[Plan, dict[str, Any]], tmp_path: Path) -> None:
    plan, results = finished
    found = {}
    for rate in (1e-3, 3e-3):
        recipe = Recipe(
            out=str(tmp_path / f"base-{rate:g}"),
            model=dataclasses.replace(plan.model, qkv=16, output=16, ffn=48),
            data=plan.data,
            optimizer=dataclasses.replace(plan.optimizer, learning_rate=rate),
            training=dataclasses.replace(plan.training, tokens=6 * STEP, seed=0),
        )
        found[rate] = train(recipe, progress=False)["eval_loss"]
    best = min(found, key=lambda rate: found[rate])
    assert results["stages"]["base"]["sweep"] == {f"{rate:g}": loss for rate, loss in found.items()}
    assert results["stages"]["base"]["learning_rate"] == best
    grow_folder(str(tmp_path / f"base-{best:g}"), str(tmp_path / "start"), qkv=24, output=24, ffn=64, seed=0)
    recipe = Recipe(
        out=str(tmp_path / "grown"),
        model=ModelRecipe(path=str(tmp_path / "start")),
        data=dataclasses.replace(plan.data, skip_rows=24),  # the 6 steps of 4 rows before
        optimizer=dataclasses.replace(plan.optimizer, learning_rate=2e-3),
        training=dataclasses.replace(plan.training, tokens=4 * STEP, seed=0),
    )
    train(recipe, progress=False)
    assert same(tmp_path / "grown", Path(plan.out) / "grown" / "seed-0" / "lr-0.002")


def test_growing_changes_no_loss(finished: tuple[Plan, dict[str, Any]]) -> None:
    stages = finished[1]["stages"]
    ends = {run["seed"]: run["eval_loss"] for run in stages["base"]["runs"] if run["chosen"]}
    starts = {run["seed"]: run["start_loss"] for run in stages["grown"]["runs"]}
    assert starts.keys() == {0, 5}
    assert starts == ends


def test_results_add_up(finished: tuple[Plan, dict[str, Any]]) -> None:
    plan, results = finished
    assert results == collect(Path(plan.out)) == json.loads((Path(plan.out) / "results.json").read_text())
    assert results["complete"]
    assert results["missing"] == []
    assert results["subject"] == ["base", "grown"]
    base, grown = results["stages"]["base"], results["stages"]["grown"]
    assert len(base["runs"]) == 3  # two rates with the first seed, the better one with the second
    assert [run["seed"] for run in base["runs"]] == [0, 0, 5]
    losses = [run["eval_loss"] for run in base["runs"] if run["chosen"]]
    mean = sum(losses) / 2
    assert base["eval_loss"]["mean"] == pytest.approx(mean)
    assert base["eval_loss"]["std"] == pytest.approx(math.sqrt(sum((loss - mean) ** 2 for loss in losses)))
    assert base["at_edge"]
    assert grown["sweep"] == {}
    assert not grown["at_edge"]
    for run in grown["runs"]:
        before = next(other for other in base["runs"] if other["chosen"] and other["seed"] == run["seed"])
        assert run["cumulative_seconds"] == pytest.approx(before["seconds"] + run["seconds"])
        last = run["held_out"][-1]
        assert last["cumulative_flops"] == grown["cumulative_flops"] == base["flops"] + grown["flops"]
        assert last["loss"] == run["eval_loss"]
        # held_out_rows and batch are the same, so the plan's own data as a measure give the same number
        assert run["measures"]["same"] == {"start": run["start_loss"], "end": run["eval_loss"]}
        assert [point["tokens"] for point in run["curve"]] == [STEP * step for step in range(1, 5)]


def test_only_the_chosen_weights_are_kept(finished: tuple[Plan, dict[str, Any]]) -> None:
    plan, results = finished
    kept = f"lr-{results['stages']['base']['learning_rate']:g}"
    for run in (Path(plan.out) / "base" / "seed-0").glob("lr-*"):
        assert (run / "model.safetensors").exists() == (run.name == kept)
        assert (run / "metrics.jsonl").exists()
        assert not (run / "checkpoints").exists()


def test_what_is_done_is_not_done_again(finished: tuple[Plan, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "do", None)
    assert quiet(finished[0]) == finished[1]


def test_more_seeds_and_stages_are_added(make_plan: MakePlan) -> None:
    plan = make_plan(baselines=[])
    quiet(plan)
    before = {file: file.stat().st_mtime_ns for file in Path(plan.out).rglob("model.safetensors")}
    later = Stage(name="later", after="grown", tokens=2 * STEP)
    results = quiet(dataclasses.replace(plan, baselines=[later], seeds=[0, 1]))
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert [run["seed"] for run in results["stages"]["later"]["runs"]] == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 5 * STEP}, r"stage 'base' has begun with another plan \(tokens is 768 there and 640 here\)"),
        ({"optimizer": {"beta1": 0.5}}, r"stage 'base' .*optimizer.beta1 is 0.9 there and 0.5 here"),
        ({"train": Start(qkv=17, output=16, ffn=48)}, r"stage 'base' has begun with another plan \(model.segments"),
    ],
)
def test_a_changed_plan_is_noticed(make_plan: MakePlan, change: dict[str, Any], message: str) -> None:
    plan = make_plan(stages=make_plan().stages[:1], baselines=[])
    plan.stages[0].learning_rate = 1e-3
    quiet(plan)
    before = (Path(plan.out) / "plan.yaml").read_text()
    changed = dataclasses.replace(plan, stages=[dataclasses.replace(plan.stages[0], **change)])
    with pytest.raises(UserError, match=message + r".*remove .*base"):
        quiet(changed)
    assert (Path(plan.out) / "plan.yaml").read_text() == before


def test_a_new_rate_that_is_better_than_what_was_grown_from_is_refused(make_plan: MakePlan) -> None:
    plan = make_plan(baselines=[])
    plan.stages[0].learning_rate = 1e-5
    quiet(plan)
    plan.stages[0].learning_rate = [1e-5, 3e-3]
    with pytest.raises(UserError, match=r"stage 'grown' went on from base/seed-0/lr-1e-05, but now .*lr-0.003"):
        quiet(plan)


@pytest.mark.parametrize("content", ["file", "folder", "stage"])
def test_a_folder_of_something_else(make_plan: MakePlan, content: str) -> None:
    plan = make_plan()
    out = Path(plan.out)
    if content == "file":
        out.write_text("mine")
        message = "is a file"
    elif content == "folder":
        (out / "mine").mkdir(parents=True)
        message = "is not empty and holds no plan"
    else:
        first = make_plan(stages=[Stage(name="other", train=Start(qkv=4), tokens=STEP)], baselines=[])
        quiet(first)
        (out / "base" / "seed-0").mkdir(parents=True)
        message = r"base is of another plan"
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match=message):
        quiet(plan)
    assert sorted(out.rglob("*")) == before


def test_missing_data_are_named_before_anything_is_done(make_plan: MakePlan, tmp_path: Path) -> None:
    plans = [
        (make_plan(data=DataRecipe(path="")), "data.path: give a folder"),
        (make_plan(data=DataRecipe(path=str(tmp_path / "none"))), "no prepared data at .*none"),
        (make_plan(measure={"specs": str(tmp_path / "none")}), "no prepared data at .*none"),
    ]
    elsewhere = make_plan()
    elsewhere.stages[1].data = str(tmp_path / "none")
    for plan, message in [*plans, (elsewhere, "no prepared data at .*none")]:
        with pytest.raises(UserError, match=message):
            quiet(plan)
        assert not Path(plan.out).exists()


def test_data_of_another_tokenizer_or_length(make_plan: MakePlan, words: Path, tmp_path: Path) -> None:
    from tokenformer.data import prepare

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"x {n} y"}) + "\n" for n in range(400)))
    common: dict[str, Any] = {"held_out": 0.2, "progress": False}
    prepare([str(text)], tokenizer="train:280", out=str(tmp_path / "one"), sequence_length=32, **common)
    prepare([str(text)], tokenizer=str(words / "tokenizer"), out=str(tmp_path / "two"), sequence_length=16, **common)
    with pytest.raises(UserError, match=r"one was prepared with another tokenizer than .*--tokenizer"):
        quiet(make_plan(measure={"other": str(tmp_path / "one")}))
    with pytest.raises(UserError, match=r"two is cut into rows of 16, .* of 32"):
        quiet(make_plan(measure={"other": str(tmp_path / "two")}))


def test_other_data_are_trained_on_and_measured(make_plan: MakePlan, words: Path, other_words: Path) -> None:
    plan = make_plan(baselines=[], measure={"old": str(words), "new": str(other_words)})
    plan.stages[0].learning_rate = 3e-3
    plan.stages[1].data = str(other_words)
    plan.stages[1].tokens = 12 * STEP
    run = quiet(plan)["stages"]["grown"]["runs"][0]
    assert run["start_loss"] == run["measures"]["new"]["start"] != run["measures"]["old"]["start"]
    assert run["eval_loss"] == run["measures"]["new"]["end"] < run["measures"]["new"]["start"]
    assert run["measures"]["old"]["end"] != run["measures"]["old"]["start"]


def test_a_rate_that_collapses_is_a_result(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    def collapsing(recipe: Recipe, **options: Any) -> dict[str, Any]:
        if recipe.optimizer.learning_rate == 3e-3:
            raise Collapse("loss nan", 3, 3e-3)
        return train(recipe, **options)

    monkeypatch.setattr("tokenformer.plans.jobs.train", collapsing)
    results = quiet(make_plan(baselines=[]))
    base = results["stages"]["base"]
    assert base["sweep"]["0.003"] is None
    assert base["learning_rate"] == 1e-3
    assert results["complete"]


def test_every_rate_collapses(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    def collapsing(recipe: Recipe, **options: Any) -> dict[str, Any]:
        raise Collapse("loss nan", 3, recipe.optimizer.learning_rate)

    monkeypatch.setattr("tokenformer.plans.jobs.train", collapsing)
    with pytest.raises(UserError, match="stage 'base': training collapsed at every learning rate"):
        quiet(make_plan(baselines=[]))


def test_stopped_anywhere_it_ends_with_the_same_bits(
    finished: tuple[Plan, dict[str, Any]], make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan whose process ends in the middle of the fifth step of some run, again and again."""
    plan = dataclasses.replace(finished[0], out=make_plan().out)
    original = LanguageTrainer.training_step
    seen = 0

    def step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == 5:
            seen = 0
            raise SystemExit("killed")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LanguageTrainer, "training_step", step)
    for _ in range(100):
        try:
            quiet(plan)
            break
        except SystemExit:
            continue
    for folder in ("base/seed-5", "grown/seed-0", "grown/seed-5", "wider/seed-5", "trained-on/seed-0"):
        (one,) = (path.parent for path in (Path(plan.out) / folder).glob("lr-*/model.safetensors"))
        assert same(one, Path(finished[0].out) / one.relative_to(plan.out)), folder


@pytest.mark.slow
def test_killed_with_its_workers_it_goes_on_to_the_same_bits(
    finished: tuple[Plan, dict[str, Any]], tmp_path: Path
) -> None:
    plan = dataclasses.replace(finished[0], out=str(tmp_path / "plan"))
    (tmp_path / "plan.yaml").write_text(plan.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "tokenformer", "run", str(tmp_path / "plan.yaml"), "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(Path(plan.out).glob("base/seed-0/lr-*/checkpoints/checkpoint-*")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for pid in map(int, children.stdout.split()):
        while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline, "a worker outlived the plan"
            time.sleep(0.1)
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for model in Path(finished[0].out).glob("*/seed-*/lr-*/model.safetensors"):
        assert same(model.parent, Path(plan.out) / model.parent.relative_to(finished[0].out)), model
