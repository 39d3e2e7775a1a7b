import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
from corpora import make_documents, write_documents

from tokenformer.data import PreparedData, prepare, tokenizer_hash
from tokenformer.errors import UserError


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prepared")
    path = write_documents(folder / "a.jsonl", make_documents(30))
    options = {"tokenizer": "train:300", "sequence_length": 16, "held_out": 0.2, "progress": False}
    for format in ("arrow", "megatron"):
        prepare([path], out=str(folder / format), format=format, **options)
    return {format: folder / format for format in ("arrow", "megatron")}


@pytest.fixture
def folder(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals["arrow"], tmp_path / "out"))


@pytest.fixture
def megatron(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals["megatron"], tmp_path / "out"))


@pytest.mark.parametrize("kind", [Path, str])
def test_attributes(folder, kind):
    data = PreparedData.load(kind(folder))
    assert data.path == folder
    assert data.manifest == json.loads((folder / "manifest.json").read_text())
    assert (data.vocab_size, data.sequence_length) == (300, 16)
    assert data.tokenizer_hash == tokenizer_hash(folder / "tokenizer")
    assert len(data.tokenizer) == 300
    for name, rows in (("train", data.train), ("held_out", data.held_out)):
        assert len(rows) == data.manifest["splits"][name]["rows"] > 0
        assert rows.format["type"] is None
        assert rows.cache_files  # memory-mapped, not read into memory
        assert len(rows[0]["input_ids"]) == 16


def test_tokens_per_byte_gives_bits_per_byte(folder):
    data = PreparedData.load(folder)
    for name in ("train", "held_out"):
        # A uniform guess costs log2(vocabulary) bits a token, spread over the bytes that the tokens stand for.
        counts = data.manifest["splits"][name]
        bits = math.log2(300) * counts["tokens"]
        assert math.log(300) / math.log(2) * data.tokens_per_byte(name) == pytest.approx(bits / counts["bytes"])
        assert 0.2 < data.tokens_per_byte(name) < 1
    with pytest.raises(UserError, match="no split 'test'"):
        data.tokens_per_byte("test")


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"no prepared data at '.*nothing': make it with `tokenformer data prepare"):
        PreparedData.load(tmp_path / "nothing")


def test_unfinished_folder(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no finished preparation .*`tokenformer data prepare \.\.\. --out .*again"):
        PreparedData.load(folder)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_start(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4] ^= 0x55
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *itertools.product(
            ["train/data-00000.arrow", "held_out/data-00000.arrow", "tokenizer/tokenizer.json"],
            [cut_off, flip_middle, flip_start, Path.unlink],
        ),
        *itertools.product(["train/state.json", "held_out/dataset_info.json"], [cut_off, flip_start, Path.unlink]),
        ("tokenizer/tokenizer_config.json", cut_off),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_damaged_file(folder, name, damage):
    damage(folder / name)
    with pytest.raises(UserError, match=r"out' is damaged \(.*tokenformer data prepare") as raised:
        PreparedData.load(folder)
    assert name.split("/")[0] in str(raised.value)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "held_out.bin", "held_out.idx"])
@pytest.mark.parametrize("damage", [cut_off, flip_middle, flip_start, Path.unlink])
def test_damaged_megatron_file(megatron, name, damage):
    assert len(PreparedData.load(megatron).train) > 0
    damage(megatron / name)
    with pytest.raises(UserError, match=r"out' is damaged \(.*tokenformer data prepare") as raised:
        PreparedData.load(megatron)
    assert name.split(".")[0] in str(raised.value)


def test_folder_from_before_there_were_formats(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["options"]["format"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert len(PreparedData.load(folder).train) == manifest["splits"]["train"]["rows"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 1}'])
def test_damaged_manifest(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"is damaged \(manifest\.json"):
        PreparedData.load(folder)


def test_manifest_of_another_version(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(UserError, match="has format 99"):
        PreparedData.load(folder)


def test_without_verification_only_sizes_are_checked(folder):
    flip_middle(folder / "train" / "data-00000.arrow")
    assert len(PreparedData.load(folder, verify=False).train) > 0
    cut_off(folder / "train" / "data-00000.arrow")
    with pytest.raises(UserError, match="wrong size"):
        PreparedData.load(folder, verify=False)
