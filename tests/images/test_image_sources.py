"""Sources of labelled images, and what is said where one is not as it should be."""

import io
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from tokenformer import UserError
from tokenformer.images import BadImage, open_image_set, open_images
from tokenformer.images.parts import stratified

CLASSES = ("cat", "dog", "owl")


def picture(value, size=(6, 4)):
    """(H, W) = (4, 6), of one colour that tells it from others."""
    return Image.new("RGB", size, (value, 2 * value % 256, 255 - value))


def png(value):
    buffer = io.BytesIO()
    picture(value).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder, counts, first=0):
    """Class folders with so many images; returns the first colour of each in the order of reading."""
    values = []
    for name in sorted(counts):
        (folder / name).mkdir(parents=True)
        for number in range(counts[name]):
            values.append(first + len(values))
            picture(values[-1]).save(folder / name / f"{number:03}.png")
    return values


def write_table(path, labels, *, features=None, image="image", label="label", values=None):
    values = range(len(labels)) if values is None else values
    rows = {image: [{"bytes": png(value), "path": None} for value in values], label: list(labels)}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def typed(names=CLASSES, image="image", label="label"):
    return datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(names))})


def reds(image_set):
    return [np.asarray(image)[0, 0, 0] for image, _ in image_set]


def refused(*words, train, **options):
    with pytest.raises(UserError) as caught:
        open_images(str(train), **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "images", {"owl": 4, "cat": 5, "dog": 6})
    return tmp_path / "images"


# --- digits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return open_images("digits")


def test_digits_are_those_of_scikit_learn(digits):
    images, labels = load_digits(return_X_y=True)
    rows = {
        row.tobytes(): label for row, label in zip(np.rint(images * 255 / 16).astype(np.uint8), labels, strict=True)
    }
    assert (len(digits.train), len(digits.held_out)) == (1438, 359)
    assert digits.classes == tuple("0123456789")
    assert digits.image_size == (8, 8)
    seen = []
    for image, label in (*digits.train, *digits.held_out):
        pixels = np.asarray(image)
        assert (pixels == pixels[:, :, :1]).all()
        seen.append(pixels[:, :, 0].tobytes())
        assert rows[seen[-1]] == label
    assert len(set(seen)) == len(rows)


def test_a_fifth_of_each_digit_is_held_out(digits):
    held_out = np.bincount(digits.held_out.labels)
    share = held_out / (held_out + np.bincount(digits.train.labels))
    assert np.abs(share - 0.2).max() < 0.005


def test_a_fraction_of_digits_leaves_those_held_out_alone(digits):
    split = open_images("digits", held_out=0.25)
    assert len(split.train) + len(split.held_out) == len(digits.train)
    known = {np.asarray(image).tobytes() for image, _ in digits.held_out}
    assert not known & {np.asarray(image).tobytes() for image, _ in (*split.train, *split.held_out)}


def test_the_package_is_cheap_to_import():
    heavy = "{'torch', 'PIL', 'numpy', 'kornia', 'sklearn', 'datasets', 'transformers'}"
    code = f"import sys, tokenformer.images; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setattr("tokenformer.errors.find_spec", lambda name: None)
    refused("sklearn", "pip install 'tokenformer[vision]'", train="digits")


# --- fraction ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.floats(0.01, 0.99), st.integers(0, 5))
def test_stratified(labels, fraction, seed):
    labels = np.array(labels)
    kept, held_out = stratified(labels, fraction, seed)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        out = int((labels[held_out] == label).sum())
        assert count - out >= 1
        assert abs(out - fraction * count) <= 1
        assert out >= 1 or count == 1


