"""Adapters in folders: what was saved comes back, into the model it was made for and no other."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from with_adapters import adapter_tensors, add_lively

from tiny import tiny_ids, tiny_model
from tiny_vision import tiny_classifier
from tokenformer import TokenFormerForCausalLM, UserError
from tokenformer.tuning import (
    add_adapter,
    base_hashes,
    list_adapters,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
)
from tokenformer.tuning.files import load_adapters

IDS = tiny_ids()


@pytest.fixture
def saved(tmp_path):
    """A folder with a model, one with an adapter for it, and the logits of both together."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    add_lively(model, "law")
    save_adapter(model, "law", tmp_path / "law")
    return tmp_path / "base", tmp_path / "law", model(IDS).logits


def _base(saved, **options) -> TokenFormerForCausalLM:
    return TokenFormerForCausalLM.from_pretrained(saved[0], **options).eval()


def test_an_adapter_comes_back_bitwise_and_alone(saved) -> None:
    model = _base(saved)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    assert load_adapter(model, saved[1]) == "law"
    assert torch.equal(model(IDS).logits, saved[2])
    assert [p.requires_grad for name, p in model.named_parameters() if ".law." not in name] == trainable
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".law." in name)
    assert sorted(file.name for file in saved[1].iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    stored = load_file(saved[1] / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == 2 * 2 * 32 * (3 * 3 + 2 + 5)


def test_it_can_be_loaded_inactive_under_another_name_or_to_be_trained(saved) -> None:
    model = _base(saved)
    before = model(IDS).logits
    assert load_adapter(model, saved[1], "other", activate=False) == "other"
    assert torch.equal(model(IDS).logits, before)
    load_adapter(model, saved[1], trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".law." in name}


def test_several_are_loaded_with_weights(saved, tmp_path) -> None:
    other = _base(saved)
    add_lively(other, "verse", seed=3, qkv=2)
    save_adapter(other, "verse", tmp_path / "verse=2")
    load_adapter(other, saved[1], activate=False)
    set_adapter(other, {"law": 0.5, "verse": 1.0})
    model = _base(saved)
    assert load_adapters(model, [f"{saved[1]}=0.5", str(tmp_path / "verse=2")]) == {"law": 0.5, "verse": 1.0}
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_base_is_known_again_in_another_dtype(saved, dtype) -> None:
    model = _base(saved, dtype=dtype)
    load_adapter(model, saved[1])
    assert {tensor.dtype for tensor in adapter_tensors(model, "law")} == {dtype}


def test_the_hash_is_of_parameters_and_of_what_decides_their_meaning() -> None:
    def hashes(**fields):
        torch.manual_seed(1)
        return base_hashes(tiny_model(**fields))

    found = [hashes(), hashes(num_attention_heads=4), hashes(normalization="gelu_l2"), hashes(rotary_pct=0.5)]
    assert len({each["bfloat16"] for each in found}) == len(found)
    assert hashes() == found[0]
    assert hashes(use_cache=False) == found[0]
    model = tiny_model()
    before = base_hashes(model)
    add_lively(model, "law")
    assert base_hashes(model) == before
    merge_adapter(model, "law")
    assert base_hashes(model) != before


def test_another_base_is_refused_by_hash_unless_asked_for(saved) -> None:
    model = _base(saved)
    with torch.no_grad():
        model.model.layers[1].ffn.segments["base"].value[3, 4] += 0.1
    before = model(IDS).logits
    with pytest.raises(
        UserError, match=r"was made for another model.*have the hash \w{12}, those of this model \w{12}"
    ):
        load_adapter(model, saved[1])
    assert torch.equal(model(IDS).logits, before)
    assert list_adapters(model) == []
    load_adapter(model, saved[1], check_base=False)
    assert not torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: tiny_model(hidden_size=64),
            r"the (key|value) of '.*' has shape \(\d, 32\), this model takes \(N, 64\)",
        ),
        (lambda: tiny_model(num_hidden_layers=1), "a layer that this model does not have"),
        (lambda: tiny_model(num_hidden_layers=3), "'model.layers.2.attention.query' has 0 tokens"),
        (lambda: tiny_classifier(), "this model takes|does not have"),
        (lambda: torch.nn.Linear(2, 2), "no Pattention layers"),
    ],
)
def test_wrong_shapes_are_refused(saved, other, message) -> None:
    model = other()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=message):
        load_adapter(model, saved[1], check_base=False)
    assert [name for name, _ in model.named_parameters()] == names


def test_two_of_one_name_are_refused(saved) -> None:
    model = _base(saved)
    load_adapter(model, saved[1])
    with pytest.raises(UserError, match="the model has an adapter 'law' already: choose another name"):
        load_adapter(model, saved[1])
    with pytest.raises(UserError, match="the model has a segment 'base' already"):
        load_adapter(model, saved[1], "base")


def _edit(folder, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _drop_a_value(folder) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if name.endswith("value")))
    save_file(tensors, folder / "adapter_model.safetensors")


def _rename(folder) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({f"x{name}y": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no weights"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"abc"), "damaged or cut short"),
        (_drop_a_value, "lacks the value of"),
        (_rename, "is no key or value of parameter tokens"),
        (lambda f: _edit(f, peft_type="LORA"), "holds an adapter of the kind 'LORA': load it with peft"),
        (lambda f: _edit(f, ffn=7), "has 5 tokens in adapter_model.safetensors but 7 by adapter_config.json"),
        (lambda f: _edit(f, name=3), "name must be text"),
        (lambda f: _edit(f, base_hashes=None), "does not say which model it was made for"),
        (shutil.rmtree, "holds no adapter"),
    ],
)
def test_damaged_folders_are_refused_with_their_name(saved, spoil, message) -> None:
    model = _base(saved)
    before = model(IDS).logits
    spoil(saved[1])
    with pytest.raises(UserError, match=message) as refused:
        load_adapter(model, saved[1])
    assert "law" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert torch.equal(model(IDS).logits, before)


def test_saving_refuses_what_is_not_there_and_folders_that_are(saved, tmp_path) -> None:
    model = _base(saved)
    with pytest.raises(UserError, match="no adapter 'law': this model has no adapters"):
        save_adapter(model, "law", tmp_path / "new")
    add_adapter(model, "law", ffn=1)
    with pytest.raises(UserError, match="exists already"):
        save_adapter(model, "law", saved[1])
    merge_adapter(model, "law")
    with pytest.raises(UserError, match="is merged"):
        save_adapter(model, "law", tmp_path / "new")
    assert not (tmp_path / "new").exists()
