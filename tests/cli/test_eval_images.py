"""`tokenformer eval --images`: what it prints and writes, and what it refuses."""

import json
import math

import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from transformers import AutoImageProcessor, AutoModelForImageClassification

from image_samples import CLASSES, random_image, save_vit, write_class_folders
from saved_model import edit_config, save_model
from tokenformer.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A classifier of three classes, its images with labels, and some without."""
    place = tmp_path_factory.mktemp("images")
    save_vit(place / "vit")
    write_class_folders(place / "data")
    (place / "loose").mkdir()
    for i in range(2):
        random_image(i, (16, 10)).save(place / "loose" / f"{i}.png")
    return place


def run(capsys, *argv):
    capsys.readouterr()
    assert main(["eval", *map(str, argv), "--threads", "1", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys, *argv):
    capsys.readouterr()
    assert main(["eval", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokenformer eval: error: ")
    assert err.count("\n") == 1
    return err


def guesses(folder, files):
    """What transformers itself takes the files for, one by one."""
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    logits = [
        model(**processor(Image.open(file).convert("RGB"), return_tensors="pt")).logits[0].detach() for file in files
    ]
    return [int(row.argmax()) for row in logits]


def test_labelled_images(place, capsys, tmp_path):
    out = run(
        capsys,
        *(place / "vit", "--images", place / "data", "--batch-size", 5),
        *("--out", tmp_path / "e.json", "--picture", tmp_path / "c.png"),
    )
    files = sorted((place / "data").rglob("*.png"))
    labels = [CLASSES.index(file.parent.name) for file in files]
    expected = confusion_matrix(labels, guesses(place / "vit", files), labels=[0, 1, 2]).tolist()
    record = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert list(record) == ["kind", "model", "run", "data", "results"]
    assert record["kind"] == "images"
    assert record["model"]["model_type"] == "vit"
    assert record["data"]["source"] == str(place / "data")
    assert record["data"]["limit"] is None
    assert record["results"]["confusion"] == expected
    assert record["results"]["classes"] == list(CLASSES)
    right = sum(expected[i][i] for i in range(3))
    assert f" 12 | {100 * right / 12:.2f} ± " in out
    row = " | ".join(f"{number if number else '.':>3}" for number in expected[0])
    assert f"| ant              | {row} |" in out
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG"
    assert f"picture: {tmp_path / 'c.png'}" in out


def test_limit_and_bad_images(place, capsys, tmp_path):
    folder = write_class_folders(tmp_path / "data", each=5)
    (folder / "cat" / "0.png").write_bytes(b"no image")
    arguments = [place / "vit", "--images", folder, "--out", tmp_path / "e.json"]
    assert "cat/0.png" in refused(capsys, *arguments)
    assert not (tmp_path / "e.json").exists()
    run(capsys, *arguments, "--bad-images", "skip")
    results = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["results"]
    assert (results["images"], results["unreadable"]) == (14, 1)
    for limit in ("3", "0.2"):
        run(capsys, *arguments, "--bad-images", "skip", "--limit", limit)
        record = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
        assert record["data"]["limit"] == 3
        assert record["results"]["images"] + record["results"]["unreadable"] == 3


def test_digits_and_the_parts_of_a_source(capsys, tmp_path):
    save_vit(tmp_path / "vit", [str(i) for i in range(10)])
    record = tmp_path / "e.json"
    for options, count in (([], 359), (["--split", "train", "--limit", "100"], 100)):
        out = run(capsys, tmp_path / "vit", "--images", "digits", *options, "--out", record)
        assert json.loads(record.read_text(encoding="utf-8"))["results"]["images"] == count
        assert "top-5 %" in out


def test_parts_of_a_folder(place, capsys, tmp_path):
    for part, each in (("train", 3), ("val", 2), ("test", 1)):
        write_class_folders(tmp_path / "data" / part, each=each)
    for options, count in (([], 6), (["--split", "train"], 9), (["--split", "test"], 3)):
        run(capsys, place / "vit", "--images", tmp_path / "data", *options, "--out", tmp_path / "e.json")
        assert json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["results"]["images"] == count
    assert "has no split 'dev'" in refused(capsys, place / "vit", "--images", tmp_path / "data", "--split", "dev")


def test_classes_in_another_order_or_without_names(place, capsys, tmp_path):
    confusions = []
    for classes in (CLASSES, CLASSES[::-1], None):
        save_vit(tmp_path / "vit", CLASSES)
        names = {f"LABEL_{i}" if classes is None else classes[i]: i for i in range(3)}
        edit_config(tmp_path / "vit", id2label={str(i): name for name, i in names.items()}, label2id=names)
        run(capsys, tmp_path / "vit", "--images", place / "data", "--out", tmp_path / "e.json")
        confusions.append(json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["results"])
    named, turned, nameless = confusions
    assert named["classes"] == nameless["classes"] == list(CLASSES)
    assert turned["classes"] == list(CLASSES[::-1])
    assert [sum(row) for row in turned["confusion"]] == [4, 4, 4]


def test_files_without_labels(place, capsys, tmp_path):
    files = sorted((place / "loose").iterdir())
    names = [CLASSES[i] for i in guesses(place / "vit", files)]
    for argument in ([place / "loose"], files):
        out = run(capsys, place / "vit", "--images", *argument, "--out", tmp_path / "p.json")
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:4]]
        assert [row[0] for row in rows] == list(map(str, files))
        assert [row[1].split()[0] for row in rows] == names
    record = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert record["kind"] == "predictions"
    assert [entry["classes"][0]["name"] for entry in record["results"]] == names
    (tmp_path / "bad.png").write_bytes(b"")
    out = run(capsys, place / "vit", "--images", *files, tmp_path / "bad.png", "--bad-images", "skip")
    assert "1 of 3 images could not be read" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--images", "absent.parquet"], "absent.parquet"),
        (["--images", "no/such/folder"], "no/such/folder"),
        (["--images", "EMPTY"], "is empty"),
        (["--images", "OTHERS"], "only the images have 'dog'; only the model has 'cat'"),
        (["--images", "TWO"], "the model has 3 classes and the images 2"),
        (["--images", "DATA", "DATA"], "give one source of labelled images, or image files only"),
        (["--images", "LOOSE", "--limit", "1"], "--limit needs images with labels"),
        (["--images", "LOOSE", "--picture", "PICTURE"], "--picture needs images with labels"),
        (["--images", "absent.png"], "absent.png"),
        (["--images", "DATA", "--limit", "1.5"], "limit must be a number of images"),
        (["--images", "DATA", "--batch-size", "0"], "batch_size must be at least 1"),
        (["--images", "DATA", "--bad-images", "ignore"], "bad_images: expected"),
        (["--images", "DATA", "--workers", "-1"], "workers must be at least 0"),
        (["--images", "DATA", "--stride", "3"], "--stride belongs to --perplexity, not to --images"),
        (["--images", "DATA", "--context", "3"], "--context belongs to --tasks and --perplexity, not to --images"),
        (["--images", "DATA", "--num-fewshot", "3"], "--num-fewshot belongs to --tasks, not to --images"),
        (["--images", "DATA", "--perplexity", "x.txt"], "--perplexity and --images were given: give one of"),
        (["--perplexity", "x.txt", "--picture", "PICTURE"], "--picture belongs to --images, not to --perplexity"),
        (["--tasks", "piqa", "--split", "train"], "--split belongs to --perplexity and --images, not to --tasks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(place, capsys, tmp_path, argv, words):
    (tmp_path / "empty").mkdir()
    places = {"DATA": place / "data", "LOOSE": place / "loose", "EMPTY": tmp_path / "empty"}
    places["OTHERS"] = write_class_folders(tmp_path / "others", ("ant", "bee", "dog"), each=1)
    places["TWO"] = write_class_folders(tmp_path / "two", ("ant", "bee"), each=1)
    places["PICTURE"] = tmp_path / "c.png"
    before = sorted(tmp_path.iterdir())
    argv = [str(places.get(word, word)) for word in argv]
    assert words in refused(capsys, place / "vit", *argv, "--out", tmp_path / "e.json")
    assert sorted(tmp_path.iterdir()) == before


def test_bad_models(place, capsys, tmp_path):
    images = ["--images", place / "data"]
    save_vit(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    message = refused(capsys, tmp_path / "vit", *images)
    assert "no image processor" in message
    assert "preprocessor_config.json" in message
    save_model(tmp_path / "language")
    save_vit(tmp_path / "other")
    (tmp_path / "language" / "preprocessor_config.json").write_bytes(
        (tmp_path / "other" / "preprocessor_config.json").read_bytes()
    )
    assert "which is no image classifier" in refused(capsys, tmp_path / "language", *images)
    assert "there is no folder" in refused(capsys, tmp_path / "absent", *images)
    save_vit(tmp_path / "large", size=16)
    (tmp_path / "other" / "preprocessor_config.json").replace(tmp_path / "large" / "preprocessor_config.json")
    assert "takes images of 16 x 16 pixels" in refused(capsys, tmp_path / "large", *images)


def test_weights_that_are_no_numbers(place, capsys, tmp_path):
    model = save_vit(tmp_path / "vit")
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "vit")
    arguments = ["--out", tmp_path / "e.json"]
    for images in (place / "data", place / "loose"):
        assert "is not finite" in refused(capsys, tmp_path / "vit", "--images", images, *arguments)
    assert not (tmp_path / "e.json").exists()


def test_bad_pictures(place, capsys, tmp_path):
    images = [place / "vit", "--images", place / "data", "--picture"]
    assert "ends in none of .png" in refused(capsys, *images, tmp_path / "c.txt")
    assert "create it first" in refused(capsys, *images, tmp_path / "absent" / "c.png")
