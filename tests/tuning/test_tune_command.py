"""`tokenformer tune`, and `generate` and `eval` with what it made; resuming, and what is refused."""

import json
import math
import shutil

import pytest
import torch

from saved_model import save_model
from tokenformer.cli import main
from tokenformer.data import PreparedData
from tokenformer.models.loading import load_image_classifier, load_model, load_tokenizer
from tokenformer.tuning import add_adapter, load_adapter, save_adapter
from tokenformer.tuning.files import CONFIG, WEIGHTS

STEPS = ["--batch-size", "4", "--threads", "1", "--precision", "fp32", "--compile", "off"]
SIZES = ["--qkv", "4", "--output", "2", "--ffn", "12"]


def tune(base, out, *options) -> int:
    learning = ["--learning-rate", "0.02", "--epochs", "0.5", "--name", "law"]
    return main(["tune", str(base.model), str(out), "--data", str(base.new), *SIZES, *learning, *STEPS, *options])


@pytest.fixture(scope="module")
def law(language, tmp_path_factory):
    out = tmp_path_factory.mktemp("law") / "law"
    assert tune(language, out) == 0
    return out


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def held_out_loss(model, data) -> float:
    """Mean next-token loss in nats, written out."""
    losses = []
    for row in PreparedData.load(data).held_out["input_ids"]:
        ids = torch.tensor(row)
        with torch.no_grad():
            probabilities = model(ids[None]).logits[0, :-1].double().softmax(-1)
        losses += [-math.log(p) for p in probabilities[torch.arange(len(ids) - 1), ids[1:]].tolist()]
    return sum(losses) / len(losses)


def test_the_adapter_learns_and_the_base_stays(language, law) -> None:
    model = load_model(language.model)
    before = held_out_loss(model, language.new)
    load_adapter(model, law)
    after = held_out_loss(model, language.new)
    summary = json.loads((law / "summary.json").read_text())
    assert after < before - 0.5
    assert summary["eval_loss"] == pytest.approx(after, abs=1e-5)
    assert summary["adapter_parameters"] == 2 * 2 * 32 * (3 * 4 + 2 + 12)
    assert not (law / "model.safetensors").exists()
    config = json.loads((law / CONFIG).read_text())
    assert (config["name"], config["qkv"], config["output"], config["ffn"]) == ("law", 4, 2, 12)
    assert config["base_model_name_or_path"] == str(language.model)
    for checkpoint in (law / "checkpoints").iterdir():
        assert not (checkpoint / "model.safetensors").exists()


def test_flops_leave_out_the_gradients_of_what_is_frozen(language, law) -> None:
    summary = json.loads((law / "summary.json").read_text())
    d, layers, length, vocabulary = 32, 2, 32, load_model(language.model).config.vocab_size
    old = layers * 2 * d * (3 * 16 + 16 + 48) + vocabulary * d
    new = layers * 2 * d * (3 * 4 + 2 + 12)
    attention = 4 * layers * d * length
    assert summary["flops"] / summary["tokens"] == 2 * (2 * old + 3 * new) + 3 * attention


