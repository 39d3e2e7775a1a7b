"""Names and fields of the published format, against the table of the paper's checkpoints written out by hand."""

import pytest
import torch

from published_folder import TINY, published_config, published_tensors
from tiny import tiny_config
from tokenformer import TokenFormerConfig, TokenFormerForCausalLM, UserError
from tokenformer.published import (
    complete_fields,
    is_published,
    our_fields,
    published_fields,
    rename_tensors,
    tensor_names,
    weights_of,
)

SIZES = {name: TINY[name] for name in ("layers", "hidden", "qkv", "proj", "ffn")}


def shapes(**changes):
    tensors = published_tensors(**SIZES, vocab=320)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()} | changes
    return {name: shape for name, shape in found.items() if shape is not None}


def fields(**changes):
    given = {**published_config(**SIZES, heads=2), **changes}
    return {name: value for name, value in given.items() if value is not None}


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# Names


def test_names_are_those_of_the_table():
    names = tensor_names(12)
    assert len(names) == 12 * 10 + 3
    assert names["model.embed_tokens.weight"] == "sequential.0.word_embeddings.weight"
    layer = "model.layers.11"
    assert names[f"{layer}.attention.query.segments.base.key"] == "sequential.13.attention.query.key_param_tokens"
    assert names[f"{layer}.attention.output.segments.base.value"] == "sequential.13.attention.proj.value_param_tokens"
    assert names[f"{layer}.ffn.segments.base.key"] == "sequential.13.mlp.key_param_tokens"
    assert names["model.norm.bias"] == "sequential.15.norm.bias"


def test_every_tensor_has_one_name_on_each_side():
    names = tensor_names(2)
    assert set(names.values()) == set(published_tensors(**SIZES, vocab=320))
    model = TokenFormerForCausalLM(TokenFormerConfig(**our_fields(fields(vocab_size=320), "config")))
    assert set(names) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_roots_of_the_number_of_tokens(dtype):
    renamed = rename_tensors(published_tensors(**SIZES, vocab=320, dtype=dtype), 2)
    for path, count in (("attention.key", 12), ("attention.output", 10), ("ffn", 20)):
        scale = renamed[f"model.layers.1.{path}.scale"]
        assert scale.shape == ()
        assert torch.equal(scale, torch.tensor(count).double().sqrt().float())


def test_rotary_tables_are_no_weights():
    tensors = published_tensors(**SIZES, vocab=320)
    table = {"sequential.2.attention.rotary_emb.inv_freq": torch.ones(4)}
    assert weights_of({**tensors, **table}).keys() == tensors.keys()


# Fields


def test_published_fields_become_ours():
    config = TokenFormerConfig(**our_fields(fields(norm_activation_type="gelu_l2_norm", rotary_pct=0.5), "config"))
    assert config.segments == [{"name": "base", "qkv": 12, "output": 10, "ffn": 20}]
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 32, 2)
    assert (config.normalization, config.rotary_pct, config.max_position_embeddings) == ("gelu_l2", 0.5, 64)
    assert config.pattention_eps == 1e-12
    assert config.dtype is None, "torch_dtype says float16 where the weights are float32"


def test_fields_of_the_training_code_are_understood():
    given = fields(layernorm_epsilon=1e-6, rotary_emb_base=500, max_position_embeddings=None, eos_token_id=3)
    config = TokenFormerConfig(**our_fields(given, "config"))
    assert config.layer_norm_eps == 1e-6
    assert config.rope_parameters["rope_theta"] == 500
    assert config.max_position_embeddings == 64, "seq_length stands for it"
    assert config.eos_token_id == 3


