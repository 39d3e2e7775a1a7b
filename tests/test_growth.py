"""Growing: exact where it promises to be, different where the paper's rules are asked for, recorded, all or nothing."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

import tokenformer.models  # noqa: F401  (registers the Auto classes)
from tiny import tiny_ids, tiny_model
from tokenformer import Pattention, TokenFormerForCausalLM, UserError, grow

l2_kinds = pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2"])


@pytest.fixture(autouse=True)
def _no_warnings():
    """Growing warns only where a test expects it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*growing changes the outputs")
        yield


def _layers(model: nn.Module) -> list[Pattention]:
    return [module for module in model.modules() if isinstance(module, Pattention)]


def _cached_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    cache, logits = None, []
    for chunk in ids.split([4, 1, 1, ids.shape[1] - 6], dim=1):
        outputs = model(chunk, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Exactness

targets = st.fixed_dictionaries({}, optional={kind: st.integers(1, 9) for kind in ("qkv", "output", "ffn")})


@l2_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=10)
@given(
    heads=st.integers(1, 3),
    layers=st.integers(1, 2),
    base=st.tuples(*[st.integers(1, 9)] * 3),
    stages=st.lists(targets.filter(bool), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_growth_with_zero_keys_changes_no_bit(dtype, normalization, heads, layers, base, stages, seed) -> None:
    torch.manual_seed(seed)
    counts = dict(zip(("qkv", "output", "ffn"), base, strict=True))
    model = tiny_model(
        hidden_size=8 * heads,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        normalization=normalization,
        segments=[{"name": "base", **counts}],
    ).to(dtype)
    ids = tiny_ids(2, 9, seed)
    with torch.no_grad():
        whole, cached = model(ids).logits, _cached_logits(model, ids)
    for stage in stages:
        counts = {kind: count + stage.get(kind, 0) for kind, count in counts.items()}
        grow(model, **{kind: counts[kind] for kind in stage})
        with torch.no_grad():
            assert torch.equal(model(ids).logits, whole)
            assert torch.equal(_cached_logits(model, ids), cached)
    assert {layer.kind: layer.num_tokens for layer in _layers(model)} == counts


def test_growth_in_training_mode_and_with_sampling_generates_the_same() -> None:
    model, ids = tiny_model(), tiny_ids(1, 5)
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "max_new_tokens": 8, "do_sample": False}
    before = model.generate(ids, **options)
    grow(model, qkv=30, output=30, ffn=60)
    assert torch.equal(model.generate(ids, **options), before)


def test_new_tokens_are_zero_keys_and_random_values_and_tau_stays() -> None:
    model = tiny_model()
    scales = [layer.scale.item() for layer in _layers(model)]
    assert grow(model, qkv=500, output=510, ffn=520) is model
    for layer, scale in zip(_layers(model), scales, strict=True):
        new = layer.segments["grown1"]
        assert new.num_tokens == {"qkv": 488, "output": 500, "ffn": 500}[layer.kind]
        assert new.key.abs().max() == 0
        assert new.value.std().item() == pytest.approx(2 / (2 * 32**0.5), rel=0.05)
        assert new.key.requires_grad
        assert new.value.requires_grad
        assert layer.scale.item() == scale


def test_random_keys_are_initialised_as_in_a_new_model_and_the_outputs_change() -> None:
    model, ids = tiny_model(), tiny_ids()
    before = model(ids).logits
    grow(model, qkv=500, ffn=500, keys="random")
    for layer in _layers(model):
        if layer.kind != "output":
            assert layer.segments["grown1"].key.std().item() == pytest.approx(0.02, rel=0.05)
            assert layer.scale.item() < 5, "tau is kept"
    assert (model(ids).logits - before).abs().max() > 0.1


def test_noise_has_the_size_asked_for_and_reaches_old_tokens_of_growing_layers_only() -> None:
    model = tiny_model(segments=[{"name": "base", "qkv": 12, "output": 400, "ffn": 400}])
    before = _state(model)
    grow(model, output=410, ffn=410, noise=0.25)
    for path, layer in model.named_modules():
        if isinstance(layer, Pattention):
            for leaf in ("key", "value"):
                old = before[f"{path}.segments.base.{leaf}"].double()
                added = layer.segments["base"].get_parameter(leaf).detach().double() - old
                if layer.kind == "qkv":
                    assert added.count_nonzero() == 0
                else:
                    size = old.square().mean().sqrt().item()
                    assert added.std().item() == pytest.approx(0.25 * size, rel=0.04)
                    assert abs(added.mean().item()) < 0.01 * size
                    assert abs(torch.corrcoef(torch.stack([added.flatten(), old.flatten()]))[0, 1].item()) < 0.05
    for name, tensor in model.state_dict().items():
        if "segments" not in name:
            assert torch.equal(tensor, before[name]), name


def test_noise_leaves_the_new_tokens_alone_and_none_changes_nothing() -> None:
    states = []
    for noise in (0.0, 0.0, 0.5):
        torch.manual_seed(5)
        model = tiny_model()
        states.append(_state(grow(model, qkv=24, output=20, ffn=40, keys="random", noise=noise)))
    plain, again, noisy = states
    for name, tensor in plain.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, noisy[name]) != ("segments.base" in name), name


