"""The forward pass against the published one in NumPy and against itself by other routes; losses and gradients."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import statement
from tiny import SEGMENTS, VOCABULARY, tiny_ids, tiny_model
from tokenformer import Pattention, TokenFormerConfig, TokenFormerForCausalLM, TokenFormerModel

normalizations = pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "gelu_l1", "softmax"])
GROWN = [*SEGMENTS, {"name": "grown1", "qkv": 4, "output": 0, "ffn": 5}]


# Against the published forward pass


@normalizations
@pytest.mark.parametrize("head_size", [8, 16, 24, 80])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_the_published_forward_pass(attention, head_size, normalization) -> None:
    model = tiny_model(attention=attention, hidden_size=2 * head_size, normalization=normalization)
    ids = tiny_ids(1, 12)
    with torch.no_grad():
        logits = model(ids).logits[0]
    expected, *_ = statement.forward(model, ids[0].tolist())
    assert np.abs(expected).max() > 5, "logits are large enough to show mistakes"
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=1e-4)


@normalizations
def test_logits_with_several_segments_and_half_the_head_turned(normalization) -> None:
    model = tiny_model(segments=GROWN, rotary_pct=0.5, normalization=normalization)
    ids = tiny_ids(1, 12)
    with torch.no_grad():
        logits = model(ids).logits[0]
    np.testing.assert_allclose(logits.numpy(), statement.forward(model, ids[0].tolist())[0], rtol=0, atol=1e-4)


def test_hidden_states_and_attentions_are_those_of_the_published_forward_pass() -> None:
    model, ids = tiny_model(attention="eager"), tiny_ids(1, 7)
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True, output_attentions=True)
    _, states, attentions = statement.forward(model, ids[0].tolist())
    assert len(outputs.hidden_states) == len(states) == 3
    assert len(outputs.attentions) == len(attentions) == 2
    for state, expected in zip(outputs.hidden_states, states, strict=True):
        np.testing.assert_allclose(state[0].numpy(), expected, rtol=0, atol=5e-5)
    for attention, expected in zip(outputs.attentions, attentions, strict=True):
        np.testing.assert_allclose(attention[0].numpy(), expected, rtol=0, atol=1e-5)


def test_bfloat16_is_close_to_the_published_forward_pass() -> None:
    model, ids = tiny_model().bfloat16(), tiny_ids(1, 12)
    expected, *_ = statement.forward(model.float(), ids[0].tolist())
    with torch.no_grad():
        logits = model.bfloat16()(ids).logits[0].float().numpy()
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


# By other routes


def test_batch_and_single_agree() -> None:
    model, ids = tiny_model(), tiny_ids(3, 9)
    with torch.no_grad():
        together = model(ids).logits
        apart = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_eager_and_sdpa_attention_agree_with_gradients() -> None:
    ids, results = tiny_ids(), []
    model = tiny_model()
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        loss = model(ids, labels=ids).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_token_sees_only_what_precedes_it() -> None:
    model, ids = tiny_model(), tiny_ids(1, 9)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-6, atol=1e-6)
    assert ((before[:, 5:] - after[:, 5:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["given", "left-to-the-model"])
def test_left_padding_equals_no_padding(positions, attention) -> None:
    model, ids = tiny_model(attention=attention), tiny_ids(1, 6)
    padded = torch.cat([torch.full((1, 3), 5), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    # Rotary positions are relative, so a shift by the padding is immaterial.
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0) if positions == "given" else None
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, position_ids=position_ids).logits[:, 3:]
        expected = model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("use_cache", [None, False], ids=["default-cache", "no-cache"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(attention, use_cache) -> None:
    model, ids = tiny_model(attention=attention), tiny_ids(2, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=use_cache).logits
        first = torch.cat([model(ids[:1, :4]).logits, model(ids[:1, 4:]).logits], dim=1)
        second = torch.cat([model(ids[1:, :2]).logits, model(ids[1:, 2:]).logits], dim=1)
    torch.testing.assert_close(packed, torch.cat([first, second]), rtol=1e-4, atol=2e-5)


def test_embeddings_in_place_of_ids() -> None:
    model, ids = tiny_model(), tiny_ids()
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one"):
        model()


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 3, 8])], ids=["last", "last-four", "indices"])
def test_logits_to_keep(keep) -> None:
    model, ids = tiny_model(), tiny_ids()
    with torch.no_grad():
        kept, whole = model(ids, logits_to_keep=keep).logits, model(ids).logits
    expected = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    torch.testing.assert_close(kept, expected, rtol=1e-6, atol=1e-6)


def test_tuple_output_holds_the_same() -> None:
    model, ids = tiny_model(), tiny_ids()
    with torch.no_grad():
        loss, logits, *_ = model(ids, labels=ids, return_dict=False)
        outputs = model(ids, labels=ids)
    assert torch.equal(loss, outputs.loss)
    assert torch.equal(logits, outputs.logits)


# Loss and gradients


def test_loss_is_the_cross_entropy_of_the_next_token() -> None:
    model, ids = tiny_model(), tiny_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        loss = model(ids, labels=labels).loss.item()
        logits = model(ids).logits.double()
    terms = []
    for row in range(2):
        for t in range(8):
            if labels[row, t + 1] >= 0:
                scores = logits[row, t]
                terms.append((scores.exp().sum().log() - scores[labels[row, t + 1]]).item())
    assert len(terms) == 5 + 8
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    # The Trainer divides the sum by the items of all accumulated batches.
    with torch.no_grad():
        accumulated = model(ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss.item()
    assert accumulated == pytest.approx(sum(terms) / 40, rel=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, ids = tiny_model().train(), tiny_ids()
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    # transformers 5.21 renamed the method.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-8)


def test_embeddings_are_one_tensor_with_one_gradient() -> None:
    model, ids = tiny_model(), tiny_ids()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [name for name, _ in model.named_parameters() if "lm_head" in name] == []
    assert model.bfloat16().lm_head.weight is model.model.embed_tokens.weight
    model.float()(ids, labels=ids).loss.backward()
    # Words that do not occur get a gradient through the output only; those that do, through both.
    absent = sorted(set(range(VOCABULARY)) - set(ids.flatten().tolist()))
    assert absent
    assert (model.model.embed_tokens.weight.grad[absent].abs().amax(-1) > 0).all()


def test_every_parameter_receives_a_gradient() -> None:
    model, ids = tiny_model(segments=GROWN), tiny_ids()
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


# Initialisation


def test_initialisation_is_the_published_one() -> None:
    config = TokenFormerConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        segments=[{"name": "base", "qkv": 90, "output": 100, "ffn": 300}],
    )
    model = TokenFormerForCausalLM(config)
    layers = [module for module in model.modules() if isinstance(module, Pattention)]
    assert len(layers) == 15
    keys = torch.cat([layer.segments["base"].key.flatten() for layer in layers])
    values = torch.cat([layer.segments["base"].value.flatten() for layer in layers])
    for tensor, std in ((keys, 0.02), (values, 2 / (3 * math.sqrt(64))), (model.lm_head.weight, 0.02)):
        assert tensor.std().item() == pytest.approx(std, rel=0.02)
        assert abs(tensor.mean().item()) < std * 4 / math.sqrt(tensor.numel())
    assert {layer.kind: round(layer.scale.item() ** 2) for layer in layers} == {"qkv": 90, "output": 100, "ffn": 300}
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    assert torch.equal(model.model.norm.bias, torch.zeros(64))
    # A new model knows nothing: its loss is that of guessing.
    ids = torch.randint(500, (4, 32))
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(500), rel=0.02)


def test_block_norms_have_no_parameters_and_nothing_has_a_bias_but_the_final_norm() -> None:
    model = tiny_model()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5
    assert {norm.eps for norm in norms} == {1e-5}
    assert [norm for norm in norms if norm.weight is not None] == [model.model.norm]
    assert [name for name, _ in model.named_parameters() if "bias" in name] == ["model.norm.bias"]


def test_backbone_gives_the_last_hidden_state() -> None:
    model, ids = tiny_model(), tiny_ids()
    backbone = TokenFormerModel(model.config).eval()
    backbone.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        hidden = backbone(ids).last_hidden_state
        torch.testing.assert_close(hidden @ model.lm_head.weight.T, model(ids).logits, rtol=1e-5, atol=1e-5)


# torch.compile


@pytest.mark.parametrize(
    ("backend", "layers"),
    [pytest.param("aot_eager", 2, id="aot_eager"), pytest.param("inductor", 1, id="inductor", marks=pytest.mark.slow)],
)
def test_compiled_training_loss_equals_eager(backend, layers) -> None:
    torch._dynamo.reset()
    model, ids = tiny_model(num_hidden_layers=layers), tiny_ids()
    loss = model(ids, labels=ids, use_cache=False).loss
    expected = torch.autograd.grad(loss, list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    compiled_loss = compiled(ids, labels=ids, use_cache=False).loss
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-6)
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)
