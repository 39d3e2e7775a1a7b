"""Tokens switched off, scaled and exchanged: against models whose weights were edited by hand."""

import copy

import pytest
import torch
from torch import nn

import statement
from saved_model import save_model, train_tokenizer
from tiny import SEGMENTS, tiny_ids, tiny_model
from tiny_vision import tiny_classifier, tiny_pixels
from tokenformer import Pattention, UserError
from tokenformer.interpret import (
    Off,
    Scale,
    Swap,
    TokenAddress,
    change_effect,
    intervene,
    measured_ablation,
    parse_change,
    pattention_layers,
    perplexity_change,
)
from tokenformer.interpret.text import piece
from tokenformer.tuning import add_adapter, disable_adapters

GROWN = [*SEGMENTS, {"name": "grown1", "qkv": 4, "output": 0, "ffn": 5}]
KINDS = ["l2_gelu", "gelu_l2", "gelu_l1", "softmax"]
FFN = "model.layers.1.ffn"
IDS = tiny_ids()


def grown_model(**fields) -> nn.Module:
    return tiny_model(segments=GROWN, **fields).double()


def without(model: nn.Module, layer: str, segment: str, indices: list[int]) -> nn.Module:
    """A copy of the model built without some tokens; the scale stays."""
    smaller = copy.deepcopy(model)
    tokens = smaller.get_submodule(layer).segments[segment]
    kept = [i for i in range(tokens.num_tokens) if i not in indices]
    tokens.key = nn.Parameter(tokens.key.detach()[kept])
    tokens.value = nn.Parameter(tokens.value.detach()[kept])
    return smaller


@torch.no_grad()
def logits(model: nn.Module, changes=()) -> torch.Tensor:
    with intervene(model, changes):
        return model(IDS).logits


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return statement.error(one, other) > 1e-4


# Off


@pytest.mark.parametrize("normalization", KINDS)
def test_a_token_that_is_off_was_never_there(normalization):
    model = grown_model(normalization=normalization)
    found = logits(model, [Off("1.ffn/base/3"), Off(TokenAddress("model.layers.0.attention.key", "grown1", 2))])
    expected = without(model, FFN, "base", [3])
    expected = without(expected, "model.layers.0.attention.key", "grown1", [2])
    assert statement.error(found, logits(expected)) < 1e-10
    assert differ(found, logits(model))


@pytest.mark.parametrize("normalization", KINDS)
def test_a_segment_that_is_off_was_never_there(normalization):
    model = grown_model(normalization=normalization)
    expected = copy.deepcopy(model)
    expected.get_submodule(FFN).remove_segment("grown1")
    found = logits(model, [Off("1.ffn/grown1")])
    assert statement.error(found, logits(expected)) < 1e-10
    assert differ(found, logits(model))


@pytest.mark.parametrize("normalization", KINDS)
def test_a_layer_without_any_token_says_nothing(normalization):
    model = grown_model(normalization=normalization)
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for tokens in silent.get_submodule(FFN).segments.values():
            tokens.value.zero_()
    assert statement.error(logits(model, [Off("1.ffn/base"), Off("1.ffn/grown1")]), logits(silent)) < 1e-10


def test_off_and_hidden_by_the_caller_are_both_hidden():
    layer = Pattention(6, 5, 8, dtype=torch.float64)
    nn.init.normal_(layer.segments["base"].key)
    x, mask = torch.randn(4, 6, dtype=torch.float64), torch.ones(8, dtype=torch.bool)
    mask[5] = False
    both = mask.clone()
    both[2] = False
    expected = layer(x, visible={"base": both})
    with intervene(layer, [Off("/base/2")]):
        assert torch.equal(layer(x, visible={"base": mask}), expected)


