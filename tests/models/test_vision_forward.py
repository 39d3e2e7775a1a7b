"""The image classifier against its equations in NumPy, against ViT's own embeddings, and against hooks."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTEmbeddings

from statement import TOLERANCE, classify, error
from tiny_vision import tiny_classifier, tiny_pixels
from tokenformer import TokenFormerForImageClassification, TokenFormerVisionConfig, UserError
from tokenformer.modules import TokenFormerBlock, drop_path

EXACT = TOLERANCE[torch.float64]
GROWN = [{"name": "base", "qkv": 12, "output": 10, "ffn": 20}, {"name": "grown1", "qkv": 3, "output": 0, "ffn": 5}]
MODELS: dict[str, dict[str, Any]] = {
    "cls": {},
    "mean": {"pooling": "mean"},
    "affine norms": {"norm_affine": True},
    "gelu_l2": {"normalization": "gelu_l2"},
    "gelu_l1": {"normalization": "gelu_l1"},
    "softmax": {"normalization": "softmax"},
    "two segments": {"segments": GROWN},
    "one patch": {"image_size": 4},
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_logits_states_and_attention_are_those_of_the_equations(fields, attention) -> None:
    model = tiny_classifier(attention=attention, **fields).double()
    pixels = tiny_pixels(2, model.config.image_size).double()
    outputs = model(pixels, output_hidden_states=True, output_attentions=attention == "eager")
    for index, image in enumerate(pixels.numpy()):
        logits, states, attentions = classify(model, image)
        assert error(outputs.logits[index], torch.from_numpy(logits)) < EXACT
        assert len(outputs.hidden_states) == len(states)
        for found, expected in zip(outputs.hidden_states, states, strict=True):
            assert error(found[index], torch.from_numpy(expected)) < EXACT
        if attention == "eager":
            for found, expected in zip(outputs.attentions, attentions, strict=True):
                assert error(found[index], torch.from_numpy(expected)) < EXACT
                np.testing.assert_allclose(found[index].sum(-1).detach(), 1, rtol=1e-12)


def _vit_embeddings(model: TokenFormerForImageClassification) -> ViTEmbeddings:
    """Transformers' own, with the parameters of `model`."""
    config = model.config
    theirs = ViTEmbeddings(
        ViTConfig(image_size=config.image_size, patch_size=config.patch_size, hidden_size=config.hidden_size)
    )
    ours = model.model.embeddings.state_dict()
    names = {"patch_embeddings.weight": "patch_embeddings.projection.weight"}
    names["patch_embeddings.bias"] = "patch_embeddings.projection.bias"
    theirs.load_state_dict({names.get(name, name): tensor for name, tensor in ours.items()})
    return theirs.to(model.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(12, 12), (24, 24), (8, 8), (8, 20), (20, 8), (36, 4)])
def test_embeddings_and_their_interpolation_are_those_of_vit(size, dtype) -> None:
    model = tiny_classifier().to(dtype)
    pixels = tiny_pixels(2, *size).to(dtype)
    expected = _vit_embeddings(model)(pixels, interpolate_pos_encoding=True)
    assert torch.equal(model.model.embeddings(pixels, interpolate_pos_encoding=True), expected)


def test_interpolation_without_a_class_token_moves_every_position() -> None:
    with_token, without = tiny_classifier(), tiny_classifier(pooling="mean")
    positions = with_token.model.embeddings.position_embeddings
    without.model.embeddings.position_embeddings.data = positions.data[:, 1:]
    expected = with_token.model.embeddings.interpolated_positions((5, 2))
    assert torch.equal(without.model.embeddings.interpolated_positions((5, 2)), expected[:, 1:])