def test_fraction_is_drawn_by_the_seed(folder):
    first, again, other = (open_images(str(folder), held_out="0.4", seed=seed) for seed in (0, 0, 1))
    assert reds(first.held_out) == reds(again.held_out) != reds(other.held_out)
    assert first.fingerprints == again.fingerprints != other.fingerprints
    assert sorted(reds(first.train) + reds(first.held_out)) == list(range(15))
    assert np.bincount(first.held_out.labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize("held_out", [0, 1, -0.1, 1.5, "0.0", "nan", 2])
def test_fraction_out_of_range(folder, held_out):
    refused("held_out must be a source or a fraction between 0 and 1", str(held_out), train=folder, held_out=held_out)


def test_fraction_of_single_images(tmp_path):
    write_folder(tmp_path / "a", {"cat": 1, "dog": 1})
    refused("no class of", "two images", train=tmp_path / "a", held_out=0.5)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_class_folders(folder, tmp_path):
    (folder / "cat" / "more").mkdir()
    picture(99).save(folder / "cat" / "more" / "9.JPEG", quality=100)
    (folder / "cat" / ".hidden.png").write_bytes(b"")
    write_folder(tmp_path / "other", {"dog": 2, "owl": 1}, first=200)
    data = open_images(str(folder), held_out=str(tmp_path / "other"))
    assert data.classes == data.train.classes == data.held_out.classes == CLASSES
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 4
    assert reds(data.train)[:5] == list(range(5))
    assert abs(reds(data.train)[5] - 99) < 3
    assert reds(data.held_out) == [200, 201, 202]
    assert data.held_out.labels.tolist() == [1, 1, 2]
    assert data.image_size == (4, 6)


@pytest.mark.parametrize("names", [["val"], ["test"], ["test", "validation"]])
def test_train_and_held_out_in_one_folder(tmp_path, names):
    write_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    for first, name in enumerate(names):
        write_folder(tmp_path / name, {"dog": 1}, first=100 * (1 + first))
    data = open_images(str(tmp_path))
    assert reds(data.held_out) == [100 * len(names)]  # validation before test
    assert data.held_out.labels.tolist() == [1]
    assert reds(open_image_set(str(tmp_path), split="train")[0]) == [0, 1, 2, 3]


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, {"train": 2, "car": 2})
    assert open_images(str(tmp_path), held_out=0.5).classes == ("car", "train")


def test_empty_folder(tmp_path):
    refused("is empty", train=tmp_path, held_out=0.5)


def test_folder_without_class_folders(tmp_path):
    picture(1).save(tmp_path / "1.png")
    refused("no class folders", train=tmp_path, held_out=0.5)


def test_empty_class(folder):
    (folder / "bat").mkdir()
    refused("bat", "holds no images", train=folder, held_out=0.5)
    (folder / "bat" / "notes.txt").write_text("none yet")
    refused("bat", "only files of type .txt", train=folder, held_out=0.5)


def test_link_that_leads_nowhere(folder):
    (folder / "cat" / "000.png").unlink()
    (folder / "cat" / "000.png").symlink_to(folder / "gone.png")
    images, _ = open_image_set(str(folder))
    with pytest.raises(BadImage, match=r"cat/000\.png' does not exist"):
        images[0]


def test_folder_that_must_not_be_read(folder, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("tokenformer.images.folders.os.scandir", scandir)
    refused("cannot read", "Permission denied", train=folder, held_out=0.5)


def test_class_that_is_empty_in_what_is_held_out(folder, tmp_path):
    write_folder(tmp_path / "other", {"cat": 2, "dog": 0, "owl": 1})
    assert open_images(str(folder), held_out=str(tmp_path / "other")).held_out.labels.tolist() == [0, 0, 2]


def test_held_out_without_any_image(tmp_path):
    write_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "val", {"cat": 0, "dog": 0})
    refused("val", "holds no images", train=tmp_path)


def test_unknown_file_types_are_left_out_with_a_warning(folder):
    (folder / "dog" / "a.heic").write_bytes(b"?")
    (folder / "README").write_text("!")
    with pytest.warns(UserWarning, match=r"2 files are left out.*none, \.heic"):
        data = open_images(str(folder), held_out=0.5)
    assert len(data.train) + len(data.held_out) == 15


def test_single_class(tmp_path):
    write_folder(tmp_path, {"cat": 4})
    refused("single class, 'cat'", train=tmp_path, held_out=0.5)


def test_held_out_is_missing(folder):
    refused("brings no held-out images", "give held_out", train=folder)


def test_held_out_is_what_is_trained_on(folder):
    refused("is what is trained on", train=folder, held_out=str(folder))


def test_other_classes_held_out(folder, tmp_path):
    write_folder(tmp_path / "other", {"cat": 1, "yak": 1})
    refused("classes that the training images have not: 'yak'", train=folder, held_out=str(tmp_path / "other"))


def test_fingerprint_of_a_folder(folder):
    before = open_images(str(folder), held_out=0.4).fingerprints
    assert open_images(str(folder), held_out=0.4).fingerprints == before
    (folder / "cat" / "000.png").write_bytes(png(0) + b"more")
    changed = open_images(str(folder), held_out=0.4).fingerprints
    assert changed["train"] != before["train"]
    (folder / "cat" / "000.png").rename(folder / "owl" / "100.png")
    assert open_images(str(folder), held_out=0.4).fingerprints["train"] not in (before["train"], changed["train"])


