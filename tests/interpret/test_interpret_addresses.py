"""Names of layers, segments and tokens: what is found, and what is said of a name that is not."""

import pytest
import torch
from torch import nn

from tiny import SEGMENTS, tiny_config, tiny_model
from tokenformer import Pattention, TokenFormerForCausalLM, UserError
from tokenformer.interpret import TokenAddress, find_layer, find_segment, find_token, pattention_layers
from tokenformer.interpret.addresses import segment_sizes
from tokenformer.tuning import add_adapter

GROWN = [*SEGMENTS, {"name": "grown1", "qkv": 4, "output": 0, "ffn": 5}]


@pytest.fixture(scope="module")
def model():
    return tiny_model(segments=GROWN)


def test_layers_are_named_as_in_the_model(model):
    layers = pattention_layers(model)
    per_block = ["attention.query", "attention.key", "attention.value", "attention.output", "ffn"]
    assert list(layers) == [f"model.layers.{i}.{name}" for i in range(2) for name in per_block]
    assert all(layer is model.get_submodule(path) for path, layer in layers.items())


@pytest.mark.parametrize("name", ["model.layers.1.ffn", "layers.1.ffn", "1.ffn"])
def test_an_end_of_a_path_is_enough(model, name):
    assert find_layer(model, name) == "model.layers.1.ffn"


def test_addresses_are_read_and_written(model):
    assert find_segment(model, "0.attention.query/grown1") == ("model.layers.0.attention.query", "grown1")
    token = find_token(model, "1.ffn/base/19")
    assert token == TokenAddress("model.layers.1.ffn", "base", 19)
    assert str(token) == "model.layers.1.ffn/base/19"
    assert find_token(model, token) == token
    assert segment_sizes(model, "model.layers.1.ffn") == {"base": 20, "grown1": 5}


def test_a_layer_that_is_the_model_has_an_empty_path():
    layer = Pattention(4, 4, 6)
    assert find_token(layer, "/base/5") == TokenAddress("", "base", 5)


def test_adapters_have_addresses():
    model = add_adapter(tiny_model(), "notes", ffn=3)
    assert find_token(model, "0.ffn/notes/2").index == 2


@pytest.mark.parametrize(
    ("find", "text", "message"),
    [
        (find_layer, "3.ffn", r"unknown layer '3\.ffn': did you mean .*model\.layers\.\d\.ffn"),
        (find_layer, "model.layers.0.fnn", r"unknown layer .*did you mean model\.layers\.0\.ffn"),
        (find_layer, "lm_head", r"unknown layer 'lm_head': .*such as model\.layers\.0\.attention\.query"),
        (find_layer, "", "unknown layer ''"),
        (find_layer, "ffn", r"'ffn' is the end of 2 layers: write more of the name, such as model\.layers\.0\.ffn"),
        (find_layer, "0.f", r"unknown layer '0\.f'"),
        (find_segment, "0.ffn", "'0.ffn' names no segment: write LAYER/SEGMENT"),
        (find_segment, "0.ffn/other", r"no segment 'other' in model\.layers\.0\.ffn: it has base, grown1"),
        (find_segment, "0.attention.output/grown1", r"no segment 'grown1' in .*output: it has base"),
        (find_token, "0.ffn/base", "'0.ffn/base' names no token: write LAYER/SEGMENT/INDEX"),
        (find_token, "0.ffn/base/20", r"no token '20' in model\.layers\.0\.ffn/base: it has the tokens 0 to 19"),
        (find_token, "0.ffn/base/-1", "no token '-1'"),
        (find_token, "0.ffn/base/x", "no token 'x'"),
        (find_token, "9.ffn/base/1", r"unknown layer '9\.ffn'"),
    ],
)
def test_what_is_unknown_is_named_with_the_fix(model, find, text, message):
    with pytest.raises(UserError, match=message) as caught:
        find(model, text)
    assert "\n" not in str(caught.value)


def test_a_model_without_pattention_layers_is_refused():
    with pytest.raises(UserError, match=r"Sequential has no Pattention layer: .*replace_linear"):
        pattention_layers(nn.Sequential(nn.Linear(3, 3)))


def test_a_sparse_model_is_refused():
    sizes = {"num_tokens": 20, "group_size": 2, "active": 4, "rank": 4, "router_rank": 4}
    with torch.device("meta"):
        model = TokenFormerForCausalLM(tiny_config(sparsity={"layers.0.ffn": sizes}))
    with pytest.raises(UserError, match=r"sparse and cannot be looked into: make it dense first"):
        pattention_layers(model)
