"""`tokenformer explain` and `explore`: what they write, print and refuse."""

import json
import socket
import subprocess
import sys

import pytest
import torch

from image_samples import random_image, write_class_folders
from saved_model import LINES, save_model
from tiny_vision import CLASSES, save_classifier
from tokenformer.cli import main
from tokenformer.interpret.explain import explain_text

TOKEN = "1.ffn/base/3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("explain")
    torch.manual_seed(0)
    save_model(place / "model", grown=True)
    save_model(place / "other")
    (place / "corpus.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    return place / "model"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    place = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    save_classifier(place / "model")
    write_class_folders(place / "images", CLASSES, each=2)
    random_image(7, (20, 16)).save(place / "cat.png")
    return place / "model"


def run(capsys, *argv):
    capsys.readouterr()
    assert main([*map(str, argv), "--threads", "1"]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv):
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"tokenformer {argv[0]}: error: ")
    assert err.count("\n") == 1
    return err


def test_summary_and_json(capsys, folder, tmp_path):
    from tokenformer.models.loading import load_model, load_tokenizer

    expected = explain_text(load_model(folder), load_tokenizer(folder), LINES[0], position=3)
    out = run(capsys, "explain", folder, "--text", LINES[0], "--position", 3, "--change", f"off {TOKEN}")
    first = expected["positions"][3]["predictions"][0]
    assert f"{first['probability']:6.1%}  {first['piece']!r}" in out
    assert expected["attribution"][0]["address"] in out
    assert f"With off model.layers.{TOKEN}:" in out
    assert all(note in out for note in expected["notes"])
    file = tmp_path / "found.json"
    run(capsys, "explain", folder, "--text", LINES[0], "--position", 3, "--json", file)
    assert json.loads(file.read_text(encoding="utf-8")) == expected


def test_index_then_page(capsys, folder, tmp_path):
    index, page = tmp_path / "index", tmp_path / "page.html"
    corpus = folder.parent / "corpus.txt"
    out = run(capsys, "explain", folder, "--data", corpus, "--index", index, "--contexts", 2)
    assert out.endswith(f"tokens read: {index}\n")
    out = run(capsys, "explain", folder, "--text", LINES[0], "--index", index, "--out", page)
    assert out == f"page: {page}\n"
    assert page.read_text(encoding="utf-8").count('"contexts":[{"before"') > 0
    error = refused(capsys, "explain", folder.parent / "other", "--text", "fox", "--index", index, "--out", page)
    assert "is an index of another model" in error
    assert "is an index of another model" in refused(
        capsys, "explore", folder.parent / "other", "--index", index, "--port", 0
    )


def test_lineage(capsys, folder, tmp_path):
    page, corpus = tmp_path / "page.html", folder.parent / "corpus.txt"
    run(capsys, "explain", folder, "--before", folder, "--data", corpus, "--num-rows", 4, "--out", page)
    assert "Before and after" in page.read_text(encoding="utf-8")


def test_lineage_in_short(capsys, folder):
    corpus = folder.parent / "corpus.txt"
    out = run(capsys, "explain", folder, "--before", folder, "--data", corpus, "--num-rows", 4)
    assert "all tokens" in out
    assert "contexts of highest weight an old token kept" in out


def test_image(capsys, classifier, tmp_path):
    from tokenformer.images import load_processor, open_image_set
    from tokenformer.interpret.vision import explain_image
    from tokenformer.models.loading import load_image_classifier

    cat, images = classifier.parent / "cat.png", classifier.parent / "images"
    file, page = tmp_path / "found.json", tmp_path / "page.html"
    given = ["--image", cat, "--images", images, "--num-images", 5, "--target", "owl", "--change", f"off {TOKEN}"]
    out = run(capsys, "explain", classifier, *given)
    run(capsys, "explain", classifier, *given, "--json", file, "--out", page)
    model = load_image_classifier(classifier)
    expected = explain_image(
        model,
        load_processor(classifier),
        cat,
        target="owl",
        images=open_image_set(str(images))[0],
        num_images=5,
        source="images",
    )
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found.pop("changes")["changes"] == [f"off model.layers.{TOKEN}"]
    assert expected.pop("changes") is None
    assert found == expected
    best = expected["predictions"][0]
    assert f"The model takes cat.png for:\n  {best['probability']:6.1%}  {best['piece']!r}" in out
    assert "What moves the logit of 'owl' most:" in out
    assert f"With off model.layers.{TOKEN}:" in out
    assert "Images of images with the highest weights (5 read):" in out
    assert "What an image uses" in page.read_text(encoding="utf-8")


