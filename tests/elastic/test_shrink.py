import copy
import math

import pytest
import torch
from torch import nn

import statement
from tiny import tiny_ids, tiny_model
from tiny_vision import tiny_classifier, tiny_pixels
from tokenformer import Pattention, TokenFormerForCausalLM, UserError, grow
from tokenformer.elastic import importance, prefix, shrink
from tokenformer.tuning import add_adapter

BATCHES = [{"input_ids": tiny_ids(seed=seed)} for seed in range(3)]


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny_ids(seed=9)).logits


def layer_and_inputs(normalization="l2_gelu", tokens=12, rows=40):
    """A layer of two segments in float64, and inputs as calibration data: the layer itself is the model."""
    torch.manual_seed(1)
    layer = Pattention(6, 5, tokens - 4, normalization=normalization, scale=3.0, dtype=torch.float64)
    layer.add_segment("grown1", 4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, torch.randn(rows, 6, dtype=torch.float64)


def keys_and_values(layer):
    parts = layer.segments.values()
    return torch.cat([p.key for p in parts]).detach(), torch.cat([p.value for p in parts]).detach()


@pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "gelu_l1", "softmax"])
def test_importance_is_the_error_of_leaving_a_token_out(normalization):
    """With the weights of the others kept: measured by leaving each out, on the equation written by itself."""
    layer, x = layer_and_inputs(normalization)
    keys, values = keys_and_values(layer)
    weights = statement.weights(x, [keys], 3.0, normalization)
    whole = weights @ values
    expected = []
    for token in range(len(keys)):
        others = [i for i in range(len(keys)) if i != token]
        expected.append((whole - weights[:, others] @ values[others]).square().sum(1).mean())
    found = importance(layer, [{"x": x[:15]}, {"x": x[15:]}])[""]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=0)


def test_ordering_by_importance_alone_keeps_the_function():
    """All tokens stay, in another order: exact but for the order of summation; then importance falls along them."""
    model = grow(tiny_model(), qkv=14, ffn=26).double()
    nn.init.normal_(model.model.layers[0].ffn.segments["grown1"].key)
    before = logits(model)
    ordered = shrink(model, qkv=14, output=10, ffn=26, by="importance", calibration=BATCHES)
    torch.testing.assert_close(logits(ordered), before, rtol=1e-10, atol=1e-10)
    for energies in importance(ordered, BATCHES).values():
        assert (energies.diff() <= 1e-12).all()
    assert ordered.config.segments == [{"name": "base", "qkv": 14, "output": 10, "ffn": 26}]


def test_important_tokens_are_those_left():
    layer, x = layer_and_inputs()
    keys, values = keys_and_values(layer)
    measured = statement.weights(x, [keys], 3.0, "l2_gelu").square().mean(0) * values.square().sum(1)
    best = measured.argsort(descending=True)[:5]
    shrink(layer, tokens=5, by="importance", calibration=[{"x": x}])
    assert torch.equal(layer.segments["base"].key, keys[best])
    assert torch.equal(layer.segments["base"].value, values[best])
    assert list(layer.segments) == ["base"]
    assert layer.scale.item() == 3.0


@pytest.mark.parametrize("sizes", [{"ffn": 7}, {"qkv": 3, "output": 10, "ffn": 23}, {"qkv": 13}])
def test_by_prefix_is_the_prefix(sizes, tmp_path):
    model = grow(tiny_model(), qkv=16, ffn=26)
    nn.init.normal_(model.model.layers[1].ffn.segments["grown1"].key)
    with prefix(model, **sizes):
        expected = logits(model)
    shrink(model, **sizes)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    again = TokenFormerForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), expected)
    assert all(again.config.num_tokens(kind) == count for kind, count in sizes.items())
    assert any("grown1" in layer.segments for layer in again.modules() if isinstance(layer, Pattention))


def test_memory_is_freed_and_what_is_frozen_stays_frozen():
    model = tiny_model()
    segment = model.model.layers[0].ffn.segments["base"]
    segment.requires_grad_(False)
    shrink(model, ffn=5)
    assert segment.key.untyped_storage().nbytes() == 5 * 32 * 4
    assert not segment.key.requires_grad
    assert not segment.value.requires_grad
    assert model.model.layers[1].ffn.segments["base"].key.requires_grad


def test_taking_out_a_segment_undoes_growing():
    model = tiny_model()
    before, segments = logits(model), model.config.segments
    grow(model, qkv=20, ffn=30, keys="random")
    assert not torch.equal(logits(model), before)
    shrink(model, by="segment", segment="grown1")
    assert torch.equal(logits(model), before)
    assert model.config.segments == segments


@pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "gelu_l1", "softmax"])
def test_scale_rules(normalization):
    """sqrt: by the share of tokens. calibrated: where the dropped tokens' share is the same in each row, the weights of
    those that stay are exactly what they were."""
    layer, x = layer_and_inputs(normalization)
    half = copy.deepcopy(layer)
    shrink(half, tokens=6, scale="sqrt")
    assert half.scale.item() == pytest.approx(3 * math.sqrt(1 / 2), rel=1e-12)

    twins = Pattention(6, 5, 10, normalization=normalization, scale=3.0, dtype=torch.float64)
    for parameter in twins.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        twins.segments["base"].key[5:] = twins.segments["base"].key[:5]
    keys = keys_and_values(twins)[0]
    expected = statement.weights(x, [keys], 3.0, normalization)[:, :5]
    shrink(twins, tokens=5, scale="calibrated", calibration=[{"x": x}])
    found = statement.weights(x, [keys[:5]], twins.scale.item(), normalization)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_fitted_values_recover_what_the_dropped_tokens_said():
    """Twins with values of their own: the kept half can say it all, with the sum of both values."""
    layer = Pattention(6, 5, 8, scale=3.0, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        layer.segments["base"].key[4:] = layer.segments["base"].key[:4]
    x, fresh = torch.randn(4000, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    value, before = layer.segments["base"].value.detach().clone(), layer(fresh)
    cut = shrink(copy.deepcopy(layer), tokens=4, scale="calibrated", calibration=[{"x": x}])
    shrink(layer, tokens=4, scale="calibrated", fit=True, calibration=[{"x": x}])
    error, cut_error = ((m(fresh) - before).square().mean().item() for m in (layer, cut))
    assert error < 1e-3 * cut_error  # the ridge holds the values back by about a hundredth
    torch.testing.assert_close(layer.segments["base"].value, value[:4] + value[4:], rtol=0, atol=0.1)


def test_fit_is_the_ridge_solution():
    layer, x = layer_and_inputs()
    keys, values = keys_and_values(layer)
    target = statement.weights(x, [keys], 3.0, "l2_gelu") @ values
    fewer = statement.weights(x, [keys[:7]], 3.0, "l2_gelu")
    shrink(layer, tokens=7, fit=True, calibration=[{"x": x}])
    new = layer.segments["base"].value.detach()
    ridge = 1e-2 * fewer.square().sum(0).mean()
    # The gradient of |F V - Y|^2 + ridge |V - V_0|^2 vanishes.
    gradient = fewer.T @ (fewer @ new - target) + ridge * (new - values[:7])
    assert gradient.abs().max() < 1e-8


def test_image_classifier():
    model = tiny_classifier()
    shrink(model, qkv=6, ffn=10, by="importance", scale="calibrated", calibration=[{"pixel_values": tiny_pixels()}])
    assert model(pixel_values=tiny_pixels()).logits.isfinite().all()
    assert model.config.segments == [{"name": "base", "qkv": 6, "output": 10, "ffn": 10}]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "nothing to shrink"),
        ({"ffn": 20}, "already has"),
        ({"ffn": 21}, "more than the 20"),
        ({"ffn": 0}, "at least 1"),
        ({"tokens": 3}, "no layers of that kind"),
        ({"ffn": 3, "by": "luck"}, "unknown by 'luck'"),
        ({"ffn": 3, "scale": "half"}, "unknown scale 'half'"),
        ({"ffn": 3, "by": "importance"}, "by 'importance' needs calibration"),
        ({"ffn": 3, "scale": "calibrated"}, "scale 'calibrated' needs calibration"),
        ({"ffn": 3, "fit": True}, "fit needs calibration"),
        ({"ffn": 3, "fit": True, "calibration": []}, "no input reaches"),
        ({"ffn": 3, "segment": "base"}, "by 'segment'"),
        ({"by": "segment"}, "name of a segment"),
        ({"by": "segment", "segment": "base"}, "cannot be taken out"),
        ({"by": "segment", "segment": "no"}, "no segment 'no'"),
        ({"by": "segment", "segment": "base", "ffn": 3}, "leave out qkv"),
    ],
)
def test_impossible_requests_change_nothing(options, words):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=words):
        shrink(model, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_models_that_are_not_whole_are_refused():
    model = tiny_model()
    model.model.layers[0].ffn.segments["base"].limit = 4
    with pytest.raises(UserError, match="limit and gain"):
        shrink(model, ffn=3)
    model = tiny_model()
    add_adapter(model, "law", ffn=2)
    with pytest.raises(UserError, match="'law' is an adapter"):
        shrink(model, ffn=3)
    with pytest.raises(UserError, match="no Pattention"):
        shrink(nn.Linear(2, 2), ffn=3)
