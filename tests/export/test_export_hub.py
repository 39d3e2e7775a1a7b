"""`tokenformer export-hub`: the folder loads where this package is not installed, and gives the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from saved_model import edit_config, save_model, train_tokenizer
from tokenformer import TokenFormerConfig, TokenFormerForCausalLM, TokenFormerModel
from tokenformer.cli import main
from tokenformer.models.loading import load_model

IDS = torch.arange(24).view(2, 12)
AUTO = {"trust_remote_code": True}

# Runs in a process of its own: `import tokenformer` fails there as where it is not installed.
ELSEWHERE = r"""
import json, re, sys
from pathlib import Path

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tokenformer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
sys.stdin = open("/dev/null")  # a question whether to trust the code would have no answer
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

# As in the process that compares: the order of sums depends on both.
torch.set_num_threads(int(sys.argv.pop(1)))
torch.use_deterministic_algorithms(True, warn_only=True)
auto = {"trust_remote_code": True}
found = {}
for name in sys.argv[1:]:
    folder = Path(name)
    ids = torch.arange(24).view(2, 12)
    model = AutoModelForCausalLM.from_pretrained(folder, **auto)
    tokenizer = AutoTokenizer.from_pretrained(folder, **auto)
    loss = model(ids, labels=ids).loss
    loss.backward()
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", **auto)
    prompt = tokenizer("the quick", return_tensors="pt")
    with torch.no_grad():
        torch.save(
            {
                "logits": model(ids).logits,
                "hidden": AutoModel.from_pretrained(folder, **auto)(ids).last_hidden_state,
                "again": again(ids).logits,
                "gradients": {name: p.grad for name, p in model.named_parameters()},
                "generated": model.generate(**prompt, max_new_tokens=8, do_sample=False),
                "beams": model.generate(**prompt, max_new_tokens=8, do_sample=False, num_beams=3),
            },
            folder / "found.pt",
        )
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    exec(snippet.replace('"owner/tiny"', repr(str(folder))))
    found[name] = {
        "classes": [type(x).__module__ for x in (model, AutoConfig.from_pretrained(folder, **auto))],
        "ids": tokenizer("the quick brown fox")["input_ids"],
        "ours": [module for module in sys.modules if module.partition(".")[0] == "tokenformer"],
    }

