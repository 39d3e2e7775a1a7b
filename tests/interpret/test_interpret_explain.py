"""The explanation of a text: its numbers are those of the model, and it is plain JSON."""

import json

import pytest
import torch

from lively import save_lively_model
from tokenformer import UserError
from tokenformer.interpret import Off, intervene
from tokenformer.interpret.attribution import gradient_contributions
from tokenformer.interpret.explain import explain_text
from tokenformer.models.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_lively_model(folder, grown=True)
    return load_model(folder), load_tokenizer(folder)


def test_the_payload_says_what_the_model_does(loaded):
    model, tokenizer = loaded
    text = "the quick brown fox"
    found = json.loads(json.dumps(explain_text(model, tokenizer, text, ablations=3), allow_nan=False))
    ids = torch.tensor([found["text"]["ids"]])
    with torch.no_grad():
        logits = model(ids).logits
    last, target = ids.shape[1] - 1, found["target"]["id"]
    assert "".join(found["text"]["pieces"]) == text
    assert target == logits[0, -1].argmax().item()
    assert found["target"]["logit"] == pytest.approx(logits[0, -1, target].item(), rel=1e-5)
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    assert found["text"]["loss"][1:] == pytest.approx(losses.tolist(), rel=1e-4)
    gradient = gradient_contributions(model, ids, last, target)
    for entry in found["attribution"]:
        layer, segment, i = entry["address"].split("/")
        assert entry["gradient"] == pytest.approx(gradient[layer][segment][int(i)].item(), rel=1e-3, abs=1e-6)
    strongest = found["attribution"][0]
    with torch.no_grad(), intervene(model, [Off(strongest["address"])]):
        without = model(ids).logits
    change = (without - logits)[0, -1, target].item()
    assert strongest["measured"] == pytest.approx(change, rel=1e-3, abs=1e-5)
    assert [entry["measured"] is None for entry in found["attribution"]][:4] == [False] * 3 + [True]
    for place in found["positions"]:
        for layer in place["layers"]:
            assert sum(layer["shares"].values()) == pytest.approx(1, abs=1e-3)
            assert all(token["address"] in found["tokens"] for token in layer["tokens"])


def test_changes_are_shown_beside(loaded):
    model, tokenizer = loaded
    change = Off("model.layers.0.ffn/base")
    found = explain_text(model, tokenizer, "the quick", ablations=0, changes=[change])
    with torch.no_grad(), intervene(model, [change]):
        logits = model(torch.tensor([found["text"]["ids"]])).logits[0, -1]
    assert found["changes"]["predictions"][0]["id"] == logits.argmax().item()
    assert found["ablations"] == {}


def test_one_token_has_no_loss(loaded):
    found = explain_text(*loaded, "t")
    assert found["loss"] is None
    assert found["text"]["loss"] == [None]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, "empty"),
        ("x " * 100, {}, "takes 64"),
        ("the", {"position": 40}, "position 40"),
        ("the", {"num_tokens": 0}, "num_tokens"),
        ("the", {"ablations": -1}, "ablations"),
        ("the", {"target": "fox 東京 fox"}, "give text that is one"),
    ],
)
def test_bad_input_is_named(loaded, text, options, words):
    with pytest.raises(UserError, match=words):
        explain_text(*loaded, text, **options)
