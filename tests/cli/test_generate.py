"""`tokenformer generate` and `generate_text`, against `model.generate` and against decoding everything at once."""

import io
import random
import sys
import threading

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saved_model import END, LINES, edit_config, save_model, train_tokenizer
from tokenformer import TokenFormerForCausalLM, UserError
from tokenformer.cli import main
from tokenformer.generation import generate_text


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    return folder, save_model(folder), train_tokenizer()


@pytest.fixture
def folder(saved):
    return str(saved[0])


class Script(TokenFormerForCausalLM):
    """A model whose likeliest continuation is a given list of ids."""

    def play(self, prompt_length, ids):
        self.script, self.prompt_length = ids, prompt_length
        return self

    def forward(self, input_ids, past_key_values=None, **kwargs):
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        out = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
        out.logits = torch.full_like(out.logits, -10.0)
        out.logits[:, -1, self.script[seen + input_ids.shape[1] - self.prompt_length]] = 10.0
        return out


def played(saved, ids, prompt="the"):
    """What generate_text gives for a model that continues `prompt` with `ids`."""
    _, model, tokenizer = saved
    model = Script(model.config).eval().play(len(tokenizer(prompt)["input_ids"] or [0]), ids)
    return list(generate_text(model, tokenizer, prompt, max_new_tokens=len(ids), greedy=True))


