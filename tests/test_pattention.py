"""The layer: names, shapes, the scale as stored state, segments, and its life inside torch (dtypes, meta, export)."""

import copy
import pickle

import pytest
import torch
from torch import nn

import statement
from tokenformer import ParameterTokens, Pattention, UserError

HIDES_NOTHING = torch.ones(1, dtype=torch.bool)


def _layer(*segments: int, channels=6, out=4, **options) -> Pattention:
    """A layer with random keys and values of unit size, segments base, s1, s2, ..."""
    layer = Pattention(channels, out, segments[0], **options)
    for i, count in enumerate(segments[1:], start=1):
        layer.add_segment(f"s{i}", count)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def _statement(layer: Pattention, x: torch.Tensor, normalization="l2_gelu") -> torch.Tensor:
    segments = layer.segments.values()
    keys, values = [s.key.double() for s in segments], [s.value.double() for s in segments]
    return statement.pattention(x.double(), keys, values, layer.scale.item(), normalization)


# Names, shapes, values


def test_public_names_and_shapes() -> None:
    layer = Pattention(6, 4, 10)
    added = layer.add_segment("extra", 3)
    assert list(layer.segments) == ["base", "extra"]
    assert layer.segments["extra"] is added
    assert layer.segments["base"].key.shape == (10, 6)
    assert layer.segments["base"].value.shape == (10, 4)
    assert layer.segments["extra"].key.shape == (3, 6)
    assert layer.segments["base"].num_tokens == 10
    assert layer.num_tokens == 13
    assert layer.kind is None
    assert [name for name, _ in layer.named_parameters()] == [
        "segments.base.key",
        "segments.base.value",
        "segments.extra.key",
        "segments.extra.value",
    ]
    assert [name for name, _ in layer.named_buffers()] == ["scale"]
    assert "num_tokens=13" in repr(layer)
    assert "num_tokens=3" in repr(layer)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_takes_and_gives_the_shapes_of_a_linear_layer(leading) -> None:
    x = torch.randn(*leading, 6)
    assert Pattention(6, 4, 10)(x).shape == nn.Linear(6, 4, bias=False)(x).shape


@pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "gelu_l1", "softmax"])
@pytest.mark.parametrize("segments", [(9,), (5, 3), (4, 2, 1)], ids=str)
def test_computes_the_equation_over_all_segments(segments, normalization) -> None:
    layer, x = _layer(*segments, normalization=normalization), torch.randn(3, 6)
    assert statement.error(layer(x), _statement(layer, x, normalization)) < 1e-5


def test_a_segment_called_with_an_input_returns_its_parameters() -> None:
    segment = ParameterTokens(5, 3, 2)
    key, value = segment(torch.randn(1, 3))
    assert key is segment.key
    assert value is segment.value


@pytest.mark.parametrize("limits", [(5, 3), (2, 3), (5, 0), (0, 3), (1, 1)], ids=str)
def test_a_limit_leaves_the_first_tokens(limits) -> None:
    layer, x = _layer(5, 3), torch.randn(4, 6)
    segments = list(layer.segments.values())
    keys = [segment.key[:limit].double() for segment, limit in zip(segments, limits, strict=True)]
    values = [segment.value[:limit].double() for segment, limit in zip(segments, limits, strict=True)]
    for segment, limit in zip(segments, limits, strict=True):
        segment.limit = limit
    expected = statement.pattention(x.double(), keys, values, layer.scale.item())
    assert statement.error(layer(x), expected) < 1e-5
    visible = {name: torch.ones(4, segment.num_tokens, dtype=torch.bool) for name, segment in layer.segments.items()}
    assert torch.equal(layer(x, visible), layer(x))


def test_a_segment_that_takes_no_part_changes_no_bit() -> None:
    layer, x = _layer(5), torch.randn(4, 6)
    before = layer(x)
    extra = layer.add_segment("extra", 3)
    assert not torch.equal(layer(x), before)
    extra.limit = 0
    assert torch.equal(layer(x), before)
    layer.segments["base"].limit = 0
    with pytest.raises(UserError, match="each of base, extra has the limit 0"):
        layer(x)


def test_a_gain_is_a_factor_of_the_values() -> None:
    layer, x = _layer(5, 3), torch.randn(4, 6)
    base, extra = layer.segments.values()
    extra.gain = 0.25
    keys, values = [base.key.double(), extra.key.double()], [base.value.double(), extra.value.double() / 4]
    assert statement.error(layer(x), statement.pattention(x.double(), keys, values, layer.scale.item())) < 1e-5


@pytest.mark.parametrize("change", [{"limit": 2}, {"limit": 0}, {"gain": 0.5}], ids=str)
def test_what_takes_part_in_part_is_not_merged(change) -> None:
    layer = _layer(5, 3)
    for name, value in change.items():
        setattr(layer.segments["base"], name, value)
    with pytest.raises(UserError, match="takes part in part"):
        layer.merge_segments()
    assert list(layer.segments) == ["base", *list(layer.segments)[1:]]


