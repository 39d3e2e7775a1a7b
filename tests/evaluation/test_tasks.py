"""Tasks of lm-eval: it sees our model, its figures are those of its own command, and what cannot run is said."""

import json
import math
import subprocess
import sys

import pytest
import torch

from offline_tasks import DOCUMENTS, NAMES, write_tasks
from saved_model import save_model, train_tokenizer
from tokenformer import UserError
from tokenformer.evaluation import evaluate_sources, read_sources, run_tasks, select_tasks, tables
from tokenformer.evaluation.sliding import rows_that_fit

pytest.importorskip("lm_eval", reason="an optional dependency")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    return folder, save_model(folder), train_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("offline") / "tasks")


@pytest.fixture(scope="module")
def selection(folder):
    return select_tasks(NAMES, include_path=folder)


@pytest.fixture(scope="module")
def choice(folder):
    return select_tasks(["local_choice"], include_path=folder)


def log_probability(model, tokenizer, question, answer):
    """Of the answer after the question, and whether it is what greedy decoding would say; without any batch."""
    asked, both = tokenizer(question)["input_ids"], tokenizer(question + answer)["input_ids"]
    assert both[: len(asked)] == asked
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([both])).logits[0].double().log_softmax(-1)
    positions = range(len(asked), len(both))
    greedy = all(logs[i - 1].argmax().item() == both[i] for i in positions)
    return sum(logs[i - 1, both[i]].item() for i in positions), greedy


# Figures


def test_figures_by_hand(saved, selection):
    _, model, tokenizer = saved
    results = run_tasks(model, tokenizer, selection, batch_size=3)["results"]
    plain, normalised, nats = 0, 0, 0.0
    for document in DOCUMENTS:
        scores = [log_probability(model, tokenizer, document["text"], f" {c}")[0] for c in document["choices"]]
        plain += max(range(3), key=scores.__getitem__) == document["gold"]
        lengths = [len(choice) for choice in document["choices"]]
        normalised += max(range(3), key=lambda i: scores[i] / lengths[i]) == document["gold"]
        nats -= scores[document["gold"]]
    assert results["local_choice"]["acc,none"] == pytest.approx(plain / len(DOCUMENTS))
    assert results["local_choice"]["acc_norm,none"] == pytest.approx(normalised / len(DOCUMENTS))
    assert results["local_likelihood"]["perplexity,none"] == pytest.approx(math.exp(nats / len(DOCUMENTS)), rel=1e-4)


def test_rolling_perplexity_is_that_of_our_sliding_window(saved, folder, tmp_path):
    _, model, tokenizer = saved
    selection = select_tasks(["local_rolling"], include_path=folder)
    results = run_tasks(model, tokenizer, selection)["results"]["local_rolling"]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS), encoding="utf-8")
    ours = evaluate_sources(model, tokenizer, read_sources([str(file)], tokenizer), word_level=True)
    assert ours["bits_per_byte"] == pytest.approx(results["bits_per_byte,none"], rel=1e-6)
    assert ours["word_perplexity"] == pytest.approx(results["word_perplexity,none"], rel=1e-4)


@pytest.mark.parametrize("batch_size", [None, 1])
def test_generation_is_greedy_decoding(saved, tmp_path, batch_size):
    _, model, tokenizer = saved
    documents = [dict(document) for document in DOCUMENTS]
    for document in documents[:3]:
        ids = tokenizer(document["text"], return_tensors="pt")["input_ids"]
        generated = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        document["answer"] = tokenizer.decode(generated, skip_special_tokens=True).split("\n")[0]
    documents[3]["answer"] = documents[4]["answer"] = "something else"
    selection = select_tasks(["local_generate"], include_path=write_tasks(tmp_path / "tasks", documents))
    results = run_tasks(model, tokenizer, selection, batch_size=batch_size)["results"]
    assert results["local_generate"]["exact_match,none"] == pytest.approx(3 / 5)


def test_options_reach_lm_eval(saved, choice):
    _, model, tokenizer = saved
    results = run_tasks(model, tokenizer, choice, num_fewshot=2, limit=3, context=48)
    assert results["n-shot"]["local_choice"] == 2
    assert results["n-samples"]["local_choice"] == {"original": 5, "effective": 3}
    assert results["max_length"] == 48
    assert results["config"]["limit"] == 3
    # The options of one run are not those of the next.
    half = run_tasks(model, tokenizer, choice, limit=0.4)
    assert half["n-samples"]["local_choice"]["effective"] == 2
    assert half["n-shot"]["local_choice"] == 0


def test_automatic_batch_size_is_computed_from_the_longest_request(saved, folder, monkeypatch):
    _, model, tokenizer = saved
    selection = select_tasks(["local_choice", "local_rolling"], include_path=folder)
    lengths = []

    def fit(model, length):
        lengths.append(length)
        return rows_that_fit(model, length)

    monkeypatch.setattr("tokenformer.evaluation.tasks.rows_that_fit", fit)
    run_tasks(model, tokenizer, selection)
    longest = max(len(tokenizer(f"{d['text']} {c}")["input_ids"]) for d in DOCUMENTS for c in d["choices"])
    assert lengths[0] == longest
    assert lengths[-1] == 64  # rolling: the whole context


