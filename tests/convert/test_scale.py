"""A tau that is not the root of the number of tokens, handed to code that takes it to be: the function stays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import statement
from tokenformer.convert.scale import absorb_scale, is_root, num_appended

KINDS = ["l2_gelu", "gelu_l2", "softmax"]


def layer(num_tokens: int, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens * 100 + channels)
    shapes = ((num_tokens, channels), (num_tokens, channels), (30, channels))
    key, value, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    # Scores of about 1: of one far below zero GeLU leaves so little that its square is 0, and gelu_l2 has no norm.
    return key.to(dtype), value.to(dtype), x / channels**0.5


def handed_over(kind: str, num_tokens: int, channels: int, tau: float, dtype: torch.dtype) -> tuple[float, int]:
    """Error of the published computation, and tokens appended."""
    key, value, x = layer(num_tokens, channels, dtype)
    appended = num_appended(kind, num_tokens, channels, [tau])
    new_key, new_value = absorb_scale(kind, key, value, tau, appended)
    assert new_key.shape == new_value.shape == (num_tokens + appended, channels)
    assert new_key.dtype == new_value.dtype == dtype
    expected = statement.pattention(x, [key.double()], [value.double()], tau, kind)
    root = (num_tokens + appended) ** 0.5
    return statement.error(
        statement.pattention(x, [new_key.double()], [new_value.double()], root, kind), expected
    ), appended


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    num_tokens=st.integers(1, 40),
    channels=st.integers(1, 24),
    square=st.floats(0.3, 90),
)
def test_the_function_stays(dtype, tolerance, kind, num_tokens, channels, square):
    error, appended = handed_over(kind, num_tokens, channels, square**0.5, dtype)
    assert error < tolerance
    assert appended <= max(min(num_tokens, channels), square - num_tokens + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_without_it_every_output_would_change(kind):
    key, value, x = layer(40, 16, torch.float64)
    naive = statement.pattention(x, [key], [value], 40**0.5, kind)
    assert statement.error(naive, statement.pattention(x, [key], [value], 20**0.5, kind)) > 0.3


@pytest.mark.parametrize(
    ("num_tokens", "channels", "square", "appended"),
    [
        (40, 16, 20, 16),  # grown from 20: as many as the keys span
        (12, 16, 6, 12),
        (40, 16, 40, 0),
        (20, 16, 60, 40),  # shrunk from 60: tokens of zero do
        (20, 16, 22.5, 16),
        (20, 16, 60.5, 41),
    ],
)
def test_no_more_tokens_than_are_needed(num_tokens, channels, square, appended):
    error, found = handed_over("l2_gelu", num_tokens, channels, square**0.5, torch.float64)
    assert found == appended
    assert error < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_where_tau_is_the_root(kind):
    key, value, _ = layer(20, 16, torch.float32)
    tau = torch.tensor(20.0).sqrt().item()
    assert num_appended(kind, 20, 16, [tau, 20**0.5]) == 0
    new_key, new_value = absorb_scale(kind, key, value, tau, 0)
    assert torch.equal(new_key, key)
    assert torch.equal(new_value, value)


def test_layers_of_a_kind_get_the_same_number():
    taus = [20**0.5, 7**0.5, 25.5**0.5]
    appended = num_appended("l2_gelu", 20, 4, taus)
    assert appended == 6
    key, value, x = layer(20, 4, torch.float64)
    for tau in taus:  # the one whose tau is the root already needs the larger norm too
        new_key, new_value = absorb_scale("l2_gelu", key, value, tau, appended)
        expected = statement.pattention(x, [key], [value], tau)
        assert statement.error(statement.pattention(x, [new_key], [new_value], 26**0.5), expected) < 1e-14


@given(num_tokens=st.integers(1, 100_000))
def test_roots_are_recognised_whoever_computed_them_and_only_they(num_tokens):
    for root in (torch.tensor(float(num_tokens)).sqrt(), torch.tensor(float(num_tokens)).double().sqrt().float()):
        assert is_root(root.item(), num_tokens)
        assert not is_root(root.item(), num_tokens + 1)
        assert not is_root(root.item() * (1 + 1e-6), num_tokens)
        assert num_appended("l2_gelu", 1, 1, [root.item()]) == num_tokens - 1
