"""Adapters in memory: nothing changes before training, weights follow the equation, merging is exact, errors clear."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from with_adapters import adapter_tensors, add_lively, liven

from statement import TOLERANCE, error, pattention
from tiny import tiny_ids, tiny_model
from tiny_vision import tiny_classifier, tiny_pixels
from tokenformer import Pattention, TokenFormerConfig, TokenFormerForCausalLM, UserError, grow
from tokenformer.tuning import (
    Adapter,
    add_adapter,
    delete_adapter,
    disable_adapters,
    enable_adapters,
    list_adapters,
    merge_adapter,
    set_adapter,
    unmerge_adapter,
)


def _language():
    ids = tiny_ids()
    return tiny_model(), lambda model: model(ids).logits


def _vision():
    pixels = tiny_pixels()
    return tiny_classifier(), lambda model: model(pixels).logits


@pytest.fixture(params=[_language, _vision], ids=["language", "vision"])
def case(request):
    return request.param()


def _grown(model: TokenFormerForCausalLM, **parts: float) -> TokenFormerForCausalLM:
    """An ordinary model whose segments are the base's and, scaled by a weight, those of adapters."""
    segments = list(model.config.segments)
    for adapter in list_adapters(model):
        if adapter.name in parts:
            counts = {kind: adapter.tokens.get(kind, 0) for kind in ("qkv", "output", "ffn")}
            segments.append({"name": adapter.name, **counts})
    whole = TokenFormerForCausalLM(TokenFormerConfig(**{**model.config.to_dict(), "segments": segments})).eval()
    tensors = {name: tensor for name, tensor in model.named_parameters() if name in dict(whole.named_parameters())}
    tensors |= dict(model.named_buffers())
    for name, tensor in tensors.items():
        weight = next((w for part, w in parts.items() if f".segments.{part}.value" in name), 1.0)
        tensors[name] = tensor.detach() * weight
    whole.load_state_dict(tensors, strict=False)
    return whole


# What an adapter computes


def test_outputs_stay_bitwise_when_an_adapter_is_added_and_when_none_is_active(case) -> None:
    model, compute = case
    before = compute(model)
    add_adapter(model, "law", qkv=3, output=2, ffn=5)
    assert torch.equal(compute(model), before), "zero keys"
    liven(model, "law")
    assert not torch.allclose(compute(model), before, atol=1e-2)
    set_adapter(model, None)
    assert torch.equal(compute(model), before)
    set_adapter(model, "law")
    with disable_adapters(model):
        assert torch.equal(compute(model), before)
    assert not torch.allclose(compute(model), before, atol=1e-2)


@pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "gelu_l1"])
def test_outputs_stay_bitwise_under_every_normalisation_of_zero_scores(normalization) -> None:
    model, ids = tiny_model(normalization=normalization), tiny_ids()
    before = model(ids).logits
    add_adapter(model, "law", qkv=3, ffn=5)
    assert torch.equal(model(ids).logits, before)


def test_softmax_gives_weight_to_zero_scores_and_says_so() -> None:
    with pytest.warns(UserWarning, match="softmax a token of zero score takes weight"):
        add_adapter(tiny_model(normalization="softmax"), "law", ffn=2)


weights = st.floats(-3, 3).filter(lambda weight: abs(weight) > 1e-3)


@settings(max_examples=25)
@given(first=weights, second=weights, base=st.integers(1, 9), n=st.integers(1, 6), m=st.integers(1, 6))
def test_a_weight_multiplies_values_under_one_norm(first, second, base, n, m) -> None:
    layer = Pattention(7, 5, base, dtype=torch.float64)
    holder = nn.ModuleDict({"layer": layer})
    add_lively(holder, "a", seed=1, tokens=n)
    add_lively(holder, "b", seed=2, tokens=m)
    nn.init.normal_(layer.segments["base"].key)
    x = torch.randn(4, 7, dtype=torch.float64)
    base_, a, b = (layer.segments[name] for name in ("base", "a", "b"))
    set_adapter(holder, {"b": second, "a": first})
    expected = pattention(
        x, [base_.key, a.key, b.key], [base_.value, first * a.value, second * b.value], float(layer.scale)
    )
    assert error(layer(x), expected) < TOLERANCE[torch.float64]
    set_adapter(holder, {"a": first, "b": 0.0})
    expected = pattention(x, [base_.key, a.key], [base_.value, first * a.value], float(layer.scale))
    assert error(layer(x), expected) < TOLERANCE[torch.float64], "weight 0 leaves an adapter out"


