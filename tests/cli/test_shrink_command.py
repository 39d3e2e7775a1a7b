"""`tokenformer shrink`: folders in, folders out, and what it refuses."""

from pathlib import Path

import pytest
import torch

from saved_model import LINES, edit_config, save_model
from tiny_vision import save_classifier, tiny_pixels
from tokenformer import TokenFormerForCausalLM
from tokenformer.cli import main
from tokenformer.data import prepare
from tokenformer.elastic import prefix, shrink
from tokenformer.elastic.folders import text_batches
from tokenformer.models.loading import load_image_classifier, load_model

IDS = torch.arange(12)[None]


@pytest.fixture
def model(tmp_path: Path) -> TokenFormerForCausalLM:
    return save_model(tmp_path / "model", grown=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(LINES * 40), encoding="utf-8")
    return file


def folders(tmp_path: Path) -> list[str]:
    return [str(tmp_path / "model"), str(tmp_path / "out")]


def refused(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """Code 2, one line with all of `parts`, and nothing new on disk."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["shrink", *arguments]) == 2
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith("tokenformer shrink: error: ")
    assert all(part in line for part in parts), line
    assert captured.out == ""
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()


def test_a_prefix_with_its_tokenizer(
    model: TokenFormerForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shrink", *folders(tmp_path), "--qkv", "5", "--ffn", "23"]) == 0
    shrunk = load_model(tmp_path / "out")
    with prefix(model, qkv=5, ffn=23):
        assert torch.equal(shrunk(IDS).logits, model(IDS).logits)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()
    out = capsys.readouterr().out
    assert f"{model.num_parameters():,} -> {shrunk.num_parameters():,}" in out
    assert "12 -> 5 qkv, 10 -> 10 output, 32 -> 23 ffn" in out


def test_a_segment(model: TokenFormerForCausalLM, tmp_path: Path) -> None:
    assert main(["shrink", *folders(tmp_path), "--by", "segment", "--segment", "grown1"]) == 0
    shrunk = load_model(tmp_path / "out")
    assert torch.equal(shrunk(IDS).logits, model(IDS).logits)  # its keys were zero
    assert [segment["name"] for segment in shrunk.config.segments] == ["base"]


@pytest.mark.parametrize("source", ["text", "prepared"])
def test_by_importance_on_text(model: TokenFormerForCausalLM, text: Path, source: str, tmp_path: Path) -> None:
    if source == "prepared":
        prepare(
            [str(text)],
            tokenizer=str(tmp_path / "model" / "tokenizer.json"),
            out=str(tmp_path / "data"),
            sequence_length=32,
            held_out=0.2,
            progress=False,
        )
        text = tmp_path / "data"
    options = ["--by", "importance", "--scale", "calibrated", "--fit", "--calibration", str(text)]
    assert main(["shrink", *folders(tmp_path), "--output", "4", "--ffn", "9", *options, "--calibration-rows", "5"]) == 0
    batches = text_batches(tmp_path / "model", str(text), 5)
    assert sum(len(batch["input_ids"]) for batch in batches) == 5
    shrink(model, output=4, ffn=9, by="importance", scale="calibrated", fit=True, calibration=batches)
    assert torch.equal(load_model(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_an_image_classifier(tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "model")
    options = ["--ffn", "9", "--by", "importance", "--calibration", "digits", "--calibration-rows", "9"]
    assert main(["shrink", *folders(tmp_path), *options]) == 0
    shrunk = load_image_classifier(tmp_path / "out")
    assert shrunk.config.num_tokens("ffn") == 9
    assert model.config.num_tokens("ffn") == 20
    assert shrunk(pixel_values=tiny_pixels()).logits.isfinite().all()
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_healing(model: TokenFormerForCausalLM, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends below the loss of the model that was only shrunk, and leaves nothing but the model."""
    data = tmp_path / "data"
    prepare(
        [str(text)],
        tokenizer=str(tmp_path / "model" / "tokenizer.json"),
        out=str(data),
        sequence_length=32,
        held_out=0.2,
        progress=False,
    )
    listed = set(tmp_path.iterdir())
    options = ["--ffn", "9", "--heal-tokens", "1280", "--heal-data", str(data), "--heal-learning-rate", "0.003"]
    assert main(["shrink", *folders(tmp_path), *options]) == 0
    assert "healed on 1,280 tokens: held-out perplexity" in capsys.readouterr().out
    assert set(tmp_path.iterdir()) - listed == {tmp_path / "out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    ids = torch.cat([batch["input_ids"] for batch in text_batches(tmp_path / "model", str(data), 8)])
    healed, cut = load_model(tmp_path / "out"), shrink(model, ffn=9)
    with torch.no_grad():
        assert healed(ids, labels=ids).loss < cut(ids, labels=ids).loss - 0.1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], ["nothing to shrink"]),
        (["--ffn", "32", "--qkv", "12"], ["nothing to shrink"]),
        (["--ffn", "33"], ["ffn=33", "32 tokens there are"]),
        (["--ffn", "0"], ["ffn must be at least 1, got 0"]),
        (["--ffn", "many"], ["ffn", "many"]),
        (["--ffn", "3", "--by", "luck"], ["by", "luck"]),
        (["--ffn", "3", "--by", "importance"], ["by 'importance' needs calibration data", "--calibration"]),
        (["--ffn", "3", "--fit"], ["fit needs calibration data"]),
        (["--ffn", "3", "--calibration", "text.txt"], ["calibration is not needed"]),
        (["--ffn", "3", "--fit", "--calibration", "no.txt"], ["no.txt"]),
        (["--ffn", "3", "--fit", "--calibration", "no.txt", "--calibration-rows", "0"], ["calibration_rows"]),
        (["--by", "segment"], ["name of a segment"]),
        (["--by", "segment", "--segment", "grown2"], ["no segment 'grown2'", "base, grown1"]),
        (["--by", "segment", "--segment", "base"], ["cannot be taken out"]),
        (["--ffn", "3", "--heal-tokens", "100"], ["--heal-data"]),
        (["--ffn", "3", "--heal-data", "data"], ["--heal-tokens"]),
        (["--ffn", "3", "--heal-tokens", "-1", "--heal-data", "data"], ["must not be negative"]),
        (["--ffn", "3", "--heal-tokens", "100", "--heal-data", "nowhere"], ["nowhere"]),
    ],
)
def test_what_cannot_be(
    options: list[str],
    parts: list[str],
    model: TokenFormerForCausalLM,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused([*folders(tmp_path), *options], tmp_path, capsys, *parts)


def test_folders_that_cannot_be(
    model: TokenFormerForCausalLM, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([str(tmp_path / "no"), str(tmp_path / "out"), "--ffn", "3"], tmp_path, capsys, "there is no folder")
    refused([str(tmp_path / "model")] * 2 + ["--ffn", "3"], tmp_path, capsys, "exists already")
    data = tmp_path / "data"
    prepare([str(text)], tokenizer="train:280", out=str(data), sequence_length=32, held_out=0.2, progress=False)
    for options in (
        ["--fit", "--calibration", str(data)],
        ["--heal-tokens", "100", "--heal-data", str(data)],
    ):
        refused([*folders(tmp_path), "--ffn", "3", *options], tmp_path, capsys, "tokenizer")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    refused(
        [*folders(tmp_path), "--ffn", "3", "--fit", "--calibration", str(tmp_path / "bytes.txt")],
        tmp_path,
        capsys,
        "bytes.txt",
        "UTF-8",
    )
    edit_config(tmp_path / "model", model_type="gpt2")
    refused([*folders(tmp_path), "--ffn", "3"], tmp_path, capsys, "model_type is 'gpt2'")
