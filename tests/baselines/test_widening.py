"""Widened Transformers: the same logits where that is promised, other weights where that is, and bad sizes named."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXForCausalLM

from tiny import tiny_ids
from tiny_transformer import save_transformer, tiny_transformer
from tokenformer import UserError
from tokenformer.baselines import load_transformer, num_parameters, widen, widen_folder, wider_config

KEEPING = pytest.mark.parametrize("method", ["net2net", "hypercloning"])


def widened(model, method, *, hidden_size=None, intermediate_size=None, **options):
    config = wider_config(model.config, hidden_size=hidden_size, intermediate_size=intermediate_size)
    return widen(model, config, method=method, **options)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def tensors(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


# The function is kept


@settings(max_examples=20)
@given(
    method=st.sampled_from(["net2net", "hypercloning"]),
    multiple=st.integers(1, 3),
    heads=st.integers(1, 3),
    old_neurons=st.integers(1, 40),
    more_neurons=st.integers(1, 60),
    parallel=st.booleans(),
    tied=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_logits_are_unchanged(method, multiple, heads, old_neurons, more_neurons, parallel, tied, bias, seed):
    model = tiny_transformer(
        hidden_size=16 * heads,
        num_attention_heads=heads,
        intermediate_size=old_neurons,
        use_parallel_residual=parallel,
        tie_word_embeddings=tied,
        attention_bias=bias,
    ).double()
    sizes = {"hidden_size": 16 * heads * multiple, "intermediate_size": old_neurons + more_neurons}
    # The noise of HyperCloning cancels whatever its size.
    noise = 0.3 if method == "hypercloning" else 0.0
    wider = widened(model, method, noise=noise, seed=seed, **sizes)
    ids = tiny_ids()
    torch.testing.assert_close(logits(wider, ids), logits(model, ids), rtol=1e-10, atol=1e-10)
    assert {name: getattr(wider.config, name) for name in sizes} == sizes
    assert wider.config.num_attention_heads == heads * multiple


@pytest.mark.parametrize(("method", "noise"), [("net2net", 0.0), ("hypercloning", 0.0), ("hypercloning", 0.32)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Logits are of the order of one; a bfloat16 keeps 8 bits of each sum on the way.
    [(torch.float32, 1e-4), (torch.bfloat16, 0.15)],
    ids=["float32", "bfloat16"],
)
def test_logits_are_unchanged_in_lower_precision(method, noise, dtype, tolerance):
    model = tiny_transformer().to(dtype)
    wider = widened(model, method, hidden_size=96, intermediate_size=100, noise=noise)
    assert {parameter.dtype for parameter in wider.parameters()} == {dtype}
    ids = tiny_ids()
    torch.testing.assert_close(logits(wider, ids), logits(model, ids), rtol=tolerance, atol=tolerance)


@KEEPING
def test_generates_the_same_text_from_its_cache(method):
    model = tiny_transformer(eos_token_id=3).double()
    model.generation_config.max_new_tokens = 20
    wider = widened(model, method, hidden_size=64)
    prompt = tiny_ids(1, 5)
    torch.testing.assert_close(wider.generate(prompt), model.generate(prompt))
    assert wider.generation_config.to_dict() == model.generation_config.to_dict()


@KEEPING
def test_what_copies_send_on_adds_up_to_what_the_old_unit_sent(method):
    model = tiny_transformer().double()
    wider = widened(model, method, intermediate_size=100, seed=4)
    for old, new in zip(model.gpt_neox.layers, wider.gpt_neox.layers, strict=True):
        rows = torch.cat([old.mlp.dense_h_to_4h.weight, old.mlp.dense_h_to_4h.bias[:, None]], 1)
        copies = torch.cat([new.mlp.dense_h_to_4h.weight, new.mlp.dense_h_to_4h.bias[:, None]], 1)
        same = (copies[:, None] == rows).all(-1).double()  # (100, 44)
        assert same.sum(1).eq(1).all()
        torch.testing.assert_close(new.mlp.dense_4h_to_h.weight @ same, old.mlp.dense_4h_to_h.weight)
        counts = same.sum(0)
        assert counts.min() >= 1
        # In turn 100 = 2 * 44 + 12; drawn at random, some neuron has more than three copies.
        assert (counts.max() == 3) == (method == "hypercloning")
        torch.testing.assert_close(new.attention.dense.weight, old.attention.dense.weight)


def test_small_model_is_left_alone_and_so_is_the_random_state():
    model = tiny_transformer().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    config = wider_config(model.config, hidden_size=64)
    wider = widen(model, config, method="net2net", noise=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert wider.training
    assert not widened(model.eval(), "width", hidden_size=64).training
    assert wider.config is not config
    assert model.config.hidden_size == 32


def test_seed_fixes_the_result():
    model = tiny_transformer()
    first, again, other = (widened(model, "net2net", intermediate_size=90, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(
        first.gpt_neox.layers[0].mlp.dense_4h_to_h.weight, other.gpt_neox.layers[0].mlp.dense_4h_to_h.weight
    )


# Noise


def test_noise_of_net2net_reaches_every_copy_but_the_first():
    model = tiny_transformer().double()
    plain, noisy = (widened(model, "net2net", hidden_size=64, noise=noise, seed=3) for noise in (0, 0.01))
    a, b = tensors(plain), tensors(noisy)
    olds = tensors(model)
    for name, old in olds.items():
        if name.endswith("bias") or "norm" in name:
            continue
        units = (lambda t: t.T) if "embed_in" in name else (lambda t: t)
        change = units(b[name]) - units(a[name])
        first = len(units(old))
        assert (change[:first] == 0).all(), name
        assert change[first:].std().item() == pytest.approx(0.01 * a[name].square().mean().sqrt().item(), rel=0.1)
    ids = tiny_ids()
    difference = (logits(noisy, ids) - logits(model, ids)).abs().max()
    assert 1e-4 < difference < 0.3


def test_noise_of_hypercloning_has_the_stated_size_and_cancels():
    model = tiny_transformer().double()
    plain, noisy = (widened(model, "hypercloning", hidden_size=96, noise=noise) for noise in (0, 0.32))
    a, b = tensors(plain), tensors(noisy)
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    change = b[name] - a[name]
    assert change.std().item() == pytest.approx(0.32 * a[name].square().mean().sqrt().item(), rel=0.05)
    torch.testing.assert_close(change.view(-1, 3, 32).sum(1), torch.zeros(288, 32, dtype=torch.float64))
    # The embedding reads words, of which there are no copies.
    assert torch.equal(a["gpt_neox.embed_in.weight"], b["gpt_neox.embed_in.weight"])


# Training from there


def train(model, steps=5):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    ids = tiny_ids(4, 17)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def halves_differ(model):
    """Largest difference between the copies in a model whose every width was doubled in turn."""
    worst = 0.0
    for name, tensor in tensors(model).items():
        dimensions = [1] if "embed_in" in name else range(tensor.ndim)
        for dimension in dimensions:
            first, second = tensor.chunk(2, dimension)
            worst = max(worst, (first - second).abs().max().item())
    return worst


def test_symmetric_clone_stays_two_equal_halves_and_noise_parts_them():
    model = tiny_transformer().double()
    sizes = {"hidden_size": 64, "intermediate_size": 88}
    symmetric = widened(model, "hypercloning", **sizes)
    assert halves_differ(symmetric) == 0
    before = copy.deepcopy(symmetric.state_dict())
    train(symmetric)
    moved = max((tensor - before[name]).abs().max().item() for name, tensor in symmetric.state_dict().items())
    assert moved > 1e-3
    assert halves_differ(symmetric) < 1e-3 * moved
    noisy = widened(model, "hypercloning", noise=0.1, **sizes)
    biases = [layer.mlp.dense_h_to_4h.bias for layer in noisy.gpt_neox.layers]  # equal at first: they get no noise
    assert all(torch.equal(*bias.chunk(2)) for bias in biases)
    train(noisy)
    assert all((bias[:44] - bias[44:]).abs().max() > 1e-4 for bias in biases)


def copied_neurons(model, steps):
    """Differences between what a copy of a neuron and the neuron itself read, before and after training."""
    layer = model.gpt_neox.layers[0].mlp.dense_h_to_4h
    weight = layer.weight.detach().clone()
    nearest = torch.cdist(weight[44:], weight[:44]).argmin(1)
    before = weight[44:] - weight[nearest]
    train(model, steps)
    return before, (layer.weight[44:] - layer.weight[nearest]).detach()


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_copies_of_net2net_part_by_training_only_with_noise(noise):
    model = tiny_transformer().double()
    before, after = copied_neurons(widened(model, "net2net", intermediate_size=88, noise=noise), steps=5)
    if noise:
        assert (after - before).abs().amax(1).min() > 1e-5
    else:
        assert before.abs().max() == 0
        assert after.abs().max() < 1e-9


# Width


@pytest.mark.parametrize("tied", [True, False])
def test_width_has_the_old_weights_in_the_corner_of_a_new_model(tied):
    model = tiny_transformer(tie_word_embeddings=tied)
    config = wider_config(model.config, hidden_size=48, intermediate_size=70)  # no whole multiple: three heads
    wider = widen(model, config, method="width", seed=5)
    torch.manual_seed(5)
    fresh = tensors(GPTNeoXForCausalLM(copy.deepcopy(config)))
    olds = tensors(model)
    for name, tensor in tensors(wider).items():
        corner = tuple(slice(size) for size in olds[name].shape)
        expected = fresh[name].clone()
        expected[corner] = olds[name]
        assert torch.equal(tensor, expected), name
    # The first two heads read the first 32 channels as before.
    heads = wider.gpt_neox.layers[0].attention.query_key_value.weight.view(3, 3, 16, 48)
    old = model.gpt_neox.layers[0].attention.query_key_value.weight.view(2, 3, 16, 32)
    assert torch.equal(heads[:2, ..., :32], old)
    ids = tiny_ids()
    assert (logits(wider, ids) - logits(model, ids)).abs().max() > 0.1


# Folders


@pytest.mark.parametrize("method", ["net2net", "hypercloning", "width"])
def test_folder_round_trip(tmp_path, method):
    small = save_transformer(tmp_path / "small", tie_word_embeddings=method != "net2net")
    out = tmp_path / "wide"
    done = widen_folder(str(tmp_path / "small"), str(out), method=method, hidden_size=64, seed=7)

    def count(d, f):
        return 2 * (4 * d * d + 2 * d * f + 4 * d + f + d + 4 * d) + 2 * d

    assert done == {"out": str(out), "before": count(32, 44), "after": count(64, 88)}
    wider = load_transformer(out)
    assert num_parameters(wider) == num_parameters(wider.config) == done["after"]
    expected = widened(small, method, hidden_size=64, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(wider.parameters(), expected.parameters(), strict=True))
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "small" / "tokenizer.json").read_bytes()
    ids = tiny_ids()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out), ids), logits(wider, ids))
    assert not wider.training


# Bad input


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({}, "nothing to widen: give hidden_size or intermediate_size"),
        ({"hidden_size": 32}, "nothing to widen: hidden_size is 32 and intermediate_size 44 already"),
        ({"hidden_size": 16}, "hidden_size=16 is less than the 32 there are: widening cannot shrink"),
        ({"hidden_size": 64, "intermediate_size": 43}, "intermediate_size=43 is less than the 44"),
        ({"hidden_size": 72}, "no whole heads of 16 channels: give a multiple of 16"),
        ({"hidden_size": 80}, "80 is no whole multiple of 32, which net2net needs.*give 96"),
    ],
)
def test_sizes_that_cannot_be(tmp_path, sizes, words):
    save_transformer(tmp_path / "small")
    with pytest.raises(UserError, match=words) as error:
        widen_folder(str(tmp_path / "small"), str(tmp_path / "wide"), method="net2net", **sizes)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "stacking"}, "unknown method 'stacking': use one of net2net, hypercloning, width"),
        ({"method": "net2net", "noise": -1.0}, "noise must be at least 0"),
        ({"method": "net2net", "noise": float("nan")}, "noise must be at least 0"),
        ({"method": "width", "noise": 0.1}, "width makes no copies"),
    ],
)
def test_options_that_cannot_be(options, words):
    model = tiny_transformer()
    with pytest.raises(UserError, match=words):
        widened(model, options.pop("method"), hidden_size=64, **options)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2 in the model and 3"),
        ({"vocab_size": 40}, "vocab_size is 31 in the model and 40"),
        ({"use_parallel_residual": False}, "use_parallel_residual is True"),
        ({"num_attention_heads": 2}, "heads of 16 channels are to keep their size"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_parameters is"),
    ],
)
def test_what_widening_keeps(fields, words):
    model = tiny_transformer()
    config = wider_config(model.config, hidden_size=64)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=words):
        widen(model, config, method="hypercloning")


def test_only_a_gpt_neox_is_widened():
    other = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"only a GPTNeoXForCausalLM can be widened.*GPT2LMHeadModel"):
        widen(other, wider_config(tiny_transformer().config, hidden_size=64), method="width")


def test_folder_that_holds_something_is_refused(tmp_path):
    save_transformer(tmp_path / "small")
    with pytest.raises(UserError, match="exists already"):
        widen_folder(str(tmp_path / "small"), str(tmp_path / "small"), method="width", hidden_size=64)
