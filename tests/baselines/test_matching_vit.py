"""The ViT to compare with: its sizes, its count of parameters, what it cannot match, its drop path and its folder."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from tiny import tiny_model
from tokenformer import UserError
from tokenformer.baselines import add_drop_path, load_vit, matching_vit, vit_config
from tokenformer.models import TokenFormerForImageClassification, TokenFormerVisionConfig

SIZES = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 44,
    "num_labels": 5,
}


def by_hand(config: ViTConfig) -> int:
    """Of the blocks: weights of query, key, value, output and the feed-forward; biases of each; two norms."""
    d, f = config.hidden_size, config.intermediate_size
    weights, biases, norms = 4 * d * d + 2 * d * f, 3 * d + d + f + d, 2 * 2 * d
    return config.num_hidden_layers * (weights + biases + norms)


def tiny_vit(**fields: Any) -> ViTForImageClassification:
    return ViTForImageClassification(vit_config(**{**SIZES, **fields})).eval()


def pixels(images: int) -> torch.Tensor:
    return torch.randn(images, 3, SIZES["image_size"], SIZES["image_size"])


# Configuration and count


@pytest.mark.parametrize(("preset", "ffn"), [("base-matched", 3072), ("large-matched", 4096)])
def test_configuration_is_that_of_a_tokenformer_in_all_they_share(preset: str, ffn: int) -> None:
    theirs = TokenFormerVisionConfig.preset(preset)
    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    ours = vit_config(**{name: getattr(theirs, name) for name in names}, intermediate_size=ffn, num_labels=1000)
    shared = set(ours.to_dict()) & set(theirs.to_dict()) - {"model_type", "architectures", "transformers_version"}
    assert {*names, "num_channels", "layer_norm_eps", "initializer_range", "id2label"} <= shared
    for name in shared:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.hidden_act == theirs.activation == "gelu"
    assert ours.attention_probs_dropout_prob == ours.hidden_dropout_prob == 0


def test_count_is_that_of_the_blocks() -> None:
    model = tiny_vit()
    assert sum(p.numel() for p in model.vit.layers.parameters()) == by_hand(model.config)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 3}, "hidden_size 32 is not divisible by num_attention_heads 3"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"intermediate_size": 0}, "intermediate_size must be at least 1"),
        ({"patch_size": 3}, "image_size 8 is not divisible by patch_size 3"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"num_channels": 0}, "num_channels must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_together(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        vit_config(**{**SIZES, **fields})


# Matching


@pytest.mark.parametrize("preset", ["base-matched", "base", "large-matched", "large"])
def test_matches_the_sizes_of_the_paper(preset: str) -> None:
    config = TokenFormerVisionConfig.preset(preset)
    tokens = sum(count * config.segments[0][kind] for kind, count in (("qkv", 3), ("output", 1), ("ffn", 1)))
    wanted = 2 * config.num_hidden_layers * config.hidden_size * tokens  # the paper's Table 3, keys and values
    sizes = {
        "image_size": 224,
        "patch_size": 16,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_labels": 1000,
    }
    found = matching_vit(wanted, hidden_size=config.hidden_size, **sizes)
    assert by_hand(found) == pytest.approx(wanted, rel=0.001)
    with torch.device("meta"):
        theirs, ours = TokenFormerForImageClassification(config), ViTForImageClassification(found)
    # What is not in the blocks is the same, so that the models match as a whole.
    rest = ours.num_parameters() - sum(p.numel() for p in ours.vit.layers.parameters())
    assert rest == theirs.num_parameters() - wanted
    if preset.endswith("matched"):
        assert found.intermediate_size == pytest.approx(4 * config.hidden_size, rel=0.005)  # ViT-B/16 and ViT-L/16
    free = matching_vit(wanted, **sizes)
    assert by_hand(free) == pytest.approx(wanted, rel=0.02)
    assert free.intermediate_size / free.hidden_size == pytest.approx(4, rel=0.25)


@settings(max_examples=50)
@given(
    wanted=st.integers(100, 10**9),
    layers=st.integers(1, 40),
    heads=st.integers(1, 16),
    head=st.none() | st.integers(1, 100),
    tolerance=st.sampled_from([0.02, 0.001]),
)
def test_matches_or_says_what_comes_nearest(
    wanted: int, layers: int, heads: int, head: int | None, tolerance: float
) -> None:
    sizes = {"image_size": 8, "patch_size": 4, "num_hidden_layers": layers, "num_attention_heads": heads}
    hidden = None if head is None else heads * head
    try:
        found = matching_vit(wanted, hidden_size=hidden, tolerance=tolerance, **sizes)
    except UserError as error:
        found, message = None, str(error)
    if found is not None:
        assert abs(by_hand(found) - wanted) <= tolerance * wanted * (1 + 1e-9)
        assert found.hidden_size / 2 <= found.intermediate_size <= 16 * found.hidden_size
        assert hidden in (None, found.hidden_size)
        if hidden is None:
            assert found.hidden_size % (8 * heads) == 0
        return
    assert "comes within" in message
    assert "\n" not in message
    if hidden is not None:
        # No intermediate size that is allowed does it: found by trying them.
        one = vit_config(**{**SIZES, **sizes, "hidden_size": hidden, "intermediate_size": 1})
        each = layers * (2 * hidden + 1)
        sizes_allowed = range(-(-hidden // 2), 16 * hidden + 1)
        nearest = min(abs(by_hand(one) + (f - 1) * each - wanted) for f in sizes_allowed)
        assert nearest > tolerance * wanted * (1 - 1e-9)


@pytest.mark.parametrize(
    ("parameters", "fields", "words"),
    [
        (
            100,
            {},
            r"no ViT of 3 layers, 2 heads and any hidden_size .* 100 parameters in its blocks: the nearest has 4",
        ),
        (
            10**8,
            {"hidden_size": 32},
            r"this hidden_size .* \(hidden_size 32, intermediate_size 512\), so change hidden",
        ),
        (10**6, {"hidden_size": 31}, "hidden_size 31 is not divisible by num_attention_heads 2"),
        (0, {}, "must be at least 1, got 0"),
        (10**6, {"patch_size": 3}, "image_size 8 is not divisible by patch_size 3"),
    ],
)
def test_what_cannot_be_matched(parameters: int, fields: dict[str, Any], words: str) -> None:
    sizes = {name: size for name, size in SIZES.items() if name not in ("hidden_size", "intermediate_size")}
    with pytest.raises(UserError, match=words):
        matching_vit(parameters, **{**sizes, **fields})


# Drop path


def test_drop_path_changes_neither_names_nor_what_is_computed_in_evaluation() -> None:
    model, images = tiny_vit(), pixels(4)
    names, before = list(model.state_dict()), model(images).logits
    add_drop_path(model, 0.5)
    assert list(model.state_dict()) == names
    assert torch.equal(model(images).logits, before)
    assert not torch.allclose(model.train()(images).logits, before)


def test_drop_path_leaves_out_each_branch_of_each_image_with_its_share() -> None:
    """Every row of a block's output is one of four: attention kept or not, feed-forward kept or not."""
    model, rate = tiny_vit(hidden_size=8, intermediate_size=8), 0.3
    add_drop_path(model, rate)
    layer = model.vit.layers[-1]
    x = torch.randn(4000, 5, 8)
    with torch.no_grad():
        out = layer.train()(x)
        mixed, _ = layer.attention(layer.layernorm_before(x))
        share = []
        seen = torch.zeros(len(x), dtype=torch.long)
        for attention_kept in (False, True):
            middle = x + mixed / (1 - rate) if attention_kept else x
            for mlp_kept in (False, True):
                wanted = middle + layer.mlp(layer.layernorm_after(middle)) / (1 - rate) if mlp_kept else middle
                found = (out - wanted).abs().amax((1, 2)) < 1e-5
                seen += found
                share.append(found.float().mean().item())
    assert (seen == 1).all()
    expected = [rate * rate, rate * (1 - rate), (1 - rate) * rate, (1 - rate) * (1 - rate)]
    # Four standard deviations of a share of 4000 images.
    assert share == pytest.approx(expected, abs=4 * (0.25 / 4000) ** 0.5)


