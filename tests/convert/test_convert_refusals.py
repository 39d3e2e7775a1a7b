"""What `tokenformer convert` refuses: one line that names it, code 2, nothing written, no code run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from published_folder import Payload, write_tiny, write_training_folder
from saved_model import edit_config, save_model, train_tokenizer
from tokenformer import TokenFormerForCausalLM, UserError
from tokenformer.cli import main

BIN = "pytorch_model.bin"
LAYER = "layer_03-model_00-model_states.pt"
RANK = "mp_rank_00_model_states.pt"
KEY = "sequential.3.mlp.key_param_tokens"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "published")
    return tmp_path / "published"


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    def check(source: Path | str, *words: str, options: tuple[str, ...] = ()) -> None:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("tokenformer convert: error: ")
        assert all(word in line for word in words), line
        assert captured.out == ""
        assert sorted(tmp_path.rglob("*")) == before

    return check


# Files that would run code


def payload_alone(folder: Path, payload: Payload, legacy: bool) -> Path:
    torch.save(payload, folder / BIN, _use_new_zipfile_serialization=not legacy)
    return folder


def payload_among_tensors(folder: Path, payload: Payload, legacy: bool) -> Path:
    tensors = torch.load(folder / BIN, weights_only=True)
    torch.save({**tensors, "extra": payload}, folder / BIN, _use_new_zipfile_serialization=not legacy)
    return folder


def payload_in_the_training_state(folder: Path, payload: Payload, legacy: bool) -> Path:
    step = write_training_folder(folder.parent / "run", torch.load(folder / BIN, weights_only=True), "ranks")
    shutil.copy(folder / "config.json", step)
    state = torch.load(step / RANK, weights_only=False)  # this test wrote it
    torch.save({**state, "lr_scheduler": [payload]}, step / RANK, _use_new_zipfile_serialization=not legacy)
    return folder.parent / "run"


def payload_in_a_layer(folder: Path, payload: Payload, legacy: bool) -> Path:
    step = write_training_folder(folder.parent / "run", torch.load(folder / BIN, weights_only=True))
    shutil.copy(folder / "config.json", step)
    torch.save({"mlp.key_param_tokens": payload}, step / LAYER, _use_new_zipfile_serialization=not legacy)
    return step


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize(
    "place", [payload_alone, payload_among_tensors, payload_in_the_training_state, payload_in_a_layer]
)
def test_code_in_a_pickle_is_never_run(place, legacy, folder, tmp_path, refused):
    evidence = tmp_path / "evidence"
    source = place(folder, Payload(evidence), legacy)
    file = next(path for path in source.rglob("*") if path.name in (BIN, RANK, LAYER) and b"touch" in path.read_bytes())
    refused(source, str(file), "system", "refused", "nothing was run")
    assert not evidence.exists()
    with pytest.raises((UserError, OSError)):  # nor by the other way in, which does not know training folders
        TokenFormerForCausalLM.from_pretrained(source)
    assert not evidence.exists()
    torch.load(file, weights_only=False)  # the payload is a real one: loaded without care, it runs
    assert evidence.exists()


# Files that are damaged or something else


@pytest.mark.parametrize("size", [0, 3, 100, 3000, -1], ids=str)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old"])
def test_files_cut_short(legacy, size, folder, refused):
    tensors = torch.load(folder / BIN, weights_only=True)
    torch.save(tensors, folder / BIN, _use_new_zipfile_serialization=not legacy)
    (folder / BIN).write_bytes((folder / BIN).read_bytes()[:size])
    refused(folder, f"{folder / BIN} is damaged, cut short or no file of torch")


def test_safetensors_cut_short(folder, refused):
    save_file(torch.load(folder / BIN, weights_only=True), folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-7])
    refused(folder, "model.safetensors is damaged or cut short")


def test_pointer_of_git_lfs(folder, refused):
    (folder / BIN).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6\n", encoding="utf-8")
    refused(folder, f"{folder / BIN} is a pointer of Git LFS", "git lfs pull")


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ([1, 2], ["no dictionary of tensors", "list"]),
        ({}, ["lacks sequential.0.word_embeddings.weight"]),
        ({"step": 3}, ["'step' is no tensor but int"]),
        ({"ids": torch.arange(3)}, ["ids is int64", "float32"]),
        ({"sparse": torch.eye(3).to_sparse()}, ["sparse is sparse_coo"]),
        ({"model.embed_tokens.weight": torch.ones(3, 2)}, ["lacks sequential.0.word_embeddings.weight"]),
    ],
    ids=["list", "empty", "number", "integers", "sparse", "other names"],
)
def test_files_that_hold_something_else(contents, words, folder, refused):
    torch.save(contents, folder / BIN)
    refused(folder, str(folder), *words)


# Weights and configuration that contradict each other


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(KEY), ["lacks", KEY]),
        (lambda tensors: tensors.update({KEY: torch.ones(20, 31)}), [KEY, "(20, 31)", "(20, 32)"]),
        (lambda tensors: tensors.update({"sequential.3.mlp.bias": torch.ones(32)}), ["holds sequential.3.mlp.bias"]),
        (lambda tensors: tensors.update({KEY: tensors[KEY].half()}), ["float16, float32", "dtype"]),
        (lambda tensors: tensors.update({k: t.to(torch.float8_e5m2) for k, t in tensors.items()}), ["is float8_e5m2"]),
    ],
    ids=["missing", "shape", "surplus", "mixed dtypes", "float8"],
)
def test_weights_that_are_wrong(change, words, folder, refused):
    tensors = torch.load(folder / BIN, weights_only=True)
    change(tensors)
    torch.save(tensors, folder / BIN)
    refused(folder, *words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_layers": 3}, ["num_layers is 3", "has 2"]),
        ({"hidden_size": 64}, ["hidden_size is 64", "has 32"]),
        ({"ffn_slot_num": 21}, ["ffn_slot_num is 21", "has 20"]),
        ({"num_attention_heads": 5}, ["hidden_size 32 is not divisible by num_attention_heads 5"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({"rotary_pct": 0.2}, ["rotary size 3", "odd"]),
        ({"rotary_pct": 2}, ["rotary_pct must lie between 0 and 1"]),
        ({"no_weight_tying": True}, ["no_weight_tying is True"]),
        ({"gpt_j_residual": True}, ["gpt_j_residual is True"]),
        ({"norm_activation_type": "relu"}, ["norm_activation_type is 'relu'"]),
        ({"attention_config": [[["mamba"], 2]]}, ["'mamba'"]),
        ({"rotary_pct": None}, ["lacks rotary_pct"]),
        ({"model_type": "llama"}, ["model_type is 'llama'", "--from-transformer"]),
    ],
    ids=lambda value: "-".join(map(str, next(iter(value.items())))) if isinstance(value, dict) else None,
)
def test_configurations_that_are_wrong(fields, words, folder, refused):
    edit_config(folder, **fields)
    refused(folder, *words)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_configuration_that_is_not_json(text, folder, refused):
    (folder / "config.json").write_text(text, encoding="utf-8")
    refused(folder, str(folder / "config.json"), "JSON")


def test_without_configuration_what_is_missing_is_named(folder, tmp_path, refused):
    (folder / "config.json").unlink()
    missing = ["num_attention_heads, norm_activation_type, rotary_pct, max_position_embeddings", "--config"]
    refused(folder, str(folder), *missing)
    refused(folder / BIN, str(folder / BIN), *missing)
    given = {"num_attention_heads": 2, "norm_activation_type": "softmax", "rotary_pct": 0.25}
    (tmp_path / "some.json").write_text(json.dumps(given), encoding="utf-8")
    refused(folder, "some.json lacks max_position_embeddings", options=("--config", str(tmp_path / "some.json")))
    (tmp_path / "some.json").write_text(json.dumps({**given, "seq_length": 64}), encoding="utf-8")
    assert main(["convert", str(folder), str(tmp_path / "out"), "--config", str(tmp_path / "some.json")]) == 0


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [("a.json", None, "not found"), ("a.yml", None, "not found"), ("a.yml", "{a: [}", "YAML"), ("a.yml", "7", "no fi")],
)
def test_config_files_that_cannot_be_read(name, text, word, folder, tmp_path, refused):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    refused(folder, name, word, options=("--config", str(tmp_path / name)))


# Folders


def test_folders_without_a_model(tmp_path, folder, refused):
    refused(tmp_path / "none", "none", "no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty", "no weights", "layer_*")
    refused("nobody/nothing", "nobody/nothing")


def test_a_shard_that_is_missing_or_elsewhere(folder, refused):
    index = folder / "pytorch_model.bin.index.json"
    (folder / BIN).unlink()
    index.write_text('{"weight_map": {"a": "one.bin"}}', encoding="utf-8")
    refused(folder, "one.bin is missing")
    index.write_text('{"weight_map": {"a": "../one.bin"}}', encoding="utf-8")
    refused(folder, "'../one.bin'", "not a file beside it")
    index.write_text("{}", encoding="utf-8")
    refused(folder, "lists no files")


def test_a_tensor_in_two_files(folder, refused):
    tensors = torch.load(folder / BIN, weights_only=True)
    torch.save({KEY: tensors[KEY]}, folder / "more.bin")
    weight_map = {**dict.fromkeys(tensors, BIN), "x": "more.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    refused(folder / "pytorch_model.bin.index.json", KEY, "in another file too")


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    write_training_folder(tmp_path / "run", torch.load(folder / BIN, weights_only=True))
    shutil.copy(folder / "config.json", tmp_path / "run")
    return tmp_path / "run"


def test_training_folders_that_are_not_whole(run, refused):
    step = run / "global_step10"
    (step / LAYER).rename(run / LAYER)
    refused(run, "num_layers is 2", "has 1")
    (run / LAYER).rename(step / LAYER)
    (step / "layer_05-model_00-model_states.pt").unlink()
    refused(run, "lacks sequential.5.norm.weight")
    for file in step.glob("layer_*"):
        file.unlink()
    refused(run, RANK, "holds no weights", "layer_*")
    (step / RANK).unlink()
    refused(run, "global_step10 holds no weights")
    (run / "latest").write_text("global_step11", encoding="utf-8")
    refused(run, "'global_step11'", "no such folder")
    (run / "latest").write_text("../published", encoding="utf-8")
    refused(run, "'../published'", "no such folder")


def test_several_steps_need_a_choice(run, refused):
    shutil.copytree(run / "global_step10", run / "global_step20")
    (run / "latest").unlink()
    refused(run, "global_step10, global_step20", "give the folder of one")


@pytest.mark.parametrize("files", ["layers", "ranks"])
def test_weights_split_over_devices_are_not_guessed_at(files, folder, tmp_path, refused):
    tensors = torch.load(folder / BIN, weights_only=True)
    step = write_training_folder(tmp_path / "split", tensors, files)
    shutil.copy(folder / "config.json", tmp_path / "split")
    first, second = {"layers": (LAYER, LAYER.replace("_00-", "_01-")), "ranks": (RANK, RANK.replace("00", "01"))}[files]
    shutil.copy(step / first, step / second)
    refused(tmp_path / "split", second, "several devices", "model_parallel_size 1")


def test_out_that_holds_something(folder, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    refused(folder, "exists already")


def test_tokenizer_of_another_model(folder, refused):
    train_tokenizer().save_pretrained(folder)
    entries = len(train_tokenizer())
    write_tiny(folder, vocab=entries - 1)
    refused(folder, f"tokenizer has {entries} entries", f"vocab_size is {entries - 1}")


# Back to the published format


def test_the_wrong_direction(folder, tmp_path, refused):
    save_model(tmp_path / "ours")
    refused(tmp_path / "ours", "model of this library already", "--to published")
    refused(folder, "published format already", options=("--to", "published"))
    config = ("--to", "published", "--config", str(folder / "config.json"))
    refused(tmp_path / "ours", "config is for reading", options=config)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"activation": "relu"}, ["activation is 'relu'"]),
        ({"normalization": "gelu_l1"}, ["normalization is 'gelu_l1'"]),
        ({"layer_norm_eps": 1e-6}, ["layer_norm_eps is 1e-06"]),
        ({"rope_parameters": {"rope_theta": 500.0}}, ["base 500"]),
        ({"tie_word_embeddings": False}, ["tie_word_embeddings is False"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_models_that_the_published_code_cannot_run(fields, words, tmp_path, refused):
    save_model(tmp_path / "ours", **fields)
    refused(tmp_path / "ours", *words, options=("--to", "published"))


def test_damaged_models_are_not_handed_back(tmp_path, refused):
    save_model(tmp_path / "ours")
    edit_config(tmp_path / "ours", vocab_size=300)
    refused(tmp_path / "ours", "model.embed_tokens.weight", options=("--to", "published"))


# Options and disks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dtype", "float17"), ("dtype", "float17")),
        (("--to", "numpy"), ("numpy",)),
        (("--qkv", "4"), ("--qkv goes only with --from-transformer",)),
        (("--from-transformer", "--dtype", "float16"), ("--dtype cannot go with --from-transformer",)),
        (("--fro-transformer",), ("did you mean '--from-transformer'?",)),
    ],
    ids=" ".join,
)
def test_options_that_are_wrong(options, words, folder, refused):
    refused(folder, *words, options=options)


@pytest.mark.parametrize("to", ["tokenformer", "published"])
def test_a_full_disk_leaves_nothing(to, folder, tmp_path, refused):
    import resource

    if to == "published":
        folder = tmp_path / "ours"
        save_model(folder)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        refused(folder, "cannot write", options=("--to", to))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_from_python_it_is_a_user_error(folder, tmp_path):
    from tokenformer.convert import convert

    options: dict[str, Any]
    for options, word in (({"to": "numpy"}, "numpy"), ({"dtype": "int8"}, "int8")):
        with pytest.raises(UserError, match=word):
            convert(str(folder), str(tmp_path / "out"), **options)
