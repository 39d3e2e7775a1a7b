"""`tokenformer eval`: what it prints and writes, and what it refuses."""

import json
import sys

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from offline_tasks import write_tasks
from saved_model import edit_config, save_model, train_tokenizer
from tokenformer.cli import main
from tokenformer.evaluation import evaluate_sources, read_sources, run_tasks, select_tasks

TEXT = "the quick brown fox jumps over the lazy dog\n" * 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    return folder, save_model(folder), train_tokenizer()


@pytest.fixture
def folder(saved):
    return str(saved[0])


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return str(write_tasks(tmp_path_factory.mktemp("offline") / "tasks"))


def run(capsys, *argv):
    capsys.readouterr()
    assert main(["eval", *argv, "--threads", "1", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys, *argv):
    capsys.readouterr()  # the progress of saving
    assert main(["eval", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokenformer eval: error: ")
    assert err.count("\n") == 1
    return err


# Perplexity


def test_perplexity(saved, capsys, folder, text, tmp_path):
    _, model, tokenizer = saved
    options = ["--context", "48", "--stride", "16", "--word-level"]
    out = run(capsys, folder, "--perplexity", text, *options, "--out", str(tmp_path / "p.json"))
    expected = evaluate_sources(
        model, tokenizer, read_sources([text], tokenizer), context=48, stride=16, word_level=True
    )
    row = out.splitlines()[2]
    for figure in ("loss", "bits_per_byte"):
        assert f" {expected[figure]:.4f} " in row
    assert f" {expected['perplexity']:,.1f} " in row
    assert f" {expected['word_perplexity']:.4g} " in row
    assert "context 48, stride 16" in out
    record = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert list(record) == ["kind", "model", "run", "results"]
    assert record["kind"] == "perplexity"
    assert record["results"] == expected
    assert record["model"] == {
        "name": "model",
        "path": folder,
        "model_type": "tokenformer",
        "parameters": model.num_parameters(),
        "dtype": "float32",
    }
    assert record["run"]["command"].startswith(f"tokenformer eval {folder} --perplexity {text} --context 48 ")
    assert record["run"]["device"] == "cpu"
    assert record["run"]["versions"]["torch"] == torch.__version__


def test_precision_and_batch_size(capsys, folder, text, tmp_path):
    losses, dtypes = [], []
    for options in (["--batch-size", "1"], ["--batch-size", "5"], ["--dtype", "bfloat16"]):
        run(capsys, folder, "--perplexity", text, *options, "--out", str(tmp_path / "p.json"))
        record = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
        losses.append(record["results"]["loss"])
        dtypes.append(record["model"]["dtype"])
    assert dtypes == ["float32", "float32", "bfloat16"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] != losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=0.03)


def test_model_of_another_kind(capsys, text, tmp_path):
    config = GPTNeoXConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    train_tokenizer().save_pretrained(tmp_path / "neox")
    out = run(capsys, str(tmp_path / "neox"), "--perplexity", text, "--out", str(tmp_path / "n.json"))
    assert "text.txt" in out
    assert json.loads((tmp_path / "n.json").read_text(encoding="utf-8"))["model"]["model_type"] == "gpt_neox"


# Tasks


def test_tasks(saved, capsys, folder, tasks, tmp_path):
    _, model, tokenizer = saved
    names = "local_choice,local_generate"
    options = ["--include-path", tasks, "--limit", "4", "--num-fewshot", "1", "--batch-size", "2"]
    out = run(capsys, folder, "--tasks", names, *options, "--out", str(tmp_path / "t.json"))
    selection = select_tasks(names.split(","), include_path=tasks)
    expected = run_tasks(model, tokenizer, selection, limit=4, num_fewshot=1, batch_size=2)
    record = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert list(record)[:4] == ["kind", "model", "run", "results"]
    assert record["kind"] == "tasks"
    assert record["results"] == expected["results"]
    # All of lm-eval's file is there, as it writes it.
    assert set(expected) == set(record) - {"kind", "model", "run"}
    for key in ("configs", "versions", "n-shot", "n-samples", "config", "group_subtasks"):
        assert record[key] == ({**expected[key], "model": folder} if key == "config" else expected[key])
    accuracy = expected["results"]["local_choice"]["acc,none"]
    assert f"| local_choice   | acc ↑         | {accuracy:.4f} |" in out
    assert "TokenFormer 150M" not in out


def test_names_may_be_separate_words(capsys, folder, tasks):
    out = run(capsys, folder, "--tasks", "local_choice", "local_generate", "--include-path", tasks, "--limit", "1")
    assert "local_choice" in out
    assert "local_generate" in out


def test_paper_rows_stand_beside_its_tasks(capsys, folder, tmp_path):
    tasks = write_tasks(tmp_path / "tasks")
    yaml = (tasks / "local_choice.yaml").read_text(encoding="utf-8")
    (tasks / "piqa.yaml").write_text(yaml.replace("task: local_choice", "task: piqa"), encoding="utf-8")
    out = run(capsys, folder, "--tasks", "piqa", "--include-path", str(tasks))
    rows = {line.split("|")[1].strip(): line.split("|") for line in out.splitlines() if line.count("|") == 10}
    assert rows["TokenFormer 150M"][5].strip() == "64.9"
    measured = next(line.split("|")[3] for line in out.splitlines() if line.startswith("| piqa | acc ↑"))
    assert float(rows["model"][5]) == pytest.approx(100 * float(measured))


# Bad input


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "there is nothing to evaluate: give one of --tasks NAMES, --perplexity FILES, --images SOURCE"),
        (["--perplexity", "TEXT", "--tasks", "piqa"], "--tasks and --perplexity were given"),
        (["--perplexity", "TEXT", "--stride", "0"], "stride must be at least 1, got 0"),
        (["--perplexity", "TEXT", "--stride", "-1"], "stride must be at least 1, got -1"),
        (["--perplexity", "TEXT", "--stride", "65"], "stride 65 is longer than the context of 64"),
        (["--perplexity", "TEXT", "--context", "65"], "longer than the 64 tokens the model takes"),
        (["--perplexity", "TEXT", "--context", "0"], "context must be at least 1"),
        (["--perplexity", "TEXT", "--batch-size", "0"], "batch_size must be at least 1"),
        (["--perplexity", "TEXT", "--batch-size", "some"], "batch_size: expected"),
        (["--perplexity", "TEXT", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["--perplexity", "TEXT", "--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["--perplexity", "TEXT", "--threads", "0"], "threads must be at least 1"),
        (["--perplexity", "TEXT", "--limit", "3"], "--limit belongs to --tasks and --images, not to --perplexity"),
        (["--perplexity", "TEXT", "--num-fewshot", "3"], "--num-fewshot belongs to --tasks"),
        (["--perplexity", "absent.txt"], "file not found: 'absent.txt'"),
        (["--perplexity", "absent/data"], "no file here"),
        (["--perplexity", "TEXT", "--strid", "3"], "did you mean '--stride'"),
        (["--tasks", "piqa", "--stride", "3"], "--stride belongs to --perplexity, not to --tasks"),
        (["--tasks", "piqa", "--word-level"], "--word-level belongs to --perplexity"),
        (["--tasks", "piqa", "--split", "dev"], "--split belongs to --perplexity"),
        (["--tasks", "piqa", "--limit", "0"], "limit must be a number of documents"),
        (["--tasks", "piqa", "--num-fewshot", "-1"], "num_fewshot must be at least 0"),
        (["--tasks", "piqa", "--batch-size", "-2"], "batch_size must be at least 1"),
        (["--tasks", "piqa", "--include-path", "absent"], "there is no folder 'absent'"),
        (["--tasks", ","], "no tasks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(capsys, folder, text, tmp_path, argv, words):
    target = tmp_path / "out.json"
    argv = [text if word == "TEXT" else word for word in argv]
    assert words in refused(capsys, folder, *argv, "--out", str(target))
    assert not target.exists()


def test_bad_texts(capsys, folder, tmp_path):
    for name, content, words in (("e.txt", b"", "holds no text"), ("l.txt", b"caf\xe9", "not UTF-8")):
        (tmp_path / name).write_bytes(content)
        assert words in refused(capsys, folder, "--perplexity", str(tmp_path / name))


def test_bad_models(capsys, text, tmp_path):
    assert "there is no folder" in refused(capsys, str(tmp_path / "absent"), "--perplexity", text)
    save_model(tmp_path / "model")
    edit_config(tmp_path / "model", vocab_size=100)
    assert "vocab_size is 100" in refused(capsys, str(tmp_path / "model"), "--perplexity", text)
    edit_config(tmp_path / "model", vocab_size=320)
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert "holds no tokenizer" in refused(capsys, str(tmp_path / "model"), "--perplexity", text)


def test_bad_targets(capsys, folder, text, tmp_path):
    assert "is a folder: give a file" in refused(capsys, folder, "--perplexity", text, "--out", str(tmp_path))
    target = str(tmp_path / "absent" / "out.json")
    assert "create it first" in refused(capsys, folder, "--perplexity", text, "--out", target)


def test_lm_eval_that_is_not_installed(capsys, folder, monkeypatch):
    monkeypatch.setattr("tokenformer.errors.find_spec", lambda name: None)
    assert "pip install 'tokenformer[eval]'" in refused(capsys, folder, "--tasks", "piqa")
    with pytest.raises(SystemExit):  # --help needs nothing
        main(["eval", "--help"])


def test_perplexity_does_not_load_lm_eval(capsys, folder, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "perplexity" in run(capsys, folder, "--perplexity", text)
