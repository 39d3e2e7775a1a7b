"""Figures of image classifiers, against scikit-learn, transformers' pipeline, and logits written by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from torch import nn
from transformers import ViTModel, pipeline
from transformers.image_processing_backends import PilBackend

from image_samples import CLASSES, random_image, save_vit, write_class_folders
from saved_model import save_model
from tokenformer.errors import UserError
from tokenformer.evaluation import (
    PixelImages,
    evaluate_images,
    load_any_classifier,
    load_any_tokenizer,
    predict_images,
    read_pixels,
)
from tokenformer.evaluation.classes import match_classes
from tokenformer.evaluation.images import part_of, unlabelled_files
from tokenformer.images import BadImage, image_processor, load_processor, open_image_set
from tokenformer.models import TokenFormerForImageClassification, TokenFormerVisionConfig


class Answers(nn.Module):
    """A classifier that knows its answers: the value of an image's first pixel is the row of its logits."""

    def __init__(self, logits, names=None):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits, dtype=torch.float64))
        names = [f"LABEL_{i}" for i in range(self.logits.shape[1])] if names is None else names
        self.config = SimpleNamespace(id2label=dict(enumerate(names)))
        self.batches = []

    def forward(self, pixel_values):
        self.batches.append(len(pixel_values))
        return SimpleNamespace(logits=self.logits[pixel_values[:, 0, 0, 0].long()])


def numbered(labels, classes=None):
    """Images for `Answers`: the first pixel of each is its number."""
    count = max(labels, default=0) + 1
    pixels = torch.arange(len(labels), dtype=torch.float64)[:, None, None, None].expand(-1, 3, 1, 1)
    classes = tuple(map(str, range(count))) if classes is None else classes
    return PixelImages(pixels, torch.tensor(labels, dtype=torch.long), classes)


def judge(logits, labels, **options):
    logits = torch.as_tensor(logits, dtype=torch.float64)
    images = numbered(labels, tuple(map(str, range(logits.shape[1]))))
    return evaluate_images(Answers(logits), images, **options)


# Figures


@pytest.mark.parametrize(("images", "classes", "top"), [(200, 10, 5), (37, 3, 5), (64, 7, 2), (50, 2, 5)])
def test_agrees_with_scikit_learn(images, classes, top):
    random = np.random.default_rng(classes)
    labels = random.integers(0, classes, images)
    labels[:classes] = range(classes)
    logits = random.normal(size=(images, classes))
    logits[range(images), labels] += 1
    found = judge(logits, labels.tolist(), batch_size=16, top=top)
    names = list(range(classes))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    best = logits.argmax(1)
    assert found["top1"] == pytest.approx(metrics.accuracy_score(labels, best), abs=1e-12)
    k = min(top, classes)
    assert found["top"] == k
    expected = 1.0 if k == classes else metrics.top_k_accuracy_score(labels, logits[:, : max(names) + 1], k=k)
    if classes > 2:  # scikit-learn takes a single score for two classes
        assert found[f"top{top}"] == pytest.approx(expected, abs=1e-12)
    assert found["loss"] == pytest.approx(metrics.log_loss(labels, shares, labels=names), rel=1e-12)
    assert found["confusion"] == metrics.confusion_matrix(labels, best, labels=names).tolist()
    precision, recall, _, support = metrics.precision_recall_fscore_support(
        labels, best, labels=names, zero_division=np.nan
    )
    for entry, *figures in zip(found["per_class"], recall, precision, support, strict=True):
        own = [math.nan if entry[name] is None else entry[name] for name in ("recall", "precision", "images")]
        np.testing.assert_allclose(own, figures, rtol=1e-12)
    assert found["images"] == images
    assert found["unreadable"] == 0
    assert found["images_per_second"] == pytest.approx(images / found["seconds"])


def test_ties_count_against_the_model():
    # The true class is 1 throughout.
    logits = [
        [0.0, 2.0, 1.0, -1.0],  # first
        [2.0, 2.0, 1.0, -1.0],  # shares the first place with 0
        [1.0, 2.0, 2.0, 2.0],  # with 2 and 3: taken for 2, third place
        [0.0, 0.0, 0.0, 0.0],  # the last of four equal ones
        [3.0, 1.0, 2.0, 1.0],  # shares the third place
    ]
    found = judge(logits, [1] * 5, top=3)
    assert found["top1"] == 1 / 5
    assert found["top3"] == 3 / 5
    assert found["confusion"][1] == [3, 1, 1, 0]