def test_an_active_adapter_is_a_grown_model() -> None:
    model, ids = add_lively(tiny_model(), "law"), tiny_ids()
    add_lively(model, "verse", seed=1, qkv=4)
    set_adapter(model, {"law": 0.5, "verse": -2.0})
    torch.testing.assert_close(model(ids).logits, _grown(model, law=0.5, verse=-2.0)(ids).logits, rtol=0, atol=1e-6)
    set_adapter(model, "verse")
    torch.testing.assert_close(model(ids).logits, _grown(model, verse=1.0)(ids).logits, rtol=0, atol=1e-6)


def test_generate_uses_the_active_adapter() -> None:
    model, ids = add_lively(tiny_model(), "law"), tiny_ids(1)
    grown = _grown(model, law=1.0)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), grown.generate(ids, **options))
    with disable_adapters(model):
        assert torch.equal(model.generate(ids, **options), _grown(model).generate(ids, **options))


def test_adapters_compile_without_graph_breaks_and_can_be_switched() -> None:
    layer = Pattention(8, 8, 6)
    holder = nn.ModuleDict({"layer": layer})
    add_lively(holder, "law", tokens=3)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 8)
    for adapters in ("law", None, {"law": 0.5}):
        set_adapter(holder, adapters)
        torch.testing.assert_close(compiled(x), layer(x))


# Training


def test_the_adapter_alone_is_trained(case) -> None:
    model, compute = case
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add_adapter(model, "law", qkv=3, output=2, ffn=5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        compute(model).square().mean().backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())
    new = {name: parameter for name, parameter in after.items() if name not in before}
    assert len(new) == 2 * 5 * 2, "layers, Pattentions, key and value"
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in new.values())


def test_gradients_are_those_of_a_grown_model() -> None:
    model, ids = add_lively(tiny_model(), "law"), tiny_ids()
    grown = _grown(model, law=1.0)
    for each in (model, grown):
        each(ids, labels=ids).loss.backward()
    expected = dict(grown.named_parameters())
    for name, parameter in model.named_parameters():
        if ".law." in name:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def test_freeze_can_be_left_to_the_caller() -> None:
    model = add_adapter(tiny_model(), "law", ffn=2, freeze=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


# Which one takes part


def test_a_new_adapter_is_the_only_active_one() -> None:
    model = add_lively(add_lively(tiny_model(), "law"), "verse", qkv=4)
    law, verse = list_adapters(model)
    assert law == Adapter("law", {"qkv": 3, "output": 2, "ffn": 5}, 2 * 2 * 32 * (3 * 3 + 2 + 5), False, 1.0, False)
    assert verse == Adapter("verse", {"qkv": 4}, 2 * 2 * 32 * 12, True, 1.0, False)


def test_disabling_lasts_until_enabled_and_keeps_the_choice() -> None:
    model, ids = add_lively(tiny_model(), "law"), tiny_ids()
    set_adapter(model, {"law": 0.5})
    half = model(ids).logits
    disable_adapters(model)
    with disable_adapters(model):
        pass
    assert [adapter.active for adapter in list_adapters(model)] == [False]
    enable_adapters(model)
    assert torch.equal(model(ids).logits, half)


def test_deleting_leaves_what_was_there_before() -> None:
    model, ids = tiny_model(), tiny_ids()
    before, names = model(ids).logits, [name for name, _ in model.named_parameters()]
    delete_adapter(add_lively(model, "law"), "law")
    assert torch.equal(model(ids).logits, before)
    assert [name for name, _ in model.named_parameters()] == names
    assert list_adapters(model) == []
    add_adapter(model, "law", ffn=1)


# What the model saves


def test_a_model_saves_itself_and_not_its_adapters(case, tmp_path) -> None:
    model, _ = case
    model.save_pretrained(tmp_path / "before")
    add_lively(model, "law")
    model.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_a_loaded_state_leaves_adapters_alone() -> None:
    model, ids = add_lively(tiny_model(), "law"), tiny_ids()
    before, tensors = model(ids).logits, adapter_tensors(model, "law")
    model.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(a, b) for a, b in zip(adapter_tensors(model, "law"), tensors, strict=True))
    assert torch.equal(copy.deepcopy(model)(ids).logits, before)


# Merging


