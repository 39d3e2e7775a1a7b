"""Which rows a run reads and measures, and a Transformer trained like any other model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, set_seed

from tokenformer.data import PreparedData
from tokenformer.errors import UserError
from tokenformer.evaluation.perplexity import evenly_spaced
from tokenformer.models.loading import load_model
from tokenformer.training import Recipe, train
from tokenformer.training.building import load_any
from tokenformer.training.callbacks import read_metrics
from tokenformer.training.collapse import Skip
from tokenformer.training.order import RowOrder

MakeRecipe = Callable[..., Recipe]


def orders(rows: int, seed: int, epochs: int, batch: int) -> list[int]:
    """The rows of all epochs, one after another, each without its last incomplete batch."""
    found: list[int] = []
    for epoch in range(epochs):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        found += order[: rows // batch * batch]
    return found


def read(sampler: RowOrder, epochs: int) -> list[int]:
    found: list[int] = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found += list(sampler)
    return found


@pytest.mark.parametrize("skip_rows", [0, 2, 8, 10, 12, 24])
def test_a_run_reads_on_behind_the_rows_that_were_read(skip_rows: int) -> None:
    sampler = RowOrder(range(11), seed=3, batch_size=2, batches_per_step=1, skip_rows=skip_rows)
    assert read(sampler, 3) == orders(11, 3, 6, 2)[skip_rows : skip_rows + 30]


def test_a_batch_that_was_read_in_part_is_not_read_again() -> None:
    sampler = RowOrder(range(8), seed=0, batch_size=4, batches_per_step=1, skip_rows=3)
    assert read(sampler, 1) == orders(8, 0, 2, 4)[4:12]


def test_skipped_batches_are_counted_from_where_the_run_began() -> None:
    skip = Skip(step=3, what="", checkpoint=1, skipped_batches=(2, 3), lost_seconds=0.0)
    sampler = RowOrder(range(12), seed=0, batch_size=2, batches_per_step=1, skips=[skip], skip_rows=4)
    stream = orders(12, 0, 3, 2)[4:]
    assert read(sampler, 1) == stream[:2] + stream[6:16]


def test_two_runs_read_what_one_would_have_read(make_recipe: MakeRecipe) -> None:
    first = make_recipe("first", training__tokens=5 * 4 * 32)
    train(first, progress=False)
    second = make_recipe(
        "second", model__path=first.out, data__skip_rows=20, training__tokens=4 * 32, training__log_every=1
    )
    train(second, progress=False)
    data = PreparedData.load(first.data.path)
    rows = orders(len(data.train), 0, 2, 4)[20:24]
    ids = torch.tensor([data.train[i]["input_ids"] for i in rows])
    by_hand = load_model(first.out)(input_ids=ids, labels=ids).loss.item()
    logged = next(line["loss"] for line in read_metrics(Path(second.out) / "metrics.jsonl") if "loss" in line)
    assert logged == pytest.approx(by_hand, rel=1e-5)


def test_evenly_spaced() -> None:
    assert evenly_spaced(range(10), 4) == [0, 2, 5, 7]
    assert evenly_spaced(range(10), 10) == evenly_spaced(range(10), None) == evenly_spaced(range(10), 11) == range(10)


def test_a_part_of_the_held_out_rows_is_measured(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(data__held_out_rows=3)
    summary = train(recipe, progress=False)
    held_out = PreparedData.load(recipe.data.path).held_out
    ids = torch.tensor([held_out[i * len(held_out) // 3]["input_ids"] for i in range(3)])
    assert summary["eval_tokens"] == 3 * 31
    assert summary["eval_loss"] == pytest.approx(
        load_model(recipe.out)(input_ids=ids, labels=ids).loss.item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__skip_rows": -1}, "data.skip_rows must not be negative"),
        ({"data__held_out_rows": 0}, "data.held_out_rows must be positive"),
        ({"model__value_initializer_range": 0.0}, "model.value_initializer_range must be positive"),
        ({"model__family": "gpt_neox", "model__preset": "150M"}, "model.preset: the presets are TokenFormers"),
    ],
)
def test_what_cannot_be(make_recipe: MakeRecipe, fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(make_recipe(**fields), progress=False)


def test_a_transformer_is_trained_by_the_same_rule(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        model__family="gpt_neox", model__intermediate_size=40, training__log_every=1, training__tokens=4 * 4 * 32
    )
    recipe.optimizer.schedule = "constant"
    recipe.optimizer.warmup = 0.0
    summary = train(recipe, progress=False)
    data = PreparedData.load(recipe.data.path)
    set_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=-(-data.vocab_size // 64) * 64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        )
    )
    others = [p for n, p in model.named_parameters() if "norm" in n or "bias" in n]
    decayed = [p for n, p in model.named_parameters() if not ("norm" in n or "bias" in n)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    rows, losses = orders(len(data.train), 0, 1, 4), []
    for step in range(4):
        ids = torch.tensor([data.train[i]["input_ids"] for i in rows[4 * step : 4 * step + 4]])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    logged = [line["loss"] for line in read_metrics(Path(recipe.out) / "metrics.jsonl") if "loss" in line]
    assert logged == pytest.approx(losses, rel=2e-5)
    assert summary["non_embedding_parameters"] == sum(p.numel() for p in model.parameters()) - data_rows(model)
    saved = load_any(recipe.out)
    assert isinstance(saved, GPTNeoXForCausalLM)
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-3, atol=1e-5)


def data_rows(model: GPTNeoXForCausalLM) -> int:
    """Parameters of the embedding."""
    return model.config.vocab_size * model.config.hidden_size