# --- tables -----------------------------------------------------------------------------------------------------------


def test_parquet_with_features(tmp_path):
    train = write_table(tmp_path / "train.parquet", [2, 0, 1, 1], features=typed())
    held_out = write_table(tmp_path / "test.parquet", [1, 0], features=typed(), values=[50, 51])
    data = open_images(train, held_out=held_out)
    assert data.classes == CLASSES
    assert data.train.labels.tolist() == [2, 0, 1, 1]
    assert reds(data.train) == [0, 1, 2, 3]
    assert reds(data.held_out) == [50, 51]
    assert [label for _, label in data.held_out] == [1, 0]
    assert data.image_size == (4, 6)


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [([10, 9, 10, -1], ("-1", "9", "10"), [2, 1, 2, 0]), (["b", "a", "b", "b"], ("a", "b"), [1, 0, 1, 1])],
    ids=["numbers", "words"],
)
def test_labels_without_names_are_sorted(tmp_path, labels, classes, expected):
    path = write_table(tmp_path / "a.parquet", labels, image="img", label="fine_label")
    data = open_images(path, held_out=0.3)
    assert data.classes == classes
    assert open_image_set(path)[0].labels.tolist() == expected


@pytest.mark.parametrize("kind", ["bytes", "path"])
def test_plain_columns(tmp_path, kind):
    """Written by any program: bytes of files, or paths of files."""
    for value in range(4):
        (tmp_path / f"{value}.png").write_bytes(png(value))
    images = [png(value) if kind == "bytes" else str(tmp_path / f"{value}.png") for value in range(4)]
    pq.write_table(pa.table({"photo": images, "kind": [0, 1, 0, 1]}), tmp_path / "a.parquet")
    data = open_images(str(tmp_path / "a.parquet"), held_out=0.5, image_column="photo", label_column="kind")
    assert sorted(reds(data.train) + reds(data.held_out)) == [0, 1, 2, 3]


def test_files_by_pattern_and_by_folder(tmp_path):
    (tmp_path / "data").mkdir()
    for part in range(2):
        write_table(
            tmp_path / "data" / f"train-0000{part}-of-00002.parquet", [0, 1], features=typed(), values=[part] * 2
        )
    write_table(tmp_path / "data" / "test-00000-of-00001.parquet", [2], features=typed(), values=[9])
    pattern = open_images(str(tmp_path / "data" / "train-*.parquet"), held_out=0.5)
    assert sorted(reds(pattern.train) + reds(pattern.held_out)) == [0, 0, 1, 1]
    whole = open_images(str(tmp_path))  # laid out as on the Hub
    assert reds(whole.train) == [0, 0, 1, 1]
    assert reds(whole.held_out) == [9]


def test_classes_are_matched_by_name(tmp_path, folder):
    """Another order of the class list, or a folder beside a table, must not exchange classes."""
    table = write_table(tmp_path / "a.parquet", [0, 1, 2], features=typed(("owl", "cat", "dog")))
    assert open_images(str(folder), held_out=table).held_out.labels.tolist() == [2, 0, 1]


def test_the_image_column_is_found_by_its_type(tmp_path):
    path = write_table(
        tmp_path / "a.parquet", [0, 1, 2, 0], features=typed(image="photo", label="kind"), image="photo", label="kind"
    )
    assert open_image_set(path)[0].labels.tolist() == [0, 1, 2, 0]


def test_missing_columns(tmp_path):
    path = write_table(tmp_path / "a.parquet", [0, 1], label="kind")
    refused("columns image, kind", "label_column", train=path, held_out=0.5)
    refused("no column 'sort'", "image, kind", train=path, held_out=0.5, label_column="sort")
    path = write_table(tmp_path / "b.parquet", [0, 1], image="scan")
    refused("columns scan, label", "image_column", train=path, held_out=0.5)


def test_a_column_that_holds_no_images(tmp_path):
    pq.write_table(pa.table({"image": [1.0, 2.0], "label": [0, 1]}), tmp_path / "a.parquet")
    refused("'image'", "holds no image files", train=tmp_path / "a.parquet", held_out=0.5)