def reference(saved, prompt, **options):
    """The continuation by transformers alone."""
    _, model, tokenizer = saved
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    torch.manual_seed(options.pop("seed", 0))
    unused = list(range(len(tokenizer), model.config.vocab_size))
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, suppress_tokens=unused, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def run(capsys, *argv):
    assert main(["generate", *argv, "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys, *argv):
    assert main(["generate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokenformer generate: error: ")
    assert err.count("\n") == 1
    return err


# Text


def test_greedy_text_is_that_of_transformers(saved, capsys, folder):
    expected = reference(saved, LINES[0], max_new_tokens=20, do_sample=False)
    out = run(capsys, folder, "--prompt", LINES[0], "--max-new-tokens", "20", "--greedy")
    assert out == expected + "\n"


def test_sampled_text_is_that_of_transformers(saved):
    _, model, tokenizer = saved
    options = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}
    expected = reference(saved, "the fox", max_new_tokens=30, do_sample=True, seed=5, **options)
    pieces = generate_text(model, tokenizer, "the fox", max_new_tokens=30, seed=5, **options)
    assert "".join(pieces) == expected


def test_seed_repeats_and_matters(capsys, folder):
    first, again, other = (
        run(capsys, folder, "--prompt", "the", "--max-new-tokens", "20", "--seed", seed) for seed in ("3", "3", "4")
    )
    assert first == again != other


def test_random_state_is_put_back(saved):
    _, model, tokenizer = saved
    before = torch.random.get_rng_state()
    list(generate_text(model, tokenizer, "the", max_new_tokens=5))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_random_ids_are_whole_characters(saved, seed):
    tokenizer = saved[2]
    chosen = random.Random(seed)
    text = "".join(chosen.choice("aé日😀🦊 \n") for _ in range(12))
    ids = tokenizer(text)["input_ids"]
    pieces = played(saved, ids)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_text_comes_in_pieces(saved):
    ids = saved[2](LINES[0])["input_ids"]
    pieces = played(saved, ids)
    assert len(pieces) == len(ids) > 5


@pytest.mark.parametrize("seed", range(3))
def test_bytes_that_are_no_text_do_not_stop_it(saved, seed):
    tokenizer = saved[2]
    chosen = random.Random(seed)
    ids = [chosen.randrange(1, len(tokenizer)) for _ in range(40)]
    whole = tokenizer.decode(tokenizer("the")["input_ids"] + ids)
    assert "the" + "".join(played(saved, ids)) == whole


def test_character_cut_by_the_limit(saved):
    tokenizer = saved[2]
    ids = tokenizer("a\U0001f680")["input_ids"]  # not in the training text: several tokens
    assert len(ids) > 2
    assert "".join(played(saved, ids)) == "a\U0001f680"
    assert "".join(played(saved, ids[:-1])) == tokenizer.decode(ids[:-1]) == "a\ufffd"


def test_end_of_text_ends_it_and_is_not_shown(saved):
    tokenizer = saved[2]
    first, rest = tokenizer("the fox")["input_ids"], tokenizer(" more")["input_ids"]
    assert "".join(played(saved, [*first, tokenizer.eos_token_id, *rest])) == "the fox"


def test_empty_prompt_begins_a_text(saved, capsys, folder):
    expected = reference(saved, END, max_new_tokens=10, do_sample=False)
    assert run(capsys, folder, "--max-new-tokens", "10", "--greedy") == expected + "\n"


def test_padding_rows_of_the_embedding_are_never_sampled(saved):
    _, model, tokenizer = saved
    model = Script(model.config).eval().play(1, [len(tokenizer) + 1] * 3)
    assert "\ufffd" not in "".join(generate_text(model, tokenizer, "", max_new_tokens=3, greedy=True))
    generated = []
    original = model.generate
    model.generate = lambda *args, **kwargs: generated.append(original(*args, **kwargs))
    list(generate_text(model, tokenizer, "", max_new_tokens=3, greedy=True))
    assert generated[0].max() < len(tokenizer)


# Prompt from standard input


def stdin(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def test_prompt_from_standard_input(saved, capsys, folder, monkeypatch):
    stdin(monkeypatch, "größer\n".encode())
    out = run(capsys, folder, "--prompt", "-", "--max-new-tokens", "10", "--greedy")
    assert out == reference(saved, "größer", max_new_tokens=10, do_sample=False) + "\n"


def test_standard_input_that_is_no_text(capsys, folder, monkeypatch):
    stdin(monkeypatch, b"caf\xe9 ")
    assert "not UTF-8" in refused(capsys, folder, "--prompt", "-")


def test_terminal_that_cannot_show_a_character(saved, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr("tokenformer.generation.generate_text", lambda *a, **k: iter(["caf", "é"]))
    assert main(["generate", folder, "--prompt", "x"]) == 0
    sys.stdout.flush()
    assert raw.getvalue() == b"caf?\n"


# Behaviour of the iterator


def test_dropping_the_iterator_stops_the_model(saved):
    pieces = generate_text(*saved[1:], "the", max_new_tokens=50, temperature=5.0, top_k=0)
    next(pieces)
    pieces.close()
    assert "tokenformer-generate" not in {thread.name for thread in threading.enumerate()}


def test_error_in_the_model_arrives(saved):
    _, model, tokenizer = saved
    model = Script(model.config).play(1, [])
    with pytest.raises(IndexError):
        list(generate_text(model, tokenizer, "", max_new_tokens=3))


def test_options_are_checked_before_anything_runs(saved):
    with pytest.raises(UserError):
        generate_text(*saved[1:], "the", max_new_tokens=0)


def test_threads(capsys, folder):
    torch.set_num_threads(2)
    run(capsys, folder, "--prompt", "the", "--max-new-tokens", "2")
    assert torch.get_num_threads() == 1


# Bad input


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-new-tokens", "-1"], "max_new_tokens must be at least 1, got -1"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--max-new-tokens", "many"], "expected int"),
        (["--temperature", "0"], "use greedy"),
        (["--temperature", "-1"], "temperature must be positive, got -1"),
        (["--temperature", ".inf"], "temperature must be positive"),
        (["--top-k", "-1"], "top_k must be at least 0"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--top-p", "1.5"], "at most 1, got 1.5"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--seed", "x"], "expected int"),
        (["--tempreature", "1"], "did you mean '--temperature'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(capsys, folder, argv, words):
    assert words in refused(capsys, folder, "--prompt", "the", *argv)


def test_temperature_does_not_matter_when_greedy(capsys, folder):
    run(capsys, folder, "--prompt", "the", "--greedy", "--temperature", "0", "--max-new-tokens", "2")


def test_longer_than_the_context(capsys, folder):
    error = refused(capsys, folder, "--prompt", "the", "--max-new-tokens", "64")
    assert "context of 64 tokens" in error
    assert "set max_new_tokens to 63" in error
    error = refused(capsys, folder, "--prompt", "the " * 100, "--max-new-tokens", "10")
    assert "shorten the prompt to 54 tokens" in error
    assert "set max_new_tokens" not in error
    run(capsys, folder, "--prompt", "the", "--max-new-tokens", "63", "--greedy")


def test_bad_folders(capsys, tmp_path):
    assert "no folder" in refused(capsys, str(tmp_path / "absent"), "--prompt", "the")
    save_model(tmp_path)
    edit_config(tmp_path, vocab_size=100)
    capsys.readouterr()  # the progress of saving
    assert "vocab_size is 100" in refused(capsys, str(tmp_path), "--prompt", "the")
    edit_config(tmp_path, vocab_size=320)
    (tmp_path / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(capsys, str(tmp_path), "--prompt", "the")


def test_tokenizer_of_another_model(saved):
    words = {"the": 0, "fox": 5000}
    other = Tokenizer(models.WordLevel(words, unk_token="the"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=other)
    with pytest.raises(UserError, match=r"id 5000 .* vocab_size is 320"):
        generate_text(saved[1], tokenizer, "fox")
    with pytest.raises(UserError, match="no end-of-text token to begin with: give a prompt"):
        generate_text(saved[1], tokenizer, "")