def test_positions_of_a_bfloat16_model_are_interpolated_in_float32() -> None:
    model = tiny_classifier().to(torch.bfloat16)
    exact = tiny_classifier()
    exact.load_state_dict(model.float().state_dict())
    expected = exact.model.embeddings.interpolated_positions((6, 6)).to(torch.bfloat16)
    found = model.to(torch.bfloat16).model.embeddings.interpolated_positions((6, 6))
    assert torch.equal(found, expected)
    assert model(tiny_pixels(), labels=torch.tensor([0, 1])).loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "interpolate", "parts"),
    [
        ((1, 3, 16, 16), False, ["16 x 16", "12 x 12", "interpolate_pos_encoding=True"]),
        ((1, 3, 12, 16), False, ["12 x 16", "12 x 12", "resize"]),
        ((1, 3, 12, 14), True, ["12 x 14", "patches of 4", "12 or 16 in place of 14"]),
        ((1, 3, 2, 12), True, ["2 x 12", "use 4 in place of 2"]),
        ((1, 1, 12, 12), False, ["(images, 3, height, width)", "(1, 1, 12, 12)"]),
        ((3, 12, 12), False, ["(images, 3, height, width)", "(3, 12, 12)"]),
    ],
)
def test_images_that_do_not_fit_are_named(shape, interpolate, parts) -> None:
    with pytest.raises(UserError) as caught:
        tiny_classifier()(torch.zeros(shape), interpolate_pos_encoding=interpolate)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


# Loss


def test_loss_is_the_mean_cross_entropy_in_nats() -> None:
    model = tiny_classifier().double()
    labels = torch.tensor([3, 0])
    outputs = model(tiny_pixels().double(), labels=labels)
    logits = outputs.logits.detach().numpy()
    by_hand = np.mean([np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, labels, strict=True)])
    assert outputs.loss.item() == pytest.approx(by_hand, rel=1e-12)
    soft = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0], [0.0, 0.0, 0.5, 0.5, 0.0]])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    by_hand = -(soft.double().numpy() * np.log(shares)).sum(1).mean()
    assert model(tiny_pixels().double(), labels=soft).loss.item() == pytest.approx(by_hand, rel=1e-12)


def test_a_label_and_its_one_hot_row_train_alike() -> None:
    model, gradients = tiny_classifier().double(), []
    for labels in (torch.tensor([3, 0]), nn.functional.one_hot(torch.tensor([3, 0]), 5).float()):
        model.zero_grad()
        model(tiny_pixels().double(), labels=labels).loss.backward()
        gradients.append(model.classifier.weight.grad)
    assert error(gradients[0], gradients[1]) < EXACT


@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 4), (1, 2)])
def test_labels_of_another_shape_are_refused(shape) -> None:
    with pytest.raises(UserError, match=r"\(2,\) class numbers or \(2, 5\) shares"):
        tiny_classifier()(tiny_pixels(), labels=torch.zeros(shape))


# Features


def test_features_lead_to_the_logits() -> None:
    for pooling in ("cls", "mean"):
        model = tiny_classifier(pooling=pooling)
        features = model.forward_features(tiny_pixels())
        assert torch.equal(features, model.model(tiny_pixels()).last_hidden_state)
        assert torch.equal(features, model.model.forward_features(tiny_pixels()))
        pooled = features[:, 0] if pooling == "cls" else features.mean(1)
        assert torch.equal(model.classifier(pooled), model(tiny_pixels()).logits)


def test_intermediate_features_are_what_hooks_see() -> None:
    model, seen, calls = tiny_classifier(num_hidden_layers=4), {}, []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _m, _a, output, index=index: seen.setdefault(index, output))
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    model(tiny_pixels())
    calls.clear()
    first, last = model.intermediate_features(tiny_pixels(), layers=[2, -4])
    assert calls == [0, 1, 2], "blocks behind the last one asked for need not run"
    assert torch.equal(first, seen[2])
    assert torch.equal(last, seen[0])
    every = model.intermediate_features(tiny_pixels())
    assert all(torch.equal(found, seen[index]) for index, found in enumerate(every))
    assert len(every) == 4
    assert model.intermediate_features(tiny_pixels(), layers=[]) == []
    for layers in ([4], [0, -5]):
        with pytest.raises(UserError, match="has 4 blocks"):
            model.intermediate_features(tiny_pixels(), layers=layers)


def test_reshaped_features_lie_where_their_patch_does() -> None:
    for pooling in ("cls", "mean"):
        model = tiny_classifier(pooling=pooling)
        pixels = tiny_pixels(2, 8, 20)
        (flat,) = model.intermediate_features(pixels, layers=[1], interpolate_pos_encoding=True)
        (maps,) = model.intermediate_features(pixels, layers=[1], interpolate_pos_encoding=True, reshape=True)
        assert maps.shape == (2, 16, 2, 5)
        prefix = 1 if pooling == "cls" else 0
        for row in range(2):
            for column in range(5):
                assert torch.equal(maps[:, :, row, column], flat[:, prefix + 5 * row + column])


# Drop path