def test_tokens_that_take_no_part_are_not_there_to_change():
    model = add_adapter(grown_model(), "notes", ffn=3)
    model.get_submodule(FFN).segments["base"].limit = 6
    with disable_adapters(model):
        plain = logits(model)
        assert torch.equal(logits(model, [Off("1.ffn/base/6"), Scale("1.ffn/base/7", 9.0)]), plain)
        assert torch.equal(logits(model, [Off("1.ffn/notes"), Scale("1.ffn/notes/0", 9.0)]), plain)
        assert differ(logits(model, [Off("1.ffn/base/5")]), plain)
        with pytest.raises(UserError, match=r"'swap .*' is not possible: one of the tokens takes no part"):
            logits(model, [Swap("1.ffn/base/0", "1.ffn/base/6")])


# Scale and swap, by weights edited by hand


def edited(model: nn.Module, edit) -> torch.Tensor:
    changed = copy.deepcopy(model)
    segments = changed.get_submodule(FFN).segments
    with torch.no_grad():
        edit(segments["base"], segments["grown1"])
    return logits(changed)


def test_a_token_is_scaled_by_its_value():
    def edit(base, grown):
        base.value[4] *= -2.5

    model = grown_model()
    assert statement.error(logits(model, [Scale("1.ffn/base/4", -2.5)]), edited(model, edit)) < 1e-10


def test_a_segment_is_scaled_by_its_values():
    def edit(base, grown):
        grown.value *= 0.25

    model = grown_model()
    assert torch.equal(logits(model, [Scale("1.ffn/grown1", 0.25)]), edited(model, edit))


def test_a_factor_of_zero_keeps_the_norm():
    model = grown_model()
    assert differ(logits(model, [Scale("1.ffn/base/4", 0)]), logits(model, [Off("1.ffn/base/4")]))


@pytest.mark.parametrize("second", ["1.ffn/base/11", "1.ffn/grown1/0"], ids=["same segment", "two segments"])
def test_swapped_tokens_exchange_their_values(second):
    def edit(base, grown):
        other, index = (grown, 0) if "grown1" in second else (base, 11)
        kept = base.value[19].clone()
        base.value[19] = other.value[index]
        other.value[index] = kept

    model = grown_model()
    assert torch.equal(logits(model, [Swap("1.ffn/base/19", second)]), edited(model, edit))


def test_changes_hold_one_after_the_other_in_one_context_or_nested():
    def edit(base, grown):
        base.value[0] *= 3
        base.value[[0, 1]] = base.value[[1, 0]]
        base.value[1] *= 2

    model = grown_model()
    changes = [Scale("1.ffn/base/0", 3), Swap("1.ffn/base/0", "1.ffn/base/1"), Scale("1.ffn/base/1", 2)]
    expected = edited(model, edit)
    assert statement.error(logits(model, changes), expected) < 1e-10
    with intervene(model, changes[:1]), intervene(model, changes[1:2]):
        assert statement.error(logits(model, changes[2:]), expected) < 1e-10


def test_contexts_that_end_in_any_order_leave_the_others():
    model = grown_model()
    plain, off = logits(model), logits(model, [Off("1.ffn/base/3")])
    first, second = intervene(model, [Off("1.ffn/base/4")]), intervene(model, [Off("1.ffn/base/3")])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits(model), off)
    second.__exit__(None, None, None)
    assert torch.equal(logits(model), plain)


# The model stays as it is


def test_nothing_is_written_whatever_happens():
    model = grown_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits(model)
    changes = [Off("1.ffn/base/3"), Scale("0.ffn/base", 2.0), Swap("1.ffn/base/0", "1.ffn/grown1/1")]

    def fail():
        with intervene(model, changes):
            assert set(model.state_dict()) == set(before)
            assert differ(model(IDS).logits, plain)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(model), plain)
    assert all("attend" not in vars(layer) for layer in pattention_layers(model).values())