def test_noise_on_every_older_segment_and_with_an_optimizer() -> None:
    model = grow(tiny_model(), ffn=40)
    optimizer = torch.optim.AdamW(model.parameters())
    before = _state(model)
    grow(model, ffn=60, noise=0.1, optimizer=optimizer)
    layer = _layers(model)[-1]
    path = next(name for name, module in model.named_modules() if module is layer)
    assert list(layer.segments) == ["base", "grown1", "grown2"]
    for segment in ("base", "grown1"):
        assert not torch.equal(layer.segments[segment].value, before[f"{path}.segments.{segment}.value"])
    # Zero keys have no size, so noise that is a share of it leaves them zero.
    assert layer.segments["grown1"].key.count_nonzero() == 0
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
def test_noise_that_cannot_be(noise: float) -> None:
    model = tiny_model()
    before = _state(model)
    with pytest.raises(UserError, match=f"noise must be 0 or a positive share .*, got {noise}"):
        grow(model, ffn=40, noise=noise)
    assert _state(model).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in _state(model).items())


@pytest.mark.parametrize("keys", ["zero", "random"])
def test_sqrt_scale_follows_the_number_of_tokens(keys) -> None:
    model, ids = tiny_model(), tiny_ids()
    before = model(ids).logits
    grow(model, qkv=24, ffn=40, keys=keys, scale="sqrt")
    assert {layer.kind: round(layer.scale.item() ** 2, 4) for layer in _layers(model)} == {
        "qkv": 24,
        "output": 10,
        "ffn": 40,
    }
    assert (model(ids).logits - before).abs().max() > 0.1


@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_doubling_with_the_published_scale_changes_outputs_by_about_half(tokens) -> None:
    """The trap of PAPER.md, section 3: zero keys, but tau from the token count, move every output by 44-50 %."""
    layer, x = Pattention(64, 64, tokens), torch.randn(200, 64)
    before = layer(x).detach()
    grow(layer, tokens=2 * tokens, scale="sqrt")
    change = ((layer(x) - before).norm(dim=-1) / before.norm(dim=-1)).mean().item()
    assert 0.40 < change < 0.54


def test_new_keys_learn_after_one_step() -> None:
    """With values of zero, too, neither would ever get a gradient."""
    model, ids = tiny_model(), tiny_ids()
    grow(model, qkv=30, output=30, ffn=60)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    keys = [layer.segments["grown1"].key for layer in _layers(model)]
    assert all(key.grad.abs().max() > 0 for key in keys), "the values are random, so the keys hear of them at once"
    optimizer.step()
    assert all(key.abs().amax(-1).min() > 0 for key in keys), "every new key moved"
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert all(layer.segments["grown1"].value.grad.abs().max() > 0 for layer in _layers(model))