def test_no_number_is_never_right():
    nan, inf = math.nan, math.inf
    found = judge([[nan, 0.0, 1.0], [0.0, nan, 1.0], [nan] * 3, [inf, inf, 0.0]], [0, 0, 0, 0], top=2)
    assert found["top1"] == 0
    assert found["top2"] == 1 / 4  # only the infinity that has one beside it
    assert sum(found["confusion"][0]) == 4
    assert found["confusion"][0][0] == 0
    assert not math.isfinite(found["loss"])


small = st.integers(-2, 2).map(float)


@given(st.data(), st.integers(1, 6), st.integers(1, 5))
def test_definition(data, classes, top):
    rows = data.draw(
        st.lists(
            st.tuples(st.lists(small, min_size=classes, max_size=classes), st.integers(0, classes - 1)),
            min_size=1,
            max_size=12,
        )
    )
    logits, labels = [row for row, _ in rows], [label for _, label in rows]
    found = judge(logits, labels, top=top, batch_size=5)
    k = min(top, classes)
    before = [sum(value >= row[label] for i, value in enumerate(row) if i != label) for row, label in rows]
    assert found["top1"] == sum(count == 0 for count in before) / len(rows)
    assert found[f"top{top}"] == sum(count < k for count in before) / len(rows)
    # The diagonal is the top-1, and nothing is taken for a class that is not among the best.
    confusion = np.array(found["confusion"])
    assert confusion.trace() == sum(count == 0 for count in before)
    assert confusion.sum(1).tolist() == [labels.count(i) for i in range(classes)]
    possible = np.zeros_like(confusion)
    for row, label in rows:
        possible[label] += np.array(row) == max(row)
    assert (confusion <= possible).all()


def test_sums_in_float64():
    # Each image costs 1 nat plus a little that float32 would lose in a sum this long.
    count = 3000
    loss = 1.0 + 1e-6
    logits = [[0.0, math.log(math.exp(loss) - 1)]] * count
    assert judge(logits, [0] * count)["loss"] == pytest.approx(loss, rel=1e-13)


def test_class_without_images_or_guesses():
    found = judge([[2.0, 0.0, 1.0]], [0])
    assert [entry["recall"] for entry in found["per_class"]] == [1.0, None, None]
    assert [entry["precision"] for entry in found["per_class"]] == [1.0, None, None]


# Which images


def test_limit_keeps_the_shares_of_the_classes():
    labels = [0, 1, 2, 3, 4] * 40  # every fifth would be of one class
    found = judge(np.eye(5)[labels], labels, limit=20)
    assert [entry["images"] for entry in found["per_class"]] == [4] * 5
    assert judge(np.eye(5)[labels], labels, limit=1000)["images"] == 200


def test_batches():
    labels = [0, 1, 1, 0, 1, 0, 0]
    model = Answers(np.random.default_rng(0).normal(size=(7, 2)))
    small_batches = evaluate_images(model, numbered(labels), batch_size=3)
    assert model.batches == [3, 3, 1]
    one_batch = evaluate_images(model, numbered(labels), batch_size=64)
    assert small_batches["loss"] == pytest.approx(one_batch["loss"], rel=1e-14)
    assert small_batches["confusion"] == one_batch["confusion"]


def test_model_is_left_in_its_mode():
    model = Answers([[1.0, 0.0]])
    modes = []
    model.register_forward_hook(lambda *_: modes.append(model.training))
    for training in (True, False):
        model.train(training)
        evaluate_images(model, numbered([0], ("0", "1")))
        assert model.training is training
    assert modes == [False, False]


