"""Training on the files of GPT-NeoX and Megatron-LM: the same run as on the same rows in our own format."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tokenformer.cli import main
from tokenformer.data import megatron, prepare
from tokenformer.errors import UserError
from tokenformer.training import Recipe, train
from tokenformer.training.callbacks import read_metrics
from tokenformer.training.trainer import LanguageTrainer

MakeRecipe = Callable[..., Recipe]
WriteRecipe = Callable[..., str]


@pytest.fixture(scope="module")
def files(prepared: Path) -> Path:
    """The corpus of `prepared`, written as .bin and .idx."""
    folder = prepared.parent
    prepare(
        [str(folder / "text.jsonl")],
        tokenizer="train:300",
        out=str(folder / "megatron"),
        sequence_length=32,
        held_out=0.1,
        format="megatron",
        progress=False,
    )
    return folder / "megatron"


def foreign(files: Path, **fields: object) -> dict[str, object]:
    """Fields of a recipe that reads `files` as if they had been made elsewhere."""
    return {
        "data__path": str(files / "train"),
        "data__tokenizer": str(files / "tokenizer"),
        "data__held_out": str(files / "held_out"),
        "data__sequence_length": 32,
    } | fields


def figures(recipe: Recipe) -> list[dict[str, float]]:
    lines = read_metrics(Path(recipe.out) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def test_every_format_gives_the_same_run(make_recipe: MakeRecipe, files: Path) -> None:
    recipes = [
        make_recipe("arrow"),
        make_recipe("megatron", data__path=str(files)),
        make_recipe("foreign", **foreign(files)),
    ]
    for recipe in recipes:
        train(recipe, progress=False)
    expected, *others = ([figures(recipe), *contents(recipe)] for recipe in recipes)
    assert len(expected[0]) == 7
    assert "eval_bits_per_byte" in expected[0][-1]
    assert others == [expected, expected]
    data = [json.loads((Path(recipe.out) / "data.json").read_text()) for recipe in recipes]
    assert data[0] == data[1] != data[2]


def contents(recipe: Recipe) -> list[bytes]:
    names = ("model.safetensors", "tokenizer.json", "tokenizer_config.json")
    return [(Path(recipe.out) / name).read_bytes() for name in names]


class Killed(BaseException):
    """Stands for a kill: nothing in the library may catch it."""


def test_a_stopped_run_goes_on(make_recipe: MakeRecipe, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = (make_recipe(name, **foreign(files, data__held_out=0.1)) for name in ("whole", "stopped"))
    train(whole, progress=False)
    step = LanguageTrainer.training_step

    def die_late(self: LanguageTrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 6:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageTrainer, "training_step", die_late)
        with pytest.raises(Killed):
            train(stopped, progress=False)
    assert not (Path(stopped.out) / "summary.json").exists()
    train(stopped, progress=False)
    assert contents(stopped) == contents(whole)


@pytest.mark.parametrize("change", ["sizes", "ids", "tokenizer"])
def test_files_that_changed_under_a_run(
    make_recipe: MakeRecipe, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    for file in (*files.glob("*.bin"), *files.glob("*.idx"), files / "tokenizer" / "tokenizer.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fields = foreign(tmp_path, data__tokenizer=str(tmp_path / "tokenizer.json"))

    def die(*args: object) -> None:
        raise Killed

    monkeypatch.setattr(LanguageTrainer, "training_step", die)
    with pytest.raises(Killed):
        train(make_recipe(**fields), progress=False)
    if change == "ids":
        ids = np.fromfile(tmp_path / "train.bin", "<u2")
        ids[100] ^= 1
        ids.tofile(tmp_path / "train.bin")
    elif change == "tokenizer":
        (tmp_path / "tokenizer.json").write_bytes((tmp_path / "tokenizer.json").read_bytes() + b"\n")
    else:  # the first id of the second document goes to the first
        index = bytearray((tmp_path / "train.idx").read_bytes())
        (count,) = struct.unpack_from("<Q", index, 18)
        first, second = struct.unpack_from("<2i", index, 34)
        struct.pack_into("<2i", index, 34, first + 1, second - 1)
        struct.pack_into("<q", index, 34 + 4 * count + 8, 2 * (first + 1))
        (tmp_path / "train.idx").write_bytes(index)
    with pytest.raises(UserError, match=r"was changed or prepared anew since .* began"):
        train(make_recipe(**fields), progress=False)


def test_a_bad_id_stops_the_run_with_its_name(
    make_recipe: MakeRecipe, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (*files.glob("*.bin"), *files.glob("*.idx")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ids = np.fromfile(tmp_path / "train.bin", "<u2")
    ids[10:-10:5] = 40000  # in every row, but not where the small sample below looks
    ids.tofile(tmp_path / "train.bin")
    monkeypatch.setattr(megatron, "_SAMPLE_PIECES", 2)
    monkeypatch.setattr(megatron, "_SAMPLE_PIECE", 4)
    recipe = make_recipe(**foreign(tmp_path, data__tokenizer=str(files / "tokenizer")))
    with pytest.raises(UserError, match=r"train.bin' holds the id 40000, outside the vocabulary of 300"):
        train(recipe, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.tokenizer", "null"], "data.tokenizer: give the tokenizer.json that"),
        (["--data.sequence_length", "null"], "data.sequence_length: "),
        (["--data.sequence_length", "-3"], "data.sequence_length must be positive, got -3"),
        (["--data.sequence_length", "long"], "data.sequence_length: expected int, null, got 'long'"),
        (["--data.held_out", "2"], "data.held_out 2.0: give a fraction between 0 and 1"),
        (["--data.held_out", "nowhere"], "no file 'nowhere.idx'"),
        (["--data.path", "nowhere"], "no file 'nowhere.idx'"),
        (["--data.sequence_length", "100000"], "fewer than one row of 100000"),
    ],
)
def test_options_that_cannot_be(
    make_recipe: MakeRecipe,
    write_recipe: WriteRecipe,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    recipe = make_recipe(**foreign(files))
    assert main(["train", write_recipe(recipe), *arguments]) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("tokenformer train: error: ")
    assert message in line
    assert shown.out == ""
    assert not Path(recipe.out).exists()
