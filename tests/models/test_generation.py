"""Caches and generate: every way to the next token gives the same token."""

import itertools

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from tiny import VOCABULARY, tiny_ids, tiny_model


def _by_hand(model, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy continuation without a cache."""
    for _ in range(steps):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def _generate(model, ids: torch.Tensor, **options) -> torch.Tensor:
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, **options}
    return model.generate(ids, **options)


# Caches


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("chunks", [(5, 1, 1, 1, 1), (1,) * 9, (3, 4, 2), (9,)], ids=str)
def test_cached_logits_equal_uncached(chunks, attention) -> None:
    model, ids = tiny_model(attention=attention), tiny_ids(2, 9)
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for chunk in ids.split(list(chunks), dim=1):
            outputs = model(chunk, past_key_values=cache, use_cache=True)
            logits.append(outputs.logits)
        expected = model(ids, use_cache=False).logits
    assert outputs.past_key_values is cache
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_static_cache_logits_equal_uncached() -> None:
    model, ids = tiny_model(), tiny_ids(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        logits = [
            model(chunk, past_key_values=cache, use_cache=True, position_ids=positions).logits
            for chunk, positions in zip(ids.split([5, 3, 1], 1), torch.arange(9)[None].split([5, 3, 1], 1), strict=True)
        ]
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_a_cache_is_returned_exactly_when_asked_for() -> None:
    model, ids = tiny_model(), tiny_ids()
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 9
    model.config.use_cache = False
    assert model(ids).past_key_values is None


def test_steps_after_left_padding_equal_no_padding() -> None:
    model, ids = tiny_model(), tiny_ids(1, 9)
    padded = torch.cat([torch.full((1, 3), 5), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 9])
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, end in ((0, 8), (8, 9), (9, 12)):
            logits.append(
                model(padded[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True).logits
            )
        expected = model(ids).logits
    torch.testing.assert_close(torch.cat(logits, dim=1)[:, 3:], expected, rtol=1e-4, atol=2e-5)


# generate


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_generation_equals_a_loop_by_hand(attention, implementation) -> None:
    model, ids = tiny_model(attention=attention), tiny_ids(2, 5)
    generated = _generate(model, ids, max_new_tokens=8, do_sample=False, cache_implementation=implementation)
    assert torch.equal(generated, _by_hand(model, ids, 8))


def test_greedy_generation_of_a_left_padded_batch_equals_each_alone() -> None:
    model = tiny_model()
    short, long = tiny_ids(1, 3, seed=1), tiny_ids(1, 6, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1), long])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    generated = _generate(model, batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated[:1, 3:], _by_hand(model, short, 6))
    assert torch.equal(generated[1:], _by_hand(model, long, 6))


def test_beams_find_the_most_likely_continuation() -> None:
    """As many beams as words, and two steps: the search is exhaustive."""
    model, ids = tiny_model(), tiny_ids(1, 4)
    generated = _generate(model, ids, max_new_tokens=2, num_beams=VOCABULARY, do_sample=False)
    pairs = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=2)))
    with torch.no_grad():
        logits = model(torch.cat([ids.expand(len(pairs), -1), pairs], dim=1)).logits.log_softmax(-1)
    likelihood = logits[:, 3].gather(1, pairs[:, :1]) + logits[:, 4].gather(1, pairs[:, 1:])
    assert generated[0, 4:].tolist() == pairs[likelihood.argmax()].tolist()


def test_sampling_follows_the_distribution() -> None:
    model, ids = tiny_model(), tiny_ids(1, 4)
    with torch.no_grad():
        probabilities = (model(ids).logits[0, -1] / 3).softmax(-1)
    options = {"max_new_tokens": 1, "do_sample": True, "temperature": 3.0, "top_k": 0}
    drawn = _generate(model, ids.expand(4000, -1), **options)[:, -1]
    frequencies = torch.bincount(drawn, minlength=VOCABULARY) / 4000
    # four standard deviations of a frequency
    assert ((frequencies - probabilities).abs() < 4 * (probabilities * (1 - probabilities) / 4000).sqrt() + 1e-3).all()


def test_sampling_from_the_most_likely_word_alone_is_greedy() -> None:
    model, ids = tiny_model(), tiny_ids(2, 4)
    sampled = _generate(model, ids, max_new_tokens=6, do_sample=True, top_k=1)
    assert torch.equal(sampled, _by_hand(model, ids, 6))


def test_generation_stops_at_the_end_of_text() -> None:
    model, ids = tiny_model(), tiny_ids(1, 5)
    expected = _by_hand(model, ids, 8)
    end = expected[0, 7].item()
    stop = 5 + expected[0, 5:].tolist().index(end) + 1
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert torch.equal(_generate(model, ids, generation_config=config), expected[:, :stop])


def test_assisted_generation_equals_greedy() -> None:
    model, ids = tiny_model(), tiny_ids(1, 5)
    torch.manual_seed(1)
    assistant = tiny_model(num_hidden_layers=1)
    generated = _generate(model, ids, max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(generated, _by_hand(model, ids, 8))


def test_generation_in_bfloat16_runs() -> None:
    model, ids = tiny_model().bfloat16(), tiny_ids(2, 5)
    generated = _generate(model, ids, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 8)
    assert torch.equal(generated[:, :5], ids)