def test_unreadable_images_are_left_out_and_counted(tmp_path):
    model = save_vit(tmp_path / "vit")
    folder = write_class_folders(tmp_path / "data")
    processor = load_processor(tmp_path / "vit")
    whole, _ = open_image_set(str(folder))
    (folder / "bee" / "1.png").write_bytes((folder / "bee" / "1.png").read_bytes()[:60])
    images, _ = open_image_set(str(folder), on_bad_image="skip")
    found = evaluate_images(model, images, processor, batch_size=4)
    assert (found["images"], found["unreadable"]) == (11, 1)
    assert [entry["images"] for entry in found["per_class"]] == [4, 3, 4]
    # A set that kept its pixels in memory before the file was damaged, without that image.
    (folder / "bee" / "1.png").unlink()
    rest, _ = open_image_set(str(folder))
    assert found["loss"] == pytest.approx(evaluate_images(model, rest, processor)["loss"], rel=1e-6)
    pixels = read_pixels(images, processor)
    assert (len(pixels), pixels.unreadable) == (11, 1)
    assert evaluate_images(model, pixels)["unreadable"] == 1
    assert len(whole) == 12


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_an_error(tmp_path, workers):
    model = save_vit(tmp_path / "vit")
    folder = write_class_folders(tmp_path / "data", each=1)
    (folder / "bee" / "0.png").write_bytes(b"no image")
    images, _ = open_image_set(str(folder))
    with pytest.raises(BadImage, match=r"^[^\n]*0\.png[^\n]*$"):
        evaluate_images(model, images, load_processor(tmp_path / "vit"), workers=workers)


def test_nothing_to_evaluate(tmp_path):
    model = Answers([[0.0, 1.0]])
    with pytest.raises(UserError, match="there are no images"):
        evaluate_images(model, numbered([], ("0", "1")))
    save_vit(tmp_path / "vit")
    folder = write_class_folders(tmp_path / "data", each=1)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    images, _ = open_image_set(str(folder), on_bad_image="skip")
    vit = load_any_classifier(tmp_path / "vit")
    with pytest.raises(UserError, match="none of the 3 images can be read"):
        evaluate_images(vit, images, load_processor(tmp_path / "vit"))
    with pytest.raises(UserError, match="none of the 3 images can be read"):
        read_pixels(images, load_processor(tmp_path / "vit"))


@pytest.mark.parametrize("option", ["batch_size", "top", "limit"])
def test_options_out_of_range(option):
    with pytest.raises(UserError, match=f"{option} must be at least 1, got 0"):
        evaluate_images(Answers([[0.0, 1.0]]), numbered([0, 1]), **{option: 0})


# Images as the model reads them


def test_pixels_read_once_give_the_same(tmp_path):
    model = save_vit(tmp_path / "vit")
    processor = load_processor(tmp_path / "vit")
    images, _ = open_image_set(str(write_class_folders(tmp_path / "data")))
    directly = evaluate_images(model, images, processor, batch_size=5)
    kept = read_pixels(images, processor, batch_size=4)
    for name in ("top1", "top5", "confusion", "per_class", "classes"):
        assert evaluate_images(model, kept)[name] == directly[name]
    assert evaluate_images(model, kept)["loss"] == pytest.approx(directly["loss"], rel=1e-6)
    part = evaluate_images(model, read_pixels(images, processor, limit=6))
    assert part["confusion"] == evaluate_images(model, images, processor, limit=6)["confusion"]


def test_agrees_with_the_pipeline_of_transformers(tmp_path):
    model = save_vit(tmp_path / "vit")
    paths = []
    for i, size in enumerate([(8, 8), (20, 12), (9, 30)]):
        paths.append(tmp_path / f"{i}.png")
        random_image(i, size).save(paths[-1])
    expected = pipeline("image-classification", model=str(tmp_path / "vit"))([str(path) for path in paths], top_k=3)
    found = predict_images(model, paths, load_processor(tmp_path / "vit"), batch_size=2, top=3)
    assert [entry["image"] for entry in found] == [str(path) for path in paths]
    for entry, guesses in zip(found, expected, strict=True):
        assert [guess["name"] for guess in entry["classes"]] == [guess["label"] for guess in guesses]
        shares = [guess["probability"] for guess in entry["classes"]]
        assert shares == pytest.approx([guess["score"] for guess in guesses], abs=1e-5)