def test_a_stopped_run_resumes_bitwise(language, law, tmp_path) -> None:
    steps = json.loads((law / "summary.json").read_text())["steps"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert tune(language, whole, "--save-every", str(steps // 2)) == 0
    shutil.copytree(whole, stopped)
    last = max((stopped / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.rmtree(last)
    for name in ("summary.json", WEIGHTS, CONFIG):
        (stopped / name).unlink()
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == [f"checkpoint-{steps // 2}"]
    assert tune(language, stopped, "--save-every", str(steps // 2)) == 0
    assert (stopped / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert (whole / WEIGHTS).read_bytes() == (law / WEIGHTS).read_bytes()


def test_a_complete_run_is_left_alone_and_another_one_is_refused(language, law, capsys) -> None:
    before = contents(law)
    assert tune(language, law) == 0
    assert "complete already" in capsys.readouterr().err
    assert tune(language, law, "--seed", "1") == 2
    assert "holds another run" in capsys.readouterr().err
    assert contents(law) == before


def test_generate_and_eval_take_it(language, law, capsys, tmp_path) -> None:
    model, tokenizer = load_model(language.model), load_tokenizer(language.model)
    load_adapter(model, law)
    ids = tokenizer("the court", return_tensors="pt")["input_ids"]
    unused = list(range(len(tokenizer), model.config.vocab_size))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, suppress_tokens=unused)
    options = ["--prompt", "the court", "--greedy", "--max-new-tokens", "12", "--threads", "1"]
    texts = []
    for adapter in ([], ["--adapter", str(law)], ["--adapter", f"{law}=0.0"]):
        assert main(["generate", str(language.model), *options, *adapter]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[1] == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    assert texts[0] == texts[2] != texts[1]

    record = tmp_path / "eval.json"
    options = ["--perplexity", str(language.new), "--out", str(record), "--threads", "1"]
    losses = []
    for adapter in ([], ["--adapter", str(law)]):
        assert main(["eval", str(language.model), *options, *adapter]) == 0
        found = json.loads(record.read_text())
        losses.append(found["results"]["sources"][0]["loss"])
    assert found["model"]["adapters"] == {"law": 1.0}
    assert losses[1] < losses[0] - 0.5


def test_an_image_classifier_is_tuned_and_evaluated(vision, tmp_path, capsys) -> None:
    before, out = contents(vision.model), tmp_path / "colours"
    options = ["--held-out", "0.25", "--epochs", "6", "--learning-rate", "0.02", "--name", "colours", *STEPS]
    assert main(["tune", str(vision.model), str(out), "--data", str(vision.new), *SIZES, *options]) == 0
    assert contents(vision.model) == before
    summary = json.loads((out / "summary.json").read_text())
    record = tmp_path / "eval.json"
    accuracies = []
    for adapter in ([], ["--adapter", str(out)]):
        images = ["--images", str(vision.new), "--out", str(record), "--threads", "1"]
        assert main(["eval", str(vision.model), *images, *adapter]) == 0
        accuracies.append(json.loads(record.read_text())["results"]["top1"])
    assert accuracies[1] > max(0.8, accuracies[0] + 0.2)
    assert summary["adapter_parameters"] == 2 * 2 * 16 * (3 * 4 + 2 + 12)
    model = load_image_classifier(vision.model)
    load_adapter(model, out)
    # Full count minus the weight gradients of the frozen blocks; 9 patches and the class token are 10 tokens.
    d, layers, old, new = 16, 2, 2 * 2 * 16 * (3 * 12 + 10 + 20), 2 * 2 * 16 * (3 * 4 + 2 + 12)
    projection, head, attention = d * 3 * 16, d * 3, 4 * layers * d * 100
    forward = 2 * (10 * (old + new) + 9 * projection + head) + attention
    assert summary["flops"] / summary["images"] == 3 * forward - 2 * 9 * projection - 2 * 10 * old
    capsys.readouterr()


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    assert main([*map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"tokenformer {argv[0]}: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to add: give the number of new tokens"),
        (["--qkv", "-1"], "qkv must be at least 0, got -1"),
        (["--ffn", "2", "--name", "base"], "the model has a segment 'base' already"),
        (["--ffn", "2", "--name", "a b"], "must be letters, digits and underscores"),
        (["--ffn", "2", "--epochs", "0"], "epochs must be positive, got 0"),
        (["--ffn", "2", "--learning-rate", "-1"], "optimizer.learning_rate must be positive"),
        (["--ffn", "2", "--held-out", "0.1"], "held_out is for images"),
        (["--fnn", "2"], "did you mean '--ffn'"),
    ],
)
def test_options_that_cannot_be_are_refused_and_nothing_is_written(
    language, tmp_path, capsys, options, message
) -> None:
    out = tmp_path / "out"
    assert message in refused(capsys, "tune", language.model, out, "--data", language.new, *options)
    assert list(tmp_path.iterdir()) == []


def test_data_and_models_that_do_not_fit_are_refused(language, vision, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert "there is no folder" in refused(capsys, "tune", tmp_path / "none", out, "--data", language.new, "--ffn", 2)
    save_model(tmp_path / "other")
    error = refused(capsys, "tune", tmp_path / "other", out, "--data", language.new, "--ffn", 2)
    assert "the tokenizer of" in error
    shutil.rmtree(tmp_path / "other")
    missing = tmp_path / "missing"
    assert f"{missing}" in refused(capsys, "tune", language.model, out, "--data", missing, "--ffn", 2)
    assert "data" in refused(capsys, "tune", language.model, out, "--ffn", 2)
    error = refused(capsys, "tune", vision.model, out, "--data", "digits", "--ffn", 2)
    assert "tells 3 classes apart, the images have 10" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_adapters_of_other_models_and_two_of_one_name_are_refused(verb, language, law, tmp_path, capsys) -> None:
    how = ["--prompt", "the", "--threads", 1] if verb == "generate" else ["--perplexity", language.new, "--threads", 1]
    ask = [verb, language.model, *how]
    other = load_model(language.model)
    other.model.norm.weight.data += 0.1
    add_adapter(other, "law", ffn=3)
    save_adapter(other, "law", tmp_path / "other")
    assert "was made for another model" in refused(capsys, *ask, "--adapter", tmp_path / "other")
    assert "the model has an adapter 'law' already" in refused(capsys, *ask, "--adapter", law, law)
    assert "holds no adapter" in refused(capsys, *ask, "--adapter", tmp_path)
    assert "must be finite" in refused(capsys, *ask, "--adapter", f"{law}=nan")


def test_a_model_without_tokens_takes_no_adapter(language, law, tmp_path, capsys) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path)
    load_tokenizer(language.model).save_pretrained(tmp_path)
    error = refused(capsys, "eval", tmp_path, "--perplexity", language.new, "--threads", 1, "--adapter", law)
    assert "no Pattention layers" in error