@pytest.mark.parametrize("label", [3, -1, None])
def test_label_outside_the_class_list(tmp_path, label):
    """A class that the list lacks, or none: the Hub marks a test set without labels by -1."""
    storage = pa.array([{"bytes": png(0), "path": None}] * 3)
    table = pa.table({"image": storage, "label": pa.array([0, label, 1])})
    path = tmp_path / "a.parquet"
    pq.write_table(table.replace_schema_metadata(typed().arrow_schema.metadata), path)
    refused("row 1", f"label {label}", "none of the 3 classes", train=path, held_out=0.5)


@pytest.mark.parametrize("labels", [[0.5, 1.0], [[0], [1]], ["a", None]], ids=["fractions", "lists", "missing"])
def test_labels_of_no_use(tmp_path, labels):
    path = write_table(tmp_path / "a.parquet", labels)
    refused("row", "whole numbers or words", train=path, held_out=0.5)


def test_empty_table(tmp_path):
    path = write_table(tmp_path / "a.parquet", [], features=typed())
    refused("a.parquet", "no data", train=path, held_out=0.5)


def test_damaged_parquet(tmp_path):
    path = write_table(tmp_path / "a.parquet", [0, 1], features=typed())
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    refused("cannot read", "as Parquet", train=path, held_out=0.5)


def test_fingerprint_of_parquet(tmp_path):
    """Of what the file holds: another image of equal size is noticed, another name of the folder is not."""
    found = []
    for number, value in enumerate([7, 7, 8]):
        (tmp_path / str(number)).mkdir()
        path = write_table(
            tmp_path / str(number) / "a.parquet", [0, 1, 0, 1], features=typed(), values=[value, 1, 2, 3]
        )
        found.append(open_images(path, held_out=0.5).fingerprints)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("name", ["photo.jpg", "rows.csv"])
def test_other_files(tmp_path, name):
    (tmp_path / name).write_text("?")
    refused(f"{name}' is no Parquet file", "class folders", train=tmp_path / name, held_out=0.5)


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for source in ("data/cifar", "./cifar", "cifar.parquet", str(tmp_path / "cifar"), "data/train-*.parquet"):
        refused(f"there is no '{source}': give digits, a folder", train=source, held_out=0.5)


def test_hub_is_asked_for_a_name():
    """Offline, as all tests: what the Hub says is passed on in one line."""
    refused("'someone/birds'", "the Hub does not give it", train="someone/birds", held_out=0.5)


def test_dataset_of_the_hub(monkeypatch):
    def load(name):
        assert name == "someone/birds"
        splits = {"train": [0, 1, 2], "validation": [2, 1], "test": [0]}
        rows = {
            split: {"image": [{"bytes": png(v), "path": None} for v in labels], "label": labels}
            for split, labels in splits.items()
        }
        return datasets.DatasetDict({k: datasets.Dataset.from_dict(v, features=typed()) for k, v in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = open_images("someone/birds")
    assert data.classes == CLASSES
    assert data.held_out.labels.tolist() == [2, 1]
    assert reds(data.held_out) == [2, 1]
    assert open_image_set("someone/birds", split="test")[0].labels.tolist() == [0]


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_split_that_is_not_there(folder, source):
    with pytest.raises(UserError, match="no split 'dev'"):
        open_image_set(str(folder) if source == "folder" else source, split="dev")


# --- images that cannot be read ---------------------------------------------------------------------------------------


def test_bad_image_is_an_error(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(png(0)[:45])
    message = refused("cat/00", "cannot be read", train=folder, held_out=0.5)
    assert message.startswith(f"'{folder}")


def test_bad_images_are_named_and_counted(tmp_path):
    path = tmp_path / "a.parquet"
    files = [{"bytes": png(0), "path": None}, {"bytes": b"?", "path": None}, {"bytes": None, "path": None}]
    pq.write_table(pa.table({"image": files, "label": [0, 1, 2]}), path)
    images, _ = open_image_set(str(path), on_bad_image="skip")
    for _ in range(2):  # counted once each
        with pytest.raises(BadImage, match=r"row 1 of .*a\.parquet' is not an image"):
            images[1]
        with pytest.raises(BadImage, match=r"row 2 of .*a\.parquet' is missing"):
            images[2]
    assert images.unreadable == 2


def test_none_can_be_read(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"?")
    refused("none of the", "can be read", train=folder, held_out=0.5, on_bad_image="skip")


def test_unknown_way_with_bad_images(folder):
    refused("on_bad_image must be error or skip", train=folder, held_out=0.5, on_bad_image="ignore")