def test_gradients_are_those_of_the_model_without_the_token():
    model = grown_model()
    smaller = without(model, FFN, "base", [3])
    with intervene(model, [Off("1.ffn/base/3"), Scale("1.ffn/grown1/1", 2.0)]):
        model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        smaller.get_submodule(FFN).segments["grown1"].value[1] *= 2
    smaller(IDS, labels=IDS).loss.backward()
    kept = [i for i in range(20) if i != 3]
    tokens, expected = (m.get_submodule(FFN).segments for m in (model, smaller))
    for name in ("key", "value"):
        gradient = getattr(tokens["base"], name).grad
        assert statement.error(gradient[kept], getattr(expected["base"], name).grad) < 1e-10
        assert (gradient[3] == 0).all()
    doubled = expected["grown1"].value.grad.clone()
    doubled[1] *= 2  # the chain rule through the factor
    assert statement.error(tokens["grown1"].value.grad, doubled) < 1e-10


def test_an_image_classifier_can_be_changed():
    model = tiny_classifier().double()
    pixels = tiny_pixels().double()
    with intervene(model, [Off("0.ffn/base/2")]), torch.no_grad():
        found = model(pixels).logits
    with torch.no_grad():
        expected = without(model, "model.layers.0.ffn", "base", [2])(pixels).logits
    assert statement.error(found, expected) < 1e-10


# Words


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("off 1.ffn/base/3", Off(TokenAddress(FFN, "base", 3))),
        ("off  1.ffn/grown1 ", Off(f"{FFN}/grown1")),
        ("scale 1.ffn/base/3 -0.5", Scale(TokenAddress(FFN, "base", 3), -0.5)),
        (
            "swap 1.ffn/base/3 1.ffn/grown1/0",
            Swap(TokenAddress(FFN, "base", 3), TokenAddress(FFN, "grown1", 0)),
        ),
    ],
)
def test_changes_are_read_and_written(text, change):
    model = grown_model()
    assert parse_change(text, model) == change
    assert parse_change(str(change), model) == change


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no change: write off ADDRESS, scale ADDRESS FACTOR or swap ADDRESS ADDRESS"),
        ("delete 1.ffn/base/3", "is no change"),
        ("off", "is no change"),
        ("scale 1.ffn/base/3", "is no change"),
        ("scale 1.ffn/base/3 loud", "'loud' is no number"),
        ("scale 1.ffn/base/3 nan", "must be finite, got nan"),
        ("off 9.ffn/base/3", r"unknown layer '9\.ffn': did you mean"),
        ("off 1.ffn/bass", r"no segment 'bass' in model\.layers\.1\.ffn: it has base, grown1"),
        ("off 1.ffn/base/20", "it has the tokens 0 to 19"),
        ("off ffn", "'ffn' names no segment"),
        ("swap 1.ffn/base 1.ffn/base/1", "names no token"),
        ("swap 1.ffn/base/1 0.ffn/base/1", "are in two layers: swap tokens of one layer"),
    ],
)
def test_a_change_that_cannot_be_is_named(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_change(text, grown_model())
    assert "\n" not in str(caught.value)


def test_a_refused_intervention_touches_nothing():
    model = grown_model()
    with pytest.raises(UserError), intervene(model, [Off("1.ffn/base/3"), Off("1.ffn/base/99")]):
        pass
    assert all("attend" not in vars(layer) for layer in pattention_layers(model).values())


# Measured


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_ablations_in_a_batch_are_those_one_at_a_time(batch_size):
    model, ids = grown_model(), tiny_ids(rows=1)
    tokens = ["1.ffn/base/3", "1.ffn/base/4", "0.ffn/grown1/1", "0.attention.query/base/0", "1.ffn/grown1/2"]
    found = measured_ablation(model, ids, tokens, batch_size=batch_size)
    assert found.shape == (5, 9, 31)
    for token, row in zip(tokens, found, strict=True):
        with intervene(model, [Off(token)]), torch.no_grad():
            assert statement.error(row, model(ids).logits[0]) < 1e-10
    assert differ(found[0], found[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": IDS}, r"inputs must be one row of token ids \(1, T\), got shape \(2, 9\)"),
        ({"tokens": []}, "no token to switch off"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"tokens": ["1.ffn/base/20"]}, "it has the tokens 0 to 19"),
    ],
)
def test_ablations_that_cannot_be(options, message):
    given = {"input_ids": tiny_ids(rows=1), "tokens": ["1.ffn/base/3"], "batch_size": 2, **options}
    with pytest.raises(UserError, match=message):
        measured_ablation(grown_model(), given.pop("input_ids"), given.pop("tokens"), **given)


