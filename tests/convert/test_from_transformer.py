"""A Transformer as a TokenFormer: exact where it is claimed to be, against transformers' own models in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import statement
from saved_model import edit_config, train_tokenizer
from tokenformer import Pattention
from tokenformer.cli import main
from tokenformer.convert.calibration import write_rows
from tokenformer.convert.closed_form import feedforward_tokens, linear_tokens
from tokenformer.convert.fitting import fit, fit_affine, fit_values
from tokenformer.convert.pretrained import Affine, load_pretrained
from tokenformer.convert.transformer import from_transformer, initialize
from tokenformer.errors import UserError
from tokenformer.models.loading import load_model, load_tokenizer
from tokenformer.ops import get_activation

D, F = 16, 40
# An epsilon that does not show: with the usual one, outputs of a layer norm have a norm a little below sqrt(D).
EPS = 1e-14
SIZES = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "use_cache": True}


def neox(**options):
    config = {
        "hidden_size": D,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": F,
        "max_position_embeddings": 16,
        "rotary_pct": 0.5,
        "layer_norm_eps": EPS,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**SIZES, **config, **options}))


def gpt2(**options):
    config = {"n_embd": D, "n_layer": 2, "n_head": 2, "n_inner": F, "n_positions": 16, "layer_norm_epsilon": EPS}
    return GPT2LMHeadModel(GPT2Config(**{**SIZES, **config, **options}))


def randomized(model, *, biases=True):
    """Parameters of the order of one: what initialisation leaves at 0 or 1 must show too."""
    for name, parameter in model.double().eval().named_parameters():
        nn.init.normal_(parameter, std=0.4)
        if name.endswith("bias") and not biases:
            nn.init.zeros_(parameter)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.data += 1
    return model


def saved(model, folder: Path, *, tokenizer=True) -> Path:
    model.save_pretrained(folder)
    if tokenizer:
        train_tokenizer().save_pretrained(folder)
    return folder


IDS = torch.randint(320, (3, 11), generator=torch.Generator().manual_seed(1))


# Reading


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: neox(), id="gpt_neox"),
        pytest.param(lambda: neox(use_parallel_residual=False, attention_bias=False), id="sequential, without biases"),
        pytest.param(lambda: neox(tie_word_embeddings=True, hidden_act="silu", rotary_pct=1.0), id="tied"),
        pytest.param(lambda: neox(rope_parameters={"rope_type": "default", "rope_theta": 500.0}), id="theta"),
        pytest.param(lambda: gpt2(), id="gpt2"),
        pytest.param(lambda: gpt2(tie_word_embeddings=False, activation_function="relu"), id="gpt2 untied"),
        pytest.param(lambda: gpt2(scale_attn_weights=False), id="gpt2 unscaled"),
        pytest.param(lambda: gpt2(scale_attn_by_inverse_layer_idx=True), id="gpt2 scaled by layer"),
    ],
)
@torch.no_grad()
def test_what_is_read_computes_what_transformers_computes(model, tmp_path):
    model = randomized(model())
    pretrained = load_pretrained(saved(model, tmp_path), dtype=torch.float64)
    hidden = pretrained.embed(IDS)
    for block in pretrained.blocks:
        hidden = pretrained.run_block(block, hidden).after
    # Both sides compute rotary angles in float32, by powers in another order.
    tolerance = 1e-12 if pretrained.architecture == "gpt2" else 1e-6
    assert statement.error(pretrained.logits(hidden), model(IDS).logits) < tolerance


# The closed form


def layer_of(tokens, activation="gelu") -> Pattention:
    layer = Pattention(tokens.key.shape[1], tokens.value.shape[1], len(tokens.key), activation=activation)
    tokens.write(layer.double())
    return layer


def norm_and_linear(out: int, *, bias: bool) -> tuple[nn.LayerNorm, nn.Linear, Affine]:
    """A layer norm and a linear map with random parameters, and the map that reads a norm without any."""
    norm, linear = nn.LayerNorm(D, eps=EPS).double(), nn.Linear(D, out, bias=bias).double()
    nn.init.normal_(norm.weight)
    if bias:
        nn.init.normal_(norm.bias)
        nn.init.normal_(linear.bias)
    none = torch.zeros(out, dtype=torch.float64)
    return norm, linear, Affine(linear.weight.data, linear.bias.data if bias else none).after_norm(norm)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "silu", "relu"])
@torch.no_grad()
def test_pairs_are_any_linear_map_behind_a_layer_norm(activation):
    norm, linear, affine = norm_and_linear(D + 3, bias=False)
    x = torch.randn(50, D, dtype=torch.float64) * 3 + 1
    tokens = linear_tokens(affine, 2 * D, get_activation(activation), input_norm=D**0.5)
    assert len(tokens.key) == 2 * D
    normed = nn.functional.layer_norm(x, (D,), eps=EPS)
    assert statement.error(layer_of(tokens, activation)(normed), linear(norm(x))) < 1e-11


@torch.no_grad()
def test_more_tokens_than_pairs_change_nothing_and_can_learn():
    _, _, affine = norm_and_linear(D, bias=True)
    x = nn.functional.layer_norm(torch.randn(20, D, dtype=torch.float64), (D,))
    tokens = linear_tokens(affine, 3 * D, get_activation("gelu"), input_norm=D**0.5)
    small, large = layer_of(tokens), Pattention(D, D, 3 * D).double()
    tokens.write(large)
    torch.testing.assert_close(large(x), small(x), rtol=0, atol=1e-13)
    with torch.enable_grad():
        large(x).square().sum().backward()
    segment = large.segments["base"]
    assert (segment.key.grad.abs().sum(1) + segment.value.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize(("num_tokens", "at_most"), [(2 * D, 0.2), (D + D // 2, 0.7), (D, 1.0), (D // 2, 1.1)])
@torch.no_grad()
def test_fewer_tokens_come_less_close(num_tokens, at_most):
    norm, linear, affine = norm_and_linear(D, bias=True)
    x = torch.randn(2000, D, dtype=torch.float64)
    tokens = linear_tokens(affine, num_tokens, get_activation("gelu"), input_norm=D**0.5)
    assert len(tokens.key) == num_tokens
    wanted = linear(norm(x))
    wrong = layer_of(tokens)(nn.functional.layer_norm(x, (D,))) - wanted
    assert 1e-6 < wrong.square().mean().sqrt() / wanted.square().mean().sqrt() < at_most


@torch.no_grad()
def test_left_out_directions_do_not_change_the_size_of_the_others():
    _, _, affine = norm_and_linear(D, bias=False)
    x = nn.functional.layer_norm(torch.randn(4000, D, dtype=torch.float64), (D,))
    tokens = linear_tokens(affine, D // 2, get_activation("gelu"), input_norm=D**0.5)
    left, strengths, right = torch.linalg.svd(affine.weight)
    strengths[D // 2 :] = 0
    kept = x @ (left * strengths @ right).T
    assert ((layer_of(tokens)(x) * kept).sum() / kept.square().sum()).item() == pytest.approx(1, abs=0.15)


@torch.no_grad()
def test_pairs_carry_the_bias_in_the_mean():
    _, _, affine = norm_and_linear(D, bias=True)
    x = nn.functional.layer_norm(torch.randn(4000, D, dtype=torch.float64), (D,))
    tokens = linear_tokens(affine, 2 * D, get_activation("gelu"), input_norm=D**0.5)
    carried = layer_of(tokens)(x) - x @ affine.weight.T
    # D is small: the sum over pairs is constant to about 1 / sqrt(D), and its mean to a few percent.
    assert (carried.mean(0) - affine.bias).norm() < 0.05 * affine.bias.norm()
    assert carried.std(0).norm() < 0.25 * affine.bias.norm()


@pytest.mark.parametrize("num_tokens", [F + D - 2, F + 3 * D])
@torch.no_grad()
def test_neurons_and_as_many_tokens_as_channels_are_a_feedforward(num_tokens):
    norm, inner, affine = norm_and_linear(F, bias=False)
    outer = nn.Linear(F, D, bias=False).double()
    x = torch.randn(50, D, dtype=torch.float64)
    tokens = feedforward_tokens(affine, Affine(outer.weight.data, torch.zeros(D).double()), num_tokens)
    assert len(tokens.key) == F + D - 2
    layer = Pattention(D, D, num_tokens).double()
    tokens.write(layer)
    wanted = outer(nn.functional.gelu(inner(norm(x))))
    assert statement.error(layer(nn.functional.layer_norm(x, (D,), eps=EPS)), wanted) < 1e-11


@torch.no_grad()
def test_fewer_tokens_than_neurons_keep_those_of_most_weight():
    inner = Affine(torch.randn(F, D).double(), torch.zeros(F).double())
    outer = Affine(torch.randn(D, F).double(), torch.zeros(D).double())
    tokens = feedforward_tokens(inner, outer, 7)
    strengths = [inner.weight[i].norm().item() * outer.weight[:, i].norm().item() for i in range(F)]
    kept = sorted(sorted(range(F), key=lambda i: -strengths[i])[:7])
    assert torch.equal(tokens.key, inner.weight[kept])
    assert torch.equal(tokens.value, outer.weight.T[kept])


@pytest.mark.parametrize("build", [neox, gpt2])
@torch.no_grad()
def test_model_is_exact_but_for_the_norm_that_the_output_projection_does_not_see(build, tmp_path):
    rotary = {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}
    options = {"use_parallel_residual": False, "rope_parameters": rotary} if build is neox else {}
    original = randomized(build(**options), biases=False)
    if build is gpt2:
        original.transformer.wpe.weight.copy_(torch.randn(D))  # what positions share is kept, the rest is lost
    pretrained = load_pretrained(saved(original, tmp_path), dtype=torch.float64)
    converted = initialize(pretrained, {"qkv": 2 * D, "output": 2 * D, "ffn": F + D - 2}, pretrained.rotary_pct)
    wanted = original(IDS).logits.log_softmax(-1)
    assert statement.error(converted(IDS).logits.log_softmax(-1), wanted) > 1e-3
    for block, layer in zip(pretrained.blocks, converted.model.layers, strict=True):
        typical = block.value.weight.norm()
        layer.attention.output.register_forward_hook(
            lambda _, x, y, typical=typical: y * x[0].norm(dim=-1, keepdim=True) / typical
        )
    # Rotary angles are float32 on both sides.
    assert statement.error(converted(IDS).logits.log_softmax(-1), wanted) < (1e-6 if build is neox else 1e-9)


# Fitting


@torch.no_grad()
def test_values_are_the_ridge_solution():
    layer = Pattention(D, 5, 12).double()
    x, target = torch.randn(3, 200, D).double(), torch.randn(3, 200, 5).double()
    segment = layer.segments["base"]
    start = segment.value.clone().numpy()
    features = statement.weights(x.flatten(0, 1), [segment.key], layer.scale.item(), "l2_gelu").numpy()
    fit_values(layer, x, target)
    ridge = 1e-3 * (features**2).sum(0).mean()
    # As one least-squares problem: the rows below say "stay where you were".
    left = np.concatenate([features, ridge**0.5 * np.eye(12)])
    right = np.concatenate([target.flatten(0, 1).numpy(), ridge**0.5 * start])
    wanted = np.linalg.lstsq(left, right, rcond=None)[0]
    np.testing.assert_allclose(segment.value.numpy(), wanted, atol=1e-9)


@torch.no_grad()
def test_fitted_weight_makes_up_for_the_bias_and_for_other_inputs():
    x = torch.randn(2, 300, D).double() + 1
    turned = torch.linalg.qr(torch.randn(D, D).double()).Q
    neurons = Affine(torch.randn(F, D).double(), torch.randn(F).double())
    fitted = fit_affine(neurons, x, neurons(x @ turned))
    left = x.flatten(0, 1).numpy()
    wanted = np.linalg.lstsq(left, neurons(x @ turned).flatten(0, 1).numpy(), rcond=None)[0].T
    wanted -= wanted.mean(-1, keepdims=True)
    # The ridge, a thousandth, is what is between them.
    np.testing.assert_allclose(fitted.weight.numpy(), wanted, atol=0.02)


@pytest.mark.parametrize("build", [neox, gpt2])
@torch.no_grad()
def test_fitting_brings_the_model_closer(build, tmp_path):
    original = build().double().eval()
    for parameter in original.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    pretrained = load_pretrained(saved(original, tmp_path), dtype=torch.float64)
    converted = initialize(pretrained, {"qkv": D, "output": D, "ffn": F}, pretrained.rotary_pct)
    rows = torch.randint(320, (200, 16))
    wanted = original(IDS).logits.log_softmax(-1)

    def divergence() -> float:
        return nn.functional.kl_div(
            converted(IDS).logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean"
        ).item()

    before = divergence()
    fit(converted, pretrained, rows)
    assert divergence() < 0.6 * before
    # In GPT-NeoX the neurons read something else than here: the fitted keys predict them better than its weights.
    ffn, block, seen = converted.model.layers[0].ffn, pretrained.blocks[0], []
    ffn.register_forward_hook(lambda _, x, y: seen.append(x[0]))
    converted(rows)
    neurons = pretrained.run_block(block, pretrained.embed(rows)).neurons
    of_keys, of_weights = (
        (seen[0] @ w.T - neurons).square().mean() for w in (ffn.segments["base"].key, block.inner.weight)
    )
    assert of_keys < (0.8 if build is neox else 1) * of_weights


# Folders


@pytest.fixture
def pythia(tmp_path) -> Path:
    return saved(randomized(neox(layer_norm_eps=1e-5)).float(), tmp_path / "pythia")


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog, größer als 日本語\n" * 40, encoding="utf-8")
    return file


@pytest.mark.parametrize("build", [neox, gpt2])
def test_folder_holds_the_model_and_its_tokenizer(build, tmp_path):
    source = saved(randomized(build()).float(), tmp_path / "original")
    done = from_transformer(str(source), str(tmp_path / "out"), qkv=24, output=20, ffn=50, calibration_tokens=0)
    model = load_model(tmp_path / "out")
    assert done["tokens"] == {"qkv": 24, "output": 20, "ffn": 50}
    assert done["architecture"] == model_type(source)
    assert done["after"] == model.num_parameters()
    assert done["before"] == sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    assert done["calibration"] == {"text": None, "tokens": 0}
    assert model.config.rotary_pct == (0.5 if build is neox else 0.25)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (build is gpt2)
    wanted = initialize(load_pretrained(source), done["tokens"], model.config.rotary_pct)
    torch.testing.assert_close(model(IDS).logits, wanted(IDS).logits, rtol=0, atol=0)
    assert load_tokenizer(tmp_path / "out")("lazy 日本")["input_ids"] == train_tokenizer()("lazy 日本")["input_ids"]


def model_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]


def test_fits_on_the_text_that_is_given(pythia, text, tmp_path):
    done = from_transformer(str(pythia), str(tmp_path / "out"), calibration=str(text), calibration_tokens=400)
    assert done["calibration"]["text"] == str(text)
    # 25 rows of 16 tokens, 3 of them for the losses.
    assert done["calibration"]["tokens"] == 22 * 16
    tokenized = train_tokenizer()(text.read_text(encoding="utf-8"))["input_ids"]
    ids = tokenized[22 * 16 : 25 * 16]
    rows = torch.tensor(ids).view(3, 16)
    pretrained = load_pretrained(pythia)
    wanted = initialize(pretrained, done["tokens"], 0.5)
    fit(wanted, pretrained, torch.tensor(tokenized[: 22 * 16]).view(22, 16))
    model = load_model(tmp_path / "out")
    torch.testing.assert_close(model(rows).logits, wanted(rows).logits, rtol=0, atol=0)
    for name, judged in (("loss_before", GPTNeoXForCausalLM.from_pretrained(pythia)), ("loss_after", model)):
        assert done["calibration"][name] == pytest.approx(judged(rows, labels=rows).loss.item(), rel=1e-5)


def test_fits_on_text_of_its_own_and_alike_each_time(pythia, tmp_path):
    done = [from_transformer(str(pythia), str(tmp_path / name), calibration_tokens=320) for name in ("a", "b")]
    assert done[0]["calibration"] == done[1]["calibration"]
    assert done[0]["calibration"]["text"] == "own"
    assert done[0]["calibration"]["tokens"] == 18 * 16
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_own_text_begins_at_the_start_token_and_does_not_depend_on_what_was_drawn_before(pythia):
    pretrained = load_pretrained(pythia)
    rows = write_rows(pretrained, 100)
    torch.rand(3)
    assert torch.equal(write_rows(pretrained, 100), rows)
    assert rows.shape == (6, 16)
    assert (rows[:, 0] == 0).all()
    assert len(rows.unique()) > 20


# Refusals


def wrong_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=F + 1)


def without(name: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({key: t for key, t in tensors.items() if name not in key}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: edit_config(folder, model_type="unheard_of"), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot read the weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut short"), "cannot read the weights"),
        (wrong_shape, "layers.0.mlp.dense_4h_to_h.weight has shape (16, 40) but (16, 41) by config.json"),
        (lambda folder: without("layers.1.mlp.dense_h_to_4h.bias", folder), "lack gpt_neox.layers.1.mlp.dense_h_to_4h"),
        (lambda folder: edit_config(folder, hidden_act="tanh"), "'tanh' cannot express linear maps"),
        (
            lambda folder: edit_config(folder, rope_parameters={"rope_type": "linear", "factor": 2.0}),
            "rope_type is 'linear'",
        ),
    ],
)
def test_refuses_what_is_wrong_with_the_model(spoil, words, pythia, tmp_path, capsys):
    spoil(pythia)
    refused(["--from-transformer", str(pythia), str(tmp_path / "out")], words, tmp_path / "out", capsys)


def refused(argv, words, out, capsys):
    capsys.readouterr()  # the progress bars of saving what is refused now
    assert main(["convert", *argv]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.startswith("tokenformer convert: error: ")
    assert message.count("\n") == 1
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


def test_refuses_other_architectures(tmp_path, capsys):
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path / "llama")
    argv = ["--from-transformer", str(tmp_path / "llama"), str(tmp_path / "out")]
    refused(argv, "is a 'llama': only gpt_neox and gpt2", tmp_path / "out", capsys)


def test_refuses_cross_attention(tmp_path, capsys):
    saved(gpt2(add_cross_attention=True), tmp_path / "gpt2")
    argv = ["--from-transformer", str(tmp_path / "gpt2"), str(tmp_path / "out")]
    refused(argv, "add_cross_attention", tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calibration", "missing.txt"], "cannot read missing.txt (No such file or directory)"),
        (["--calibration", "short.txt"], "short.txt holds 1 tokens, at least 32 are needed"),
        (["--calibration", "latin1.txt"], "cannot read latin1.txt (it is not UTF-8 text)"),
        (["--calibration", "short.txt", "--calibration-tokens", "0"], "calibration_tokens is 0"),
        (["--calibration-tokens", "-1"], "calibration_tokens must not be negative"),
        (["--qkv", "0"], "qkv must be at least 1, got 0"),
        (["--rotary-pct", "1.5"], "rotary_pct must lie between 0 and 1"),
    ],
)
def test_refuses_options_that_cannot_be(options, words, pythia, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("a", encoding="utf-8")
    Path("latin1.txt").write_bytes("größer".encode("latin-1"))
    refused(["--from-transformer", str(pythia), "out", *options], words, tmp_path / "out", capsys)


def test_refuses_calibration_without_a_tokenizer(text, tmp_path, capsys):
    saved(neox(), tmp_path / "bare", tokenizer=False)
    argv = ["--from-transformer", str(tmp_path / "bare"), str(tmp_path / "out"), "--calibration", str(text)]
    refused(argv, "holds no tokenizer", tmp_path / "out", capsys)


def test_leaves_a_folder_that_is_not_empty_alone(pythia, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        from_transformer(str(pythia), str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note"]