def test_image_by_its_number(capsys, classifier):
    images = classifier.parent / "images"
    assert "The model takes image 3 of images for:" in run(
        capsys, "explain", classifier, "--image", 3, "--images", images
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "a"], "is an image classifier: give --image FILE"),
        (["--image", "absent.png"], "'absent.png' does not exist"),
        (["--image", "../cat.png", "--position", "1"], "--position does not belong to --image"),
        (["--image", "../cat.png", "--text", "a"], "--text and --image were given"),
        (["--image", "../cat.png", "--target", "zebra"], "the model has no class 'zebra'"),
        (["--image", "../cat.png", "--images", "absent"], "absent"),
        (["--image", "../cat.png", "--images", "../images", "--num-images", "0"], "num_images must be at least 1"),
        (["--image", "10", "--images", "../images"], "--image 10: ../images has the images 0 to 9"),
        (["--image", "../cat.png", "--change", "off 9.ffn/base/1"], "9.ffn"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_with_images(capsys, classifier, options, words, monkeypatch):
    monkeypatch.chdir(classifier)
    before = sorted(classifier.iterdir())
    assert words in refused(capsys, "explain", classifier, *options)
    assert sorted(classifier.iterdir()) == before


def test_kinds_of_models_are_told_apart(capsys, folder, classifier):
    assert "is no TokenFormer image classifier" in refused(capsys, "explain", folder, "--image", "cat.png")
    assert "use tokenformer explain" in refused(capsys, "explore", classifier, "--port", 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "there is nothing to explain: give one of --text TEXT"),
        (["--data", "x"], "there is nothing to explain"),
        (["--text", "a", "--before", "x"], "--text and --before were given"),
        (["--text", "a", "--data", "x"], "--data does not belong to --text"),
        (["--before", "x"], "--before needs --data"),
        (["--index", "x"], "--index needs --data"),
        (["--faithfulness", "x.json"], "--faithfulness needs --data"),
        (["--data", "x", "--index", "y", "--out", "p.html"], "--out does not belong to --index"),
        (["--data", "x", "--index", "y", "--position", "1"], "--position does not belong to --index"),
        (["--text", ""], "the text is empty"),
        (["--text", "fox " * 500], "tokens"),
        (["--text", "fox", "--position", "99"], "position 99 is outside of the text"),
        (["--text", "fox", "--target", "the quick"], "tokens: give text that is one"),
        (["--text", "fox", "--change", "burn 1.ffn"], "'burn 1.ffn' is no change"),
        (["--text", "fox", "--change", "off 9.ffn/base/1"], "9.ffn"),
        (["--text", "fox", "--out", "absent/page.html"], "--out: 'absent/page.html' cannot be written"),
        (["--text", "fox", "--json", "absent/page.json"], "--json: 'absent/page.json' cannot be written"),
        (["--txt", "fox"], "did you mean '--text'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input(capsys, folder, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, "explain", folder, *options)
    assert list(tmp_path.iterdir()) == []


def test_missing_plotly(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenformer.errors.find_spec", lambda name: None)
    error = refused(capsys, "explain", folder, "--text", "fox", "--out", tmp_path / "page.html")
    assert "this needs plotly, which is not installed: pip install 'tokenformer[explain]'" in error
    assert "pip install 'tokenformer[explain]'" in refused(capsys, "explore", folder)


def test_port_in_use(capsys, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --port" in refused(capsys, "explore", folder, "--port", taken.getsockname()[1])


@pytest.mark.parametrize("verb", ["explain", "explore"])
def test_help_is_light(verb):
    code = (
        "import sys; from tokenformer.cli import main\n"
        f"try: main(['{verb}', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'plotly', 'fastapi', 'uvicorn', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.rstrip().endswith("[]")
    assert f"\n  tokenformer {verb} " in done.stdout
