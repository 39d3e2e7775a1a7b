"""`tokenformer export-hub` of an image classifier: it loads where this package is not installed, with the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tiny_vision import CLASSES, save_classifier, tiny_pixels
from tokenformer import TokenFormerForImageClassification
from tokenformer.cli import main

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
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

# As in the process that compares: the order of sums depends on both.
torch.set_num_threads(int(sys.argv[1]))
torch.use_deterministic_algorithms(True, warn_only=True)
folder = Path(sys.argv[2])
pixels = torch.load("pixels.pt")
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
model(pixels, labels=torch.tensor([0, 1])).loss.backward()
model.save_pretrained("again")
again = AutoModelForImageClassification.from_pretrained("again", trust_remote_code=True)
with torch.no_grad():
    found = {
        "logits": model(pixels).logits,
        "again": again(pixels).logits,
        "hidden": AutoModel.from_pretrained(folder, trust_remote_code=True)(pixels).last_hidden_state,
        "gradients": {name: p.grad for name, p in model.named_parameters()},
    }
torch.save(found, "found.pt")
(snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
exec(snippet.replace('"owner/tiny"', repr(str(folder))))
ours = [module for module in sys.modules if module.partition(".")[0] == "tokenformer"]
guesses = classify("photo.jpg", top_k=5)
Path("found.json").write_text(json.dumps({"module": type(model).__module__, "ours": ours, "guesses": guesses}))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A grown model, its exported folder, and what another process found in it."""
    root = tmp_path_factory.mktemp("elsewhere")
    torch.manual_seed(0)
    model = save_classifier(root / "model", grown=True, drop_path_rate=0.1)
    for name, parameter in model.named_parameters():
        if ".grown1." in name:  # zero keys would hide a mistake with them
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(root / "model")
    torch.save(tiny_pixels(), root / "pixels.pt")
    Image.effect_noise((30, 20), 80).convert("RGB").save(root / "photo.jpg")
    assert main(["export-hub", str(root / "model"), str(root / "out"), "--name", "owner/tiny"]) == 0
    (root / "check.py").write_text(ELSEWHERE, encoding="utf-8")
    command = [sys.executable, "check.py", str(torch.get_num_threads()), str(root / "out")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    return root, model, json.loads((root / "found.json").read_text())


def test_without_the_package_everything_is_the_same(elsewhere) -> None:
    root, model, found = elsewhere
    there = torch.load(root / "found.pt")
    assert found["ours"] == []
    assert found["module"].startswith("transformers_modules.")
    model(tiny_pixels(), labels=torch.tensor([0, 1])).loss.backward()
    with torch.no_grad():
        assert torch.equal(there["logits"], model(tiny_pixels()).logits)
        assert torch.equal(there["hidden"], model.forward_features(tiny_pixels()))
    assert torch.equal(there["again"], there["logits"])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(there["gradients"]) == set(gradients)
    for name, gradient in gradients.items():
        assert torch.equal(there["gradients"][name], gradient), name
        assert gradient.abs().max() > 0, name


def test_the_card_s_snippet_classifies_a_photo(elsewhere) -> None:
    root, model, found = elsewhere
    pixels = AutoImageProcessor.from_pretrained(root / "model")(Image.open(root / "photo.jpg"), return_tensors="pt")
    shares = model(pixels["pixel_values"]).logits.softmax(-1)[0]
    guesses = {guess["label"]: guess["score"] for guess in found["guesses"]}
    assert guesses == pytest.approx(dict(zip(CLASSES, shares.tolist(), strict=True)), rel=1e-5)


def test_what_is_in_the_folder(elsewhere) -> None:
    root, model, _ = elsewhere
    out = root / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["TokenFormerForImageClassification"]
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
    assert (out / "preprocessor_config.json").read_bytes() == (root / "model" / "preprocessor_config.json").read_bytes()
    assert not (out / "modeling_tokenformer.py").exists(), "the language model's code has no business here"
    written = "".join(path.read_text() for path in out.iterdir() if path.suffix in (".json", ".md", ".py"))
    assert str(root) not in written
    loaded = AutoModelForImageClassification.from_pretrained(out)
    assert type(loaded) is TokenFormerForImageClassification, "with the package its own classes are used"
    assert torch.equal(loaded(tiny_pixels()).logits, model(tiny_pixels()).logits)


def test_an_exported_folder_grows_like_any_other(elsewhere, tmp_path) -> None:
    root, model, _ = elsewhere
    assert main(["grow", str(root / "out"), str(tmp_path / "grown"), "--ffn", "50"]) == 0
    grown = AutoModelForImageClassification.from_pretrained(tmp_path / "grown")
    assert torch.equal(grown(tiny_pixels()).logits, model(tiny_pixels()).logits)
    assert "auto_map" not in json.loads((tmp_path / "grown" / "config.json").read_text()), "its code did not come along"


# The card

# By hand: two layers of 16 channels, segments of (12, 10, 20) and (0, 0, 12) tokens, nine patches of 4 x 4 x 3.
TOKENS = 2 * 2 * 16 * (3 * 12 + 10 + 20 + 12)
EMBEDDING = 48 * 16 + 16 + 10 * 16 + 16
TOTAL = TOKENS + EMBEDDING + 2 * 16 + (16 + 1) * 5
FORWARD = 2 * (10 * TOKENS + 9 * 48 * 16 + 16 * 5) + 4 * 2 * 16 * 10**2


def record(**changes: Any) -> dict[str, Any]:
    """What `tokenformer eval MODEL --images pictures/held-out --out FILE` writes, in part."""
    results = {
        "top1": 0.75,
        "top5": 1.0,
        "top": 5,
        "loss": 0.625,
        "classes": CLASSES,
        "images": 400,
        "unreadable": 0,
        "images_per_second": 10.0,
    }
    whole = {
        "kind": "images",
        "model": {"model_type": "tokenformer_vision", "parameters": TOTAL},
        "data": {"source": "/somewhere/held-out.parquet", "split": None, "fingerprint": "0", "limit": None},
        "results": results,
    }
    return {**whole, **changes}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    assert save_classifier(tmp_path / "model", grown=True).num_parameters() == TOTAL
    return tmp_path / "model"


def test_the_card_has_sizes_training_and_evaluation(model, tmp_path) -> None:
    summary = {"parameters": TOTAL, "images": 7_000_064, "epochs": 140.0, "eval_top1": 0.8125, "eval_loss": 0.5}
    (model / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (tmp_path / "eval.json").write_text(json.dumps(record()), encoding="utf-8")
    argv = ["export-hub", str(model), str(tmp_path / "out"), "--eval", str(tmp_path / "eval.json")]
    assert main([*argv, "--name", "owner/tiny"]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == "image-classification"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.text.splitlines() if "|" in line]
    rows = {cells[0]: cells[1:] for cells in lines}
    assert rows["parameters"] == [f"{TOTAL:,}"]
    assert rows["in parameter tokens"] == [f"{TOKENS:,}"]
    assert rows["in the embedding"] == [f"{EMBEDDING:,}"]
    assert rows["FLOPs per image, forward"] == [f"{FORWARD:.3g}"]
    assert rows["images"] == ["7,000,064"], "of training; the size of an image has another name"
    assert rows["image size"] == ["12 x 12 pixels, patches of 4"]
    assert rows["epochs"] == ["140"]
    assert rows["held-out top-1 accuracy"] == ["81.25%"]
    assert rows["held-out.parquet"][rows["source"].index("images")] == "400"
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["accuracy"].metric_value == 0.75
    assert results["accuracy"].task_type == "image-classification"
    assert results["accuracy"].dataset_name == "held-out.parquet"
    assert "/somewhere" not in card.content, "where the images lay concerns nobody"


def test_a_part_of_the_images_is_no_result_for_the_hub(model, tmp_path) -> None:
    limited = record(data={**record()["data"], "limit": 100})
    (tmp_path / "eval.json").write_text(json.dumps(limited), encoding="utf-8")
    argv = ["export-hub", str(model), str(tmp_path / "out"), "--eval", str(tmp_path / "eval.json")]
    assert main(argv) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results is None
    assert "Only a part of the images." in card.text


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda model: (model / "preprocessor_config.json").unlink(), "no image processor"),
        (lambda model: (model / "preprocessor_config.json").write_text("{"), "image processor"),
        (lambda model: (model / "model.safetensors").unlink(), "holds no weights"),
        (lambda model: (model / "eval.json").write_text(json.dumps(record(kind="predictions"))), "eval.json"),
        (
            lambda model: (model / "eval.json").write_text(json.dumps(record(model={"model_type": "vit"}))),
            "is of a 'vit' model",
        ),
    ],
    ids=["no processor", "damaged processor", "no weights", "another record", "another model"],
)
def test_what_cannot_be_exported_leaves_nothing_behind(damage, part, model, tmp_path, capsys) -> None:
    damage(model)
    evaluation = ["--eval", str(model / "eval.json")] if (model / "eval.json").exists() else []
    assert main(["export-hub", str(model), str(tmp_path / "out"), *evaluation]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tokenformer export-hub: error: ")
    assert part in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
