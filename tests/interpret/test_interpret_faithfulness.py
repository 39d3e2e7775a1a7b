"""Removal curves against models without the tokens."""

import copy
import json
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

from saved_model import LINES, save_model
from tiny import tiny_ids, tiny_model
from tokenformer import UserError
from tokenformer.cli import main
from tokenformer.data import PreparedData, prepare
from tokenformer.interpret import Off, first_order, intervene, pattention_layers
from tokenformer.interpret.attribution import row_losses, trace
from tokenformer.interpret.faithfulness import lens_agreement, log_counts, removal_curves
from tokenformer.interpret.first_order import first_order_agreement
from tokenformer.models.loading import load_model


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


def test_rankings_of_tokens_that_write():
    """Those of output and ffn layers first; then loss as without them all, whatever their order was."""
    model, ids = tiny_model().double(), tiny_ids(1, 9)
    layers = pattention_layers(model)
    writing = [name for name in layers if not name.endswith(("query", "key", "value"))]
    count = sum(layers[name].num_tokens for name in writing)
    found = removal_curves(model, ids, counts=[2, count], rankings=["direct", "lowest-direct", "random-writing"])
    assert (found["tokens"], found["writing"]) == (sum(layer.num_tokens for layer in layers.values()), count)
    with torch.no_grad(), intervene(model, [Off(f"{name}/base") for name in writing]):
        without = row_losses(model(ids).logits, ids).item()
    for curve in found["curves"].values():
        assert curve["loss"][1] == pytest.approx(without, abs=1e-10)
    passed = trace(model, ids)
    direct = passed.direct_loss(row_losses(passed.logits, ids))
    ranked = sorted(
        (c, f"{layer}/{segment}/{i}")
        for layer, parts in direct.items()
        for segment, values in parts.items()
        for i, c in enumerate(values[0].tolist())
    )
    for name, key in (("direct", lambda pair: pair[0]), ("lowest-direct", lambda pair: abs(pair[0]))):
        with torch.no_grad(), intervene(model, [Off(address) for _, address in sorted(ranked, key=key)[:2]]):
            expected = row_losses(model(ids).logits, ids).item()
        assert found["curves"][name]["loss"][0] == pytest.approx(expected, abs=1e-10)
    assert set(found["areas"]) == {"direct", "lowest-direct"}
    assert found["areas"]["direct"]["mean"] == pytest.approx(
        sum(found["curves"]["direct"]["loss"]) / 2 - sum(found["curves"]["random-writing"]["loss"]) / 2, abs=1e-10
    )


def ranks(numbers):
    """The place of each number in order, from 1."""
    return [1 + sum(other < number for other in numbers) for number in numbers]


def test_first_order_of_a_model_without_small_tokens(monkeypatch):
    """All tokens of a row, each deleted from a copy of the model in float64."""
    monkeypatch.setattr(first_order, "BANDS", ((1, None),))
    model, ids = tiny_model().double(), tiny_ids(1, 9)
    found = first_order_agreement(model, ids, tokens_per_band=10**6)
    passed = trace(model, ids)
    loss = row_losses(passed.logits, ids)
    contributions = passed.gradient(loss)
    foretold, measured = [], []
    for name, layer in pattention_layers(model).items():
        for i in range(layer.num_tokens):
            other = copy.deepcopy(model)
            tokens = other.get_submodule(name).segments["base"]
            kept = [j for j in range(layer.num_tokens) if j != i]
            tokens.key = torch.nn.Parameter(tokens.key[kept])
            tokens.value = torch.nn.Parameter(tokens.value[kept])
            with torch.no_grad():
                measured.append(row_losses(other(ids).logits, ids).item() - loss.item())
            foretold.append(-contributions[name]["base"][0, i].item())
    (band,) = found["bands"]
    assert band["tokens"] == len(measured) == sum(kind["tokens"] for kind in found["kinds"].values())
    assert band["measured"] == pytest.approx(np.abs(measured).mean(), rel=1e-6)
    figures = {name: figure["mean"] for name, figure in band["gradient"].items()}
    assert figures["pearson"] == pytest.approx(statistics.correlation(foretold, measured), abs=1e-6)
    assert figures["spearman"] == pytest.approx(statistics.correlation(ranks(foretold), ranks(measured)), abs=1e-6)
    assert figures["sign"] == np.mean(np.sign(foretold) == np.sign(measured))
    assert figures["slope"] == pytest.approx(np.dot(foretold, measured) / np.dot(foretold, foretold), rel=1e-6)
    assert found["kinds"]["qkv"]["direct"] is None
    assert -1 <= found["kinds"]["ffn"]["direct"]["pearson"]["mean"] <= 1


def test_a_record_and_its_picture_by_the_command(tmp_path, capsys):
    save_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(LINES * 40), encoding="utf-8")
    options = {"sequence_length": 16, "held_out": 0.2, "progress": False}
    prepare([str(tmp_path / "text.txt")], tokenizer=str(tmp_path / "model"), out=str(tmp_path / "data"), **options)
    out = tmp_path / "faithfulness.json"
    command = ["explain", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--num-rows", "3"]
    assert main([*command, "--faithfulness", str(out), "--threads", "1"]) == 0
    assert capsys.readouterr().out == f"record: {out}\npicture: {out.with_suffix('.png')}\n"
    record = json.loads(out.read_text(encoding="utf-8"))
    held_out = PreparedData.load(tmp_path / "data").held_out
    rows = torch.tensor([held_out[i * len(held_out) // 3]["input_ids"] for i in range(3)])
    model = load_model(tmp_path / "model")
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in rows]
    assert record["results"]["removal"]["before"] == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert record["results"]["removal"] == removal_curves(model, rows)
    assert record["results"]["lens"] == lens_agreement(model, rows)
    assert record["results"]["first_order"] == first_order_agreement(model, rows)
    assert record["run"]["command"].startswith("tokenformer explain ")
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--faithfulness", "absent/f.json"], "absent"),
        (["--faithfulness", "f.txt"], "does not end in .json"),
        (["--faithfulness", "f.json", "--num-rows", "0"], "num_rows must be at least 1"),
        (["--faithfulness", "f.json", "--data", "absent"], "absent"),
    ],
)
def test_what_cannot_be_recorded(tmp_path, capsys, monkeypatch, options, words):
    save_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert main(["explain", "model", "--data", "data", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


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
