"""Contributions of tokens: they add up, and are the derivatives that they are said to be."""

import pytest
import torch

from statement import error, weights
from tiny import tiny_ids, tiny_model
from tokenformer import TokenFormerForCausalLM, UserError, grow
from tokenformer.interpret import Off, Scale, capture, intervene
from tokenformer.interpret.attribution import direct_contributions, gradient_contributions, segment_shares, trace
from tokenformer.tuning.adapters import add_adapter

NORMALIZATIONS = ("l2_gelu", "gelu_l2", "gelu_l1", "softmax")


def _model(case: str) -> TokenFormerForCausalLM:
    normalization = case if case in NORMALIZATIONS else "l2_gelu"
    model = tiny_model(normalization=normalization, tie_word_embeddings=case != "untied").double()
    if case == "grown":
        grow(model, qkv=18, output=15, ffn=27)
    if case == "adapter":
        add_adapter(model, "more", output=3, ffn=4)
    if case in ("grown", "adapter"):
        for name, parameter in model.named_parameters():
            if ".base." not in name and ".segments." in name:
                torch.nn.init.normal_(parameter, std=0.3)
    if case == "untied":
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


CASES = (*NORMALIZATIONS, "grown", "adapter", "untied")


@pytest.mark.parametrize("case", CASES)
def test_direct_contributions_embedding_and_bias_add_up_to_the_logit(case):
    model, ids = _model(case), tiny_ids(1, 9)
    for position, target in ((0, 3), (8, 17)):
        terms = direct_contributions(model, ids, position, target)
        expected = model(ids).logits[0, position, target].item()
        tokens = sum(c.sum().item() for parts in terms.tokens.values() for c in parts.values())
        assert abs(tokens + terms.embedding + terms.bias - expected) <= 1e-10 * (1 + abs(expected))
        assert {name.rpartition(".")[2] for name in terms.tokens} == {"output", "ffn"}
        assert abs(tokens) > 1e-2
        assert abs(terms.embedding) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_gradient_contributions_are_derivatives_by_a_factor_on_the_value(case):
    model, ids = _model(case), tiny_ids(1, 9)
    found = gradient_contributions(model, ids, 7, 5)
    for layer in ("model.layers.0.ffn", "model.layers.0.attention.key", "model.layers.1.attention.output"):
        for segment, contributions in found[layer].items():
            value = model.get_submodule(f"{layer}.segments.{segment}").value
            plain = value.detach().clone()
            factors = torch.ones(len(plain), 1, dtype=torch.float64, requires_grad=True)
            parameters = {f"{layer}.segments.{segment}.value": plain * factors}
            logit = torch.func.functional_call(model, parameters, (ids,)).logits[0, 7, 5]
            (expected,) = torch.autograd.grad(logit, factors)
            assert error(contributions, expected[:, 0]) < 1e-10
            assert contributions.abs().max() > 1e-4


def test_gradient_contributions_are_finite_differences_too():
    model, ids, step = _model("grown"), tiny_ids(1, 9), 1e-5
    found = gradient_contributions(model, ids, 8, 2)
    for layer, segment, i in (("model.layers.0.attention.query", "base", 3), ("model.layers.1.ffn", "grown_1", 0)):
        segment = segment if segment in found[layer] else list(found[layer])[-1]
        logits = []
        for factor in (1 + step, 1 - step):
            with torch.no_grad(), intervene(model, [Scale(f"{layer}/{segment}/{i}", factor)]):
                logits.append(model(ids).logits[0, 8, 2].item())
        assert found[layer][segment][i].item() == pytest.approx((logits[0] - logits[1]) / (2 * step), abs=1e-8)


def test_contributions_of_source_positions_add_up_and_later_ones_are_nothing():
    model, ids = _model("grown"), tiny_ids(1, 9)
    whole = gradient_contributions(model, ids, 4, 2)
    parts = gradient_contributions(model, ids, 4, 2, by_position=True)
    for layer, segments in parts.items():
        for segment, contributions in segments.items():
            assert error(contributions.sum(0), whole[layer][segment]) < 1e-12
            assert not contributions[5:].any()


