"""Encoder and decoder layers: beside torch's own, inside torch's stacks, against the equations, and step by step."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from beside_torch import attention_equation, equation, like_torch, randomise
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import statement
from tokenformer import ParameterTokens, UserError, grow
from tokenformer.nn import DecoderCache, KeyValueCache, TransformerDecoderLayer, TransformerEncoderLayer

CAUSAL = nn.Transformer.generate_square_subsequent_mask


def encoder(layer: nn.Module, num_layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False, **options)


def _layers(**options: Any) -> list[nn.Module]:
    return [cls(16, 4, 24, **options) for cls in (TransformerEncoderLayer, TransformerDecoderLayer)]


@st.composite
def _calls(draw: st.DrawFn) -> dict[str, Any]:
    size = st.integers(1, 4)
    masks = st.sampled_from([None, "bool", "float", "bool3d", "float3d", "causal"])
    return {
        "decoder": draw(st.booleans()),
        "norm_first": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-5, 1e-2])),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "batch": draw(st.one_of(st.none(), st.integers(1, 3))),
        "target": draw(size),
        "source": draw(size),
        "mask": draw(masks),
        "memory_mask": draw(masks.filter(lambda kind: kind != "causal")),
        "padding": draw(st.sampled_from([None, "bool", "float"])),
        "memory_padding": draw(st.sampled_from([None, "bool", "float"])),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@given(call=_calls())
def test_layers_do_with_masks_and_norms_what_torch_does(call) -> None:
    torch.manual_seed(call["seed"])
    batch, target, source = call["batch"], call["target"], call["source"]
    options = {
        "norm_first": call["norm_first"],
        "batch_first": call["batch_first"],
        "bias": call["bias"],
        "layer_norm_eps": call["eps"],
        # What torch returns with batch_first is a transposed view, and dropout draws in the order of memory.
        "dropout": 0.0 if call["batch_first"] else call["dropout"],
    }
    kind = nn.TransformerDecoderLayer if call["decoder"] else nn.TransformerEncoderLayer
    theirs = kind(8, 2, 6, **options)  # in training: the fused path of evaluation has other results for hidden rows
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = like_torch(theirs)

    def tokens(length: int) -> torch.Tensor:
        return torch.randn(
            *((length,) if batch is None else (batch, length) if call["batch_first"] else (length, batch)), 8
        )

    def mask(name: str, queries: int, keys: int) -> torch.Tensor | None:
        if call[name] == "causal":
            return CAUSAL(queries)
        return _mask(call[name], (2 * (batch or 1), queries, keys))

    def padding(name: str, keys: int) -> torch.Tensor | None:
        return _mask(call[name], (keys,) if batch is None else (batch, keys))

    inputs = [tokens(target)]
    if call["decoder"]:
        inputs += [tokens(source), mask("mask", target, target), mask("memory_mask", target, source)]
        inputs += [padding("padding", target), padding("memory_padding", source)]
    else:
        inputs += [mask("mask", target, target), padding("padding", target)]
    arguments = (*inputs, call["mask"] == "causal")
    torch.manual_seed(0)
    expected = theirs(*arguments)
    torch.manual_seed(0)
    torch.testing.assert_close(ours(*arguments), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def _mask(kind: str | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    if kind is None:
        return None
    if len(shape) == 3 and not kind.endswith("3d"):
        shape = shape[1:]
    hidden = torch.rand(shape) < 0.4
    return hidden if kind.startswith("bool") else torch.randn(shape).masked_fill(hidden, -torch.inf)


# Inside torch's stacks


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "padded"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_a_torch_encoder_of_our_layers_is_one_of_torchs(training, grad, nested, norm_first) -> None:
    """Also where torch would take its fused path, or turn padding into nested tensors."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    theirs, ours = (
        nn.TransformerEncoder(each, 2, norm=nn.LayerNorm(8), enable_nested_tensor=nested).train(training)
        for each in (layer, like_torch(layer))
    )
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([5, 2, 4])[:, None]
    causal = CAUSAL(5)
    with torch.set_grad_enabled(grad):
        for arguments in ({}, {"mask": causal}, {"mask": causal, "is_causal": True}):
            torch.testing.assert_close(ours(x, **arguments), theirs(x, **arguments), rtol=1e-4, atol=1e-4)
        actual, expected = (stack(x, src_key_padding_mask=padding)[~padding] for stack in (ours, theirs))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:Support for mismatched")
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_transformer_of_torch_takes_both_stacks(batch_first) -> None:
    """nn.Transformer initialises what it is given anew and passes its masks on."""
    options = {"dropout": 0.0, "batch_first": batch_first}
    theirs = nn.Transformer(8, 2, 2, 2, 16, **options)
    ours = nn.Transformer(
        8,
        2,
        custom_encoder=encoder(TransformerEncoderLayer(8, 2, 16, **options), norm=nn.LayerNorm(8)),
        custom_decoder=nn.TransformerDecoder(TransformerDecoderLayer(8, 2, 16, **options), 2, norm=nn.LayerNorm(8)),
        batch_first=batch_first,
    )
    limit = (6 / (16 + 8)) ** 0.5  # of xavier_uniform_
    values = ours.encoder.layers[0].ffn.segments.base.value
    assert 0.8 * limit < values.abs().max() <= limit
    for stack, torchs in ((ours.encoder, theirs.encoder), (ours.decoder, theirs.decoder)):
        stack.layers = nn.ModuleList(like_torch(layer) for layer in torchs.layers)
    source, target = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    masks = {"tgt_mask": CAUSAL(4), "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    torch.testing.assert_close(ours(source, target, **masks), theirs(source, target, **masks), rtol=1e-4, atol=1e-4)


def test_a_stack_trains_from_torchs_own_initialisation() -> None:
    """Learns to reverse a sequence: chance is log 8."""
    model = nn.Transformer(
        32,
        4,
        custom_encoder=encoder(TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 1),
        custom_decoder=nn.TransformerDecoder(TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 1),
        batch_first=True,
    )
    embed, places = nn.Embedding(8, 32), nn.Parameter(torch.randn(3, 32))
    optimizer = torch.optim.Adam([*model.parameters(), *embed.parameters(), places], lr=5e-3)
    for _ in range(40):
        source = torch.randint(8, (32, 3))
        hidden = model(embed(source) + places, places.expand(32, -1, -1))
        loss = F.cross_entropy((hidden @ embed.weight.T).flatten(0, 1), source.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.0


# The true path: Pattentions


def _norm(layer: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + layer.eps).sqrt()
    return normed if layer.weight is None else normed * layer.weight + layer.bias


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_a_decoder_layer_is_the_equations_in_float64(norm_first) -> None:
    layer = randomise(
        TransformerDecoderLayer(
            8, 2, 6, dropout=0.0, activation="relu", norm_first=norm_first, batch_first=True, qkv=5, output=7
        ).double()
    )
    for parameter in (layer.norm1.weight, layer.norm2.bias, layer.norm3.weight):
        nn.init.normal_(parameter)
    for attention in (layer.self_attn, layer.multihead_attn):
        for name in ("query", "key", "value", "output"):
            assert getattr(attention, name).activation == "relu"
            getattr(attention, name).activation = "gelu"  # that of the equations below; the feed-forward keeps relu
    target, memory = torch.randn(2, 3, 8).double(), torch.randn(2, 4, 8).double()
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    x = target
    for norm, branch in (
        (layer.norm1, lambda x: attention_equation(layer.self_attn, x, x, causal.expand(2, -1, -1))),
        (layer.norm2, lambda x: attention_equation(layer.multihead_attn, x, memory, torch.zeros(2, 3, 4).bool())),
        (layer.norm3, lambda x: equation(layer.ffn, x, torch.relu)),
    ):
        x = x + branch(_norm(norm, x)) if norm_first else _norm(norm, x + branch(x))
    assert statement.error(layer(target, memory, causal), x) < 1e-10


def test_the_block_of_the_paper_has_no_parameters_but_tokens() -> None:
    for layer in _layers(norm_first=True, elementwise_affine=False):
        assert all(".segments.base." in name for name, _ in layer.named_parameters())
    for layer in _layers(bias=False):
        norms = [module for module in layer.modules() if isinstance(module, nn.LayerNorm)]
        assert all(norm.bias is None and norm.weight is not None for norm in norms)


def test_device_dtype_and_numbers_of_tokens() -> None:
    for layer in _layers(device="meta", dtype=torch.bfloat16, qkv=3, output=5):
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
        segments = {module.num_tokens for module in layer.modules() if isinstance(module, ParameterTokens)}
        assert segments == {3, 5, 24}


def test_copies_pickles_and_state_dicts_compute_the_same() -> None:
    x, memory = torch.randn(3, 2, 16), torch.randn(5, 2, 16)
    for layer, inputs in zip(_layers(dropout=0.0), ((x,), (x, memory)), strict=True):
        grow(layer, qkv=20, output=20, ffn=30)
        expected = layer(*inputs)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        fresh = grow(type(layer)(16, 4, 24, dropout=0.0), qkv=20, output=20, ffn=30)
        fresh.load_state_dict(layer.state_dict())
        for same in (copy.deepcopy(layer), torch.load(file, weights_only=False), fresh):
            assert torch.equal(same(*inputs), expected)


def test_growing_a_stack_changes_nothing_and_reaches_every_kind() -> None:
    stack = randomise(nn.TransformerDecoder(TransformerDecoderLayer(16, 4, 24, dropout=0.0), 2))
    x, memory = torch.randn(3, 2, 16), torch.randn(5, 2, 16)
    before = stack(x, memory)
    grow(stack, qkv=20, output=18, ffn=30)
    assert torch.equal(stack(x, memory), before)
    layer = stack.layers[1]
    assert [p.num_tokens for p in (layer.multihead_attn.key, layer.self_attn.output, layer.ffn)] == [20, 18, 30]
    (stack(x, memory) * torch.randn(16)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in stack.named_parameters() if n.endswith(".key"))


def test_layers_compile_without_a_break() -> None:
    x, memory, causal = torch.randn(2, 4, 16), torch.randn(2, 5, 16), CAUSAL(4)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    encoder_layer, decoder_layer = _layers(dropout=0.0, batch_first=True)
    for stack, inputs, masks in (
        (encoder(encoder_layer, 1), (memory,), {"src_key_padding_mask": padding}),
        (
            nn.TransformerDecoder(decoder_layer, 1),
            (x, memory),
            {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding},
        ),
    ):
        compiled = torch.compile(stack, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*inputs, **masks), stack(*inputs, **masks), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_bfloat16_autocast_follows_float32() -> None:
    x, memory, causal = torch.randn(4, 2, 16), torch.randn(5, 2, 16), CAUSAL(4)
    for layer, inputs in zip(_layers(dropout=0.0), ((x, causal), (x, memory, causal)), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            low = layer(*inputs)
        assert statement.error(low, layer(*inputs)) < statement.TOLERANCE[torch.bfloat16]


# Cache


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("steps", [[1] * 5, [3, 1, 1], [2, 3]], ids=str)
def test_decoding_step_by_step_is_the_full_pass(batch_first, norm_first, steps) -> None:
    options = {"batch_first": batch_first, "norm_first": norm_first}
    stack = randomise(nn.TransformerDecoder(TransformerDecoderLayer(16, 4, 24, **options), 2)).eval().double()
    target, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 6, 16).double()
    causal = CAUSAL(5)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    if not batch_first:
        target, memory = target.transpose(0, 1), memory.transpose(0, 1)
    dim = 1 if batch_first else 0
    expected = stack(target, memory, tgt_mask=causal, memory_key_padding_mask=padding)

    caches, outputs, done = [DecoderCache() for _ in stack.layers], [], 0
    for length in steps:
        x = target.narrow(dim, done, length)
        mask = None if length == 1 else causal[done : done + length, : done + length]
        source = memory if done == 0 else None
        done += length
        for layer, cache in zip(stack.layers, caches, strict=True):
            x = layer(x, source, mask, memory_key_padding_mask=padding, cache=cache)
        outputs.append(x)
    assert [cache.length for cache in caches] == [5, 5]
    torch.testing.assert_close(torch.cat(outputs, dim), expected, rtol=1e-9, atol=1e-9)


def test_the_memory_is_projected_once() -> None:
    layer, cache = TransformerDecoderLayer(16, 4, 24), DecoderCache()
    calls = []
    layer.multihead_attn.key.register_forward_hook(lambda *_: calls.append(1))
    memory = torch.randn(5, 2, 16)
    for _ in range(3):
        layer(torch.randn(1, 2, 16), memory, cache=cache)
    assert len(calls) == 1


def test_an_encoder_layer_decodes_with_a_cache() -> None:
    layer = randomise(TransformerEncoderLayer(16, 4, 24, norm_first=True, batch_first=True)).eval()
    x, cache = torch.randn(2, 5, 16), KeyValueCache()
    steps = [layer(x[:, t : t + 1], cache=cache) for t in range(5)]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x, CAUSAL(5), is_causal=True), rtol=1e-4, atol=1e-4)


