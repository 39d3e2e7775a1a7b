"""Published checkpoints give the published outputs, and the comparison notices every known fault of other code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import statement
from published_folder import write_published
from tokenformer import Pattention, TokenFormerConfig, TokenFormerForCausalLM, grow
from tokenformer.convert import convert
from tokenformer.models import modeling_tokenformer

GOLDEN = Path(__file__).parent / "golden"
KINDS = ["l2_norm_gelu", "gelu_l2_norm", "softmax"]
ATOL = 1e-4

normalizations = pytest.mark.parametrize("normalization", KINDS)


def load_directly(folder: Path, tmp_path: Path) -> TokenFormerForCausalLM:
    return TokenFormerForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_converted(folder: Path, tmp_path: Path) -> TokenFormerForCausalLM:
    convert(str(folder), str(tmp_path / "converted"))
    return TokenFormerForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32).eval()


routes = pytest.mark.parametrize("load", [load_directly, load_converted])


def largest_error(model: TokenFormerForCausalLM, folder: Path, ids: torch.Tensor) -> float:
    """Largest absolute difference of a batch's logits from the published forward pass in float64."""
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        logits = model(ids).logits.double().numpy()
    expected = np.stack([statement.published_logits(tensors, config, row) for row in ids.tolist()])
    assert np.abs(expected).max() > 5, "logits are large enough to show mistakes"
    return float(np.abs(logits - expected).max())


def checkpoint(folder: Path, **fields: Any) -> torch.Tensor:
    """A random checkpoint in the published format, and a batch of ids for it."""
    sizes = {"layers": 2, "hidden": 128, "heads": 2, "qkv": 48, "proj": 40, "ffn": 112, "vocab": 96}
    # Values about as large as the published initialisation makes them: much larger ones make token-token attention so
    # sharp that float32 itself, whoever computes it, is no longer good for four decimals.
    write_published(folder, **{**sizes, "value_std": 0.1, **fields})
    return torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))


@routes
@normalizations
def test_golden_checkpoints_give_their_published_logits(normalization, load, tmp_path) -> None:
    expected = np.load(GOLDEN / normalization / "expected.npz")
    model = load(GOLDEN / normalization, tmp_path)
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["ids"])[None]).logits[0]
    assert np.abs(expected["logits"]).max() > 10
    np.testing.assert_allclose(logits.numpy(), expected["logits"], rtol=0, atol=ATOL)


@normalizations
def test_the_statement_gives_the_golden_logits_too(normalization) -> None:
    expected = np.load(GOLDEN / normalization / "expected.npz")
    tensors = torch.load(GOLDEN / normalization / "pytorch_model.bin", weights_only=True)
    config = json.loads((GOLDEN / normalization / "config.json").read_text(encoding="utf-8"))
    logits = statement.published_logits(tensors, config, expected["ids"].tolist())
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-6)  # they are stored in float32


@routes
@normalizations
@pytest.mark.parametrize("head_size", [64, 80, 96])
def test_random_checkpoints_give_the_published_logits(head_size, normalization, load, tmp_path) -> None:
    ids = checkpoint(tmp_path / "published", hidden=2 * head_size, normalization=normalization, rotary_pct=0.25)
    assert largest_error(load(tmp_path / "published", tmp_path), tmp_path / "published", ids) < ATOL


@routes
def test_decoding_with_a_cache_gives_the_published_logits(load, tmp_path) -> None:
    ids = checkpoint(tmp_path / "published")
    model = load(tmp_path / "published", tmp_path)
    config = json.loads((tmp_path / "published" / "config.json").read_text(encoding="utf-8"))
    tensors = torch.load(tmp_path / "published" / "pytorch_model.bin", weights_only=True)
    expected = np.stack([statement.published_logits(tensors, config, row) for row in ids.tolist()])
    cache, logits = None, []
    with torch.no_grad():
        for start, end in ((0, 10), *((i, i + 1) for i in range(10, ids.shape[1]))):
            outputs = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
    np.testing.assert_allclose(torch.cat(logits, 1).numpy(), expected, rtol=0, atol=ATOL)


# Known faults of other implementations: each is put into the model, and the comparison above has to notice it


def rotary_over_the_batch_axis(model: TokenFormerForCausalLM, patch: pytest.MonkeyPatch) -> None:
    angles = modeling_tokenformer.rotary_angles

    def wrong(positions: torch.Tensor, *arguments: Any) -> Any:
        return angles(torch.arange(2)[:, None].expand(2, positions.shape[1]), *arguments)

    patch.setattr(modeling_tokenformer, "rotary_angles", wrong)


