"""What is captured is what the equation says, and the model does not notice."""

import gc
import warnings
import weakref
from importlib import import_module

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import statement
import tokenformer
from tiny import SEGMENTS, tiny_ids, tiny_model
from tiny_vision import tiny_classifier, tiny_pixels
from tokenformer import Pattention, UserError, replace_linear
from tokenformer.elastic import prefix
from tokenformer.interpret import LayerRecord, Off, capture, intervene, pattention_layers
from tokenformer.tuning import TokensConfig, add_adapter, set_adapter

GROWN = [*SEGMENTS, {"name": "grown1", "qkv": 4, "output": 0, "ffn": 5}]
KINDS = ["l2_gelu", "gelu_l2", "gelu_l1", "softmax"]
FFN = "model.layers.1.ffn"


def lively(model: nn.Module) -> nn.Module:
    """Random values wherever parameters are trained, so that what starts at zero takes part."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def inputs_and_outputs(model: nn.Module, *args, **kwargs) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What torch's own hooks see of each layer."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda module, given, output, path=path: seen.setdefault(path, []).append((given[0], output))
        )
        for path, layer in pattention_layers(model).items()
    ]
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return seen


def check_by_equation(layer: Pattention, record: LayerRecord, limits: dict[str, int] | None = None) -> None:
    """Scores, weights and shares of every segment against Eq. 4 in float64."""
    pairs = {name: segment(record.input) for name, segment in layer.segments.items()}
    pairs = {name: pair for name, pair in pairs.items() if len(pair[0])}
    if limits is not None:
        assert {name: len(key) for name, (key, _) in pairs.items()} == limits
    assert list(record.segments) == list(pairs)
    x, keys = record.input.double(), [key.double() for key, _ in pairs.values()]
    weights = statement.weights(x, keys, float(layer.scale), layer.normalization)
    weights = dict(zip(pairs, weights.split([len(key) for key in keys], dim=-1), strict=True))
    tolerance = statement.TOLERANCE[record.input.dtype]
    shares = []
    for name, (key, value) in pairs.items():
        found = record.segments[name]
        assert found.num_tokens == len(key)
        assert statement.error(found.weights, weights[name]) < tolerance
        assert statement.error(found.scores, x @ key.double().T) < tolerance
        shares.append(weights[name] @ value.double())
        assert statement.error(found.output, shares[-1]) < 4 * tolerance
    assert statement.error(record.output, sum(shares)) < 4 * tolerance


def captured(model: nn.Module, *args, **kwargs) -> dict[str, LayerRecord]:
    with capture(model, scores=True, outputs=True) as seen, torch.no_grad():
        model(*args, **kwargs)
    return dict(seen)


# By the equation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalization", KINDS)
def test_weights_of_a_grown_model_are_the_equation(normalization, dtype):
    model, ids = tiny_model(segments=GROWN, normalization=normalization).to(dtype), tiny_ids()
    expected = inputs_and_outputs(model, ids)
    seen = captured(model, ids)
    assert list(seen) == list(pattention_layers(model))
    for path, layer in pattention_layers(model).items():
        record = seen[path]
        assert (record.layer, record.kind) == (path, layer.kind)
        assert torch.equal(record.input, expected[path][0][0])
        assert torch.equal(record.output, expected[path][0][1])
        assert not record.input.requires_grad
        check_by_equation(layer, record)


def test_an_adapter_a_gain_and_a_limit_are_in_what_is_seen():
    model = lively(add_adapter(tiny_model(segments=GROWN), "notes", ffn=3)).double()
    set_adapter(model, {"notes": 0.5})
    layer = model.get_submodule(FFN)
    layer.segments["base"].limit = 7
    check_by_equation(layer, captured(model, tiny_ids())[FFN], {"base": 7, "grown1": 5, "notes": 3})
    set_adapter(model, None)
    check_by_equation(layer, captured(model, tiny_ids())[FFN], {"base": 7, "grown1": 5})


def test_a_prefix_is_seen_as_a_prefix():
    model = tiny_model(segments=GROWN).double()
    with prefix(model, ffn=22):
        check_by_equation(model.get_submodule(FFN), captured(model, tiny_ids())[FFN], {"base": 20, "grown1": 2})


@pytest.mark.parametrize("normalization", KINDS)
def test_a_hidden_token_has_no_weight_and_is_in_no_norm(normalization):
    layer = Pattention(6, 5, 8, normalization=normalization, dtype=torch.float64)
    layer.add_segment("more", 3)
    lively(layer)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    mask = torch.rand(2, 1, 8) < 0.6
    mask[0, 0, :2] = torch.tensor([True, False])
    with capture(layer, scores=True) as seen:
        layer(x, visible={"base": mask, "elsewhere": torch.zeros(1, dtype=torch.bool)})
    record = seen[""]
    assert record.kind == "tokens"
    base, more = layer.segments["base"], layer.segments["more"]
    assert torch.equal(record.segments["base"].scores, x @ base.key.T)  # what a hidden token would have scored
    for row in range(2):
        kept = mask[row, 0]
        expected = statement.weights(x[row], [base.key[kept], more.key], float(layer.scale), normalization)
        found = record.segments["base"].weights[row]
        assert statement.error(torch.cat((found[:, kept], record.segments["more"].weights[row]), -1), expected) < 1e-10
        assert (found[:, ~kept] == 0).all()


def test_a_hidden_token_is_silent_where_the_activation_of_zero_is_not():
    layer, mask = lively(Pattention(6, 5, 8, activation="sigmoid")), torch.arange(8) != 3
    with capture(layer, outputs=True) as seen:
        layer(torch.randn(4, 6), visible={"base": mask})
    record = seen[""].segments["base"]
    assert (record.weights[:, 3] == 0).all()
    assert torch.equal(record.output, seen[""].output)


def test_a_lora_on_a_segment_is_in_what_is_seen():
    model = tiny_model()
    plain = captured(model, tiny_ids())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=2, target_parameters=["segments.base.key", "segments.base.value"]))
    lively(adapted)
    seen = captured(adapted, tiny_ids())
    path = f"base_model.model.{FFN}"
    layer = adapted.get_submodule(path)
    check_by_equation(layer, seen[path])
    assert not torch.allclose(seen[path].segments["base"].weights, plain[FFN].segments["base"].weights, atol=0.01)
    merged = adapted.merge_and_unload()
    expected = captured(merged, tiny_ids())[FFN]
    assert statement.error(seen[path].segments["base"].weights, expected.segments["base"].weights.double()) < 1e-4
    with capture(merged, layers=["1.ffn"]), torch.no_grad():
        merged(tiny_ids())


def test_tokens_that_peft_adds_are_seen():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = lively(get_peft_model(tiny_model(), TokensConfig(ffn=4)))
        with capture(adapted, layers=["1.ffn"], outputs=True) as seen, torch.no_grad():
            adapted(tiny_ids())
        (record,) = seen.values()
        wrapper = adapted.get_submodule(record.layer.removesuffix(".base_layer"))
        base, new = wrapper.base_layer.segments["base"], wrapper.tokens_adapter["default"]
        expected = statement.weights(
            record.input.double(), [base.key.double(), new.key.double()], float(wrapper.base_layer.scale), "l2_gelu"
        )
        found = torch.cat([record.segments[name].weights for name in ("base", "default")], -1)
        assert statement.error(found, expected) < 1e-5
        with intervene(adapted, [Off("1.ffn/default")]), torch.no_grad():
            without = adapted(tiny_ids()).logits
        wrapper.tokens_adapter["default"].limit = 0
        with torch.no_grad():
            assert statement.error(without, adapted(tiny_ids()).logits.double()) < 1e-5


def test_a_model_of_another_architecture():
    config = GPTNeoXConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = GPTNeoXForCausalLM(config).eval()
    paths = replace_linear(model, num_tokens=12)
    lively(model)
    expected = inputs_and_outputs(model, tiny_ids())
    seen = captured(model, tiny_ids())
    assert set(seen) == set(paths)
    for path in paths:
        layer = model.get_submodule(path)
        check_by_equation(layer, seen[path])
        assert seen[path].kind == "tokens"
        with_bias = seen[path].output + layer.bias
        assert statement.error(with_bias, expected[path][0][1].double()) < 1e-6


def test_an_image_classifier():
    model = tiny_classifier(segments=GROWN).double()
    seen = captured(model, tiny_pixels().double())
    for path, layer in pattention_layers(model).items():
        assert seen[path].input.shape[:2] == (2, model.config.sequence_length)
        check_by_equation(layer, seen[path])


def test_the_calls_of_generation_are_those_of_the_whole_text():
    model, ids = tiny_model(segments=GROWN).double(), tiny_ids(rows=1, length=5)
    with capture(model, kinds=["ffn"]) as seen:
        text = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with capture(model, kinds=["ffn"]) as whole, torch.no_grad():
        model(text[:, :-1])
    assert list(seen) == ["model.layers.0.ffn", FFN]
    calls = seen.calls[FFN]
    assert [record.input.shape[1] for record in calls] == [5, 1, 1, 1]
    assert seen[FFN] is calls[-1]
    for name in ("base", "grown1"):
        found = torch.cat([record.segments[name].weights for record in calls], dim=1)
        assert statement.error(found, whole[FFN].segments[name].weights) < 1e-10
    seen.clear()
    assert not seen


# The model does not notice


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_are_bitwise_the_same(dtype, attention):
    model, ids = tiny_model(segments=GROWN, attention=attention).to(dtype), tiny_ids()

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        return output.logits, {name: p.grad.clone() for name, p in model.named_parameters()}

    logits, gradients = run()
    with capture(model, scores=True, outputs=True) as seen:
        captured_logits, captured_gradients = run()
    assert torch.equal(captured_logits, logits)
    assert all(torch.equal(captured_gradients[name], gradient) for name, gradient in gradients.items())
    assert len(seen) == 10
    assert {r.weights.dtype for record in seen.values() for r in record.segments.values()} == {dtype}
    after, _ = run()
    assert torch.equal(after, logits)


def test_under_autocast_records_have_the_dtype_of_the_products():
    model, ids = tiny_model(), tiny_ids()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = model(ids).logits
        with capture(model, outputs=True) as seen:
            assert torch.equal(model(ids).logits, plain)
    record = seen[FFN].segments["base"]
    assert record.weights.dtype == record.output.dtype == torch.bfloat16
    assert torch.equal(record.output, seen[FFN].output)


def untouched(model: nn.Module) -> bool:
    return all("attend" not in vars(layer) for layer in pattention_layers(model).values())


def test_layers_are_themselves_again_after_an_error():
    model = tiny_model()
    with capture(model):
        assert not untouched(model)

    def fail():
        with capture(model), capture(model, layers=["0.ffn"]), intervene(model, [Off("0.ffn/base/1")]):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert untouched(model)

    def consume(record):
        raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"), capture(model, consume=consume):
        model(tiny_ids())
    assert untouched(model)


def test_a_refused_capture_touches_nothing():
    model = tiny_model()
    with pytest.raises(UserError), capture(model, layers=["0.ffn", "0.fnn"]):
        pass
    assert untouched(model)


def test_a_model_is_freed_after_capturing():
    model = tiny_model()
    with capture(model), torch.no_grad():
        model(tiny_ids())
    gone = weakref.ref(model.get_submodule(FFN))
    del model
    gc.collect()
    assert gone() is None


def test_a_compiled_layer_is_seen_and_changed():
    torch.compiler.reset()
    layer, x = lively(Pattention(6, 5, 8, dtype=torch.float64)), torch.randn(3, 6, dtype=torch.float64)
    compiled, changes = torch.compile(layer, backend="eager"), [Off("/base/3")]
    plain = compiled(x)
    with intervene(layer, changes):
        expected, changed = layer(x), compiled(x)
    with capture(layer) as seen:
        again = compiled(x)
    assert statement.error(changed, expected) < 1e-10
    assert statement.error(again, plain) < 1e-10
    assert statement.error(changed, plain) > 1e-3
    with capture(layer) as uncompiled:
        layer(x)
    assert torch.equal(seen[""].segments["base"].weights, uncompiled[""].segments["base"].weights)


def test_two_captures_at_once_are_two():
    model = tiny_model()
    with capture(model, kinds=["ffn"]) as outer, torch.no_grad():
        with capture(model, top_k=2) as inner:
            model(tiny_ids())
        model(tiny_ids())
    assert len(outer.calls[FFN]) == 2
    assert len(inner.calls[FFN]) == 1
    assert len(inner) == 10
    assert untouched(model)


def test_what_is_changed_is_seen_whichever_began_first():
    model = tiny_model().double()
    changes = [Off("1.ffn/base/3")]
    with capture(model, layers=["1.ffn"]) as before, intervene(model, changes), torch.no_grad():
        model(tiny_ids())
    with intervene(model, changes), capture(model, layers=["1.ffn"]) as after, torch.no_grad():
        model(tiny_ids())
    for seen in (before, after):
        weights = seen[FFN].segments["base"].weights
        assert (weights[..., 3] == 0).all()
        assert (weights[..., 4] != 0).all()
    assert torch.equal(before[FFN].segments["base"].weights, after[FFN].segments["base"].weights)


# Choosing


def test_top_k_keeps_the_strongest_and_nothing_else():
    model, ids = tiny_model(segments=GROWN), tiny_ids()
    whole = captured(model, ids)[FFN].segments["base"]
    with capture(model, kinds=["ffn"], scores=True, top_k=3) as seen, torch.no_grad():
        model(ids)
    found = seen[FFN].segments["base"]
    order = whole.weights.abs().argsort(dim=-1, descending=True)[..., :3]
    assert torch.equal(found.indices, order)
    assert torch.equal(found.weights, whole.weights.take_along_dim(order, -1))
    assert torch.equal(found.scores, whole.scores.take_along_dim(order, -1))
    assert found.num_tokens == 20
    for tensor in (found.indices, found.weights, found.scores):
        assert tensor.untyped_storage().nbytes() == 2 * 9 * 3 * tensor.itemsize  # no view of all tokens


def test_top_k_of_more_tokens_than_there_are_gives_all():
    model = tiny_model(segments=GROWN)
    with capture(model, layers=["1.ffn"], top_k=12) as seen, torch.no_grad():
        model(tiny_ids())
    assert {name: record.weights.shape[-1] for name, record in seen[FFN].segments.items()} == {"base": 12, "grown1": 5}


def test_what_was_not_asked_for_is_not_kept():
    model = tiny_model()
    with capture(model, weights=False, outputs=True) as seen, torch.no_grad():
        model(tiny_ids())
    record = seen[FFN].segments["base"]
    assert record.weights is record.scores is record.indices is None
    assert torch.equal(record.output, seen[FFN].output)


def test_consumed_records_are_not_kept():
    model, order, alive = tiny_model(), [], []

    def consume(record):
        order.append(record.layer)
        alive.append(weakref.ref(record.segments["base"].weights))

    with capture(model, consume=consume) as seen, torch.no_grad():
        model(tiny_ids())
    assert order == list(pattention_layers(model))
    assert not seen
    assert all(reference() is None for reference in alive)


@pytest.mark.parametrize(
    ("options", "layers", "segments"),
    [
        ({"layers": ["0.ffn"]}, ["model.layers.0.ffn"], ["base", "grown1"]),
        ({"kinds": ["output"]}, ["model.layers.0.attention.output", "model.layers.1.attention.output"], ["base"]),
        ({"kinds": ["ffn", "output"], "segments": ["grown1"]}, ["model.layers.0.ffn", FFN], ["grown1"]),
        ({"layers": ["0.ffn", "1.ffn"], "kinds": ["ffn"]}, ["model.layers.0.ffn", FFN], ["base", "grown1"]),
    ],
)
def test_layers_kinds_and_segments_are_chosen(options, layers, segments):
    model = tiny_model(segments=GROWN)
    whole = captured(model, tiny_ids())
    with capture(model, **options) as seen, torch.no_grad():
        model(tiny_ids())
    assert list(seen) == layers
    for path in layers:
        assert list(seen[path].segments) == segments
        for name in segments:  # under the norm of all segments
            assert torch.equal(seen[path].segments[name].weights, whole[path].segments[name].weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["7.ffn"]}, r"unknown layer '7\.ffn': did you mean model\.layers\."),
        ({"kinds": ["mlp"]}, "unknown kind 'mlp': the layers of this model are ffn, output, qkv"),
        ({"segments": ["grown2"]}, "unknown segment 'grown2': the chosen layers have base"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"kinds": "ffn"}, r"kinds must be a list of names: write kinds=\['ffn'\]"),
    ],
)
def test_what_cannot_be_chosen_is_named(options, message):
    with pytest.raises(UserError, match=message) as caught, capture(tiny_model(), **options):
        pass
    assert "\n" not in str(caught.value)


def test_a_model_without_parameter_tokens():
    with pytest.raises(UserError, match="Linear has no Pattention layer"), capture(nn.Linear(2, 2)):
        pass


def test_it_is_a_name_of_the_package_whatever_was_imported():
    import_module("tokenformer.interpret.capture")  # binds the module to the name, were it not bound before
    assert tokenformer.interpret.capture is capture
