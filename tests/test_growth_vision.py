"""Growing an image classifier: the same `grow`, in memory and on folders; no logit changes, and new tokens train."""

import json

import pytest
import torch

from statement import TOLERANCE, error
from tiny_vision import save_classifier, tiny_classifier, tiny_pixels
from tokenformer import grow
from tokenformer.cli import main
from tokenformer.growth import grow_folder
from tokenformer.models.loading import load_image_classifier

EXACT = TOLERANCE[torch.float64]


@pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "gelu_l1"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_zero_keys_and_the_kept_scale_change_no_logit(pooling, normalization) -> None:
    model = tiny_classifier(pooling=pooling, normalization=normalization).double()
    pixels = tiny_pixels().double()
    before = model(pixels).logits
    grow(model, qkv=24, output=20, ffn=40)
    assert error(model(pixels).logits, before) < EXACT
    grow(model, ffn=64)
    assert error(model(pixels).logits, before) < EXACT
    assert [segment["name"] for segment in model.config.segments] == ["base", "grown1", "grown2"]
    grow(model, ffn=80, scale="sqrt")
    assert error(model(pixels).logits, before) > 1e-3, "a scale that follows the tokens changes the outputs"


def test_new_tokens_learn_from_the_first_step_on() -> None:
    model = grow(tiny_classifier(), qkv=24, output=20, ffn=40).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    new = {name: p for name, p in model.named_parameters() if ".grown1." in name}
    before = {name: p.detach().clone() for name, p in new.items()}
    for _ in range(2):  # values have no gradient while their keys are zero
        optimizer.zero_grad()
        model(tiny_pixels(8), labels=torch.arange(8) % 5).loss.backward()
        optimizer.step()
    assert len(new) == 2 * 5 * 2
    assert all(not torch.equal(p, before[name]) for name, p in new.items())


def test_merged_segments_compute_the_same(tmp_path) -> None:
    model = save_classifier(tmp_path / "grown", grown=True).double()
    for name, parameter in model.named_parameters():
        if ".grown1." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    before = model(tiny_pixels().double()).logits
    model.merge_segments()
    assert model.config.segments == [{"name": "base", "qkv": 12, "output": 10, "ffn": 32}]
    model.save_pretrained(tmp_path / "merged")
    assert error(load_image_classifier(tmp_path / "merged")(tiny_pixels().double()).logits, before) < EXACT


def test_a_grown_folder_keeps_logits_classes_and_processor(tmp_path, capsys) -> None:
    model = save_classifier(tmp_path / "small", drop_path_rate=0.1)
    argv = ["grow", str(tmp_path / "small"), str(tmp_path / "large"), "--qkv", "24", "--ffn", "40"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    grown = load_image_classifier(tmp_path / "large")
    assert torch.equal(grown(tiny_pixels()).logits, model(tiny_pixels()).logits)
    assert grown.config.segments[1] == {"name": "grown1", "qkv": 12, "output": 0, "ffn": 20}
    assert f"{model.num_parameters():,} -> {grown.num_parameters():,} parameters" in out
    assert "--data.train" in out
    assert grown.config.id2label == model.config.id2label
    processors = [(tmp_path / name / "preprocessor_config.json").read_bytes() for name in ("small", "large")]
    assert processors[0] == processors[1]
    assert grow_folder(str(tmp_path / "large"), str(tmp_path / "larger"), ffn=50)["segment"] == "grown2"


def test_what_cannot_grow_leaves_nothing_behind(tmp_path, capsys) -> None:
    save_classifier(tmp_path / "small")
    before = json.loads((tmp_path / "small" / "config.json").read_text())
    for options, part in (
        (["--ffn", "5"], "growing cannot shrink"),
        ([], "nothing to grow"),
        (["--ffn", "40", "--name", "base"], "segment 'base' exists already"),
    ):
        assert main(["grow", str(tmp_path / "small"), str(tmp_path / "large"), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    assert json.loads((tmp_path / "small" / "config.json").read_text()) == before