def test_initialisation_gives_outputs_of_the_order_of_one() -> None:
    layer = Pattention(64, 64, 512)
    assert layer.segments["base"].key.std().item() == pytest.approx(0.02, rel=0.02)
    assert layer.segments["base"].value.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert 0.3 < layer(torch.randn(100, 64)).std().item() < 1.5


def test_activation_and_epsilon_reach_the_operator() -> None:
    x = torch.randn(3, 6)
    layer = _layer(5, activation=torch.tanh)
    base = layer.segments["base"]
    exact = [tensor.double() for tensor in (x, base.key, base.value)]
    expected = statement.pattention(exact[0], [exact[1]], [exact[2]], 5**0.5, function=torch.tanh)
    assert statement.error(layer(x), expected) < 1e-5
    # With an epsilon far above the sum of squares, the layer is linear in the score: gelu(z) is z / 2 near 0.
    layer = _layer(5, eps=1e12)
    base = layer.segments["base"]
    expected = 5**0.5 * 1e-6 / 2 * (x @ base.key.T) @ base.value
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-9)


# The scale is stored state


@pytest.mark.parametrize(("given", "expected"), [(None, 3.0), (1.25, 1.25)], ids=["default", "given"])
def test_scale_stays_when_segments_come_and_go(given, expected) -> None:
    layer = Pattention(6, 4, 9, scale=given)
    scales = [layer.scale.item()]
    layer.add_segment("extra", 7)
    scales.append(layer.scale.item())
    layer.remove_segment("base")
    scales.append(layer.scale.item())
    layer.add_segment("more", 2)
    layer.merge_segments()
    scales.append(layer.scale.item())
    assert scales == [expected] * 4


def test_scale_travels_in_the_state_dict() -> None:
    source, target = Pattention(6, 4, 9, scale=7.5), Pattention(6, 4, 9)
    assert "scale" in source.state_dict()
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 6)
    assert target.scale.item() == 7.5
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize(
    ("convert", "parameters", "scale"),
    [
        pytest.param(lambda m: m.to(torch.bfloat16), torch.bfloat16, torch.float32, id="to-bfloat16"),
        pytest.param(lambda m: m.half(), torch.float16, torch.float32, id="half"),
        pytest.param(lambda m: m.double(), torch.float64, torch.float64, id="double"),
        pytest.param(lambda m: m.double().float(), torch.float32, torch.float32, id="double-float"),
        pytest.param(lambda m: nn.Sequential(m).bfloat16()[0], torch.bfloat16, torch.float32, id="inside-a-model"),
    ],
)
def test_conversion_never_rounds_the_scale(convert, parameters, scale) -> None:
    layer = convert(Pattention(6, 4, 11))
    assert {parameter.dtype for parameter in layer.parameters()} == {parameters}
    assert layer.scale.dtype == scale
    assert layer.scale.item() == pytest.approx(11**0.5, rel=1e-7)
    x = torch.randn(3, 6, dtype=parameters)
    assert layer(x).dtype == parameters
    assert statement.error(layer(x), _statement(layer, x)) < statement.TOLERANCE[parameters]


