"""Sliding windows against one forward pass per token with its context written out, and against transformers' recipe."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from statement import forward
from tiny import VOCABULARY, tiny_model
from tokenformer import UserError
from tokenformer.evaluation.sliding import choose_window, rows_that_fit, score_documents, windows

START = 3


def make_documents(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(VOCABULARY, size=length, dtype=np.uint16) for length in lengths]


def nats(logits, token):
    """-log softmax in float64, of one position."""
    logits = np.asarray(logits, dtype=np.float64)
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()) - logits[token])


def tiny_neox():
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.5,
    )
    return GPTNeoXForCausalLM(config).eval()


# Values


@pytest.mark.parametrize(("context", "stride"), [(5, 1), (5, 2), (5, 4), (5, 5), (1, 1), (12, 3)])
def test_every_token_by_hand(context, stride):
    model = tiny_model().double()
    # Shorter than the window, as long, one longer, several strides longer; and empty.
    documents = make_documents([0, 1, 4, 5, 6, 0, 13])
    expected = 0.0
    for document in documents:
        tokens = [START, *document.tolist()]
        for i in range(1, len(tokens)):
            first = stride * max(0, math.ceil((i - context) / stride))
            logits, _, _ = forward(model, tokens[first:i])
            expected += nats(logits[-1], tokens[i])
    for batch_size in (1, 4, None):
        actual = score_documents(
            model, documents, start_id=START, context=context, stride=stride, batch_size=batch_size
        )
        assert actual == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("make", [tiny_neox, tiny_model], ids=["gpt-neox", "tokenformer"])
def test_recipe_of_transformers(make, stride):
    model, context = make().double(), 8
    (document,) = make_documents([37])
    ids = torch.tensor([[START, *document.tolist()]])
    expected, before, length = 0.0, 0, ids.shape[1]
    for begin in range(0, length, stride):
        end = min(begin + context + 1, length)
        labels = ids[:, begin:end].clone()
        labels[:, : before - end] = -100
        predicted = (labels[:, 1:] != -100).sum().item()
        expected += model(input_ids=ids[:, begin:end], labels=labels).loss.item() * predicted
        before = end
        if end == length:
            break
    actual = score_documents(model, [document], start_id=START, context=context, stride=stride)
    assert actual == pytest.approx(expected, rel=1e-6)  # the loss of transformers is a float32


def test_model_that_always_gives_all_logits():
    class AllLogits(GPTNeoXForCausalLM):
        def forward(self, input_ids, use_cache):
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    model = tiny_neox()
    plain = AllLogits(model.config).eval()
    plain.load_state_dict(model.state_dict())
    documents = make_documents([20, 7])
    options = {"start_id": START, "context": 6, "stride": 2}
    assert score_documents(plain, documents, **options) == pytest.approx(
        score_documents(model, documents, **options), rel=1e-6
    )


def test_uniform_model_needs_the_logarithm_of_its_vocabulary():
    model = tiny_model()
    torch.nn.init.zeros_(model.model.embed_tokens.weight)
    documents = make_documents([9, 3])
    total = score_documents(model, documents, start_id=START, context=4, stride=2)
    assert total == pytest.approx(12 * math.log(VOCABULARY), rel=1e-6)


def test_documents_do_not_see_each_other():
    model = tiny_model()
    documents = make_documents([9, 12, 5])
    options = {"start_id": START, "context": 6, "stride": 3}
    alone = sum(score_documents(model, [document], **options) for document in documents)
    assert score_documents(model, documents, **options) == pytest.approx(alone, rel=1e-6)


def test_mode_is_put_back_and_dropout_is_off():
    model = tiny_neox()
    documents = make_documents([9])
    options = {"start_id": START, "context": 6, "stride": 3}
    expected = score_documents(model, documents, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    assert score_documents(model, documents, **options) == expected
    assert model.training


def test_progress_counts_every_token_once():
    counts: list[int] = []
    documents = make_documents([9, 0, 30])
    score_documents(tiny_model(), documents, start_id=START, context=6, stride=2, batch_size=3, on_tokens=counts.append)
    assert sum(counts) == 39
    assert len(counts) > 3


def test_nothing_to_predict():
    assert score_documents(tiny_model(), make_documents([0, 0]), start_id=START, context=6, stride=2) == 0.0


def test_loss_that_is_not_finite():
    model = tiny_model()
    torch.nn.init.constant_(model.model.norm.bias, math.inf)
    with pytest.raises(UserError, match="not finite in float32"):
        score_documents(model, make_documents([4]), start_id=START, context=4, stride=2)


# Windows


@given(st.integers(0, 200), st.integers(1, 40), st.integers(1, 40))
def test_windows_predict_every_token_once(length, context, stride):
    stride = min(stride, context)
    predicted = []
    for window in windows(7, length, context, stride):
        assert window.document == 7
        assert 0 < window.stop - window.start <= context
        for token in range(window.stop - window.scored + 1, window.stop + 1):
            # Input positions start .. token - 1 are before the token, and position 0 is the start token.
            seen = token - window.start
            assert seen == token if window.start == 0 else context - stride + 1 <= seen <= context
            predicted.append(token)
    assert predicted == list(range(1, length + 1))


def test_choice_of_the_window():
    model = tiny_model()  # takes 64 tokens
    assert choose_window(model, None, None) == (64, 32)
    assert choose_window(model, 7, None) == (7, 3)
    assert choose_window(model, 1, None) == (1, 1)
    assert choose_window(model, 7, 7) == (7, 7)
    long = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=4096, n_embd=8, n_layer=1, n_head=1))
    assert choose_window(long, None, None) == (2048, 1024)
    assert choose_window(long, 4096, None) == (4096, 2048)


@pytest.mark.parametrize(
    ("context", "stride", "words"),
    [
        (0, None, "context must be at least 1, got 0"),
        (65, None, "context 65 is longer than the 64 tokens the model takes"),
        (None, 0, "stride must be at least 1, got 0"),
        (None, -3, "stride must be at least 1, got -3"),
        (8, 9, "stride 9 is longer than the context of 8"),
    ],
)
def test_impossible_windows(context, stride, words):
    with pytest.raises(UserError, match=words):
        choose_window(tiny_model(), context, stride)


def test_rows_shrink_with_the_memory_of_the_logits():
    model = tiny_model()
    assert rows_that_fit(model, 64) == 64
    model.config.vocab_size = 50304
    # 3 float32 numbers per logit in 2 GiB
    assert rows_that_fit(model, 512) == (2 << 30) // (3 * 4 * 512 * 50304) == 6
    assert rows_that_fit(model, 100_000) == 1
