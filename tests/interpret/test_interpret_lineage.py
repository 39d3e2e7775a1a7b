"""Two models of one lineage, compared: against hand computation, and against growing that changes nothing."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from saved_model import LINES, save_model, train_tokenizer
from tiny_vision import tiny_classifier
from tokenformer import TokenFormerForCausalLM, grow
from tokenformer.errors import UserError
from tokenformer.interpret.lineage import compare_lineage, kind_of_text


@pytest.fixture
def before(tmp_path: Path) -> TokenFormerForCausalLM:
    return save_model(tmp_path / "before").eval()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join([*LINES, "In 1984, it's 'new'."] * 12), encoding="utf-8")
    return file


def _compare(before: Any, after: Any, data: Path, **options: Any) -> dict[str, Any]:
    return compare_lineage(before, after, train_tokenizer(), data, contexts=3, progress=False, **options)


def _grown(model: TokenFormerForCausalLM) -> TokenFormerForCausalLM:
    """Grown in every kind of layer, with keys and values that speak."""
    after = copy.deepcopy(model)
    grow(after, qkv=20, output=16, ffn=32)
    for name, parameter in after.named_parameters():
        if "grown1" in name:
            nn.init.normal_(parameter, std=0.3)
    return after


def test_growing_with_zero_keys_changes_nothing(before: TokenFormerForCausalLM, data: Path) -> None:
    after = copy.deepcopy(before)
    grow(after, qkv=20, output=16, ffn=32)
    found = _compare(before, after, data)
    assert json.loads(json.dumps(found)) == found
    for row in found["loss"]:
        assert row["before"] == pytest.approx(row["after"], abs=1e-5)
    assert found["overlaps"]["mean"] > 0.999  # a tie may be decided otherwise by rounding
    for layer in found["layers"]:
        base, new = layer["segments"]
        assert (base["share"], new["share"]) == (pytest.approx(1, abs=1e-6), pytest.approx(0, abs=1e-6))
        assert (base["use"], new["use"]) == (pytest.approx(1, abs=1e-6), pytest.approx(0, abs=1e-6))
        assert (base["new"], new["new"]) == (False, True)


def test_share_and_use_by_hand(before: TokenFormerForCausalLM, data: Path) -> None:
    after = _grown(before)
    found = _compare(before, after, data, num_rows=3, batch_size=2)
    ids = torch.tensor(_rows(data, 3))
    layer = after.model.layers[1].attention.output
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    after(ids)
    hook.remove()
    segments = {name: (s.key.detach().double(), s.value.detach().double()) for name, s in layer.segments.items()}
    scores = {name: seen[0] @ key.T for name, (key, _) in segments.items()}
    norm = sum((a**2).sum(-1, keepdim=True) for a in scores.values()).sqrt()
    weights = {name: nn.functional.gelu(layer.scale.double() * a / norm) for name, a in scores.items()}
    outputs = {name: weights[name] @ value for name, (_, value) in segments.items()}
    whole = outputs["base"] + outputs["grown1"]
    uses = {name: (weights[name].abs() * value.norm(dim=-1)).sum(-1) for name, (_, value) in segments.items()}
    (mine,) = [row for row in found["layers"] if row["name"] == "model.layers.1.attention.output"]
    assert (mine["kind"], mine["block"]) == ("output", 1)
    for segment in mine["segments"]:
        name = segment["name"]
        share = ((outputs[name] * whole).sum(-1) / (whole**2).sum(-1)).mean().item()
        assert segment["share"] == pytest.approx(share, abs=1e-4)
        assert segment["use"] == pytest.approx((uses[name] / (uses["base"] + uses["grown1"])).mean().item(), abs=1e-5)


def test_losses_of_the_types_of_each_group_add_up_to_that_of_all(before: TokenFormerForCausalLM, data: Path) -> None:
    after = _grown(before)
    found = _compare(before, after, data, num_rows=4)
    ids = torch.tensor(_rows(data, 4))
    for name, model in (("before", before), ("after", after)):
        loss = model(ids, labels=ids).loss.item()
        assert found[name]["loss"] == pytest.approx(loss, abs=1e-5)
        for group in {row["group"] for row in found["loss"]}:
            rows = [row for row in found["loss"] if row["group"] == group]
            assert sum(row["tokens"] for row in rows) == ids[:, 1:].numel()
            assert sum(row["tokens"] * row[name] for row in rows) / ids[:, 1:].numel() == pytest.approx(loss, abs=1e-5)


def test_seen_and_new_by_hand(before: TokenFormerForCausalLM, data: Path) -> None:
    found = _compare(before, before, data, num_rows=2)
    new = {row["type"]: row["tokens"] for row in found["loss"] if row["group"] == "in this row"}["new"]
    assert new == sum(len(set(row)) - 1 for row in _rows(data, 2))


def test_changed_tokens_are_those_with_the_smallest_overlap(before: TokenFormerForCausalLM, data: Path) -> None:
    after = _grown(before)
    with torch.no_grad():
        after.model.layers[0].ffn.segments["base"].key[7] *= -1
    found = _compare(before, after, data)
    overlaps = [row["overlap"] for row in found["changed"]]
    assert overlaps == sorted(overlaps)
    keys = [parameter for name, parameter in before.named_parameters() if name.endswith("base.key")]
    assert sum(found["overlaps"]["counts"]) == sum(map(len, keys))
    for row in found["changed"]:
        # The four strongest are shown, here all three.
        kept = {context["row"] for context in row["before"]} & {context["row"] for context in row["after"]}
        assert row["overlap"] == pytest.approx(len(kept) / 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 48}, "hidden_size is 32 before and 48 after"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 2 before and 1 after"),
        ({"vocab_size": 340}, "vocab_size"),
        ({"segments": [{"name": "base", "qkv": 12, "output": 10, "ffn": 21}]}, "base 20 before and base 21 after"),
    ],
)
def test_models_of_other_lineages(
    before: TokenFormerForCausalLM, data: Path, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as raised:
        _compare(before, save_model(tmp_path / "other", **fields), data)
    assert "\n" not in str(raised.value)


def test_exchanged_models_and_another_tokenizer(before: TokenFormerForCausalLM, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was before and after exchanged"):
        _compare(_grown(before), before, data)
    tokenizer = train_tokenizer()
    tokenizer.add_tokens(["quokka"])
    (tmp_path / "other").mkdir()
    tokenizer.save_pretrained(tmp_path / "other")
    after = _grown(before)
    after.name_or_path = str(tmp_path / "other")
    with pytest.raises(UserError, match="'other' has another tokenizer"):
        _compare(before, after, data)


def test_classifiers_read_no_text(data: Path) -> None:
    with pytest.raises(UserError, match="TokenFormerForImageClassification reads no text: give a language model"):
        _compare(tiny_classifier(), tiny_classifier(), data)


@pytest.mark.parametrize(
    ("piece", "front", "kind"),
    [
        (" fox", "brown", "word start"),
        ("fox", "\n", "word start"),
        ("ing", "go", "inside a word"),
        ("s", "it'", "inside a word"),
        ("new", " '", "word start"),
        ("ö", "gr", "inside a word"),
        ("\n\n", "x", "white space"),
        (" 19", "in", "digit"),
        (",", "x", "punctuation"),
        ("_", "x", "punctuation"),
        ("", "x", "part of a character"),
    ],
)
def test_kinds_of_tokens(piece: str, front: str, kind: str) -> None:
    assert kind_of_text(piece, front) == kind


def _rows(data: Path, count: int) -> list[list[int]]:
    """The first rows: end of text, then the text, in rows of as many ids as the tiny model takes."""
    ids = [0, *train_tokenizer()(data.read_text(encoding="utf-8"))["input_ids"]]
    return [ids[64 * i : 64 * (i + 1)] for i in range(count)]
