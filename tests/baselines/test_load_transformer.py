"""Transformers from their folders: as they were saved, or one line that says what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from saved_model import edit_config, save_model
from tiny import tiny_ids
from tiny_transformer import save_transformer
from tokenformer import UserError
from tokenformer.baselines import load_transformer


@pytest.fixture
def folder(tmp_path):
    save_transformer(tmp_path / "transformer")
    return tmp_path / "transformer"


@pytest.mark.parametrize("tied", [True, False])
def test_loads_what_was_saved(tmp_path, tied):
    model = save_transformer(tmp_path / "transformer", tie_word_embeddings=tied)
    found = load_transformer(str(tmp_path / "transformer"))
    assert not found.training
    assert found.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(found(tiny_ids()).logits, model(tiny_ids()).logits)
    assert load_transformer(tmp_path / "transformer", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_dtype_is_that_of_the_weights(folder):
    load_transformer(folder).bfloat16().save_pretrained(folder)
    assert load_transformer(folder).dtype == torch.bfloat16


def _edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


DAMAGES = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "no json": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot read the weights"),
    "cut short": (_cut_short, "cannot read the weights"),
    "other sizes": (lambda folder: edit_config(folder, intermediate_size=48), "has shape .* by config.json"),
    "missing": (
        lambda folder: _edit_weights(folder, lambda weights: weights.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.bias")),
        "the weights lack gpt_neox.layers.1.mlp.dense_h_to_4h.bias: copy all files",
    ),
    "more layers": (
        lambda folder: edit_config(folder, num_hidden_layers=3),
        "the weights lack gpt_neox.layers.2.attention.dense.bias and 11 more",
    ),
    "fewer layers": (
        lambda folder: edit_config(folder, num_hidden_layers=1),
        "the weights hold gpt_neox.layers.1.attention.dense.bias and 11 more, which config.json does not list",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_named(folder, damage):
    break_it, words = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(UserError, match=words) as error:
        load_transformer(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_other_architectures_are_named(tmp_path):
    save_model(tmp_path / "tokenformer")
    GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    for kind in ("tokenformer", "gpt2"):
        with pytest.raises(UserError, match=f"is a '{kind}', not a 'gpt_neox'"):
            load_transformer(tmp_path / kind)
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_transformer(tmp_path / "unknown")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        load_transformer(tmp_path / "absent")