def test_drop_path_grows_linearly_from_none_in_the_first_block() -> None:
    model = tiny_vit(num_hidden_layers=5).train()
    add_drop_path(model, 0.4)
    x = torch.randn(4000, 5, 32)
    for index, layer in enumerate(model.vit.layers):
        with torch.no_grad():
            left_out = (layer.dropout(x) == 0).all(2).all(1).float().mean().item()
        assert left_out == pytest.approx(0.1 * index, abs=0.04), index
        assert left_out > 0 or index == 0


def test_drop_path_keeps_dropout_and_recomputes_the_same_branches() -> None:
    images, labels = pixels(4), torch.arange(4)
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = tiny_vit(hidden_dropout_prob=0.2).train()
        add_drop_path(model, 0.5)
        if recomputed:
            # transformers 5.21 renamed the method.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.nn.functional.cross_entropy(model(images).logits, labels).backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, again)
    last = model.vit.layers[-1]
    # 0.5 of the images and 0.2 of the rest.
    assert (last.dropout(torch.ones(4000, 5, 8)) == 0).float().mean().item() == pytest.approx(0.6, abs=0.04)


def test_drop_path_compiles_as_one_graph() -> None:
    model = tiny_vit(num_hidden_layers=2, hidden_size=8).train()
    add_drop_path(model, 0.5)
    assert torch.compile(model, backend="eager", fullgraph=True)(pixels(2)).logits.shape == (2, 5)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_drop_path_rate_outside_its_range(rate: float) -> None:
    with pytest.raises(UserError, match=r"drop path must lie in \[0, 1\)"):
        add_drop_path(tiny_vit(), rate)


def test_drop_path_needs_a_vit() -> None:
    with pytest.raises(UserError, match="TokenFormerForCausalLM has no blocks of a ViT"):
        add_drop_path(tiny_model(), 0.1)


# Folder


def test_loads_what_was_saved(tmp_path: Any) -> None:
    model, images = tiny_vit(), pixels(2)
    add_drop_path(model, 0.5)  # not a part of the model that is saved
    model.save_pretrained(tmp_path)
    found = load_vit(str(tmp_path))
    assert not found.training
    assert torch.equal(found(images).logits, model(images).logits)
    assert load_vit(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("language model", "is a 'tokenformer', not a 'vit': give a ViT with its classifier"),
        ("no classifier", "the weights lack classifier.bias and 1 more: copy all files"),
        ("other classes", "classifier.bias has shape .* by config.json"),
        ("empty", "holds no config.json: give the folder of a ViT with its classifier"),
        ("missing", "there is no folder"),
    ],
)
def test_folder_that_is_no_vit_is_named(tmp_path: Any, kind: str, words: str) -> None:
    folder = tmp_path / "model"
    if kind == "language model":
        tiny_model().save_pretrained(folder)
    elif kind == "no classifier":
        ViTModel(tiny_vit().config, add_pooling_layer=False).save_pretrained(folder)
    elif kind == "other classes":
        tiny_vit().save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = [f"class {i}" for i in range(7)]
        fields |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    elif kind == "empty":
        folder.mkdir()
    with pytest.raises(UserError, match=words) as error:
        load_vit(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
