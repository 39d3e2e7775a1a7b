"""`torchrun -m tokenformer train`: the run of one process over several, killed, restarted, and on other layouts."""

import errno
import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from disturbed_train import poisoned

from tokenformer import TokenFormerForCausalLM
from tokenformer.cli import main
from tokenformer.data import prepare
from tokenformer.errors import UserError
from tokenformer.folders import saving
from tokenformer.growth import grow_folder
from tokenformer.parallel.heartbeat import start_heartbeat
from tokenformer.training import Recipe, train
from tokenformer.training.callbacks import read_metrics
from tokenformer.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, ParallelRecipe, TrainingRecipe
from tokenformer.training.trainer import LanguageTrainer

DISTURBED = str(Path(__file__).with_name("disturbed_train.py"))
# Sums in float32 in another order, over twelve steps of AdamW.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus, and the run of one process on it."""
    folder = tmp_path_factory.mktemp("runs")
    draw = random.Random(0)
    words = ["def", "self", "return", "value", "for", "in", "(", ")", ":", "x", "token", "if", "not", "None"]
    text = "".join(json.dumps({"text": " ".join(draw.choices(words, k=60))}) + "\n" for _ in range(60))
    (folder / "text.jsonl").write_text(text, encoding="utf-8")
    prepare(
        [str(folder / "text.jsonl")],
        tokenizer="train:300",
        out=str(folder / "data"),
        sequence_length=32,
        held_out=0.1,
        progress=False,
    )
    train(recipe_in(folder, "one"), progress=False)
    return folder


def recipe_in(folder: Path, out: str) -> Recipe:
    """Twelve steps of 8 rows in two passes, a checkpoint every four."""
    return Recipe(
        out=str(folder / out),
        model=ModelRecipe(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, qkv=16, output=16, ffn=45, rotary_pct=0.5
        ),
        data=DataRecipe(path=str(folder / "data")),
        optimizer=OptimizerRecipe(learning_rate=3e-3, warmup=0.1, max_grad_norm=0.5),
        training=TrainingRecipe(
            tokens=12 * 8 * 32,
            batch_size=8,
            save_every=4,
            keep_checkpoints=9,
            log_every=1,
            precision="fp32",
            threads=1,
        ),
    )


