"""replace_linear: which layers it takes, what takes their place, and models of transformers and torch that go on."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from beside_torch import equation, randomise
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import statement
from tokenformer import Pattention, UserError, grow, replace_linear
from tokenformer.nn import BiasedPattention

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=31, **SIZES))


def _gpt2() -> nn.Module:
    special = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=32, **special)
    )


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, num_labels=5, **SIZES)
    )


MODELS = {"bert": _bert, "gpt2": _gpt2, "vit": _vit}


def _inputs(name: str) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 3])}
    ids = torch.randint(31, (4, 7))
    return {"input_ids": ids, "labels": ids.flip(1) if name == "bert" else ids}


def _linear_paths(model: nn.Module) -> set[str]:
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return {path for path, module in model.named_modules() if type(module) in kinds}


def _tree() -> nn.Module:
    """Linear layers at several depths: a.0, a.2, b.q_proj, b.k_proj, head."""
    model = nn.Module()
    model.a = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    model.b = nn.ModuleDict({"q_proj": nn.Linear(4, 4, bias=False), "k_proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    model.head = nn.Linear(4, 3)
    return model


# Whole models


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_trains_after_the_swap_saves_and_loads(name) -> None:
    model = MODELS[name]()
    linear = _linear_paths(model)
    replaced = replace_linear(model)
    output = {"bert": {"cls.predictions.decoder"}, "gpt2": {"lm_head"}, "vit": set()}[name]
    assert _linear_paths(model) == output
    assert set(replaced) == linear - output
    assert all(isinstance(model.get_submodule(path), BiasedPattention) for path in replaced)

    inputs, optimizer, losses = _inputs(name), torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(25):
        losses.append(model(**inputs).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0]
    moved = [layer for layer in model.modules() if isinstance(layer, Pattention)]
    assert all(p.grad is not None and p.grad.isfinite().all() for layer in moved for p in layer.parameters())

    again = MODELS[name]()
    replace_linear(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_generation_after_the_swap_uses_the_cache_correctly() -> None:
    model = _gpt2().eval()
    replace_linear(model)
    ids = torch.randint(31, (2, 5))
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **greedy), model.generate(ids, use_cache=False, **greedy))


def test_what_was_swapped_grows_without_a_change() -> None:
    model, ids = _bert().eval(), torch.randint(31, (2, 5))
    replace_linear(model)
    before = model(ids).logits
    grow(model, tokens=40)
    assert all(layer.num_tokens == 40 for layer in model.modules() if isinstance(layer, Pattention))
    assert torch.equal(model(ids).logits, before)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_of_torch_stays_off_the_path_that_reads_the_weights(batch_first) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2)
    assert replace_linear(model) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    x, padding = torch.randn(2, 2, 8), torch.tensor([[False, False], [False, True]])
    trained = model(x, src_key_padding_mask=padding)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            evaluated = model.eval()(x, src_key_padding_mask=padding)
        torch.testing.assert_close(evaluated, trained, rtol=1e-5, atol=1e-5)


# Which layers


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, (), {"a.0", "a.2", "b.q_proj", "b.k_proj", "head"}),
        ("q_proj", (), {"b.q_proj"}),
        (["*_proj"], (), {"b.q_proj", "b.k_proj"}),
        ("b", (), {"b.q_proj", "b.k_proj"}),
        ("a", "a.0", {"a.2"}),
        (["a.0", "head"], (), {"a.0", "head"}),
        ("?.0", (), {"a.0"}),
        (None, ["a", "head"], {"b.q_proj", "b.k_proj"}),
        (None, "norm", {"a.0", "a.2", "b.q_proj", "b.k_proj", "head"}),
        (lambda path, layer: layer.bias is None or path == "head", (), {"b.q_proj", "head"}),
        (lambda path, layer: True, "a", {"b.q_proj", "b.k_proj", "head"}),
    ],
)
def test_patterns_and_functions_choose(include, exclude, expected) -> None:
    model = _tree()
    assert set(replace_linear(model, include, exclude)) == expected
    assert _linear_paths(model) == {"a.0", "a.2", "b.q_proj", "b.k_proj", "head"} - expected


def test_a_pattern_is_not_half_a_name() -> None:
    with pytest.raises(UserError, match="no linear layer fits 'proj'"):
        replace_linear(_tree(), "proj")


def test_a_layer_used_twice_is_replaced_once_at_both_places() -> None:
    model = _tree()
    model.tail = model.b["k_proj"]
    assert replace_linear(model, ["k_proj", "tail"]) == ["b.k_proj"]
    assert isinstance(model.tail, Pattention)
    assert model.tail is model.b["k_proj"]


def test_tied_weights_are_left_alone_and_never_untied() -> None:
    model = _tree()
    model.embedding = nn.Embedding(3, 4)
    model.head.weight = model.embedding.weight
    model.b["q_proj"].weight = model.b["k_proj"].weight
    before = dict(model.named_modules())
    for include, other in (("head", "embedding.weight"), ("q_proj", "b.k_proj.weight"), ("*", "b.k_proj.weight")):
        with pytest.raises(UserError, match=f"is that of '{other}' too: exclude"):
            replace_linear(model, include)
    assert dict(model.named_modules()) == before
    assert replace_linear(model) == ["a.0", "a.2"]
    assert model.head.weight is model.embedding.weight


def test_output_embeddings_are_replaced_only_when_asked_for() -> None:
    config = transformers.GPTNeoXConfig(vocab_size=31, tie_word_embeddings=False, **SIZES)
    wrapped = nn.ModuleDict({"model": transformers.GPTNeoXForCausalLM(config)})
    assert not any("lm_head" in path for path in replace_linear(wrapped))
    assert replace_linear(wrapped, "lm_head") == ["model.lm_head"]


class Marked(nn.Linear):
    """A subclass, as quantised and parametrised layers are."""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"include": "q_porj"}, "include: no linear layer fits 'q_porj'; there is .*q_proj"),
        ({"include": ["head", "nothing"]}, "no linear layer fits 'nothing'"),
        ({"exclude": "haed"}, "exclude: no linear layer fits 'haed'; there is head"),
        ({"include": "marked"}, "'marked' is a Marked: nn.Linear itself is replaced"),
        ({"include": "norm"}, "no linear layer fits 'norm'"),
        ({"include": "a", "exclude": "a"}, "none of the 6 linear layers is chosen"),
        ({"include": lambda path, layer: False}, "none of the 6 linear layers is chosen"),
        ({"include": ["a", "b"]}, "'b.hooked' carries hooks"),
        ({"exclude": "hooked", "num_tokens": 0}, "num_tokens of 'a.0' must be a whole number of at least 1, got 0"),
        ({"exclude": "hooked", "num_tokens": lambda path, layer: 2.5 if path == "head" else 2}, "num_tokens of 'head'"),
        ({"init": "fit"}, "unknown init 'fit': use one of random, linear"),
        (
            {"init": "linear", "num_tokens": 8, "exclude": "hooked"},
            "needs at least 12 tokens, 2 per input channel, for 'a.2'",
        ),
        ({"init": "linear", "normalization": "softmax"}, "needs normalization 'l2_gelu'"),
        ({"init": "linear", "activation": "tanh"}, "gelu, relu or silu"),
        ({"exclude": "hooked", "normalization": "l3"}, "unknown normalization"),
        ({"exclude": "hooked", "activation": "gulu"}, "unknown activation"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(arguments, words) -> None:
    model = _tree()
    model.marked = Marked(4, 4)
    model.b["hooked"] = nn.Linear(4, 4)
    model.b["hooked"].register_forward_pre_hook(lambda *_: None)
    before = dict(model.named_modules())
    with pytest.raises(UserError, match=words):
        replace_linear(model, **arguments)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    ("model", "words"), [(nn.Linear(2, 2), "itself a linear layer"), (nn.LayerNorm(2), "no linear layers")]
)
def test_models_without_a_place_for_it_are_refused(model, words) -> None:
    with pytest.raises(UserError, match=words):
        replace_linear(model)


# What takes their place


def test_parameters_are_about_as_many_as_before() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(32, 96))
    before = [layer.weight.numel() for layer in model]
    replace_linear(model, bias=False)
    assert [sum(p.numel() for p in layer.parameters()) for layer in model] == pytest.approx(before, rel=0.03)


def test_token_numbers_bias_device_dtype_and_mode() -> None:
    model = _tree().to(torch.bfloat16).eval()
    bias = model.a[0].bias.requires_grad_(False)
    replace_linear(
        model,
        "a",
        num_tokens=lambda path, layer: layer.out_features + len(path),
        normalization="gelu_l2",
        activation="relu",
    )
    first, second = model.a[0], model.a[2]
    assert (first.in_features, first.out_features, first.num_tokens, second.num_tokens) == (4, 6, 9, 7)
    assert first.bias is bias
    assert {p.dtype for p in model.a.parameters()} == {torch.bfloat16}
    assert not first.training
    assert (first.normalization, first.activation, first.kind) == ("gelu_l2", "relu", None)
    replace_linear(model, "k_proj", bias=False)
    assert type(model.b["k_proj"]) is Pattention
    on_meta = nn.Sequential(nn.Linear(3, 3, device="meta"))
    replace_linear(on_meta, init="linear")
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}


def test_a_biased_layer_is_the_equation_plus_its_bias() -> None:
    layer = randomise(BiasedPattention(6, 3, 5)).double()
    nn.init.normal_(layer.bias)
    x = torch.randn(4, 6).double()
    assert statement.error(layer(x), equation(layer, x) + layer.bias) < 1e-10
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == nn.Linear(6, 3)(x.float()).dtype == torch.bfloat16
    layer.reset_parameters()
    assert torch.equal(layer.bias, torch.zeros(3))


@given(
    channels=st.integers(1, 9),
    out=st.integers(1, 5),
    extra=st.integers(0, 3),
    activation=st.sampled_from(["gelu", "relu", "silu"]),
    seed=st.integers(0, 2**16),
)
def test_linear_init_is_the_old_layer_on_the_direction_of_a_row(channels, out, extra, activation, seed) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(channels, out)).double()
    directions = F.normalize(torch.randn(7, channels).double())
    x = directions * torch.linspace(0.5, 4, 7)[:, None]
    expected = model(directions * channels**0.5)
    replace_linear(model, init="linear", num_tokens=2 * channels + extra, activation=activation)
    assert statement.error(model(x), expected) < 1e-10


def test_linear_init_behind_a_norm_changes_nothing_but_the_epsilon() -> None:
    for norm in (nn.LayerNorm(16), nn.RMSNorm(16)):
        for linear in (nn.Linear(16, 8), transformers.pytorch_utils.Conv1D(8, 16)):
            model = nn.Sequential(norm, linear)
            nn.init.normal_(linear.bias)
            x = 3 * torch.randn(5, 16)
            expected = model(x)
            replace_linear(model, init="linear")
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
            assert sum(p.numel() for p in model[1].parameters()) == 32 * 24 + 8


def test_linear_init_learns() -> None:
    """The tokens whose keys are zero get a gradient too."""
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    replace_linear(model, init="linear", num_tokens=20)
    x = torch.randn(16, 8)
    F.mse_loss(model(x), torch.randn(16, 4)).backward()
    assert (model[1].segments.base.key.grad.abs().sum(-1) > 0).all()


# The page about it


def test_the_page_about_drop_ins_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "drop-ins.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["hidden"].shape == (8, 7, 64)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    full = names["decoder"](names["target"], names["memory"], tgt_mask=causal, tgt_is_causal=True)
    torch.testing.assert_close(names["x"], full[:, -1:], rtol=1e-4, atol=1e-4)
    assert names["replaced"] == [f"transformer.h.{i}.mlp.{name}" for i in (0, 1) for name in ("c_fc", "c_proj")]