# What is recorded


def test_saved_and_loaded_after_growing_twice(tmp_path) -> None:
    model, ids = tiny_model(), tiny_ids()
    grow(model, qkv=15, ffn=30)
    grow(model, output=13, ffn=31, scale="sqrt", keys="random", name="last")
    assert model.config.segments == [
        {"name": "base", "qkv": 12, "output": 10, "ffn": 20},
        {"name": "grown1", "qkv": 3, "output": 0, "ffn": 10},
        {"name": "last", "qkv": 0, "output": 3, "ffn": 1},
    ]
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.segments == model.config.segments
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(grow(loaded, ffn=50)(ids).logits, model(ids).logits)


def test_names_count_up_or_are_given() -> None:
    model = tiny_model()
    grow(model, ffn=21)
    grow(model, qkv=13)  # whose layers have no grown1, but the configuration does
    grow(model, ffn=22, name="law_texts")
    grow(model, ffn=23)
    assert [segment["name"] for segment in model.config.segments] == ["base", "grown1", "grown2", "law_texts", "grown3"]
    assert list(model.model.layers[0].ffn.segments) == ["base", "grown1", "law_texts", "grown3"]
    assert list(model.model.layers[0].attention.query.segments) == ["base", "grown2"]


def test_the_configuration_of_another_model_stays() -> None:
    model = tiny_model()
    twin = copy.deepcopy(model)
    segments = model.config.segments
    grow(model, ffn=30)
    assert len(segments) == len(twin.config.segments) == 1
    assert len(model.config.segments) == 2
    assert model.model.config.segments == model.config.segments


def test_a_model_inside_a_wrapper_grows_as_it_does_alone(tmp_path) -> None:
    model, ids = tiny_model(), tiny_ids()
    before = model(ids).logits
    grow(nn.ModuleDict({"student": model, "probe": nn.Linear(2, 2)}), ffn=600)
    assert model.config.segments[1:] == [{"name": "grown1", "qkv": 0, "output": 0, "ffn": 580}]
    new = model.model.layers[0].ffn.segments["grown1"].value
    assert new.std().item() == pytest.approx(2 / (2 * 32**0.5), rel=0.05), "the model's initialisation"
    model.save_pretrained(tmp_path)
    assert torch.equal(TokenFormerForCausalLM.from_pretrained(tmp_path)(ids).logits, before)


# Any module


class _Sandwich(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Pattention(6, 8, 5), Pattention(8, 3, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


def test_a_module_of_ones_own_grows_by_tokens() -> None:
    model, x = _Sandwich(), torch.randn(4, 6)
    before = model(x)
    grow(model, tokens=7)
    assert [layer.num_tokens for layer in _layers(model)] == [7, 7]
    assert list(model.last.segments) == ["base"], "it had 7 already"
    assert torch.equal(model(x), before)
    grow(model, tokens=50)
    assert torch.equal(model(x), before)
    assert [list(layer.segments) for layer in _layers(model)] == [["base", "grown1", "grown2"], ["base", "grown2"]]


def test_layers_between_which_the_target_lies_are_refused() -> None:
    model = _Sandwich()
    with pytest.raises(UserError, match="tokens=6 is fewer than the 7 tokens"):
        grow(model, tokens=6)
    assert [layer.num_tokens for layer in _layers(model)] == [5, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_single_layer_grows(dtype) -> None:
    layer, x = Pattention(6, 4, 5, dtype=dtype), torch.randn(3, 6, dtype=dtype)
    before = layer(x)
    grow(layer, tokens=9, name="more")
    assert layer.segments["more"].key.shape == (4, 6)
    assert layer.segments["more"].key.dtype == dtype
    assert torch.equal(layer(x), before)


def test_growing_on_the_meta_device_allocates_nothing() -> None:
    with torch.device("meta"):
        model = TokenFormerForCausalLM(tiny_model().config)
    grow(model, qkv=10**9)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.num_token_parameters() == 2 * 2 * 32 * (3 * 10**9 + 10 + 20)


# The optimizer


def _trained(groups) -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    model, ids = tiny_model(), tiny_ids()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, ids


def _one_group(model):
    return model.parameters()


def _keys_and_the_rest(model):
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if not name.endswith(".key")]},
        {"params": [p for name, p in named if name.endswith(".key")], "weight_decay": 0.0, "lr": 5e-4},
    ]