def test_drop_path_leaves_whole_samples_out_and_keeps_the_mean() -> None:
    branch = torch.full((20000, 2, 3), 1.5, dtype=torch.float64)
    found = drop_path(branch, 0.3)
    kept = found[:, 0, 0] != 0
    assert torch.equal(found, kept[:, None, None] * (branch / 0.7))
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.015)  # four standard errors
    assert drop_path(branch.to(torch.bfloat16), 0.3).dtype == torch.bfloat16


def test_the_rate_of_drop_path_rises_from_block_to_block() -> None:
    def rates(model: nn.Module) -> list[float]:
        return [block.drop_path for block in model.modules() if isinstance(block, TokenFormerBlock)]

    model = tiny_classifier(num_hidden_layers=5, drop_path_rate=0.2)
    assert rates(model) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    model.set_drop_path(0.4)
    assert rates(model) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert model.config.drop_path_rate == 0.4
    assert rates(tiny_classifier(num_hidden_layers=1, drop_path_rate=0.2)) == [0]
    for rate in (1, -0.1):
        with pytest.raises(UserError, match="drop_path_rate"):
            model.set_drop_path(rate)


def test_a_block_drops_its_branches_apart_from_each_other_and_only_in_training() -> None:
    block = tiny_classifier(drop_path_rate=0.5).model.layers[1].double()
    states = torch.randn(64, 9, 16, dtype=torch.float64)
    attended = states + block.attention(block.attention_norm(states))[0]
    whole = attended + block.ffn(block.ffn_norm(attended))
    assert torch.equal(block(states), whole)

    found = block.train()(states)
    possible = []
    for attention in (0, 2):
        middle = states + attention * block.attention(block.attention_norm(states))[0]
        possible += [middle + ffn * block.ffn(block.ffn_norm(middle)) for ffn in (0, 2)]
    distances = torch.stack([(found - state).abs().amax((1, 2)) for state in possible])
    assert distances.amin(0).max() < EXACT
    assert set(distances.argmin(0).tolist()) == {0, 1, 2, 3}, "none of the four has a chance below 1e-7 to be missing"


# Training


def test_pixels_enter_where_adapters_look_for_the_input_embedding() -> None:
    model = tiny_classifier()
    assert model.get_input_embeddings() is model.model.get_input_embeddings() is model.model.embeddings.patch_embeddings


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_classifier(drop_path_rate=0.5).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(1)  # the same branches are left out
        model(tiny_pixels(8), labels=torch.arange(8) % 5).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(training) -> None:
    model = tiny_classifier(drop_path_rate=0.5, segments=GROWN).train(training)
    # aot_eager traces forward and backward, and generates no code, which would take a minute.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    labels = torch.tensor([0, 1])
    results = []
    for run in (model, compiled):
        torch.manual_seed(1)
        model.zero_grad()
        loss = run(tiny_pixels(), labels=labels).loss
        loss.backward()
        results.append((loss, {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert error(results[1][0], results[0][0]) < TOLERANCE[torch.float32]
    for name, gradient in results[0][1].items():
        assert error(results[1][1][name], gradient) < TOLERANCE[torch.float32], name
    if not training:
        larger = tiny_pixels(2, 20, 8)
        expected = model(larger, interpolate_pos_encoding=True).logits
        assert error(compiled(larger, interpolate_pos_encoding=True).logits, expected) < TOLERANCE[torch.float32]


def test_initialisation_is_that_of_the_paper_and_of_vit() -> None:
    config = TokenFormerVisionConfig(
        image_size=64, patch_size=4, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_labels=100
    )
    model = TokenFormerForImageClassification(config)
    published = 2 / (2 * 256**0.5)
    expected = {
        "layers.1.ffn.segments.base.key": 0.02,
        "layers.1.ffn.segments.base.value": published,
        "layers.0.attention.output.segments.base.value": published,
        "embeddings.patch_embeddings.weight": 0.02,
        "embeddings.position_embeddings": 0.02,
        "embeddings.cls_token": 0.02,
    }
    for name, std in expected.items():
        parameter = model.model.get_parameter(name)
        assert parameter.std().item() == pytest.approx(std, rel=4 / (2 * parameter.numel()) ** 0.5), name
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.classifier.bias.any()
    assert not model.model.embeddings.patch_embeddings.bias.any()
    assert model.model.layers[0].ffn.scale.item() == pytest.approx(1024**0.5)
