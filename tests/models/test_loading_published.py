"""Published folders loaded as they are: by transformers' from_pretrained and by what the command line uses."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from published_folder import Payload, write_tiny
from saved_model import edit_config, train_tokenizer
from tiny import tiny_ids
from tokenformer import TokenFormerConfig, TokenFormerForCausalLM, TokenFormerModel, UserError
from tokenformer.cli import main
from tokenformer.convert import convert
from tokenformer.models import checkpoints
from tokenformer.models.loading import load_config, load_model, load_tokenizer

BIN = "pytorch_model.bin"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "published"
    write_tiny(folder)
    train_tokenizer().save_pretrained(folder)
    convert(str(folder), str(folder.with_name("converted")))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def same(model, other):
    state = other.state_dict()
    return model.state_dict().keys() == state.keys() and all(
        torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize("load", [TokenFormerForCausalLM.from_pretrained, load_model])
def test_it_is_the_converted_model(load, original):
    model = load(original)
    assert same(model, load_model(original.with_name("converted")))
    assert not model.training
    assert model.dtype == torch.float32, "that of the weights, though torch_dtype says float16"
    assert model.config.vocab_size == 320
    assert model.config.name_or_path == str(original)


def test_no_scale_is_said_to_be_newly_initialized(original):
    _, report = TokenFormerForCausalLM.from_pretrained(original, output_loading_info=True)
    assert not any(report.values()), report


def test_options_of_from_pretrained(original):
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager", "use_cache": False, "revision": "main"}
    model = TokenFormerForCausalLM.from_pretrained(original, **options)
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].ffn.scale.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False
    assert TokenFormerForCausalLM.from_pretrained(original, dtype="auto").dtype == torch.float32
    assert same(
        TokenFormerForCausalLM.from_pretrained(original.parent, subfolder=original.name),
        TokenFormerForCausalLM.from_pretrained(original),
    )


def test_the_backbone_alone(original):
    backbone = TokenFormerModel.from_pretrained(original)
    assert same(backbone, load_model(original).model)


def test_saved_again_it_is_a_model_of_ours(original, tmp_path):
    model = TokenFormerForCausalLM.from_pretrained(original)
    model.save_pretrained(tmp_path)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "tokenformer"


def test_a_given_configuration_is_used(original, tmp_path):
    config = TokenFormerConfig.from_pretrained(original, vocab_size=320)
    config.layer_norm_eps = 1e-3
    assert AutoModelForCausalLM.from_pretrained(original, config=config).config.layer_norm_eps == 1e-3
    config.save_pretrained(tmp_path)
    assert TokenFormerForCausalLM.from_pretrained(original, config=tmp_path).config.layer_norm_eps == 1e-3


def test_configuration_of_a_published_folder(original):
    config = TokenFormerConfig.from_pretrained(original)
    assert (config.num_hidden_layers, config.normalization, config.vocab_size) == (2, "l2_gelu", 50304)
    assert load_config(original).vocab_size == 320, "which the weights tell"
    assert load_tokenizer(original).get_vocab() == train_tokenizer().get_vocab()


def test_the_auto_class_needs_the_missing_model_type(original):
    with pytest.raises(ValueError, match="model_type"):
        AutoModelForCausalLM.from_pretrained(original)


def test_training_it_leaves_the_file_alone(folder):
    before = (folder / BIN).read_bytes()
    model = TokenFormerForCausalLM.from_pretrained(folder).train()
    model(tiny_ids(), labels=tiny_ids()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not same(model, load_model(folder))
    assert (folder / BIN).read_bytes() == before


def test_name_on_the_hub(original, monkeypatch):
    asked = []

    def snapshot(name, *, allow_patterns, **options):
        asked.append((name, "*.bin" in allow_patterns, options))
        return str(original)

    fields = json.loads((original / "config.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert same(load_model("somebody/published"), load_model(original))
    assert asked == [("somebody/published", wanted, {}) for wanted in (False, True)], "the bin where there is no other"
    asked.clear()
    monkeypatch.setattr(checkpoints.PreTrainedConfig, "get_config_dict", lambda *a, **k: (dict(fields), {}))
    model = TokenFormerForCausalLM.from_pretrained("somebody/published", revision="v2", local_files_only=True)
    assert same(model, load_model(original))
    assert asked[-1] == ("somebody/published", True, {"revision": "v2", "local_files_only": True})


# What is refused


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("load", [TokenFormerForCausalLM.from_pretrained, load_model])
def test_what_is_wrong_is_named(load, folder):
    edit_config(folder, ffn_slot_num=21)
    refused(lambda: load(folder), f"{folder}/config.json", "ffn_slot_num is 21", "has 20")
    edit_config(folder, ffn_slot_num=20, gpt_j_residual=True)
    refused(lambda: load(folder), "gpt_j_residual is True")
    edit_config(folder, gpt_j_residual=False, num_attention_heads=None)
    refused(lambda: load(folder), "lacks num_attention_heads", "tokenformer convert")
    (folder / BIN).write_bytes((folder / BIN).read_bytes()[:1000])
    refused(lambda: load(folder), f"{folder / BIN} is damaged")
    (folder / BIN).unlink()
    refused(lambda: load(folder), f"{folder} holds no weights")


def test_code_in_the_weights_is_not_run(folder, tmp_path):
    torch.save({"a": Payload(tmp_path / "evidence")}, folder / BIN)
    refused(lambda: load_model(folder), "system", "nothing was run")
    assert not os.path.exists(tmp_path / "evidence")


def test_info_says_how_to_convert(original, capsys):
    assert main(["info", str(original)]) == 2
    assert f"run `tokenformer convert {original} OUT`" in capsys.readouterr().err