def test_predictions_of_files_that_can_be_read(tmp_path):
    model = save_vit(tmp_path / "vit")
    (tmp_path / "bad.png").write_bytes(b"")
    random_image(0).save(tmp_path / "good.png")
    paths, processor = [tmp_path / "bad.png", tmp_path / "good.png"], load_processor(tmp_path / "vit")
    (entry,) = predict_images(model, paths, processor, on_bad_image="skip")
    assert entry["image"] == str(paths[1])
    assert len(entry["classes"]) == 3
    with pytest.raises(BadImage, match=r"bad\.png"):
        predict_images(model, paths, processor)
    with torch.no_grad():
        model.classifier.bias[1] = math.nan
    with pytest.raises(UserError, match="what the model gives is not finite"):
        predict_images(model, paths[1:], processor)
    with pytest.raises(UserError, match="none of the 1 images"):
        predict_images(model, paths[:1], processor, on_bad_image="skip")


def test_narrow_weights(tmp_path):
    save_vit(tmp_path / "vit")
    images, _ = open_image_set(str(write_class_folders(tmp_path / "data")))
    processor = load_processor(tmp_path / "vit")
    wide, narrow = (
        evaluate_images(load_any_classifier(tmp_path / "vit", dtype=dtype), images, processor)["loss"]
        for dtype in ("float32", "bfloat16")
    )
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=0.05)


def test_size_that_does_not_fit_is_named(tmp_path):
    model = save_vit(tmp_path / "vit")
    images, _ = open_image_set(str(write_class_folders(tmp_path / "data", each=1)))
    with pytest.raises(UserError, match="takes images of 8 x 8 pixels and its image processor gives 12 x 12"):
        evaluate_images(model, images, image_processor(12))
    with pytest.raises(ValueError, match="channel"):  # what is wrong with the model itself is not hidden
        evaluate_images(model, PixelImages(torch.zeros(1, 1, 8, 8), torch.tensor([0]), CLASSES))