@pytest.mark.parametrize("weight", [1.0, 0.5, -0.3])
def test_merging_and_unmerging_are_exact(case, tmp_path, weight) -> None:
    model, compute = case
    base = compute(model)
    listed = list(model.config.segments)
    add_lively(model, "law")
    set_adapter(model, {"law": weight})
    active, tensors = compute(model), adapter_tensors(model, "law")
    merge_adapter(model, "law")
    assert torch.equal(compute(model), active)
    set_adapter(model, None)
    assert torch.equal(compute(model), active), "it is part of the model now"
    assert [adapter.merged for adapter in list_adapters(model)] == [True]

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.segments == [*listed, {"name": "law", "qkv": 3, "output": 2, "ffn": 5}]
    assert torch.equal(compute(loaded), active)
    merged = copy.deepcopy(model)
    merged.merge_segments()
    torch.testing.assert_close(compute(merged), active, rtol=1e-4, atol=1e-5)

    unmerge_adapter(model, "law")
    assert torch.equal(compute(model), active)
    assert model.config.segments == listed
    assert all(torch.equal(a, b) for a, b in zip(adapter_tensors(model, "law"), tensors, strict=True))
    set_adapter(model, None)
    assert torch.equal(compute(model), base)


def test_adapters_merged_in_another_order_load_bitwise(tmp_path) -> None:
    model, ids = add_lively(add_lively(tiny_model(), "law"), "verse", seed=1, qkv=4), tiny_ids()
    set_adapter(model, {"law": 1.0, "verse": 1.0})
    both = model(ids).logits
    merge_adapter(model, "verse")
    merge_adapter(model, "law")
    assert [segment["name"] for segment in model.config.segments] == ["base", "law", "verse"]
    model.save_pretrained(tmp_path)
    assert torch.equal(TokenFormerForCausalLM.from_pretrained(tmp_path)(ids).logits, both)


def test_a_model_that_was_moved_unmerges() -> None:
    model = add_lively(tiny_model(), "law")
    set_adapter(model, {"law": 0.5})
    tensors = adapter_tensors(model, "law")
    merge_adapter(model, "law")
    model.double()
    unmerge_adapter(model, "law")
    assert all(torch.equal(a, b.double()) for a, b in zip(adapter_tensors(model, "law"), tensors, strict=True))
    set_adapter(model, "law")
    assert model(tiny_ids()).logits.dtype == torch.float64


# Errors


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: add_adapter(m, "law", ffn=1), "the model has an adapter 'law' already: choose another name"),
        (lambda m: add_adapter(m, "base", ffn=1), "the model has a segment 'base' already"),
        (lambda m: add_adapter(m, "two words", ffn=1), "must be letters, digits and underscores"),
        (lambda m: add_adapter(m, "keys", ffn=1), "'keys' is reserved"),
        (lambda m: add_adapter(m, "new"), "nothing to add: give the number of new tokens"),
        (lambda m: add_adapter(m, "new", ffn=-1), "ffn must be at least 0, got -1"),
        (lambda m: add_adapter(m, "new", ffn=1, tokens=3), "tokens=3: the model has no layers of that kind"),
        (lambda m: set_adapter(m, "lwa"), "no adapter 'lwa': this model has law"),
        (lambda m: set_adapter(m, {"law": float("nan")}), "the weight of adapter 'law' must be finite, got nan"),
        (lambda m: delete_adapter(m, "base"), "no adapter 'base': this model has law"),
        (lambda m: merge_adapter(m, "verse"), "no adapter 'verse'"),
        (lambda m: unmerge_adapter(m, "law"), "no adapter 'law' is merged into this model"),
        (lambda m: m.merge_segments(), "'law' is an adapter: merge it first"),
        (lambda m: grow(m, ffn=50), "'law' is an adapter, made for the model as it is: merge or delete it"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(act, message) -> None:
    model, ids = add_lively(tiny_model(), "law"), tiny_ids()
    before, listed, names = model(ids).logits, list_adapters(model), [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=message):
        act(model)
    assert torch.equal(model(ids).logits, before)
    assert list_adapters(model) == listed
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("act", [set_adapter, delete_adapter, merge_adapter])
def test_a_merged_adapter_is_to_be_unmerged_first(act) -> None:
    model = add_lively(tiny_model(), "law")
    merge_adapter(model, "law")
    with pytest.raises(UserError, match="adapter 'law' is merged into the model: unmerge it first"):
        act(model, "law")


def test_a_model_without_pattention_is_refused() -> None:
    with pytest.raises(UserError, match="no Pattention layers"):
        add_adapter(nn.Linear(2, 2), "law", ffn=1)
    with pytest.raises(UserError, match="no adapter 'law': this model has no adapters"):
        set_adapter(nn.Linear(2, 2), "law")
