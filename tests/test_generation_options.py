"""Beams, an assistant, compiled decoding, precision and device of `tokenformer generate`; text cut at stop strings."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch._inductor.exc import InductorError
from transformers import PreTrainedTokenizerFast

from lively import save_lively_model
from saved_model import save_model, train_tokenizer
from tokenformer import UserError
from tokenformer.cli import main
from tokenformer.generation import TextStream, generate_text, load_assistant, static_cache_options

PROMPT = "the quick"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    return folder, save_lively_model(folder), train_tokenizer()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(1)
    return folder, save_lively_model(folder, num_hidden_layers=1)


def ids_by_hand(large, prompt, steps):
    """The likeliest continuation, without a cache and without transformers' generate."""
    _, model, tokenizer = large
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(steps):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1, : len(tokenizer)]
        ids.append(logits.argmax().item())
    return ids


def text_by_hand(large, prompt, steps):
    _, _, tokenizer = large
    return tokenizer.decode(ids_by_hand(large, prompt, steps)[len(tokenizer(prompt)["input_ids"]) :])


def run(capsys, *argv):
    assert main(["generate", *map(str, argv), "--prompt", PROMPT, "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys, *argv):
    assert main(["generate", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokenformer generate: error: ")
    assert err.count("\n") == 1
    return err


# Beams


def test_beams_find_the_likeliest_text(large):
    """As many beams as entries, and two steps: the search is exhaustive."""
    _, model, tokenizer = large
    ids = tokenizer(PROMPT)["input_ids"]
    # A text that ends is a candidate too, but here ending is not among the likeliest.
    with torch.no_grad():
        first = model(torch.tensor([ids])).logits[0, -1, : len(tokenizer)].log_softmax(-1)
        longer = torch.cat([torch.tensor([ids]).expand(len(first), -1), torch.arange(len(first))[:, None]], 1)
        second = model(longer).logits[:, -1, : len(tokenizer)].log_softmax(-1)
    best = (first[:, None] + second).flatten().argmax().item()
    expected = tokenizer.decode(divmod(best, len(tokenizer)))
    pieces = list(generate_text(model, tokenizer, PROMPT, max_new_tokens=2, num_beams=len(tokenizer)))
    assert "".join(pieces) == expected


def test_beams_on_the_command_line(large, capsys):
    folder, model, tokenizer = large
    out = run(capsys, folder, "--num-beams", 4, "--max-new-tokens", 12)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    unused = list(range(len(tokenizer), model.config.vocab_size))
    options = {"num_beams": 4, "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "suppress_tokens": unused}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert out == tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True) + "\n"


# Assistant


def test_assisted_text_is_the_greedy_one(large, small, capsys):
    out = run(capsys, large[0], "--assistant", small[0], "--greedy", "--max-new-tokens", 40)
    assert out == text_by_hand(large, PROMPT, 40) + "\n"


def test_guesses_of_an_assistant_save_steps(large):
    """The model assists itself: each of 40 tokens is guessed in one step, and few more steps check many at once."""
    _, model, tokenizer = large
    steps = []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    try:
        pieces = list(generate_text(model, tokenizer, PROMPT, max_new_tokens=40, greedy=True, assistant=model))
    finally:
        hook.remove()
    assert "".join(pieces) == text_by_hand(large, PROMPT, 40)
    assert 40 <= len(steps) < 60


def test_assisted_sampling_repeats_with_its_seed(large, small):
    def text(seed):
        options = {"max_new_tokens": 8, "seed": seed, "temperature": 2.0}
        return "".join(generate_text(*large[1:], PROMPT, assistant=small[1], **options))

    assert text(3) == text(3) != text(4)


def test_assistant_with_another_tokenizer(large, small, capsys, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(small[0], other)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(other)
    error = refused(capsys, large[0], "--assistant", other, "--prompt", PROMPT)
    assert f"the assistant '{other}' has another tokenizer" in error
    with pytest.raises(UserError, match="another tokenizer"):
        load_assistant(other, large[2])


def test_assistant_with_another_vocabulary(large, capsys, tmp_path):
    save_model(tmp_path, vocab_size=352)
    capsys.readouterr()
    error = refused(capsys, large[0], "--assistant", tmp_path, "--prompt", PROMPT)
    assert "the assistant's vocab_size is 352, the model's 320" in error


def test_assistant_that_is_not_there(large, capsys, tmp_path):
    assert "there is no folder" in refused(capsys, large[0], "--assistant", tmp_path / "absent")


# Compiled decoding


@pytest.mark.slow
def test_compiled_text_is_the_greedy_one(small, capsys):
    out = run(capsys, small[0], "--compile", "--greedy", "--max-new-tokens", 40)
    assert out == text_by_hand((*small, TOKENIZER), PROMPT, 40) + "\n"


def test_decoding_is_compiled(large):
    """One graph without breaks, for each of the steps after the prompt."""
    _, model, tokenizer = large
    options = static_cache_options()
    steps = []

    def backend(graph, inputs):
        return lambda *args: steps.append(len(args)) or graph.forward(*args)

    options["compile_config"].backend = backend
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    unused = list(range(len(tokenizer), model.config.vocab_size))
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, suppress_tokens=unused, **options
    )
    assert found[0].tolist() == ids_by_hand(large, PROMPT, 10)
    assert len(steps) == 9


def test_compiler_that_fails(large, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise InductorError(RuntimeError("no working C++ compiler"), None)

    monkeypatch.setattr("tokenformer.TokenFormerForCausalLM.generate", fail)
    error = refused(capsys, large[0], "--compile", "--max-new-tokens", 5)
    assert "torch.compile does not work here" in error
    assert "leave out compile" in error


# Precision and device


def test_dtype(large, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "tokenformer.generation.generate_text", lambda model, *a, **k: seen.append(model.dtype) or iter(())
    )
    run(capsys, large[0], "--dtype", "bfloat16", "--device", "cpu")
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-beams", "0"], "num_beams must be at least 1, got 0"),
        (["--num-beams", "2", "--greedy"], "greedy and num_beams exclude each other"),
        (["--num-beams", "2", "--compile"], "num_beams and compile exclude each other"),
        (["--temperature", "1e-40"], "temperature must be positive"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(large, capsys, argv, words):
    assert words in refused(capsys, large[0], *argv)


@pytest.mark.parametrize("way", ["num_beams", "compile"])
def test_an_assistant_excludes(large, small, way):
    with pytest.raises(UserError, match="exclude each other: give one of them"):
        generate_text(*large[1:], PROMPT, assistant=small[1], **{way: 2})


# Text as it comes


CHUNKS = st.lists(st.text(alphabet="ab é日🚀\n", max_size=3), max_size=12)  # the rocket is several tokens
TOKENIZER = train_tokenizer()


def streamed(ids, stop=()):
    stream = TextStream(TOKENIZER, TOKENIZER("the")["input_ids"], stop)
    pieces = [stream.add(token) for token in ids]
    return pieces, stream.rest(), stream.stopped


STOP = st.lists(st.text(alphabet="ab é\n", min_size=1, max_size=4), max_size=3)


@settings(max_examples=200)
@given(chunks=CHUNKS, cut=st.integers(0, 3), stop=STOP)
def test_streamed_text_ends_before_the_first_stop_string(chunks, cut, stop):
    ids = [token for chunk in chunks for token in TOKENIZER(chunk)["input_ids"]]
    ids = ids[: len(ids) - cut]  # perhaps inside a character
    pieces, rest, stopped = streamed(ids, stop)
    whole = TOKENIZER.decode(ids)
    # The texts on the way that end with a whole character, until one holds a stop string.
    texts = [text for n in range(len(ids)) if not (text := TOKENIZER.decode(ids[: n + 1])).endswith("\ufffd")]
    ends = (min((text.find(s) for s in stop if s in text), default=None) for text in [*texts, whole])
    end = next((end for end in ends if end is not None), None)
    assert stopped == (end is not None)
    assert "".join(pieces) + rest == whole[:end]


@settings(max_examples=100)
@given(chunks=CHUNKS)
def test_streamed_text_comes_as_soon_as_its_characters_are_whole(chunks):
    ids = [token for chunk in chunks for token in TOKENIZER(chunk)["input_ids"]]
    pieces, rest, _ = streamed(ids)
    for n in range(len(ids)):
        text = TOKENIZER.decode(ids[: n + 1])
        if not text.endswith("\ufffd"):
            assert "".join(pieces[: n + 1]) == text
    assert rest == ""


def test_only_what_may_become_a_stop_string_is_held_back():
    pieces, rest, stopped = streamed([TOKENIZER(c)["input_ids"][0] for c in "aab ab"], ["abb"])
    assert pieces == ["", "a", "", "ab ", "", ""]
    assert rest == "ab"
    assert not stopped
