"""FLOP and byte counts against torch's own counter and against sums by hand."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tiny import SEGMENTS, tiny_ids, tiny_model
from tokenformer import Pattention
from tokenformer.models.cost import count_tokens

GROWN = [*SEGMENTS, {"name": "grown1", "qkv": 0, "output": 3, "ffn": 5}]


@pytest.mark.parametrize("segments", [SEGMENTS, GROWN], ids=["one-segment", "two-segments"])
@pytest.mark.parametrize("length", [16, 48])
def test_flops_are_those_that_torch_counts(length, segments) -> None:
    model = tiny_model(attention="eager", segments=segments)
    ids = tiny_ids(3, length)
    with FlopCounterMode(display=False) as counter:
        loss = model(ids, labels=ids).loss
    forward = counter.get_total_flops() / ids.numel()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    both = forward + counter.get_total_flops() / ids.numel()
    assert model.forward_flops_per_token(length) == pytest.approx(forward, rel=0.02)
    assert model.training_flops_per_token(length) == pytest.approx(both, rel=0.02)


def test_backbone_alone_has_no_output_embedding() -> None:
    model = tiny_model(attention="eager")
    with FlopCounterMode(display=False) as counter:
        model.model(tiny_ids(1, 16))
    assert model.model.forward_flops_per_token(16) == pytest.approx(counter.get_total_flops() / 16, rel=0.02)


def test_decode_bytes_by_hand() -> None:
    model = tiny_model(segments=GROWN)
    tokens = 2 * 2 * 32 * (3 * 12 + 13 + 25)  # keys and values, 2 layers, 32 channels
    embeddings = 31 * 32 + 32  # all rows to make logits, one to read the input
    norm = 2 * 32
    assert model.decode_bytes_per_token() == 4 * (tokens + embeddings + norm)
    cached = 100 * 2 * 2 * 32  # keys and values of 100 positions in 2 layers
    assert model.decode_bytes_per_token(100) == 4 * (tokens + embeddings + norm + cached)
    assert model.decode_bytes_per_token(100, dtype=torch.int8) == tokens + embeddings + norm + cached
    assert model.bfloat16().decode_bytes_per_token(100) == 2 * (tokens + embeddings + norm + cached)


def test_decode_bytes_cover_the_parameters_of_the_model() -> None:
    model = tiny_model()
    stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert model.decode_bytes_per_token() == stored + 4 * 32


def test_tokens_are_counted_by_segment_and_kind() -> None:
    assert count_tokens(tiny_model(segments=GROWN)) == {
        "base": {"qkv": 2 * 3 * 12 * 64, "output": 2 * 10 * 64, "ffn": 2 * 20 * 64},
        "grown1": {"output": 2 * 3 * 64, "ffn": 2 * 5 * 64},
    }
    assert count_tokens(nn.Sequential(Pattention(3, 5, 7), nn.Linear(5, 5))) == {"base": {"other": 7 * 8}}