def rotary_over_the_whole_head(model: TokenFormerForCausalLM, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TokenFormerConfig, "rotary_dim", property(lambda config: config.head_dim))


def neighbouring_channels_turned(model: TokenFormerForCausalLM, patch: pytest.MonkeyPatch) -> None:
    """The other convention: pairs (2i, 2i+1) instead of (i, i + half)."""
    from tokenformer import modules

    rotate = modules.apply_rotary

    def wrong(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        size = cos.shape[-1]
        order = torch.cat((torch.arange(0, size, 2), torch.arange(1, size, 2), torch.arange(size, x.shape[-1])))
        return rotate(x[..., order], cos, sin)[..., order.argsort()]

    patch.setattr(modules, "apply_rotary", wrong)


def _scales(model: TokenFormerForCausalLM, rule: Callable[[float], float]) -> None:
    for layer in model.modules():
        if isinstance(layer, Pattention):
            layer.scale.fill_(rule(layer.scale.item()))


def tau_twice(model: TokenFormerForCausalLM, patch: pytest.MonkeyPatch) -> None:
    _scales(model, lambda tau: tau * tau)


def no_tau(model: TokenFormerForCausalLM, patch: pytest.MonkeyPatch) -> None:
    _scales(model, lambda tau: 1.0)


FAULTS = [rotary_over_the_batch_axis, rotary_over_the_whole_head, neighbouring_channels_turned, tau_twice, no_tau]


@pytest.mark.parametrize("fault", FAULTS)
@normalizations
def test_a_known_fault_is_noticed(normalization, fault, tmp_path, monkeypatch) -> None:
    ids = checkpoint(tmp_path / "published", normalization=normalization)
    model = load_directly(tmp_path / "published", tmp_path)
    assert largest_error(model, tmp_path / "published", ids) < ATOL
    fault(model, monkeypatch)
    assert largest_error(model, tmp_path / "published", ids) > 100 * ATOL


@pytest.mark.parametrize("other", ["gelu_l2", "softmax"])
def test_the_wrong_normalization_is_noticed(other, tmp_path) -> None:
    ids = checkpoint(tmp_path / "published")
    model = load_directly(tmp_path / "published", tmp_path)
    for layer in model.modules():
        if isinstance(layer, Pattention):
            layer.normalization = other
    assert largest_error(model, tmp_path / "published", ids) > 100 * ATOL


# Known faults of growing


def learned(model: TokenFormerForCausalLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """How far the keys of the new tokens move in three steps."""
    segments = [layer.segments["grown1"] for layer in model.modules() if isinstance(layer, Pattention)]
    before = [segment.key.detach().clone() for segment in segments]
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return min((s.key.detach() - key).abs().max().item() for s, key in zip(segments, before, strict=True))


def test_new_tokens_of_a_published_checkpoint_learn(tmp_path) -> None:
    ids = checkpoint(tmp_path / "published")
    model = load_directly(tmp_path / "published", tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grow(model, qkv=64, output=64, ffn=128, optimizer=optimizer)
    assert largest_error(model, tmp_path / "published", ids) < ATOL, "growing changed an output"
    assert learned(model, optimizer, ids) > 1e-4


def test_keys_and_values_both_zero_are_noticed(tmp_path) -> None:
    ids = checkpoint(tmp_path / "published")
    model = grow(load_directly(tmp_path / "published", tmp_path), qkv=64, output=64, ffn=128)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Pattention):
                layer.segments["grown1"].value.zero_()
    assert learned(model, torch.optim.AdamW(model.parameters(), lr=1e-3), ids) == 0


def test_an_optimizer_kept_over_growing_is_noticed(tmp_path) -> None:
    ids = checkpoint(tmp_path / "published")
    model = load_directly(tmp_path / "published", tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grow(model, qkv=64, output=64, ffn=128)
    assert learned(model, optimizer, ids) == 0


def test_a_tau_that_follows_the_number_of_tokens_is_noticed(tmp_path) -> None:
    ids = checkpoint(tmp_path / "published")
    model = load_directly(tmp_path / "published", tmp_path)
    grow(model, qkv=64, output=64, ffn=128, scale="sqrt")
    assert largest_error(model, tmp_path / "published", ids) > 100 * ATOL
