"""`tokenformer info` of an image classifier: its figures against the parameters of the loaded model."""

import json
import shutil

import pytest

from saved_model import edit_config
from tiny_vision import CLASSES, save_classifier
from tokenformer.cli import main
from tokenformer.inspection import inspect_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    return folder, save_classifier(folder, grown=True, norm_affine=True)


def test_parameters_are_those_of_the_model(saved, capsys) -> None:
    folder, model = saved
    assert main(["info", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == inspect_model(folder)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    parts = {
        "embedding": ".embeddings.",
        "parameter_tokens": ".segments.",
        "block_norms": "_norm.",
        "final_norm": "model.norm.",
        "classifier": "classifier.",
    }
    expected = {part: sum(n for name, n in sizes.items() if mark in name) for part, mark in parts.items()}
    assert report["parameters"] == {"total": sum(sizes.values()), **expected}
    assert sum(expected.values()) == sum(sizes.values())
    assert report["classes"] == CLASSES
    assert (report["image_size"], report["patch_size"], report["tokens_per_image"]) == (12, 4, 10)
    assert report["image_processor"]
    assert [segment["tokens"]["ffn"] for segment in report["segments"]] == [20, 12]
    assert (report["scale"]["ffn"]["sqrt_of"], report["scale"]["ffn"]["num_tokens"]) == (20, 32)


def test_text_says_what_the_model_is(saved, capsys, tmp_path) -> None:
    folder, model = saved
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    for part in (
        f"{model.num_parameters():,}",
        "grown1",
        "12 x 12 pixels of 3 channels, with its processor",
        "10 of an image, patches of 4 x 4, the class token classifies",
        "5: cat, dog, fish, owl, newt",
        "per image",
        "with weight and bias",
    ):
        assert part in out, part
    save_classifier(tmp_path / "plain", pooling="mean", num_labels=12)
    (tmp_path / "plain" / "preprocessor_config.json").unlink()
    assert main(["info", str(tmp_path / "plain")]) == 0
    out = capsys.readouterr().out
    for part in (
        "without weight and bias",
        "no image processor here",
        "9 of an image",
        "12: LABEL_0, LABEL_1, LABEL_2, LABEL_3, LABEL_4, ...",
    ):
        assert part in out, part
    # JSON orders them as text, 10 before 2.
    assert inspect_model(tmp_path / "plain")["classes"] == [f"LABEL_{index}" for index in range(12)]


def test_what_cannot_be_described_is_named(saved, capsys, tmp_path) -> None:
    assert main(["info", str(saved[0]), "--sequence-length", "7"]) == 2
    assert "leave sequence_length out" in capsys.readouterr().err
    shutil.copytree(saved[0], tmp_path / "changed")
    edit_config(tmp_path / "changed", image_size=14)
    assert main(["info", str(tmp_path / "changed")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "14 x 14" in line
