"""`tokenformer info`: its figures against the parameters of the loaded model and the paper's formulas."""

import json
import math
import shutil

import pytest
import torch

from saved_model import edit_config, save_model
from tokenformer import grow
from tokenformer.cli import main
from tokenformer.inspection import inspect_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    return folder, save_model(folder, grown=True)


def refused(capsys, *argv):
    assert main(["info", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokenformer info: error: ")
    assert err.count("\n") == 1
    return err


def test_json_is_the_report(saved, capsys):
    folder, _ = saved
    assert main(["info", str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == inspect_model(folder)
    assert err == ""


def test_parameters_are_those_of_the_model(saved):
    folder, model = saved
    report = inspect_model(folder)
    tokens = {name: p for name, p in model.named_parameters() if ".segments." in name}
    assert report["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert report["parameters"]["parameter_tokens"] == sum(p.numel() for p in tokens.values())
    assert report["parameters"]["embedding"] == 320 * 32
    assert report["parameters"]["total"] == sum(
        report["parameters"][part] for part in ("embedding", "parameter_tokens", "final_norm")
    )
    for segment in report["segments"]:
        mine = {name: p.numel() for name, p in tokens.items() if f".segments.{segment['name']}." in name}
        assert sum(segment["parameters"].values()) == sum(mine.values())
        assert segment["parameters"]["ffn"] == sum(n for name, n in mine.items() if ".ffn." in name)
    assert [segment["tokens"] for segment in report["segments"]] == [
        {"qkv": 12, "output": 10, "ffn": 20},
        {"qkv": 0, "output": 0, "ffn": 12},
    ]


def test_scales_name_the_count_before_growing(saved):
    scales = inspect_model(saved[0])["scale"]
    assert scales["qkv"]["sqrt_of"] == scales["qkv"]["num_tokens"] == 12
    assert (scales["ffn"]["sqrt_of"], scales["ffn"]["num_tokens"]) == (20, 32)
    assert scales["ffn"]["min"] == scales["ffn"]["max"] == pytest.approx(math.sqrt(20))


def test_scales_that_differ(saved, tmp_path):
    _, model = saved
    changed = type(model)(model.config)
    with torch.no_grad():
        changed.model.layers[1].ffn.scale.fill_(7.5)
    changed.save_pretrained(tmp_path)
    scale = inspect_model(tmp_path)["scale"]["ffn"]
    assert scale["max"] == 7.5
    assert scale["min"] == pytest.approx(math.sqrt(20))
    assert scale["sqrt_of"] is None


def test_scale_that_follows_the_tokens(tmp_path):
    model = save_model(tmp_path)
    grow(model, ffn=32, scale="sqrt").save_pretrained(tmp_path)
    assert inspect_model(tmp_path)["scale"]["ffn"]["sqrt_of"] == 32


@pytest.mark.parametrize("length", [1, 64, 1000])
def test_costs_follow_the_paper(saved, length):
    report = inspect_model(saved[0], sequence_length=length)
    layers, d, vocabulary = 2, 32, 320
    tokens = 2 * layers * d * (3 * 12 + 10 + 32)
    assert report["parameters"]["parameter_tokens"] == tokens
    forward = 2 * (tokens + vocabulary * d) + 4 * layers * d * length  # Table 3, and the output embedding
    assert report["flops_per_token"] == {"forward": forward, "training": 3 * forward}
    empty, full = report["decode_bytes_per_token"].values()
    assert full - empty == 2 * layers * d * length * 4
    assert report["sequence_length"] == length


def test_length_is_that_of_the_configuration_unless_given(saved, capsys):
    folder, _ = saved
    assert inspect_model(folder)["sequence_length"] == 64
    assert main(["info", str(folder), "--json", "--sequence-length", "128"]) == 0
    assert json.loads(capsys.readouterr().out)["sequence_length"] == 128


def test_bytes_and_dtype_are_those_of_the_files(saved, tmp_path):
    folder, model = saved
    weights = inspect_model(folder)["weights"]
    assert weights == {
        "dtype": "float32",
        "files": ["model.safetensors"],
        "bytes": (folder / "model.safetensors").stat().st_size,
    }
    type(model).from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    half = inspect_model(tmp_path)
    assert half["weights"]["dtype"] == "bfloat16"
    full = inspect_model(folder)["decode_bytes_per_token"]["full_cache"]
    assert half["decode_bytes_per_token"]["full_cache"] * 2 == full


def test_shards_give_the_same_report(saved, tmp_path):
    folder, model = saved
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    whole, shards = inspect_model(folder), inspect_model(tmp_path)
    files = shards["weights"]["files"]
    assert len(files) > 1
    assert shards["weights"]["bytes"] == sum((tmp_path / file).stat().st_size for file in files)
    assert shards["tokenizer"] is None
    different = ("path", "weights", "tokenizer")
    assert {k: v for k, v in whole.items() if k not in different} == {
        k: v for k, v in shards.items() if k not in different
    }


def test_weights_are_not_read(saved, tmp_path, monkeypatch):
    from tokenformer import inspection

    read = []
    original = inspection.safe_open

    class Counting:
        def __init__(self, *args, **kwargs):
            self.file = original(*args, **kwargs).__enter__()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(inspection, "safe_open", Counting)
    inspect_model(saved[0])
    assert len(read) == 2 * 5
    assert all(name.endswith(".scale") for name in read)


def test_table_for_people(saved, capsys):
    assert main(["info", str(saved[0])]) == 0
    out = capsys.readouterr().out
    total = sum(p.numel() for p in saved[1].parameters())
    for expected in (
        "base",
        "grown1",
        f"{total:,}",
        "sqrt(20), the tokens before growing (32 now)",
        "l2_gelu",
        "float32",
    ):
        assert expected in out
    assert max(map(len, out.splitlines())) <= 120


def test_bad_length(saved, capsys):
    assert "sequence_length must be at least 1, got 0" in refused(capsys, saved[0], "--sequence-length", "0")
    assert "expected int" in refused(capsys, saved[0], "--sequence-length", "long")


def test_bad_folders(saved, tmp_path, capsys):
    assert "no folder" in refused(capsys, tmp_path / "absent")
    assert "config.json" in refused(capsys, tmp_path)
    copy = shutil.copytree(saved[0], tmp_path / "copy")
    edit_config(copy, hidden_size=64, vocab_size=320)
    assert "has shape" in refused(capsys, copy)
    edit_config(copy, hidden_size=32)
    (copy / "model.safetensors").unlink()
    assert "no weights" in refused(capsys, copy)


def test_bad_options(capsys):
    assert "required: model" in refused(capsys)
    assert "did you mean '--json'" in refused(capsys, "m", "--jsn")
