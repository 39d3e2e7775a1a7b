import pytest
import torch

from tiny import tiny_ids, tiny_model
from tokenformer import Pattention, UserError, grow
from tokenformer.elastic import prefix
from tokenformer.ops import reference_pattention


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny_ids()).logits


def segments(*triples):
    names = ("base", "grown1", "grown2")
    return [{"name": n, "qkv": q, "output": o, "ffn": f} for n, (q, o, f) in zip(names, triples, strict=False)]


@pytest.mark.parametrize(("qkv", "output", "ffn"), [(5, 3, 7), (12, 10, 20), (14, 10, 21)])
def test_prefix_is_the_model_without_the_other_tokens(qkv, output, ffn):
    """Against a model that never had them, with tau as it was: bitwise, over two segments."""
    whole = tiny_model(segments=segments((12, 10, 20), (4, 0, 8)))
    first = (min(qkv, 12), min(output, 10), min(ffn, 20))
    rest = tuple(max(0, n - m) for n, m in zip((qkv, output, ffn), first, strict=True))
    small = tiny_model(segments=segments(first, rest) if any(rest) else segments(first))
    pairs = zip(
        (m for m in small.modules() if isinstance(m, Pattention)),
        (m for m in whole.modules() if isinstance(m, Pattention)),
        strict=True,
    )
    with torch.no_grad():
        small.model.embed_tokens.weight.copy_(whole.model.embed_tokens.weight)
        for name in ("weight", "bias"):
            getattr(small.model.norm, name).copy_(getattr(whole.model.norm, name))
        for mine, theirs in pairs:
            mine.scale.copy_(theirs.scale)
            for name, segment in mine.segments.items():
                segment.key.copy_(theirs.segments[name].key[: segment.num_tokens])
                segment.value.copy_(theirs.segments[name].value[: segment.num_tokens])
    with prefix(whole, qkv=qkv, output=output, ffn=ffn):
        assert torch.equal(logits(whole), logits(small))


def test_prefix_of_a_layer_is_the_equation_on_its_first_tokens():
    layer = Pattention(6, 5, 9, dtype=torch.float64)
    x, segment = torch.randn(4, 6, dtype=torch.float64), layer.segments["base"]
    with prefix(layer, tokens=4), torch.no_grad():
        expected = reference_pattention(x, segment.key[:4], segment.value[:4], 3.0)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_model_is_whole_again_afterwards_whatever_happens():
    model = tiny_model()
    before = logits(model)

    def fail():
        with prefix(model, ffn=1):
            assert not torch.equal(logits(model), before)
            with prefix(model, ffn=1, qkv=2):
                pass
            raise RuntimeError("meanwhile")

    with pytest.raises(RuntimeError, match="meanwhile"):
        fail()
    assert torch.equal(logits(model), before)


def test_tokens_that_are_limited_already_do_not_come_back():
    model = grow(tiny_model(), ffn=28)
    for layer in model.modules():
        if isinstance(layer, Pattention) and layer.kind == "ffn":
            layer.segments["base"].limit = 0
    with prefix(model, ffn=3):
        limits = {s.limit for n, s in model.named_modules() if n.endswith("ffn.segments.base")}
        assert limits == {0}
        assert {s.limit for n, s in model.named_modules() if n.endswith("ffn.segments.grown1")} == {3}
    assert {s.limit for n, s in model.named_modules() if n.endswith("ffn.segments.grown1")} == {None}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"ffn": 0}, "at least 1"), ({"ffn": 21}, "20 tokens there are"), ({"tokens": 2}, "no layers of that kind")],
)
def test_impossible_sizes(sizes, words):
    model = tiny_model()
    with pytest.raises(UserError, match=words), prefix(model, **sizes):
        pass
    with pytest.raises(UserError, match="no Pattention"), prefix(torch.nn.Linear(2, 2), ffn=1):
        pass


def test_gradients_reach_the_prefix_alone():
    model = tiny_model()
    with prefix(model, qkv=3, ffn=4):
        model(input_ids=tiny_ids(), labels=tiny_ids()).loss.backward()
    for name, parameter in model.named_parameters():
        if ".segments." in name:
            count = 4 if ".ffn." in name else 10 if ".output." in name else 3
            assert parameter.grad[:count].abs().sum() > 0
            assert parameter.grad[count:].abs().sum() == 0


def test_a_compiled_model_has_a_program_for_each_size():
    """The limit is a plain attribute: the compiler must see it change, forwards and back."""
    model = tiny_model()
    sizes = [{}, {"qkv": 6, "output": 5, "ffn": 10}]

    def all_sizes():
        found = []
        for kinds in sizes:
            with prefix(model, **kinds):
                found.append(logits(model))
        return found

    plain = all_sizes()
    assert not torch.allclose(plain[0], plain[1], atol=1e-3)
    torch.compiler.reset()
    model.compile(dynamic=False, backend="aot_eager")
    for _ in range(2):
        for compiled, expected in zip(all_sizes(), plain, strict=True):
            torch.testing.assert_close(compiled, expected)