def test_frozen_parameters_and_interventions_are_respected():
    model, ids = _model("grown"), tiny_ids(1, 9)
    free = gradient_contributions(model, ids, 8, 2)
    model.requires_grad_(False)
    frozen = gradient_contributions(model, ids, 8, 2)
    layer = "model.layers.0.ffn"
    assert torch.equal(free[layer]["base"], frozen[layer]["base"])
    with intervene(model, [Off(f"{layer}/base/3")]):
        terms, logit = direct_contributions(model, ids, 8, 2), model(ids).logits[0, 8, 2].item()
    assert terms.tokens[layer]["base"][3] == 0
    tokens = sum(c.sum().item() for parts in terms.tokens.values() for c in parts.values())
    assert tokens + terms.embedding + terms.bias == pytest.approx(logit, abs=1e-10)


def test_rows_of_a_batch_get_their_own_contributions():
    model, ids = _model("grown"), tiny_ids(2, 9)
    both = trace(model, ids)
    together = both.gradient(both.logits[:, 8, 2])
    for row in range(2):
        alone = gradient_contributions(model, ids[row : row + 1], 8, 2)
        for layer, segments in alone.items():
            for segment, contributions in segments.items():
                assert error(together[layer][segment][row], contributions) < 1e-12


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_class_logit_is_the_sum_of_its_terms(pooling):
    from tokenformer import TokenFormerForImageClassification, TokenFormerVisionConfig

    segments = [{"name": "base", "qkv": 12, "output": 10, "ffn": 20}]
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = TokenFormerVisionConfig(**sizes, segments=segments, pooling=pooling, num_labels=5)
    model = TokenFormerForImageClassification(config).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    pixels = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    terms = direct_contributions(model, pixels, None, 3)
    tokens = sum(c.sum().item() for parts in terms.tokens.values() for c in parts.values())
    expected = model(pixels).logits[0, 3].item()
    assert tokens + terms.embedding + terms.bias == pytest.approx(expected, abs=1e-10)
    found = gradient_contributions(model, pixels, None, 3)["model.layers.0.ffn"]["base"]
    logits = []
    for factor in (1 + 1e-5, 1 - 1e-5):
        with torch.no_grad(), intervene(model, [Scale("0.ffn/base/4", factor)]):
            logits.append(model(pixels).logits[0, 3].item())
    assert found[4].item() == pytest.approx((logits[0] - logits[1]) / 2e-5, abs=1e-8)


def test_segment_shares_are_projections_and_add_up():
    model, ids = _model("grown"), tiny_ids(2, 6)
    with torch.no_grad(), capture(model, outputs=True) as seen:
        model(ids)
    for name, record in seen.items():
        shares = segment_shares(record)
        assert error(sum(shares.values()), torch.ones(2, 6, dtype=torch.float64)) < 1e-12
        layer = model.get_submodule(name)
        keys, values = ([getattr(s, part) for s in layer.segments.values()] for part in ("key", "value"))
        w = weights(record.input, keys, layer.scale.item(), "l2_gelu")[..., : len(keys[0])]
        output = record.output
        expected = ((w @ values[0]) * output).sum(-1) / output.pow(2).sum(-1)
        assert error(shares["base"], expected) < 1e-10


def test_shares_need_the_outputs_of_segments():
    model = _model("l2_gelu")
    with torch.no_grad(), capture(model) as seen:
        model(tiny_ids(1, 3))
    with pytest.raises(UserError, match="outputs=True"):
        segment_shares(next(iter(seen.values())))


def test_what_cannot_be_attributed_is_named():
    model, ids = _model("l2_gelu"), tiny_ids(1, 4)
    with pytest.raises(UserError, match="position 4"):
        direct_contributions(model, ids, 4, 0)
    with pytest.raises(UserError, match="no id 31"):
        gradient_contributions(model, ids, 0, 31)
    with pytest.raises(UserError, match="one row"):
        direct_contributions(model, tiny_ids(2, 4), 0, 0)
    with pytest.raises(UserError, match="no final norm"):
        direct_contributions(model.model.layers[0], ids, 0, 0)
