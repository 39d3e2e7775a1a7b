"""The first values of a model."""

import pytest
import torch

import tokenformer
from tokenformer.models import TokenFormerConfig, TokenFormerForCausalLM
from tokenformer.pattention import ParameterTokens


def stds(model: TokenFormerForCausalLM, leaf: str) -> list[float]:
    return [getattr(m, leaf).std().item() for m in model.modules() if isinstance(m, ParameterTokens)]


def config(**fields: float) -> TokenFormerConfig:
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return TokenFormerConfig(**sizes, **fields, segments=[{"name": "base", "qkv": 128, "output": 128, "ffn": 256}])


def test_published_unless_given() -> None:
    model = TokenFormerForCausalLM(config())
    assert stds(model, "value") == pytest.approx([2 / (4 * 64**0.5)] * 20, rel=0.05)
    assert stds(model, "key") == pytest.approx([0.02] * 20, rel=0.05)


def test_given_for_the_first_and_the_grown_tokens() -> None:
    model = TokenFormerForCausalLM(config(value_initializer_range=0.003))
    tokenformer.grow(model, qkv=256, output=256, ffn=512)
    assert stds(model, "value") == pytest.approx([0.003] * 40, rel=0.05)


def test_the_same_draws_in_another_size() -> None:
    torch.manual_seed(0)
    published = TokenFormerForCausalLM(config()).state_dict()
    torch.manual_seed(0)
    small = TokenFormerForCausalLM(config(value_initializer_range=0.0625 / 10)).state_dict()
    for name, tensor in published.items():
        torch.testing.assert_close(small[name], tensor / 10 if name.endswith(".value") else tensor)