def test_made_in_bfloat16() -> None:
    layer = Pattention(6, 4, 11, dtype=torch.bfloat16)
    added = layer.add_segment("extra", 2)
    assert added.key.dtype == added.value.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_made_on_the_meta_device_and_filled_later(dtype) -> None:
    layer = Pattention(6, 4, 300, device="meta", dtype=dtype, scale=2.5)
    layer.add_segment("extra", 200)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer(torch.empty(3, 6, device="meta", dtype=dtype)).shape == (3, 4)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.scale.item() == 2.5
    for segment in layer.segments.values():
        assert segment.key.float().std().item() == pytest.approx(0.02, rel=0.1)
        assert segment.value.float().std().item() == pytest.approx(segment.num_tokens**-0.5, rel=0.1)


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"num_tokens": 0}, "num_tokens must be at least 1, got 0", id="no-tokens"),
        pytest.param({"num_tokens": -3}, "num_tokens must be at least 1, got -3", id="negative-tokens"),
        pytest.param({"in_features": 0}, "in_features must be at least 1", id="no-channels-in"),
        pytest.param({"out_features": 0}, "out_features must be at least 1", id="no-channels-out"),
        pytest.param({"scale": 0.0}, "scale must be positive", id="zero-scale"),
        pytest.param({"scale": -1.0}, "scale must be positive", id="negative-scale"),
        pytest.param({"scale": float("nan")}, "scale must be positive", id="nan-scale"),
        pytest.param({"scale": float("inf")}, "scale must be positive", id="infinite-scale"),
        pytest.param({"normalization": "l1"}, "unknown normalization 'l1'", id="normalization"),
        pytest.param({"activation": "swoosh"}, "unknown activation 'swoosh'", id="activation"),
    ],
)
def test_bad_arguments_are_user_errors(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        Pattention(**{"in_features": 6, "out_features": 4, "num_tokens": 5, **arguments})


@pytest.mark.parametrize("name", ["base", "", "a.b", "1st", "with space", "keys", "values", "training", 3], ids=repr)
def test_bad_segment_names_are_user_errors(name) -> None:
    layer = Pattention(6, 4, 5)
    with pytest.raises(UserError, match="segment"):
        layer.add_segment(name, 2)
    assert list(layer.segments) == ["base"]


def test_bad_segment_operations_are_user_errors_and_change_nothing() -> None:
    layer = _layer(5, 3)
    with pytest.raises(UserError, match="num_tokens must be at least 1"):
        layer.add_segment("new", 0)
    with pytest.raises(UserError, match="no segment 'other': this layer has base, s1"):
        layer.remove_segment("other")
    with pytest.raises(UserError, match="segment name"):
        layer.merge_segments("a.b")
    assert list(layer.segments) == ["base", "s1"]
    layer.remove_segment("s1")
    with pytest.raises(UserError, match="'base' is the only one"):
        layer.remove_segment("base")
    assert list(layer.segments) == ["base"]


# Segments


def test_remove_segment_returns_it_and_its_tokens_are_gone() -> None:
    layer, x = _layer(5, 3, 2), torch.randn(2, 6)
    tokens = layer.segments["s1"]
    assert layer.remove_segment("s1") is tokens
    assert list(layer.segments) == ["base", "s2"]
    assert statement.error(layer(x), _statement(layer, x)) < 1e-5


@pytest.mark.parametrize("name", ["base", "s1", "all_of_them"])
def test_merge_segments_keeps_function_and_order(name) -> None:
    layer, x = _layer(5, 3, 2), torch.randn(7, 6)
    before = layer(x)
    keys = torch.cat([segment.key for segment in layer.segments.values()])
    layer.merge_segments(name)
    assert list(layer.segments) == [name]
    assert torch.equal(layer.segments[name].key, keys)
    assert layer.segments[name].key.requires_grad
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)


def test_merging_a_single_segment_under_its_name_does_nothing() -> None:
    layer = _layer(5)
    base = layer.segments["base"]
    layer.merge_segments()
    assert layer.segments["base"] is base


@pytest.mark.parametrize("frozen", ["base", "s1"])
def test_a_frozen_segment_stays_while_the_other_trains(frozen) -> None:
    layer = _layer(5, 3)
    layer.segments[frozen].requires_grad_(False)
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    for name, tensor in layer.state_dict().items():
        unchanged = name == "scale" or name.startswith(f"segments.{frozen}.")
        assert torch.equal(tensor, before[name]) == unchanged, name


def test_visible_by_segment_name() -> None:
    layer, x = _layer(5, 3), torch.randn(2, 6)
    everything = layer(x)
    without = layer(x, visible={"s1": torch.zeros(3, dtype=torch.bool)})
    first_only = layer(x, visible={"s1": torch.tensor([[True], [False]])})
    shown = layer(x, visible={"base": HIDES_NOTHING, "s1": HIDES_NOTHING})
    layer.remove_segment("s1")
    torch.testing.assert_close(without, layer(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first_only[0], everything[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first_only[1], layer(x)[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shown, everything, rtol=1e-6, atol=1e-6)


# Copies and exports


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(duplicate) -> None:
    layer, x = _layer(5, 3, scale=1.5), torch.randn(2, 6)
    twin = duplicate(layer)
    expected = layer(x)
    assert torch.equal(twin(x), expected)
    assert twin.scale.item() == 1.5
    with torch.no_grad():
        twin.segments["base"].value.zero_()
    twin.add_segment("mine", 1)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("normalization", ["l2_gelu", "softmax"])
def test_exports_with_a_dynamic_batch(normalization) -> None:
    layer = _layer(5, 3, normalization=normalization)
    program = torch.export.export(layer, (torch.randn(2, 6),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    x = torch.randn(7, 6)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_data_parallel_style_functional_call_reaches_every_tensor() -> None:
    """No tensor is captured outside the module's own parameters and buffers."""
    layer, x = _layer(5, 3), torch.randn(2, 6)
    other = _layer(5, 3, scale=9.0)
    assert torch.equal(torch.func.functional_call(layer, other.state_dict(), x), other(x))


@pytest.mark.parametrize("frozen", [("base",), ("base", "more")], ids=["one", "all"])
def test_merging_frozen_segments_gives_a_frozen_one_only_if_all_are(frozen) -> None:
    layer = Pattention(6, 5, 4)
    layer.add_segment("more", 3)
    for name in frozen:
        layer.segments[name].requires_grad_(False)
    layer.merge_segments()
    assert all(p.requires_grad == (len(frozen) == 1) for p in layer.parameters())