@pytest.mark.parametrize("normalization", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_fields_survive_there_and_back(normalization):
    given = fields(norm_activation_type=normalization, rotary_pct=0.5, vocab_size=320)
    back = published_fields(TokenFormerConfig(**our_fields(given, "config")), torch.float16)
    assert {name: back[name] for name in given if name != "transformers_version"} == {
        name: value for name, value in given.items() if name != "transformers_version"
    }
    assert is_published(back)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pos_emb": "learned"}, ["pos_emb is 'learned'", "'rotary'"]),
        ({"norm": "layernorm"}, ["norm is 'layernorm'", "'layernorm_nonparam'"]),
        ({"final_norm": "rmsnorm"}, ["final_norm is 'rmsnorm'"]),
        ({"no_weight_tying": True}, ["no_weight_tying is True"]),
        ({"gpt_j_residual": True}, ["gpt_j_residual is True"]),
        ({"use_bias_in_attn_linear": True}, ["use_bias_in_attn_linear is True"]),
        ({"norm_activation_type": "relu"}, ["norm_activation_type is 'relu'", "l2_norm_gelu"]),
        ({"attention_config": [[["global"], 2]]}, ["attention_config", "'global'"]),
        ({"attention_config": [[["tokenformer"], 3]]}, ["attention_config has 3 layers", "num_layers is 2"]),
        ({"attention_config": "tokenformer"}, ["attention_config"]),
        ({"num_attention_heads": "many"}, ["num_attention_heads", "'many'"]),
        ({"num_attention_heads": True}, ["num_attention_heads", "True"]),
        ({"rotary_pct": "all"}, ["rotary_pct", "'all'"]),
        ({"num_attention_heads": None, "rotary_pct": None}, ["lacks num_attention_heads, rotary_pct", "--config"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_fields_that_are_not_implemented(changes, words):
    refused(lambda: our_fields(fields(**changes), "there/config.json"), "there/config.json", *words)


def test_layers_may_all_be_of_one_kind():
    assert our_fields(fields(attention_config=[[["tokenformer"], "all"]]), "config")["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "relu"}, ["activation is 'relu'", "'gelu'"]),
        ({"normalization": "gelu_l1"}, ["normalization is 'gelu_l1'", "l2_gelu, gelu_l2, softmax"]),
        ({"layer_norm_eps": 1e-6}, ["layer_norm_eps is 1e-06"]),
        ({"rope_parameters": {"rope_theta": 500.0}}, ["base 500", "10000"]),
        ({"tie_word_embeddings": False}, ["tie_word_embeddings is False"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_the_published_code_cannot_do(changes, words):
    refused(lambda: published_fields(tiny_config(**changes), torch.float32), *words)


# Weights against fields

KEY = "sequential.3.mlp.key_param_tokens"


def test_sizes_come_from_the_weights():
    names = ("num_layers", "hidden_size", "qkv_slot_num", "proj_slot_num", "ffn_slot_num")
    complete = complete_fields(fields(**dict.fromkeys(names)), shapes(), "config", "weights")
    assert {name: complete[name] for name in names} == {name: fields()[name] for name in names}
    assert complete["vocab_size"] == 320


@pytest.mark.parametrize(
    ("given", "tensors", "words"),
    [
        ({"num_layers": 3}, {}, ["config: num_layers is 3", "weights has 2"]),
        ({"hidden_size": 64}, {}, ["config: hidden_size is 64", "weights has 32"]),
        ({"qkv_slot_num": 9}, {}, ["config: qkv_slot_num is 9", "weights has 12"]),
        ({"proj_slot_num": "ten"}, {}, ["config: proj_slot_num", "'ten'"]),
        ({"ffn_slot_num": 21}, {}, ["config: ffn_slot_num is 21", "weights has 20"]),
        ({"vocab_size": 300}, {}, ["config: vocab_size is 300", "weights has 320"]),
        ({}, {KEY: None}, ["weights lacks", KEY]),
        ({}, {KEY: (20, 31)}, [KEY, "(20, 31)", "(20, 32)"]),
        ({}, {KEY: (19, 32)}, [KEY, "(19, 32)", "(20, 32)"]),
        ({}, {KEY: (640,)}, [KEY, "(640,)"]),
        ({}, {"sequential.2.mlp.key_param_tokens": (640,)}, ["sequential.2.mlp.key_param_tokens", "(640,)"]),
        ({}, {"sequential.2.mlp.key_param_tokens": None}, ["lacks sequential.2.mlp.key_param_tokens"]),
        ({}, {"sequential.0.word_embeddings.weight": None}, ["lacks sequential.0.word_embeddings.weight"]),
        ({}, {"sequential.5.norm.bias": None}, ["lacks sequential.5.norm.bias"]),
        ({}, {"sequential.2.mlp.bias": (32,)}, ["holds sequential.2.mlp.bias"]),
        ({}, {"sequential.6.final_linear.weight": (320, 32)}, ["holds sequential.6.final_linear.weight"]),
        ({"num_layers": None}, {"sequential.999999999.mlp.key_param_tokens": (20, 32)}, ["lacks sequential.4."]),
    ],
    ids=str,
)
def test_weights_that_contradict(given, tensors, words):
    refused(lambda: complete_fields(fields(**given), shapes(**tensors), "config", "weights"), *words)