# The package is imported after its exported copy was: they do not get into each other's way.
del sys.meta_path[0]
import tokenformer.models
late = AutoModelForCausalLM.from_pretrained(sys.argv[1], **auto)
before = torch.load(Path(sys.argv[1]) / "found.pt")["logits"]
found["late"] = [type(late).__module__, torch.equal(late(ids).logits, before)]
Path(sys.argv[1], "found.json").write_text(json.dumps(found))
"""


def _randomise(model: TokenFormerForCausalLM, folder: Path) -> None:
    """New tokens have zero keys, which would hide a mistake with them."""
    for name, parameter in model.named_parameters():
        if ".grown1." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models of one and of two segments, their exported folders, and what another process found in these."""
    root = tmp_path_factory.mktemp("elsewhere")
    torch.manual_seed(0)
    models = {}
    for name, grown in (("plain", False), ("grown", True)):
        models[name] = save_model(root / f"{name}-model", grown=grown, normalization="l2_gelu" if grown else "gelu_l2")
        _randomise(models[name], root / f"{name}-model")
        assert main(["export-hub", str(root / f"{name}-model"), str(root / name), "--name", "owner/tiny"]) == 0
    (root / "check.py").write_text(ELSEWHERE, encoding="utf-8")
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules")}
    threads = str(torch.get_num_threads())
    command = [sys.executable, str(root / "check.py"), threads, *(str(root / name) for name in models)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((root / "plain" / "found.json").read_text())
    return root, models, found


@pytest.mark.parametrize("name", ["plain", "grown"])
def test_without_the_package_everything_is_the_same(elsewhere, name) -> None:
    root, models, found = elsewhere
    folder, model = root / name, models[name]
    there = torch.load(folder / "found.pt")
    assert found[str(folder)]["ours"] == []
    assert all(module.startswith("transformers_modules.") for module in found[str(folder)]["classes"])

    loss = model(IDS, labels=IDS).loss
    loss.backward()
    with torch.no_grad():
        assert torch.equal(there["logits"], model(IDS).logits)
        assert torch.equal(there["hidden"], model.model(IDS).last_hidden_state)
    assert torch.equal(there["again"], there["logits"])
    gradients = dict(model.named_parameters())
    assert set(there["gradients"]) == set(gradients)
    for key, parameter in gradients.items():
        assert torch.equal(there["gradients"][key], parameter.grad), key
        assert parameter.grad.abs().max() > 0, key

    tokenizer = train_tokenizer()
    assert found[str(folder)]["ids"] == tokenizer("the quick brown fox")["input_ids"]
    prompt = tokenizer("the quick", return_tensors="pt")
    for key, beams in (("generated", 1), ("beams", 3)):
        expected = model.generate(**prompt, max_new_tokens=8, do_sample=False, num_beams=beams)
        assert torch.equal(there[key], expected)


def test_the_package_may_be_imported_afterwards(elsewhere) -> None:
    assert elsewhere[2]["late"] == ["tokenformer.models.modeling_tokenformer", True]


@pytest.mark.parametrize("trust", [True, False, None])
def test_with_the_package_its_own_classes_are_used(elsewhere, trust) -> None:
    root, models, _ = elsewhere
    kwargs = {} if trust is None else {"trust_remote_code": trust}
    model = AutoModelForCausalLM.from_pretrained(root / "grown", **kwargs)
    assert type(model) is TokenFormerForCausalLM
    assert type(AutoModel.from_pretrained(root / "grown", **kwargs)) is TokenFormerModel
    assert type(AutoConfig.from_pretrained(root / "grown", **kwargs)) is TokenFormerConfig
    assert torch.equal(model(IDS).logits, models["grown"](IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(root / "grown", **kwargs)
    assert tokenizer("the fox")["input_ids"] == train_tokenizer()("the fox")["input_ids"]


def test_what_is_in_the_folder(elsewhere) -> None:
    folder = elsewhere[0] / "grown"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["TokenFormerForCausalLM"]
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 0
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    assert stated["model_max_length"] == 64
    # Traces of the folder that it came from would be published with it.
    written = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md", ".py"))
    assert str(elsewhere[0]) not in written
    assert "local_files_only" not in stated


def test_an_exported_folder_is_a_model_like_any_other(elsewhere, tmp_path, capsys) -> None:
    exported = elsewhere[0] / "grown"
    assert main(["export-hub", str(exported), str(tmp_path / "twice")]) == 0
    code = {path.name: path.read_bytes() for path in exported.glob("*.py")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "twice").glob("*.py")} == code
    assert main(["grow", str(exported), str(tmp_path / "grown"), "--ffn", "50"]) == 0
    assert torch.equal(load_model(tmp_path / "grown")(IDS).logits, load_model(exported)(IDS).logits)
    assert "auto_map" not in json.loads((tmp_path / "grown" / "config.json").read_text()), "its code did not come along"
    capsys.readouterr()
    assert main(["info", str(exported)]) == 0
    assert "grown1" in capsys.readouterr().out


def test_weights_in_bfloat16(elsewhere, tmp_path) -> None:
    assert main(["export-hub", str(elsewhere[0] / "grown-model"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.ffn.segments.grown1.key").dtype == torch.bfloat16
        scale = file.get_tensor("model.layers.0.ffn.scale")
    assert scale.dtype == torch.float32
    assert scale == elsewhere[1]["grown"].model.layers[0].ffn.scale
    assert "bfloat16" in (tmp_path / "out" / "README.md").read_text()


# What cannot be exported

PERPLEXITY = {
    "kind": "perplexity",
    "model": {"model_type": "tokenformer", "parameters": 18752},
    "results": {"sources": [], "context": 8, "stride": 4},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    assert save_model(tmp_path / "model").num_parameters() == PERPLEXITY["model"]["parameters"]
    return tmp_path / "model"


def refused(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """Code 2, one line with all of `parts`, and nothing new on disk."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    folders = {path for path in tmp_path.rglob("*") if path.is_dir()}
    capsys.readouterr()
    assert main(["export-hub", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("tokenformer export-hub: error: ")
    assert all(part in line for part in parts), line
    assert captured.out == ""
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert {path for path in tmp_path.rglob("*") if path.is_dir()} == folders


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--dtype", "int8"], ["unknown dtype 'int8'", "bfloat16"]),
        (["--name", "a/b/c"], ["name 'a/b/c'", "owner/name"]),
        (["--name", "me/-x"], ["name 'me/-x'"]),
        (["--licence", "mit"], ["--licence", "did you mean '--license'"]),
        (["--eval", "nowhere.json"], ["no file", "nowhere.json"]),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else None,
)
def test_options_that_cannot_be(options, parts, model, tmp_path, capsys) -> None:
    refused([str(model), str(tmp_path / "out"), *options], tmp_path, capsys, *parts)


def test_folders_that_are_missing_or_taken(model, tmp_path, capsys) -> None:
    refused([str(tmp_path / "none"), str(tmp_path / "out")], tmp_path, capsys, "no folder", "none")
    refused([str(model), str(model)], tmp_path, capsys, "exists already")
    refused([str(model), str(model / "config.json")], tmp_path, capsys, "config.json exists already")


def test_models_that_are_not_whole(model, tmp_path, capsys) -> None:
    (model / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    refused([str(model), str(tmp_path / "out")], tmp_path, capsys, "holds no tokenizer")
    (tmp_path / "tokenizer.json").rename(model / "tokenizer.json")
    edit_config(model, model_type="llama")
    refused([str(model), str(tmp_path / "out")], tmp_path, capsys, "model_type is 'llama'")


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ("{", ["cannot be read as JSON"]),
        ("[]", ["does not hold a JSON object"]),
        ({}, ["not a file that `tokenformer eval --out` wrote"]),
        ({**PERPLEXITY, "kind": "taste"}, ["not a file that `tokenformer eval --out` wrote"]),
        ({**PERPLEXITY, "results": {}}, ["not a file that `tokenformer eval --out` wrote"]),
        ({**PERPLEXITY, "results": {"sources": [{"name": 3}]}}, ["not a file that `tokenformer eval --out` wrote"]),
        ({**PERPLEXITY, "kind": "tasks", "results": {"a": 1}}, ["not a file that `tokenformer eval --out` wrote"]),
        ({**PERPLEXITY, "model": {"model_type": "gpt_neox", "parameters": 18752}}, ["'gpt_neox' model"]),
        ({**PERPLEXITY, "model": {"model_type": "tokenformer", "parameters": 7}}, ["with 7 parameters", "has 18752"]),
    ],
    ids=["cut", "list", "empty", "kind", "results", "source", "tasks", "architecture", "size"],
)
def test_evaluations_that_are_not_of_this_model(record, parts, model, tmp_path, capsys) -> None:
    text = record if isinstance(record, str) else json.dumps(record)
    (tmp_path / "eval.json").write_text(text, encoding="utf-8")
    options = ["--eval", str(tmp_path / "eval.json")]
    refused([str(model), str(tmp_path / "out"), *options], tmp_path, capsys, "eval.json", *parts)


@pytest.mark.parametrize(
    ("summary", "part"),
    [
        ("{", "cannot be read"),
        ('{"parameters": 7}', "with 7 parameters"),
        ('{"parameters": 18752, "tokens": []}', "not a summary"),
    ],
    ids=["cut", "size", "type"],
)
def test_summaries_that_are_not_of_this_model(summary, part, model, tmp_path, capsys) -> None:
    (model / "summary.json").write_text(summary, encoding="utf-8")
    refused([str(model), str(tmp_path / "out")], tmp_path, capsys, "summary.json", part)
