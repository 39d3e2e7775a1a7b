"""Loading from folders: what comes back, and one clear line for each thing that can be wrong with a folder."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from saved_model import edit_config, save_model, train_tokenizer
from tiny import tiny_ids
from tokenformer import TokenFormerModel, UserError
from tokenformer.models.loading import load_model, load_tokenizer, stored_tensors


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    return folder, save_model(folder, grown=True)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original[0], tmp_path / "copy")


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# What comes back


def test_loaded_model_is_the_saved_one(original):
    folder, model = original
    loaded = load_model(folder)
    assert not loaded.training
    assert loaded.config.segments == model.config.segments
    saved, read = model.state_dict(), loaded.state_dict()
    assert saved.keys() == read.keys()
    assert all(torch.equal(saved[name], read[name]) for name in saved)
    assert torch.equal(loaded(tiny_ids()).logits, model.eval()(tiny_ids()).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16], ids=["name", "torch"])
def test_dtype_changes_weights_but_not_scales(original, dtype):
    loaded = load_model(original[0], dtype=dtype)
    assert {name: p.dtype for name, p in loaded.named_parameters() if p.dtype != torch.bfloat16} == {}
    assert {b.dtype for name, b in loaded.named_buffers() if name.endswith("scale")} == {torch.float32}


def test_saved_dtype_is_kept(tmp_path, original):
    load_model(original[0], dtype="bfloat16").save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16


def test_device_is_used(original):
    assert load_model(original[0], device="meta").device.type == "meta"


def test_shards_load_like_one_file(original, tmp_path):
    folder, model = original
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    read = load_model(tmp_path).state_dict()
    assert all(torch.equal(tensor, read[name]) for name, tensor in model.state_dict().items())
    headers, whole = stored_tensors(tmp_path), stored_tensors(folder)
    assert {name: t.shape for name, t in headers.items()} == {name: t.shape for name, t in whole.items()}


def test_backbone_saved_alone_loads(original, tmp_path):
    _, model = original
    backbone: TokenFormerModel = model.model
    backbone.save_pretrained(tmp_path)
    read = load_model(tmp_path).state_dict()
    assert all(torch.equal(tensor, read[f"model.{name}"]) for name, tensor in backbone.state_dict().items())
    assert torch.equal(read["lm_head.weight"], backbone.embed_tokens.weight)


def test_tokenizer_is_the_saved_one(original):
    tokenizer = load_tokenizer(original[0])
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.get_vocab() == train_tokenizer().get_vocab()
    assert tokenizer.eos_token == "<|endoftext|>"


def test_loading_is_silent_and_leaves_settings_alone(original, capfd):
    logging.enable_progress_bar()
    verbosity = logging.get_verbosity()
    load_model(original[0])
    load_tokenizer(original[0])
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == verbosity


# Folders


def test_no_folder(tmp_path):
    refused(lambda: load_model(tmp_path / "absent"), "absent", "no folder")
    refused(lambda: load_tokenizer(tmp_path / "absent"), "absent", "no folder")


def test_a_file_instead_of_a_folder(folder):
    refused(lambda: load_model(folder / "model.safetensors"), "is a file", "config.json")


def test_mistyped_relative_path_does_not_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    refused(lambda: load_model("runs/smal"), "no folder 'runs/smal'")


def test_name_that_the_hub_does_not_give():
    refused(lambda: load_model("nobody/nothing"), "no folder 'nobody/nothing'", "check the path")  # offline in tests


def test_name_on_the_hub(original, monkeypatch):
    folder, model = original
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append(name) or str(folder))
    assert torch.equal(load_model("somebody/model").lm_head.weight, model.lm_head.weight)
    assert asked == ["somebody/model"]


# Configuration


def test_no_configuration(folder):
    (folder / "config.json").unlink()
    refused(lambda: load_model(folder), str(folder), "config.json")


@pytest.mark.parametrize("text", ["{", "[1]", "", "\xff"], ids=["cut", "list", "empty", "bytes"])
def test_configuration_that_is_not_json(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(lambda: load_model(folder), str(folder / "config.json"), "JSON")


def test_another_kind_of_model(folder):
    edit_config(folder, model_type="gpt_neox")
    refused(lambda: load_model(folder), str(folder), "'gpt_neox'", "'tokenformer'")
    edit_config(folder, model_type=None)
    refused(lambda: load_model(folder), "model_type is missing")


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "wide"},
        {"num_attention_heads": 5},
        {"segments": [1]},
        {"normalization": "l3"},
        {"vocab_size": 0},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_values_that_make_no_model(folder, fields):
    edit_config(folder, **fields)
    refused(lambda: load_model(folder), str(folder / "config.json"))


# Weights


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(lambda: load_model(folder), str(folder), "no weights", "model.safetensors")


@pytest.mark.parametrize("size", [0, 4, 300, 80_000], ids=lambda size: f"{size}bytes")
def test_weights_cut_short(folder, size):
    file = folder / "model.safetensors"
    assert file.stat().st_size > size
    file.write_bytes(file.read_bytes()[:size])
    refused(lambda: load_model(folder), str(file), "damaged or cut short")


def test_weights_that_are_something_else(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 9, encoding="utf-8")
    refused(lambda: load_model(folder), "model.safetensors", "damaged")


def test_shapes_that_disagree(folder):
    edit_config(folder, vocab_size=400)
    refused(lambda: load_model(folder), "model.embed_tokens.weight", "(320, 32)", "(400, 32)")


def test_segment_without_weights(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edit_config(folder, segments=[*config["segments"], {"name": "more", "qkv": 0, "output": 0, "ffn": 4}])
    refused(lambda: load_model(folder), "lack", "segments.more", "and 3 more", "config.json")


def test_weights_of_a_segment_not_listed(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edit_config(folder, segments=config["segments"][:1])
    refused(lambda: load_model(folder), "hold", "segments.grown1", "does not list")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', "{"])
def test_index_without_files(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    refused(lambda: load_model(folder), "model.safetensors.index.json", "again")


def test_shard_missing(original, tmp_path):
    original[1].save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(lambda: load_model(tmp_path), str(shard), "missing")


# Options


@pytest.mark.parametrize("dtype", ["float17", "int8", "nn"])
def test_unknown_dtype(original, dtype):
    refused(lambda: load_model(original[0], dtype=dtype), f"'{dtype}'", "bfloat16")


def test_unknown_device(original):
    refused(lambda: load_model(original[0], device="abacus"), "'abacus'")


# Tokenizer


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    refused(lambda: load_tokenizer(folder), str(folder), "no tokenizer", "tokenizer.json")


@pytest.mark.parametrize("text", ["{", "{}", '{"model": {"type": "no such"}}'])
def test_tokenizer_that_is_damaged(folder, text):
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    refused(lambda: load_tokenizer(folder), "tokenizer.json", "cannot be read")


def test_tokenizer_larger_than_the_embedding(folder):
    entries = len(train_tokenizer())
    edit_config(folder, vocab_size=entries - 1)
    refused(lambda: load_tokenizer(folder), f"{entries} entries", f"vocab_size is {entries - 1}")
    edit_config(folder, vocab_size=entries)
    assert len(load_tokenizer(folder)) == entries


def test_tokenizer_without_a_model(folder):
    (folder / "config.json").unlink()
    assert load_tokenizer(folder).get_vocab() == train_tokenizer().get_vocab()