def mean_loss(found: torch.Tensor, ids: torch.Tensor) -> float:
    shares = torch.log_softmax(found[:, :-1].double(), -1)
    return -shares.gather(-1, ids[:, 1:, None]).mean().item()


def test_perplexity_before_and_after():
    model, changes = grown_model(), [Off("1.ffn/base")]
    found = perplexity_change(model, changes, IDS)
    assert found["loss_before"] == pytest.approx(mean_loss(logits(model), IDS), rel=1e-6)
    assert found["loss_after"] == pytest.approx(mean_loss(logits(model, changes), IDS), rel=1e-6)
    assert found["perplexity_after"] == pytest.approx(torch.tensor(found["loss_after"]).exp().item(), rel=1e-6)
    assert found["tokens"] == 2 * 8
    rows = [{"input_ids": row} for row in IDS.tolist()]
    assert perplexity_change(model, changes, rows, batch_size=1) == pytest.approx(found, rel=1e-6)
    with pytest.raises(UserError, match="nothing to predict: give rows of at least two tokens"):
        perplexity_change(model, changes, IDS[:, :1])


def test_effect_on_a_text(tmp_path):
    model, tokenizer = save_model(tmp_path, grown=True).double(), train_tokenizer()
    text, changes = "the quick brown", [Off("1.ffn/base")]
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    found = change_effect(model, tokenizer, changes, text, count=5)
    with torch.no_grad():
        before = model(ids).logits
        with intervene(model, changes):
            after = model(ids).logits
    assert found["changes"] == ["off 1.ffn/base"]
    assert found["position"] == ids.shape[1] - 1
    for when, some in (("before", before), ("after", after)):
        shares = some[0, -1].softmax(-1)
        likeliest = shares.argsort(descending=True)[:5].tolist()
        assert [row["id"] for row in found[when]] == likeliest
        assert [row["probability"] for row in found[when]] == pytest.approx(shares[likeliest].tolist())
        assert found[f"loss_{when}"] == pytest.approx(mean_loss(some, ids))
    p, q = before[0, -1].softmax(-1), after[0, -1].softmax(-1)
    assert found["divergence"] == pytest.approx((p * (p / q).log()).sum().item())
    first = change_effect(model, tokenizer, changes, text, position=0)
    assert first["before"][0]["id"] == before[0, 0].argmax()
    one = change_effect(model, tokenizer, [], "t")
    assert one["loss_before"] is one["perplexity_after"] is None


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", None, "the text is empty"),
        ("a b " * 40, None, r"the text has \d+ tokens, and the model takes 64: give a shorter text"),
        ("the", 40, "position 40 is outside of the text: it has the tokens 0 to"),
        ("the", -9, "position -9 is outside"),
    ],
)
def test_effect_on_a_text_that_cannot_be(tmp_path, text, position, message):
    model = save_model(tmp_path)
    with pytest.raises(UserError, match=message):
        change_effect(model, train_tokenizer(), [], text, position=position)


def test_pieces_of_characters_are_shown_as_bytes():
    tokenizer = train_tokenizer()
    first = tokenizer("😀", add_special_tokens=False)["input_ids"][0]
    shown = piece(tokenizer, first)
    if shown != "😀":
        assert "😀".encode().startswith(bytes.fromhex(shown.replace("\\x", "")))
    byte = next(i for i in range(300) if tokenizer.convert_ids_to_tokens(i) == "ð")
    assert piece(tokenizer, byte) == "\\xf0"
    assert piece(tokenizer, tokenizer.eos_token_id) == "<|endoftext|>"
    assert piece(tokenizer, 317) == "<id 317>"
    assert piece(tokenizer, tokenizer("the")["input_ids"][0]).isascii()