@pytest.mark.slow
def test_same_file_as_the_command_of_lm_eval(saved, folder, selection, tmp_path):
    path, model, tokenizer = saved
    ours = run_tasks(model, tokenizer, selection, batch_size=2, num_fewshot=1, limit=4)
    # With our classes registered, its command loads our folder.
    program = "import tokenformer.models; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    options = ["--model", "hf", "--model_args", f"pretrained={path}", "--device", "cpu", "--tasks", ",".join(NAMES)]
    options += ["--include_path", str(folder), "--output_path", str(tmp_path / "out.json")]
    options += ["--batch_size", "2", "--num_fewshot", "1", "--limit", "4"]
    subprocess.run([sys.executable, "-c", program, "run", *options], check=True, capture_output=True, timeout=600)
    (file,) = tmp_path.glob("out_*.json")
    theirs = json.loads(file.read_text(encoding="utf-8"))
    assert ours["results"] == theirs["results"]
    # What it alone adds, about the run of its command, is not in ours.
    about = {"model_source", "model_name", "model_name_sanitized", "task_hashes", "total_evaluation_time_seconds"}
    about |= {"system_instruction", "system_instruction_sha", "fewshot_as_multiturn", "chat_template"}
    assert set(ours) == set(theirs) - about - {"chat_template_sha"}
    for same in ("n-shot", "n-samples", "versions", "higher_is_better", "max_length"):
        assert ours[same] == theirs[same]


# Nothing is printed


def test_quiet_where_nobody_looks(saved, choice, tmp_path, monkeypatch, capfd):
    _, model, tokenizer = saved
    monkeypatch.chdir(tmp_path)  # git, which lm-eval asks for a commit, would complain here
    run_tasks(model, tokenizer, choice, limit=1)
    assert capfd.readouterr() == ("", "")


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "limit must be"),
        ({"limit": -1}, "limit must be"),
        ({"limit": 1.5}, "limit must be a number of documents, or a fraction"),
        ({"limit": math.nan}, "limit must be"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"context": 65}, "longer than the 64 tokens"),
        ({"context": 3}, "lm-eval cannot run local_choice: .* longer than the context"),
    ],
    ids=str,
)
def test_bad_options(saved, choice, options, words):
    with pytest.raises(UserError, match=words):
        run_tasks(*saved[1:], choice, **options)


def test_no_room_to_generate(saved, folder):
    selection = select_tasks(["local_generate"], include_path=folder)
    with pytest.raises(UserError, match=r"lm-eval cannot run local_generate: .*max tokens to generate \(6\)"):
        run_tasks(*saved[1:], selection, context=5)


def test_bad_folders_and_no_names(tmp_path):
    with pytest.raises(UserError, match="include-path: there is no folder"):
        select_tasks(["local_choice"], include_path=tmp_path / "absent")
    with pytest.raises(UserError, match="no tasks"):
        select_tasks([], include_path=tmp_path)


def test_local_data_that_is_missing(saved, tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    (folder / "documents.jsonl").unlink()
    selection = select_tasks(["local_choice"], include_path=folder)
    with pytest.raises(UserError, match=r"task 'local_choice' cannot be loaded .*: check its YAML file"):
        run_tasks(*saved[1:], selection)


@pytest.fixture(scope="module")
def all_tasks(tmp_path_factory):
    """lm-eval's own tasks and ours, looked for once: that takes several seconds."""
    from lm_eval.tasks import TaskManager

    folder = write_tasks(tmp_path_factory.mktemp("all") / "tasks")
    lines = "group: both\ntask: [local_choice, local_likelihood]\naggregate_metric_list: [{metric: acc}]\n"
    (folder / "both.yaml").write_text(lines, encoding="utf-8")
    return TaskManager(include_path=str(folder))


@pytest.mark.slow
def test_names_among_those_of_lm_eval(saved, all_tasks, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **kwargs: all_tasks)
    assert set(tables.paper_tasks()) <= set(all_tasks.all_subtasks)
    assert select_tasks(["local_*", "local_choice"]).names == sorted(NAMES)
    with pytest.raises(UserError, match="no task 'hellaswagg': did you mean 'hellaswag'"):
        select_tasks(["hellaswagg"])
    with pytest.raises(UserError, match="no task 'papers': did you mean 'paper'"):
        select_tasks(["papers"])
    with pytest.raises(UserError, match="no task '%%%': `lm-eval ls tasks` lists all"):
        select_tasks(["%%%"])
    paper = select_tasks(["paper"])
    assert paper.names == ["lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande"]
    # The first is LAMBADA, which no test may download.
    with pytest.raises(UserError, match=r"task 'lambada_openai' cannot be loaded .*--include-path"):
        run_tasks(*saved[1:], paper)


@pytest.mark.slow
def test_a_group(saved, all_tasks, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **kwargs: all_tasks)
    results = run_tasks(*saved[1:], select_tasks(["both"]))
    assert set(results["results"]) == {"both", "local_choice", "local_likelihood"}
    mean = (results["results"]["local_choice"]["acc,none"] + results["results"]["local_likelihood"]["acc,none"]) / 2
    assert results["groups"]["both"]["acc,none"] == pytest.approx(mean)
