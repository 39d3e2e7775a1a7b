"""Recipes: YAML and overrides in, one clear line out for whatever cannot be."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from saved_model import save_model
from tokenformer.cli import main
from tokenformer.cli.train import parse
from tokenformer.data import prepare
from tokenformer.training import Recipe

MakeRecipe = Callable[..., Recipe]
WriteRecipe = Callable[..., str]


def fails(argv: list[str], capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """`tokenformer train` ends with code 2 and one line that holds all of `parts`."""
    capsys.readouterr()
    assert main(["train", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("tokenformer train: error: ")
    for part in parts:
        assert part in line


def test_overrides_win_over_the_file(make_recipe: MakeRecipe, write_recipe: WriteRecipe) -> None:
    path = write_recipe(make_recipe())
    recipe = parse([path, "--training.batch_size", "8", "--model.ffn=99", "--out", "elsewhere"])
    assert (recipe.training.batch_size, recipe.model.ffn, recipe.out) == (8, 99, "elsewhere")
    assert recipe.model.hidden_size == 32
    assert recipe.optimizer.learning_rate == 3e-3


def test_the_written_recipe_reads_back(make_recipe: MakeRecipe, write_recipe: WriteRecipe) -> None:
    recipe = make_recipe(model__preset="150M", training__micro_batch_size=2)
    assert parse([write_recipe(recipe)]) == recipe


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("recipes/language/*.yaml")), ids=lambda path: path.stem
)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = parse([str(path), "--data.path", "data", "--out", "run"])
    recipe.validate()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model:\n  fnn: 3\n", ["unknown option 'model.fnn'", "did you mean 'model.ffn'?"]),
        ("trainin:\n  tokens: 3\n", ["unknown option", "did you mean 'training.tokens'?"]),
        ("training:\n  tokens: many\n", ["training.tokens", "int", "many"]),
        ("training:\n  precision: int8\n", ["training.precision", "bf16", "int8"]),
        ("model: [1,\n", ["recipe", "line 2"]),
        ("- 1\n- 2\n", ["recipe"]),
    ],
    ids=["field", "section", "type", "choice", "yaml", "list"],
)
def test_a_faulty_file(text: str, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "faulty.yaml"
    path.write_text(text)
    fails([str(path)], capsys, str(path), *parts)


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails([str(tmp_path / "none.yaml")], capsys, "none.yaml", "not found")
    (tmp_path / "latin.yaml").write_bytes("out: caf\xe9\n".encode("latin-1"))
    fails([str(tmp_path / "latin.yaml")], capsys, "latin.yaml", "not UTF-8")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--traning.tokens", "5"], ["'--traning.tokens'", "did you mean '--training.tokens'?"]),
        (["--training.tokens", "0"], ["training.tokens must be positive, got 0"]),
        (["--training.batch_size", "-4"], ["training.batch_size must be positive, got -4"]),
        (["--model.qkv", "0"], ["model.qkv must be positive, got 0"]),
        (["--optimizer.learning_rate", "0"], ["optimizer.learning_rate must be positive"]),
        (["--optimizer.learning_rate", "nan"], ["optimizer.learning_rate", "got 'nan'"]),
        (["--optimizer.warmup", "2"], ["optimizer.warmup must lie between 0 and 1"]),
        (["--optimizer.beta2", "1"], ["optimizer.beta2"]),
        (["--optimizer.weight_decay", "-1"], ["optimizer.weight_decay"]),
        (["--training.eval_every", "-1"], ["training.eval_every"]),
        (["--training.micro_batch_size", "3"], ["batch_size 4 is not a multiple", "3"]),
        (["--training.batch_size", "5000"], ["fewer than training.batch_size 5000", "smaller batch"]),
        (["--training.precision", "fp16"], ["fp16 needs a CUDA GPU", "bf16 or fp32"]),
        (["--model.num_attention_heads", "5"], ["hidden_size 32 is not divisible by num_attention_heads 5"]),
        (["--model.rotary_pct", "0.2"], ["rotary size 3", "odd"]),
        (["--model.normalization", "l3"], ["unknown normalization 'l3'"]),
        (["--model.activation", "gelo"], ["unknown activation 'gelo'"]),
        (["--model.preset", "7B"], ["unknown preset '7B'"]),
        (["--model.preset", "150M", "--model.path", "x"], ["model.path and model.preset exclude each other"]),
        (["--model.path", "nowhere"], ["nowhere"]),
        (["--data.path", "nowhere"], ["nowhere", "data prepare"]),
        (["--data.path", ""], ["data.path", "data prepare"]),
        (["--out", ""], ["out", "--out"]),
        (["--optimizer.state", "carried"], ["optimizer.state 'carried' needs model.path"]),
        (["--training.threads", "0"], ["training.threads must be positive"]),
        (["--optimizer.old_tokens", "0.1"], ["optimizer.old_tokens 0.1 needs model.path", "tokenformer grow"]),
        (["--optimizer.old_tokens", "-1"], ["optimizer.old_tokens must lie between 0 (frozen) and 1000, got -1"]),
        (["--optimizer.old_tokens", "1e6"], ["optimizer.old_tokens must lie between 0 (frozen) and 1000"]),
        (["--optimizer.anneal_scale", "0.5"], ["optimizer.anneal_scale 0.5 needs model.path"]),
        (["--optimizer.anneal_scale", "1.5"], ["optimizer.anneal_scale must lie between 0 and 1"]),
        (["--optimizer.schedule_from", "-0.1"], ["optimizer.schedule_from must lie between 0 and 1"]),
        (["--optimizer.schedule_to", "1.1"], ["optimizer.schedule_to must lie between 0 and 1"]),
        (["--optimizer.schedule_from", "1"], ["optimizer.schedule_from 1.0 must lie below optimizer.schedule_to 1.0"]),
        (["--training.collapse_rise", "-1"], ["training.collapse_rise must not be negative, got -1"]),
        (["--training.collapse_rise", "inf"], ["training.collapse_rise", "inf"]),
        (["--training.on_collapse", "pray"], ["training.on_collapse", "skip", "pray"]),
        (["another.yaml"], ["one recipe file"]),
    ],
    ids=lambda value: "_".join(value).strip("-") if isinstance(value, list) else None,
)
def test_values_that_cannot_be(
    arguments: list[str],
    parts: list[str],
    make_recipe: MakeRecipe,
    write_recipe: WriteRecipe,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make_recipe()
    fails([write_recipe(recipe), *arguments], capsys, *parts)
    assert not Path(recipe.out).exists()


def test_folders_that_hold_something_else(
    make_recipe: MakeRecipe, write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe()
    path = write_recipe(recipe)
    Path(recipe.out).write_text("a file")
    fails([path], capsys, recipe.out, "is a file")
    Path(recipe.out).unlink()
    Path(recipe.out).mkdir()
    (Path(recipe.out) / "thesis.tex").write_text("precious")
    fails([path], capsys, recipe.out, "not empty and holds no run")
    assert (Path(recipe.out) / "thesis.tex").read_text() == "precious"


def test_a_tokenizer_that_does_not_fit_the_model(
    make_recipe: MakeRecipe, write_recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model")
    recipe = make_recipe(model__path=str(tmp_path / "model"))
    fails([write_recipe(recipe)], capsys, "tokenizer of", "prepare the data with --tokenizer")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    small = save_model(tmp_path / "small", vocab_size=64)
    for file in (tmp_path / "small").glob("tokenizer*"):
        file.unlink()
    recipe = make_recipe(model__path=str(tmp_path / "small"))
    fails([write_recipe(recipe)], capsys, "vocabulary of 300", f"the model one of {small.config.vocab_size}")


def test_rows_longer_than_the_model_takes(
    make_recipe: MakeRecipe, write_recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", max_position_embeddings=16)
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    recipe = make_recipe(model__path=str(tmp_path / "model"))
    fails([write_recipe(recipe)], capsys, "packed to 32 tokens", "takes 16", "--sequence-length")


def test_data_prepared_with_the_models_tokenizer_is_accepted(
    make_recipe: MakeRecipe, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    save_model(tmp_path / "model")
    assert isinstance(PreTrainedTokenizerFast.from_pretrained(tmp_path / "model"), PreTrainedTokenizerFast)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox\n" * 400)
    prepare(
        [str(text)], tokenizer=str(tmp_path / "model"), out=str(tmp_path / "data"), sequence_length=32, progress=False
    )
    recipe = make_recipe(model__path=str(tmp_path / "model"))
    recipe.data.path = str(tmp_path / "data")
    recipe.training.tokens = 128
    assert main(["train", write_recipe(recipe)]) == 0
