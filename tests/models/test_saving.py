"""Files: what is saved comes back bit by bit, through the Auto classes, in shards and in other dtypes; and LoRA."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import tokenformer.models  # noqa: F401  (registers the Auto classes)
from tiny import SEGMENTS, tiny_config, tiny_ids, tiny_model
from tokenformer import Pattention, TokenFormerConfig, TokenFormerForCausalLM, TokenFormerModel, grow

GROWN = [*SEGMENTS, {"name": "grown1", "qkv": 4, "output": 0, "ffn": 5}]


def _layers(model) -> list[Pattention]:
    return [module for module in model.modules() if isinstance(module, Pattention)]


@pytest.mark.parametrize("segments", [SEGMENTS, GROWN], ids=["one-segment", "two-segments"])
@pytest.mark.parametrize("shard", ["5GB", "8KB"], ids=["one-file", "shards"])
def test_saved_and_loaded_bit_by_bit(tmp_path, shard, segments) -> None:
    model, ids = tiny_model(segments=segments), tiny_ids()
    _layers(model)[0].scale.fill_(1.2345)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if shard == "5GB" else len(files) > 3
    loaded, info = TokenFormerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_file_holds_the_documented_names(tmp_path) -> None:
    tiny_model(num_hidden_layers=1, segments=GROWN).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected = {"model.embed_tokens.weight": (31, 32), "model.norm.weight": (32,), "model.norm.bias": (32,)}
    for path, base, grown in (
        ("attention.query", 12, 4),
        ("attention.key", 12, 4),
        ("attention.value", 12, 4),
        ("attention.output", 10, 0),
        ("ffn", 20, 5),
    ):
        expected[f"model.layers.0.{path}.scale"] = ()
        for name, tokens in (("base", base), ("grown1", grown)):
            for part in ("key", "value") if tokens else ():
                expected[f"model.layers.0.{path}.segments.{name}.{part}"] = (tokens, 32)
    assert shapes == expected
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["TokenFormerForCausalLM"]


def test_auto_classes(tmp_path) -> None:
    model, ids = tiny_model(), tiny_ids()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TokenFormerConfig)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(causal, TokenFormerForCausalLM)
    assert torch.equal(causal(ids).logits, model(ids).logits)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert isinstance(backbone, TokenFormerModel)
    assert torch.equal(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert isinstance(AutoModelForCausalLM.from_config(tiny_config()), TokenFormerForCausalLM)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loading_in_16_bits_keeps_the_scale_in_float32(tmp_path, dtype) -> None:
    model, ids = tiny_model(), tiny_ids()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    for layer, original in zip(_layers(loaded), _layers(model), strict=True):
        assert layer.scale.dtype == torch.float32
        assert torch.equal(layer.scale, original.scale)
    logits, expected = loaded(ids).logits, model(ids).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_bfloat16_file_keeps_the_scale_in_float32(tmp_path) -> None:
    model, ids = tiny_model().bfloat16(), tiny_ids()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.ffn.scale").dtype == torch.float32
        assert file.get_tensor("model.layers.0.ffn.segments.base.key").dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_file_without_a_segment_initialises_it(tmp_path) -> None:
    """From a base checkpoint with a larger configuration: old tokens are loaded, new ones initialised."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    larger = tiny_config(segments=[*SEGMENTS, {"name": "new", "qkv": 400, "output": 400, "ffn": 400}])
    loaded = TokenFormerForCausalLM.from_pretrained(tmp_path, config=larger)
    for layer, original in zip(_layers(loaded), _layers(model), strict=True):
        assert torch.equal(layer.segments["base"].key, original.segments["base"].key)
        assert torch.equal(layer.scale, original.scale)
        assert layer.segments["new"].key.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.segments["new"].value.std().item() == pytest.approx(2 / (2 * 32**0.5), rel=0.05)


def test_a_file_without_scales_gets_the_root_of_the_base_tokens(tmp_path) -> None:
    model, ids = tiny_model(segments=GROWN), tiny_ids()
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("scale")}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded = TokenFormerForCausalLM.from_pretrained(tmp_path)
    roots = {"qkv": 12**0.5, "output": 10**0.5, "ffn": 20**0.5}
    assert [layer.scale.item() for layer in _layers(loaded)] == pytest.approx([roots[x.kind] for x in _layers(loaded)])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


# PEFT

LORA = LoraConfig(r=2, target_parameters=["segments.base.key", "segments.base.value"])


def _train(model, ids: torch.Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


def test_stock_lora_trains_saves_and_merges(tmp_path) -> None:
    model, ids = tiny_model(), tiny_ids()
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    before = model(ids).logits
    adapted = get_peft_model(model, LORA)
    assert torch.equal(adapted(ids).logits, before), "LoRA begins at zero"
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 5 * 2 * 2, "layers, Pattentions, key and value, A and B"
    _train(adapted, ids)
    after = adapted(ids).logits
    assert (after - before).abs().max() > 1e-3

    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000
    merged = adapted.merge_and_unload()
    assert isinstance(merged, TokenFormerForCausalLM)
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-5)
    changed = {name for name, parameter in merged.named_parameters() if not torch.equal(parameter, frozen[name])}
    assert changed == {name for name in frozen if ".segments." in name}


def test_a_model_under_lora_can_be_inspected_and_grown() -> None:
    model, ids = tiny_model(), tiny_ids()
    adapted = get_peft_model(model, LORA)
    _train(adapted, ids)
    before = adapted(ids).logits
    assert [layer.num_tokens for layer in _layers(adapted)] == [12, 12, 12, 10, 20] * 2
    assert "num_tokens=20" in repr(adapted)
    with pytest.raises(ValueError, match="merge_and_unload"):
        _layers(adapted)[0].merge_segments()
    grow(adapted, ffn=30)
    assert model.config.segments[-1] == {"name": "grown1", "qkv": 0, "output": 0, "ffn": 10}
    assert torch.equal(adapted(ids).logits, before)


def test_a_merged_model_saves_and_loads(tmp_path) -> None:
    model = grow(tiny_model(), qkv=20, ffn=33)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = tiny_ids()
    before = model(ids).logits
    model.merge_segments()
    assert model.config.segments == [{"name": "base", "qkv": 20, "output": 10, "ffn": 33}]
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = TokenFormerForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
