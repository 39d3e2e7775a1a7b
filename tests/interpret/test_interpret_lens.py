"""The lens against the same reading in NumPy."""

import numpy as np
import pytest

from tiny import tiny_model
from tokenformer import UserError, grow
from tokenformer.interpret.lens import nearest_inputs, promoted, value_lens


def test_value_lens_is_embedding_times_centred_and_scaled_value():
    model = tiny_model().double()
    grow(model, ffn=24)
    for name in ("1.ffn", "0.attention.output"):
        layer = model.get_submodule(f"model.layers.{name}")
        value = np.concatenate([segment.value.detach().numpy() for segment in layer.segments.values()])
        gain = model.model.norm.weight.detach().numpy()
        table = model.model.embed_tokens.weight.detach().numpy()
        expected = np.array([[e @ (gain * (v - v.mean())) for e in table] for v in value])
        np.testing.assert_allclose(value_lens(model, name).numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(value_lens(model, name, sigma=2.5).numpy(), expected / 2.5, atol=1e-12)
        base = value_lens(model, name, "base").numpy()
        np.testing.assert_allclose(base, expected[: len(base)], atol=1e-12)
        up, down = promoted(model, f"{name}/base/3", 4)
        order = np.argsort(expected[3])
        assert [token_id for token_id, _ in up] == order[::-1][:4].tolist()
        assert [token_id for token_id, _ in down] == order[:4].tolist()
        np.testing.assert_allclose([v for _, v in up], expected[3][order[::-1][:4]], rtol=1e-6)


def test_nearest_inputs_are_cosines_with_normalised_embeddings():
    model = tiny_model().double()
    table = model.model.embed_tokens.weight.detach().numpy()
    normed = (table - table.mean(1, keepdims=True)) / table.std(1, keepdims=True)
    key = model.model.layers[0].attention.query.segments["base"].key[5].detach().numpy()
    cosines = normed @ key / np.linalg.norm(normed, axis=1) / np.linalg.norm(key)
    found = nearest_inputs(model, "0.attention.query/base/5", 3)
    assert [token_id for token_id, _ in found] == np.argsort(cosines)[::-1][:3].tolist()
    np.testing.assert_allclose([v for _, v in found], np.sort(cosines)[::-1][:3], rtol=1e-6)


def test_other_kinds_and_unknown_segments_are_refused():
    model = tiny_model()
    with pytest.raises(UserError, match="kind 'qkv'"):
        value_lens(model, "0.attention.query")
    with pytest.raises(UserError, match="kind 'output'"):
        nearest_inputs(model, "0.attention.output/base/0")
    with pytest.raises(UserError, match="no segment 'more'"):
        value_lens(model, "0.ffn", "more")