def file_of(recipe: Recipe) -> str:
    path = Path(recipe.out + ".yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(recipe.to_yaml())), encoding="utf-8")
    return str(path)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def parameters(run: Path) -> dict[str, torch.Tensor]:
    return TokenFormerForCausalLM.from_pretrained(run).state_dict()


def assert_same_run(run: Path, other: Path) -> None:
    assert losses(run) == pytest.approx(losses(other), abs=ROUNDING)
    ends = [json.loads((each / "summary.json").read_text())["eval_loss"] for each in (run, other)]
    assert ends[0] == pytest.approx(ends[1], abs=ROUNDING)
    theirs = parameters(other)
    for name, tensor in parameters(run).items():
        # AdamW divides by the gradient's own size: where that is rounding alone, so is the step.
        assert (tensor - theirs[name]).abs().mean() < ROUNDING, name


def rewound(run: Path, to: Path, step: int) -> Path:
    """A copy of a run as it was when it had just written a checkpoint."""
    shutil.copytree(run, to)
    for checkpoint in (to / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    for name in ("model.safetensors", "summary.json"):
        (to / name).unlink()
    return to


@pytest.mark.slow
def test_a_killed_process_loses_nothing(folder: Path, launch: Callable[..., Any]) -> None:
    recipe = recipe_in(folder, "shard")
    launch(2, "-m", "tokenformer", "train", file_of(recipe), "--parallel.shard", "2")
    assert_same_run(folder / "shard", folder / "one")
    summary = json.loads((folder / "shard" / "summary.json").read_text())
    assert summary["parameters"] == json.loads((folder / "one" / "summary.json").read_text())["parameters"]

    recipe.out = str(folder / "killed")
    sent = {"SIGNAL": "SIGKILL", "SENT": str(folder / "sent")}
    done = launch(2, DISTURBED, "train", file_of(recipe), "--parallel.shard", "2", restarts=1, **sent)
    assert "another process of this run ended" in done.stderr
    left, undisturbed = parameters(folder / "killed"), parameters(folder / "shard")
    assert all(torch.equal(left[name], undisturbed[name]) for name in undisturbed)
    assert losses(folder / "killed") == losses(folder / "shard")

    # On with one process, from a checkpoint of two.
    alone = recipe_in(folder, "alone")
    rewound(folder / "shard", folder / "alone", 8)
    train(alone, progress=False)
    assert_same_run(folder / "alone", folder / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal", "line"),
    [
        ("SIGKILL", "another process of this run ended"),
        ("SIGSTOP", r"process 1 on \S+ gives no sign of life for \d+ s, so the run ends"),
    ],
)
def test_a_process_that_dies_or_hangs_ends_the_run_within_a_minute(
    folder: Path, launch: Callable[..., Any], signal: str, line: str
) -> None:
    recipe, sent = recipe_in(folder, signal), folder / f"sent-{signal}"
    options = {"SIGNAL": signal, "SENT": str(sent), "TOKENFORMER_HEARTBEAT": "9", "fails": True}
    done = launch(2, DISTURBED, "train", file_of(recipe), "--parallel.data", "2", **options)
    assert time.time() - float(sent.read_text()) < 60
    assert re.search(f"^tokenformer.*: error: .*{line}", done.stderr, re.MULTILINE)
    checkpoints = {path.name for path in (folder / signal / "checkpoints").iterdir()}
    assert "checkpoint-4" in checkpoints


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(folder: Path, launch: Callable[..., Any]) -> None:
    recipe = recipe_in(folder, "stopped")
    options = {"SIGNAL": "SIGTERM", "SENT": str(folder / "sent-SIGTERM"), "fails": True}
    done = launch(2, DISTURBED, "train", file_of(recipe), "--parallel.data", "2", **options)
    assert "stopped at step 6 of 12 and saved; the same command resumes" in done.stderr
    newest = max(int(path.name.rpartition("-")[2]) for path in (folder / "stopped" / "checkpoints").iterdir())
    assert newest == 6
    launch(2, "-m", "tokenformer", "train", file_of(recipe), "--parallel.data", "2")
    assert_same_run(folder / "stopped", folder / "one")


@pytest.mark.slow
def test_batches_are_skipped_as_in_one_process(
    folder: Path, launch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, together = recipe_in(folder, "skips-alone"), recipe_in(folder, "skips-together")
    for recipe in (alone, together):
        recipe.training.on_collapse = "skip"
    with monkeypatch.context() as patch:
        patch.setattr(LanguageTrainer, "compute_loss", poisoned(20, alone.data.path))
        skips = train(alone, progress=False)["skips"]
    assert skips  # the row is one that the run reads
    poison = f"20 {together.data.path}"
    launch(2, DISTURBED, "train", file_of(together), "--parallel.shard", "2", POISON=poison)
    found = json.loads((folder / "skips-together" / "summary.json").read_text())["skips"]
    assert [skip["skipped_batches"] for skip in found] == [list(skip["skipped_batches"]) for skip in skips]
    assert_same_run(folder / "skips-together", folder / "skips-alone")


@pytest.mark.slow
def test_sizes_are_nested_as_in_one_process(folder: Path, launch: Callable[..., Any]) -> None:
    alone, together = recipe_in(folder, "nested-alone"), recipe_in(folder, "nested-together")
    for recipe in (alone, together):
        recipe.training.nested = [0.5, 1.0]
    train(alone, progress=False)
    assert losses(folder / "nested-alone") != losses(folder / "one")
    launch(2, "-m", "tokenformer", "train", file_of(together), "--parallel.shard", "2")
    assert_same_run(folder / "nested-together", folder / "nested-alone")


@pytest.mark.slow
def test_blocks_that_are_compiled_give_the_same_losses(folder: Path, launch: Callable[..., Any]) -> None:
    recipe = recipe_in(folder, "compiled")
    options = ["--parallel.shard", "2", "--training.compile", "on"]
    launch(2, "-m", "tokenformer", "train", file_of(recipe), *options)
    assert json.loads((folder / "compiled" / "summary.json").read_text())["compile_seconds"] > 0
    assert_same_run(folder / "compiled", folder / "one")


@pytest.mark.slow
def test_less_memory_and_carried_moments_change_nothing(folder: Path, launch: Callable[..., Any]) -> None:
    grow_folder(folder / "one", folder / "carried", qkv=20, output=20, ffn=64, keys="random", optimizer="carried")
    alone, together = recipe_in(folder, "carried-alone"), recipe_in(folder, "carried-together")
    for recipe in (alone, together):
        recipe.model = ModelRecipe(path=str(folder / "carried"))
        recipe.optimizer.state = "carried"
        recipe.optimizer.old_tokens = 0.5
    train(alone, progress=False)
    together.training.recompute = together.training.fused_loss = True
    launch(2, "-m", "tokenformer", "train", file_of(together), "--parallel.shard", "2")
    assert_same_run(folder / "carried-together", folder / "carried-alone")


@pytest.mark.slow
def test_four_processes_go_on_from_a_checkpoint_of_one(folder: Path, launch: Callable[..., Any]) -> None:
    rewound(folder / "one", folder / "four", 4)
    recipe = recipe_in(folder, "four")
    recipe.training.gradient_checkpointing = True
    saved = yaml.safe_load((folder / "four" / "recipe.yaml").read_text())
    saved["training"]["gradient_checkpointing"] = True
    (folder / "four" / "recipe.yaml").write_text(yaml.safe_dump(saved))
    options = ["--parallel.data", "2", "--parallel.tensor", "2"]
    launch(4, "-m", "tokenformer", "train", file_of(recipe), *options)
    assert_same_run(folder / "four", folder / "one")


@pytest.mark.slow
def test_a_folder_grows_in_parts_as_in_one_process(folder: Path, launch: Callable[..., Any]) -> None:
    options = ["--qkv", "20", "--output", "16", "--ffn", "64", "--keys", "random"]
    assert main(["grow", str(folder / "one"), str(folder / "grown"), *options]) == 0
    launch(2, "-m", "tokenformer", "grow", str(folder / "one"), str(folder / "grown-in-parts"), *options)
    files = sorted(path.name for path in (folder / "grown").iterdir())
    assert sorted(path.name for path in (folder / "grown-in-parts").iterdir()) == files
    for name in files:
        assert (folder / "grown-in-parts" / name).read_bytes() == (folder / "grown" / name).read_bytes(), name


def test_the_layout_must_be_what_was_started(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_in(folder, "nothing")
    assert main(["train", file_of(recipe), "--parallel.data", "2", "--parallel.tensor", "2"]) == 2
    error = capsys.readouterr().err
    assert "torchrun --nproc-per-node 4" in error
    assert error.count("\n") == 1
    assert not Path(recipe.out).exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--parallel.data", "3"], "training.batch_size 8 is not a multiple of parallel.data 3"),
        (["--parallel.shard", "2", "--training.micro_batch_size", "8"], "x training.micro_batch_size 8"),
        (["--parallel.tensor", "0"], "parallel.tensor must be positive, got 0"),
        (["--parallel.tensor", "2", "--training.nested", "[0.5, 1]"], "training.nested"),
    ],
)
def test_what_cannot_run_in_parallel_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    recipe = recipe_in(folder, "nothing")
    assert main(["train", file_of(recipe), *options]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not Path(recipe.out).exists()


@pytest.mark.parametrize("given", ["soon", "-1", "inf"])
def test_the_limit_of_the_heartbeat_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("TOKENFORMER_HEARTBEAT", given)
    with pytest.raises(UserError, match=f"TOKENFORMER_HEARTBEAT must be a number of seconds.*got '{given}'"):
        start_heartbeat()


def test_one_process_of_a_launch_speaks(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    recipe = file_of(recipe_in(folder, "nothing"))
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", recipe]) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_a_full_disk_of_any_process_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(argv: list[str]) -> None:
        with saving(tmp_path / "checkpoint"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tokenformer.cli.train.main", full)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "3")
    assert main(["train", "recipe.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenformer train (process 3): error: cannot write ")
    assert error.count("\n") == 1


def test_a_run_goes_on_with_other_processes_but_not_with_another_batch(folder: Path) -> None:
    recipe = recipe_in(folder, "one")
    recipe.parallel = ParallelRecipe(data=2, shard=2, tensor=2)
    assert recipe.difference(folder / "one") is None
    recipe.training.batch_size = 16
    assert "training.batch_size" in (recipe.difference(folder / "one") or "")
