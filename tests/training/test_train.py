"""A training run against the same steps written out by hand, and what a run leaves behind."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import tokenformer.models  # registers the Auto classes
from tokenformer.data import PreparedData
from tokenformer.errors import UserError
from tokenformer.training import Recipe, train
from tokenformer.training.building import build_model
from tokenformer.training.callbacks import read_metrics

MakeRecipe = Callable[..., Recipe]


def cosine(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    """The learning rate of step `step`, counted from 0."""
    if step < warmup:
        return peak * step / warmup
    half = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    return peak * (half * (1 - floor) + floor)


def losses_by_hand(recipe: Recipe, steps: int) -> list[float]:
    """Plain AdamW on the rows in the order that torch's RandomSampler gives for the seed."""
    data = PreparedData.load(recipe.data.path)
    set_seed(recipe.training.seed)
    model = build_model(recipe, data).train()
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    others = [p for n, p in model.named_parameters() if "norm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    losses: list[float] = []
    epoch = 0
    while len(losses) < steps:
        order = torch.randperm(
            len(data.train), generator=torch.Generator().manual_seed(recipe.training.seed + epoch)
        ).tolist()
        for start in range(0, len(order) - 3, 4):
            if len(losses) == steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = cosine(len(losses), steps, round(0.1 * steps), recipe.optimizer.learning_rate, 0.1)
            ids = torch.tensor([data.train[i]["input_ids"] for i in order[start : start + 4]])
            logits = model(ids).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        epoch += 1
    return losses


def test_losses_equal_a_hand_written_loop(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training__log_every=1)
    train(recipe, progress=False)
    logged = [line["loss"] for line in read_metrics(Path(recipe.out) / "metrics.jsonl") if "loss" in line]
    assert logged == pytest.approx(losses_by_hand(recipe, 12), rel=2e-5)


def test_micro_batches_add_up_to_the_batch(make_recipe: MakeRecipe) -> None:
    whole, split = make_recipe("whole"), make_recipe("split", training__micro_batch_size=2)
    train(whole, progress=False)
    train(split, progress=False)
    first, second = (
        [line["loss"] for line in read_metrics(Path(recipe.out) / "metrics.jsonl") if "loss" in line]
        for recipe in (whole, split)
    )
    assert first == pytest.approx(second, rel=1e-4)


def test_what_a_run_leaves(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training__eval_every=6)
    summary = train(recipe, progress=False)
    run = Path(recipe.out)
    model = AutoModelForCausalLM.from_pretrained(run)
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert tokenizer.decode(tokenizer("def self: return")["input_ids"]) == "def self: return"
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary["tokens"] == 12 * 4 * 32
    assert summary["flops"] == summary["tokens"] * model.training_flops_per_token(32)
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["checkpoint-12", "checkpoint-8"]
    assert list((run / "tensorboard").glob("events*"))

    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "eval_loss" in line] == [6, 12]
    assert all(line["tokens"] == line["step"] * 128 for line in lines)
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)

    # the held-out figures, from the saved model and the definition
    data = PreparedData.load(recipe.data.path)
    ids = torch.tensor(data.held_out["input_ids"])
    with torch.no_grad():
        probabilities = model(ids).logits[:, :-1].double().log_softmax(-1)
    nats = -probabilities.gather(-1, ids[:, 1:, None]).mean().item()
    split = data.manifest["splits"]["held_out"]
    assert summary["eval_loss"] == pytest.approx(nats, rel=1e-6)
    assert summary["eval_perplexity"] == pytest.approx(math.exp(nats), rel=1e-6)
    bits_per_byte = nats / math.log(2) * split["tokens"] / split["bytes"]
    assert summary["eval_bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-6)


def test_training_learns(make_recipe: MakeRecipe) -> None:
    summary = train(make_recipe(training__tokens=60 * 128), progress=False)
    assert summary["eval_loss"] < 0.8 * math.log(300)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions_agree(make_recipe: MakeRecipe, precision: str) -> None:
    exact = train(make_recipe("exact"), progress=False)["eval_loss"]
    summary = train(make_recipe("other", training__precision=precision), progress=False)
    assert summary["precision"] == precision
    assert summary["eval_loss"] == pytest.approx(exact, rel=2e-3 if precision == "bf16" else 1e-9)


def test_gradient_checkpointing_changes_nothing(make_recipe: MakeRecipe) -> None:
    plain = train(make_recipe("plain"), progress=False)["eval_loss"]
    checkpointed = train(make_recipe("checkpointed", training__gradient_checkpointing=True), progress=False)[
        "eval_loss"
    ]
    assert checkpointed == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("option", ["recompute", "fused_loss"])
def test_what_saves_memory_changes_nothing(make_recipe: MakeRecipe, option: str) -> None:
    plain = train(make_recipe("plain"), progress=False)["eval_loss"]
    saving = train(make_recipe("saving", **{f"training__{option}": True}), progress=False)["eval_loss"]
    # The rounding of the fused loss is another; the weights are made again from the same scores.
    assert saving == (plain if option == "recompute" else pytest.approx(plain, rel=1e-6))


@pytest.mark.parametrize("option", ["recompute", "fused_loss"])
def test_what_a_transformer_does_not_have(make_recipe: MakeRecipe, option: str) -> None:
    recipe = make_recipe(model__family="gpt_neox", **{f"training__{option}": True})
    with pytest.raises(UserError, match=f"training.{option}: a TokenFormer has it, this model has not"):
        train(recipe, progress=False)
    assert not Path(recipe.out).exists()


def test_a_torch_without_the_fused_loss(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions")
    recipe = make_recipe(training__fused_loss=True)
    with pytest.raises(UserError, match=r"fused_loss needs torch 2\.13 or newer, this is .*: leave it out"):
        train(recipe, progress=False)
    assert not Path(recipe.out).exists()


@pytest.mark.slow
def test_compiled_training_equals_eager(make_recipe: MakeRecipe) -> None:
    eager = train(make_recipe("eager", training__compile="off"), progress=False)
    compiled = train(make_recipe("compiled", training__compile="on"), progress=False)
    assert eager["compile_seconds"] == 0 < compiled["compile_seconds"]
    assert compiled["eval_loss"] == pytest.approx(eager["eval_loss"], rel=1e-5)


def test_a_failing_compiler_is_survived(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("C++ compile error")

    plain = train(make_recipe("plain"), progress=False)["eval_loss"]
    monkeypatch.setattr("tokenformer.training.run._compile_pays", lambda *args: True)
    monkeypatch.setattr(torch, "compile", broken)
    summary = train(make_recipe("fallback"), progress=False)
    assert "torch.compile failed, going on without it: RuntimeError: C++ compile error" in capsys.readouterr().err
    assert summary["eval_loss"] == plain


def test_a_finished_run_is_not_redone(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe()
    summary = train(recipe, progress=False)
    before = {path: path.stat().st_mtime_ns for path in Path(recipe.out).rglob("*")}
    assert train(recipe, progress=False) == summary
    assert {path: path.stat().st_mtime_ns for path in Path(recipe.out).rglob("*")} == before
    assert "complete already" in capsys.readouterr().err


def test_presets_build_the_papers_sizes(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(model__preset="150M")
    with torch.device("meta"):
        model = build_model(recipe, PreparedData.load(recipe.data.path))
    assert model.num_token_parameters() == 2 * 12 * 768 * (4 * 768 + 3072)
    assert model.config.vocab_size == 320  # the tokenizer's 300, aligned
    assert isinstance(model, tokenformer.models.TokenFormerForCausalLM)