@pytest.mark.parametrize("groups", [_one_group, _keys_and_the_rest], ids=["one-group", "two-groups"])
def test_the_optimizer_goes_on_with_the_old_and_begins_with_the_new(groups) -> None:
    model, optimizer, ids = _trained(groups)
    old = list(model.parameters())
    moments = {parameter: copy.deepcopy(optimizer.state[parameter]) for parameter in old}
    grow(model, qkv=15, ffn=30, optimizer=optimizer)

    for parameter in old:
        for name, value in moments[parameter].items():
            assert torch.equal(optimizer.state[parameter][name], value)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held})
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}
    for layer in _layers(model):
        for part in ("key", "value") if "grown1" in layer.segments else ():
            places = [
                [i for i, group in enumerate(optimizer.param_groups) if any(p is tensor for p in group["params"])]
                for tensor in (getattr(segment, part) for segment in layer.segments.values())
            ]
            assert places[0] == places[1]

    new = {id(parameter) for parameter in held} - {id(parameter) for parameter in old}
    before = {id(parameter): parameter.detach().clone() for parameter in held}
    # The first step after growing leaves zero keys: their values get no gradient yet. The second moves everything.
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for parameter in held:
        assert not torch.equal(parameter, before[id(parameter)])
        assert optimizer.state[parameter]["step"].item() == (2 if id(parameter) in new else 5)


def test_the_old_parameters_step_as_if_nothing_had_grown() -> None:
    """Function, gradients and moments of the old tokens are those of the model that did not grow."""
    model, optimizer, ids = _trained(_one_group)
    grown, carried = copy.deepcopy((model, optimizer))
    grow(grown, qkv=15, output=14, ffn=30, optimizer=carried)
    for one, steps in ((model, optimizer), (grown, carried)):
        one(ids, labels=ids).loss.backward()
        steps.step()
    after = dict(grown.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(after[name], parameter, rtol=1e-5, atol=1e-7)


def test_an_optimizer_of_named_parameters_learns_the_new_names() -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.named_parameters())
    grow(model, qkv=15, optimizer=optimizer)
    (group,) = optimizer.param_groups
    named = dict(zip(group["param_names"], group["params"], strict=True))
    assert "model.layers.1.attention.query.segments.grown1.key" in named
    assert named.keys() == dict(model.named_parameters()).keys()
    assert all(named[name] is parameter for name, parameter in model.named_parameters())

    layer = Pattention(6, 4, 5)
    optimizer = torch.optim.SGD(layer.named_parameters(), lr=0.1)
    grow(layer, tokens=9, optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in layer.named_parameters()]


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({}, "nothing to grow: give the number of tokens", id="nothing-asked"),
        pytest.param({"qkv": 12, "ffn": 20}, "nothing to grow: every layer already has", id="same-counts"),
        pytest.param({"qkv": 11}, "qkv=11 is fewer than the 12 tokens", id="shrinking"),
        pytest.param({"qkv": 30, "ffn": 19}, "ffn=19 is fewer than the 20 tokens", id="one-of-two-shrinking"),
        pytest.param({"output": 0}, "output must be at least 1, got 0", id="zero"),
        pytest.param({"ffn": -5}, "ffn must be at least 1, got -5", id="negative"),
        pytest.param({"tokens": 30}, "tokens=30: the model has no layers of that kind", id="no-such-kind"),
        pytest.param({"qkv": 30, "name": "base"}, "segment 'base' exists already", id="name-taken"),
        pytest.param({"qkv": 30, "name": "a.b"}, "segment name 'a.b'", id="name-with-dot"),
        pytest.param({"qkv": 30, "name": ""}, "segment name ''", id="empty-name"),
        pytest.param({"qkv": 30, "name": "keys"}, "segment name 'keys' is reserved", id="reserved-name"),
        pytest.param({"qkv": 30, "keys": "zeros"}, "unknown keys 'zeros': use one of zero, random", id="key-rule"),
        pytest.param({"qkv": 30, "scale": "root"}, "unknown scale 'root': use one of keep, sqrt", id="scale-rule"),
    ],
)
def test_errors_name_the_fix_and_leave_the_model_unchanged(arguments, message) -> None:
    model = tiny_model()
    before = _state(model)
    with pytest.raises(UserError, match=message):
        grow(model, **arguments)
    _assert_unchanged(model, before)


