"""`tokenformer grow`: folders in, folders out, and what it refuses."""

from pathlib import Path

import pytest
import torch

from saved_model import save_model
from tokenformer import TokenFormerForCausalLM
from tokenformer.cli import main
from tokenformer.models.loading import load_model

IDS = torch.arange(12)[None]


@pytest.fixture
def model(tmp_path: Path) -> TokenFormerForCausalLM:
    return save_model(tmp_path / "model")


def refused(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """Code 2, one line with all of `parts`, and nothing new on disk."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["grow", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("tokenformer grow: error: ")
    assert all(part in line for part in parts), line
    assert captured.out == ""
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()


def test_outputs_stay_and_the_tokenizer_comes_along(
    model: TokenFormerForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model" / "special_tokens_map.json").write_text("{}", encoding="utf-8")
    assert main(["grow", str(tmp_path / "model"), str(tmp_path / "out"), "--qkv", "24", "--ffn", "40"]) == 0
    grown = load_model(tmp_path / "out")
    assert torch.equal(grown(IDS).logits, model(IDS).logits)
    assert grown.config.segments[1] == {"name": "grown1", "qkv": 12, "output": 0, "ffn": 20}
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert f"{model.num_parameters():,} -> {grown.num_parameters():,}" in capsys.readouterr().out


def test_the_papers_way_changes_the_outputs(model: TokenFormerForCausalLM, tmp_path: Path) -> None:
    options = ["--ffn", "40", "--keys", "random", "--scale", "sqrt", "--name", "paper"]
    assert main(["grow", str(tmp_path / "model"), str(tmp_path / "out"), *options]) == 0
    grown = load_model(tmp_path / "out")
    assert not torch.allclose(grown(IDS).logits, model(IDS).logits, atol=1e-2)
    assert grown.model.layers[0].ffn.scale.item() == pytest.approx(40**0.5)
    assert grown.model.layers[0].ffn.segments["paper"].key.std() > 0


def test_the_seed_repeats_the_new_tokens(model: TokenFormerForCausalLM, tmp_path: Path) -> None:
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["grow", str(tmp_path / "model"), str(tmp_path / out), "--ffn", "40", "--seed", seed]) == 0
    a, b, c = (load_model(tmp_path / out).model.layers[0].ffn.segments["grown1"].value for out in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--ffn", "5"], ["ffn=5", "fewer than the 20", "cannot shrink"]),
        (["--ffn", "0"], ["ffn must be at least 1, got 0"]),
        (["--qkv", "-8"], ["qkv must be at least 1, got -8"]),
        (["--ffn", "many"], ["ffn", "int", "many"]),
        ([], ["nothing to grow"]),
        (["--ffn", "20"], ["nothing to grow", "already"]),
        (["--ffn", "40", "--name", "base"], ["'base' exists already"]),
        (["--ffn", "40", "--name", "a.b"], ["'a.b'"]),
        (["--ffn", "40", "--keys", "ones"], ["keys", "zero", "ones"]),
        (["--ffn", "40", "--optimizer", "carried"], ["no optimizer state"]),
        (["--fnn", "40"], ["unknown option '--fnn'", "did you mean '--ffn'?"]),
    ],
    ids=lambda value: "_".join(value).replace("--", "") or "none" if isinstance(value, list) else None,
)
def test_what_cannot_grow(
    options: list[str],
    parts: list[str],
    model: TokenFormerForCausalLM,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused([str(tmp_path / "model"), str(tmp_path / "out"), *options], tmp_path, capsys, *parts)


def test_folders_that_are_missing_or_taken(
    model: TokenFormerForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([str(tmp_path / "none"), str(tmp_path / "out"), "--ffn", "40"], tmp_path, capsys, "none")
    refused([str(tmp_path / "model"), str(tmp_path / "model"), "--ffn", "40"], tmp_path, capsys, "exists already")


def test_a_full_disk_leaves_nothing(
    model: TokenFormerForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        refused([str(tmp_path / "model"), str(tmp_path / "out"), "--ffn", "4000"], tmp_path, capsys, "cannot write")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.glob("*.partial"))


def test_noise_reaches_the_old_tokens_and_the_seed_repeats_it(model: TokenFormerForCausalLM, tmp_path: Path) -> None:
    for out, noise in (("a", "0.1"), ("b", "0.1"), ("c", "0")):
        assert main(["grow", str(tmp_path / "model"), str(tmp_path / out), "--ffn", "40", "--noise", noise]) == 0
    a, b, c = (load_model(tmp_path / out).model.layers[0].ffn.segments for out in "abc")
    assert torch.equal(a["base"].value, b["base"].value)
    assert torch.equal(c["base"].value, model.model.layers[0].ffn.segments["base"].value)
    assert not torch.equal(a["base"].value, c["base"].value)
    assert torch.equal(a["grown1"].value, c["grown1"].value)


def test_noise_that_cannot_be(
    model: TokenFormerForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "model"), str(tmp_path / "out"), "--ffn", "40", "--noise", "-1"]
    refused(arguments, tmp_path, capsys, "noise must be 0 or a positive share", "got -1")