def test_what_training_draws_next_is_left_alone(tmp_path):
    model = save_vit(tmp_path / "vit")
    images, _ = open_image_set(str(write_class_folders(tmp_path / "data", each=1)))
    before = torch.get_rng_state()
    evaluate_images(model, images, load_processor(tmp_path / "vit"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_sizes_that_differ_are_named(tmp_path, workers):
    model = save_vit(tmp_path / "vit")
    folder = write_class_folders(tmp_path / "data", each=1)
    random_image(0, (8, 16)).save(folder / "cat" / "0.png")
    processor = image_processor(8)
    processor.do_center_crop = False
    assert isinstance(processor, PilBackend)
    images, _ = open_image_set(str(folder))
    with pytest.raises(UserError, match=r"^[^\n]*\(8 x 8 and 16 x 8\): set do_center_crop[^\n]*$"):
        evaluate_images(model, images, processor, workers=workers)
    with pytest.raises(UserError, match="8 x 8 and 16 x 8"):  # each in a batch of its own
        read_pixels(images, processor, batch_size=1, workers=workers)


# Classes


@pytest.mark.parametrize(
    ("own", "theirs", "names", "ids"),
    [
        (["a", "b", "c"], ["a", "b", "c"], ["a", "b", "c"], [0, 1, 2]),
        (["a", "b", "c"], ["c", "a", "b"], ["a", "b", "c"], [2, 0, 1]),
        (["LABEL_0", "LABEL_1"], ["b", "a"], ["b", "a"], [0, 1]),
        (["b", "a"], ["0", "1"], ["b", "a"], [0, 1]),
        (["1", "0"], ["0", "1"], ["1", "0"], [1, 0]),  # names that are numbers are names first
        (["0", "1", "10", "2"], ["0", "1", "2", "10"], ["0", "1", "10", "2"], [0, 1, 3, 2]),
        (["crane", "crane"], ["crane", "crane"], ["crane", "crane"], [0, 1]),  # as in ImageNet
    ],
)
def test_classes_are_matched(own, theirs, names, ids):
    found, positions = match_classes(dict(enumerate(own)), theirs)
    assert (found, positions.tolist()) == (names, ids)


@pytest.mark.parametrize(
    ("own", "theirs", "words"),
    [
        (["a", "b"], ["a", "c"], "only the images have 'c'; only the model has 'b'"),
        (
            ["a", "b", "c"],
            ["a", "b"],
            "the model has 3 classes and the images 2, which are not the same: only the model",
        ),
        (["LABEL_0", "LABEL_1"], ["a", "b", "c"], "the model has 2 classes and the images 3"),
        (["a"], ["a", "p", "q", "r", "s"], "'p', 'q', 'r' and 1 more"),
        (["a", "a", "b"], ["a", "b", "a"], "one name stands for two classes"),
        (["a", "b", "b"], ["a", "a", "b"], "one name stands for two classes"),
    ],
)
def test_other_classes_are_refused(own, theirs, words):
    with pytest.raises(UserError, match="give images of the model's classes") as caught:
        match_classes(dict(enumerate(own)), theirs)
    assert words in str(caught.value)


def test_labels_are_brought_to_the_order_of_the_model():
    # The model always says "b", which is class 1 of the images and 0 of its own.
    images = numbered([1, 0, 1], ("a", "b"))
    found = evaluate_images(Answers([[1.0, 0.0]] * 3, ["b", "a"]), images)
    assert found["top1"] == 2 / 3
    assert found["classes"] == ["b", "a"]
    assert found["confusion"] == [[2, 0], [1, 0]]


# What the command line takes


def test_files_without_labels(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    assert unlabelled_files([str(tmp_path)]) == [str(tmp_path / "a.jpg"), str(tmp_path / "b.PNG")]
    assert unlabelled_files(["x.png", "y.webp"]) == ["x.png", "y.webp"]
    assert unlabelled_files(["digits"]) is None
    assert unlabelled_files(["data.parquet"]) is None
    (tmp_path / "class").mkdir()
    assert unlabelled_files([str(tmp_path)]) is None
    with pytest.raises(UserError, match=r"'digits' is no image file"):
        unlabelled_files(["x.png", "digits"])


def test_part_of():
    assert [part_of(360, limit) for limit in (None, 1, 500, 0.5, 0.001)] == [None, 1, 500, 180, 1]
    for limit in (0, -1, 1.5, math.nan, math.inf):
        with pytest.raises(UserError, match="limit must be a number of images"):
            part_of(360, limit)


# Models


def test_tokenformer(tmp_path):
    config = TokenFormerVisionConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        segments=[{"name": "base", "qkv": 8, "output": 8, "ffn": 16}],
        id2label=dict(enumerate(CLASSES)),
    )
    model = TokenFormerForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model.save_pretrained(tmp_path / "model")
    image_processor(8).save_pretrained(tmp_path / "model")
    images, _ = open_image_set(str(write_class_folders(tmp_path / "data")))
    processor = load_processor(tmp_path / "model")
    found = evaluate_images(load_any_classifier(tmp_path / "model"), images, processor)
    pixels = torch.stack([processor(image, return_tensors="pt")["pixel_values"][0] for image, _ in images])
    logits = model(pixel_values=pixels).logits.detach().double()
    assert found["loss"] == pytest.approx(metrics.log_loss(images.labels, logits.softmax(1).numpy()), rel=1e-5)
    assert found["confusion"] == metrics.confusion_matrix(images.labels, logits.argmax(1)).tolist()
    with pytest.raises(UserError, match="holds an image classifier: evaluate it with --images"):
        load_any_tokenizer(tmp_path / "model")


def test_models_that_are_no_classifiers(tmp_path):
    save_model(tmp_path / "language")
    with pytest.raises(UserError, match="a 'tokenformer' model, which is no image classifier"):
        load_any_classifier(tmp_path / "language")
    save_vit(tmp_path / "vit").vit.save_pretrained(tmp_path / "headless")
    assert ViTModel.from_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match=r"the weights lack classifier\.\w+ and so"):
        load_any_classifier(tmp_path / "headless")
    with pytest.raises(UserError, match="there is no folder"):
        load_any_classifier(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_any_classifier(tmp_path / "empty")
    (tmp_path / "vit" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the 'vit' model"):
        load_any_classifier(tmp_path / "vit")
