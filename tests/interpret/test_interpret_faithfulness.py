"""Removal curves against models without the tokens."""

import pytest
import torch

from tiny import tiny_ids, tiny_model
from tokenformer import UserError
from tokenformer.interpret import Off, intervene
from tokenformer.interpret.attribution import row_losses, trace
from tokenformer.interpret.faithfulness import lens_agreement, log_counts, removal_curves


def test_a_curve_is_the_loss_without_the_tokens_ranked_first():
    model, ids = tiny_model().double(), tiny_ids(1, 9)
    found = removal_curves(model, ids, counts=[1, 5], rankings=["gradient", "random"])
    passed = trace(model, ids)
    contributions = passed.gradient(row_losses(passed.logits, ids))
    ranked = sorted(
        (c, f"{layer}/{segment}/{i}")
        for layer, parts in contributions.items()
        for segment, values in parts.items()
        for i, c in enumerate(values[0].tolist())
    )
    for place, count in enumerate((1, 5)):
        with torch.no_grad(), intervene(model, [Off(address) for _, address in ranked[:count]]):
            expected = row_losses(model(ids).logits, ids).item()
        assert found["curves"]["gradient"]["loss"][place] == pytest.approx(expected, abs=1e-10)
    assert found["before"] == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-6)


def test_draws_repeat_with_their_seed_and_counts_end_at_half():
    model, ids = tiny_model(), tiny_ids(2, 7)
    first, again = (removal_curves(model, ids, counts=[3], seed=4) for _ in range(2))
    assert first == again
    assert log_counts(100)[0] == 1
    assert log_counts(100)[-1] == 50


def test_agreement_has_each_layer_that_writes():
    found = lens_agreement(tiny_model(), tiny_ids(2, 7))
    assert {name.rpartition(".")[2] for name in found["layers"]} == {"output", "ffn"}
    figures = found["layers"]["model.layers.1.ffn"]["strongest"]["spearman"]
    assert 0.5 < figures["mean"] <= 1  # nothing comes after it but the norms


@pytest.mark.parametrize(
    ("options", "words"),
    [({"rankings": ["best"]}, "best"), ({"counts": [0]}, "counts"), ({"random_orders": 0}, "at least 1")],
)
def test_bad_input_is_named(options, words):
    with pytest.raises(UserError, match=words):
        removal_curves(tiny_model(), tiny_ids(1, 5), **options)
    with pytest.raises(UserError, match="nothing to predict"):
        removal_curves(tiny_model(), tiny_ids(1, 1))