def _assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [segment["name"] for segment in model.config.segments] == ["base"]


@pytest.mark.parametrize("foreign", ["all", "half"])
def test_an_optimizer_of_another_model_is_refused_and_left_alone(foreign) -> None:
    model = tiny_model()
    before = _state(model)
    # half: it holds the first layer's tokens, so the error must come before anything is appended
    source = tiny_model() if foreign == "all" else model.model.layers[0]
    optimizer = torch.optim.AdamW(source.parameters())
    held = list(optimizer.param_groups[0]["params"])
    with pytest.raises(UserError, match="the optimizer does not hold the model's parameters"):
        grow(model, qkv=30, ffn=40, optimizer=optimizer)
    _assert_unchanged(model, before)
    assert len(optimizer.param_groups[0]["params"]) == len(held)


def test_a_model_without_parameter_tokens_cannot_grow() -> None:
    with pytest.raises(UserError, match="no Pattention layers"):
        grow(nn.Linear(3, 3), tokens=5)


def test_the_name_of_an_earlier_growth_is_taken() -> None:
    model = grow(tiny_model(), ffn=30, name="first")
    with pytest.raises(UserError, match="segment 'first' exists already"):
        grow(model, qkv=30, name="first")


# Warnings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"normalization": "softmax"}, "softmax", id="softmax"),
        pytest.param({"activation": "sigmoid"}, r"sigmoid\(0\) is not 0", id="sigmoid"),
        pytest.param({"activation": "softplus", "normalization": "gelu_l2"}, r"softplus\(0\)", id="softplus"),
    ],
)
def test_warns_where_zero_keys_cannot_keep_the_function(fields, message) -> None:
    model, ids = tiny_model(**fields), tiny_ids()
    before = model(ids).logits
    with pytest.warns(UserWarning, match=f"{message}.*growing changes the outputs") as caught:
        grow(model, qkv=30, ffn=40)
    assert caught[0].filename == __file__
    assert (model(ids).logits - before).abs().max() > 1e-2, "the warning is right"


@pytest.mark.parametrize("arguments", [{"keys": "random"}, {"scale": "sqrt"}], ids=["random-keys", "sqrt-scale"])
def test_does_not_warn_where_the_change_was_asked_for(arguments) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grow(tiny_model(normalization="softmax"), qkv=30, **arguments)


def test_an_optimizer_of_only_the_newest_segment_takes_the_next_one() -> None:
    layer = Pattention(6, 5, 4)
    newest = layer.add_segment("tuned", 2)
    layer.segments["base"].requires_grad_(False)
    optimizer = torch.optim.SGD(newest.named_parameters(), lr=0.1)
    grow(layer, tokens=9, name="next", optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"] == ["key", "value", "segments.next.key", "segments.next.value"]
    assert optimizer.param_groups[0]["params"][2] is layer.segments["next"].key