def test_beams_reorder_a_cache() -> None:
    layer = randomise(TransformerDecoderLayer(16, 4, 24, batch_first=True)).eval()
    target, memory, rows = torch.randn(3, 4, 16), torch.randn(3, 6, 16), torch.tensor([2, 2, 0, 1])
    cache = DecoderCache()
    layer(target[:, :3], memory, CAUSAL(3), cache=cache)
    cache.reorder(rows)
    last = layer(target[rows, 3:], memory[rows], cache=cache)
    full = layer(target[rows], memory[rows], CAUSAL(4))
    torch.testing.assert_close(last, full[:, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(2, 6), (3, 5)], ids=str)
def test_another_memory_is_refused(batch_first, shape) -> None:
    layer, cache = TransformerDecoderLayer(16, 4, 24, batch_first=batch_first), DecoderCache()
    turn = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    layer(turn(torch.randn(2, 1, 16)), turn(torch.randn(2, 5, 16)), cache=cache)
    with pytest.raises(UserError, match="begin each source sequence with a new cache"):
        layer(turn(torch.randn(2, 1, 16)), turn(torch.randn(*shape, 16)), cache=cache)


def test_a_decoder_without_memory_is_refused() -> None:
    with pytest.raises(UserError, match="no keys to attend to"):
        TransformerDecoderLayer(16, 4, 24)(torch.randn(1, 2, 16), None)


def test_a_single_sequence_needs_no_batch() -> None:
    layer = randomise(TransformerDecoderLayer(16, 4, 24, batch_first=True)).eval()
    target, memory, cache = torch.randn(4, 16), torch.randn(6, 16), DecoderCache()
    steps = [layer(target[t : t + 1], memory, cache=cache) for t in range(4)]
    expected = layer(target[None], memory[None], CAUSAL(4))[0]
    torch.testing.assert_close(torch.cat(steps), expected, rtol=1e-4, atol=1e-4)
