"""`convert` in both directions: every form that published weights come in, and models that go there and back."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import statement
from published_folder import write_tiny, write_training_folder
from saved_model import save_model, train_tokenizer
from tokenformer import Pattention, grow
from tokenformer.convert import convert, writing
from tokenformer.models.loading import load_model, load_tokenizer
from tokenformer.published import tensor_names

Tensors = dict[str, torch.Tensor]
BIN = "pytorch_model.bin"
IDS = torch.arange(3, 15)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "published"


@pytest.fixture
def tensors(folder: Path) -> Tensors:
    return write_tiny(folder)


def check_converted(out: Path, tensors: Tensors) -> None:
    """Bitwise the published tensors, and scales that are the roots of the number of tokens."""
    read = load_file(out / "model.safetensors")
    for ours, theirs in tensor_names(2).items():
        assert torch.equal(read.pop(ours), tensors[theirs]), ours
    assert {name.rpartition(".")[2] for name in read} == {"scale"}
    assert len(read) == 2 * 5
    assert read["model.layers.1.ffn.scale"].item() == np.float32(20**0.5)
    load_model(out)


# The forms of published weights. Each takes a folder as on the Hub and returns what to convert, and a config file.


def as_on_the_hub(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    return folder, None


def in_the_old_format(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    torch.save(tensors, folder / BIN, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(folder / BIN)
    return folder, None


def zipped_again(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    """Compressed by a file manager: torch reads that, but not by mapping it into memory."""
    with zipfile.ZipFile(folder / BIN) as stored, zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED) as packed:
        for record in stored.namelist():
            packed.writestr(record, stored.read(record))
    (folder / "new").replace(folder / BIN)
    return folder, None


def with_rotary_tables(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    torch.save({**tensors, "sequential.2.attention.rotary_emb.inv_freq": torch.ones(2)}, folder / BIN)
    return folder, None


def with_transposed_tensors(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    torch.save({name: t.T.contiguous().T if t.ndim == 2 else t for name, t in tensors.items()}, folder / BIN)
    return folder, None


def _shards(folder: Path, tensors: Tensors, save: Callable, pattern: str, index: str) -> tuple[Path, Path | None]:
    (folder / BIN).unlink()
    files = {name: pattern.format(1 + (i % 2)) for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")
    return folder, None


def in_two_files(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    return _shards(folder, tensors, torch.save, "pytorch_model-{:05}-of-00002.bin", "pytorch_model.bin.index.json")


def in_two_files_by_their_index(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    in_two_files(folder, tensors)
    return folder / "pytorch_model.bin.index.json", None


def as_safetensors(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    (folder / BIN).write_bytes(b"not read where there are safetensors")
    save_file(tensors, folder / "model.safetensors")
    return folder, None


def as_two_safetensors(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    return _shards(folder, tensors, save_file, "model-{:05}-of-00002.safetensors", "model.safetensors.index.json")


def as_a_bare_file(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    return (folder / BIN).rename(folder.parent / "weights.bin"), folder / "config.json"


def as_a_file_beside_its_config(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    return folder / BIN, None


def as_a_training_folder(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    write_training_folder(folder.parent / "run", tensors)
    return folder.parent / "run", folder / "config.json"


def as_a_training_folder_with_one_file(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    write_training_folder(folder.parent / "run", tensors, "ranks")
    shutil.copy(folder / "config.json", folder.parent / "run")
    return folder.parent / "run", None


def as_the_folder_of_a_step(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    return write_training_folder(folder.parent / "run", tensors), folder / "config.json"


def as_the_only_step(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    step = write_training_folder(folder.parent / "run", tensors)
    shutil.copy(folder / "config.json", step)
    (step.parent / "latest").unlink()
    return step.parent, None


def as_a_bare_training_file(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    step = write_training_folder(folder.parent / "run", tensors, "ranks")
    return step / "mp_rank_00_model_states.pt", folder / "config.json"


def with_the_yaml_of_the_training_code(folder: Path, tensors: Tensors) -> tuple[Path, Path | None]:
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields["num-attention-heads"] = fields.pop("num_attention_heads")
    lines = "".join(f'  "{name}": {json.dumps(value)}, # as they write it\n' for name, value in fields.items())
    (folder / "config.yml").write_text(f"{{\n{lines}}}\n", encoding="utf-8")
    (folder / "config.json").unlink()
    return folder, folder / "config.yml"


FORMS = [
    as_on_the_hub,
    in_the_old_format,
    zipped_again,
    with_rotary_tables,
    with_transposed_tensors,
    in_two_files,
    in_two_files_by_their_index,
    as_safetensors,
    as_two_safetensors,
    as_a_bare_file,
    as_a_file_beside_its_config,
    as_a_training_folder,
    as_a_training_folder_with_one_file,
    as_the_folder_of_a_step,
    as_the_only_step,
    as_a_bare_training_file,
    with_the_yaml_of_the_training_code,
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_model(form, folder, tensors, tmp_path):
    source, config = form(folder, tensors)
    summary = convert(str(source), str(tmp_path / "out"), config=None if config is None else str(config))
    check_converted(tmp_path / "out", tensors)
    assert summary["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert summary["segments"] == [{"name": "base", "qkv": 12, "output": 10, "ffn": 20}]


def test_the_newest_step_is_the_one_that_latest_names(folder, tensors, tmp_path):
    step = write_training_folder(tmp_path / "run", tensors)
    other = step.with_name("global_step20")
    shutil.copytree(step, other)
    torch.save({}, other / "layer_00-model_00-model_states.pt")
    convert(str(tmp_path / "run"), str(tmp_path / "out"), config=str(folder / "config.json"))
    check_converted(tmp_path / "out", tensors)


# What comes along


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtype_is_kept(dtype, folder, tmp_path):
    tensors = write_tiny(folder, dtype=dtype)
    summary = convert(str(folder), str(tmp_path / "out"))
    check_converted(tmp_path / "out", tensors)
    model = load_model(tmp_path / "out")
    assert model.dtype == dtype
    assert model.model.layers[0].ffn.scale.dtype == torch.float32
    assert summary["dtype"] == str(dtype).removeprefix("torch.")


def test_dtype_is_chosen(folder, tensors, tmp_path):
    convert(str(folder), str(tmp_path / "out"), dtype="bfloat16")
    check_converted(tmp_path / "out", {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_mixed_dtypes_take_the_chosen_one(folder, tensors, tmp_path):
    name = "sequential.0.word_embeddings.weight"
    torch.save({**tensors, name: tensors[name].half()}, folder / BIN)
    convert(str(folder), str(tmp_path / "out"), dtype="float32")
    check_converted(tmp_path / "out", {**tensors, name: tensors[name].half().float()})


def test_tokenizer_comes_along_and_tells_the_ids(folder, tensors, tmp_path):
    train_tokenizer().save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}', encoding="utf-8")
    (folder / "generation_config.json").write_text('{"top_k": 7}', encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}), encoding="utf-8")
    summary = convert(str(folder), str(tmp_path / "out"))
    for name in (*summary["tokenizer"], "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert set(summary["tokenizer"]) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert load_tokenizer(tmp_path / "out").get_vocab() == train_tokenizer().get_vocab()
    model = load_model(tmp_path / "out")
    assert model.config.eos_token_id == train_tokenizer().eos_token_id == 0
    assert model.generation_config.top_k == 7


def test_large_models_are_written_as_several_files(folder, tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_SHARD_BYTES", 10_000)
    calls: list[tuple[int, int]] = []
    convert(str(folder), str(tmp_path / "out"), progress=lambda done, total: calls.append((done, total)))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == len(calls) > 3
    read = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(read[ours], tensors[theirs]) for ours, theirs in tensor_names(2).items())
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    weights = sum(tensor.nbytes for tensor in tensors.values())
    assert calls[-1] == (weights + 10 * 4, weights + 10 * 4)  # ten scales


# There and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalization", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_published_to_ours_and_back_is_bitwise(dtype, normalization, folder, tmp_path):
    tensors = write_tiny(folder, dtype=dtype, normalization=normalization)
    train_tokenizer().save_pretrained(folder)
    convert(str(folder), str(tmp_path / "ours"))
    summary = convert(str(tmp_path / "ours"), str(tmp_path / "back"), to="published")
    back = torch.load(tmp_path / "back" / BIN, weights_only=True)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    for name in written.keys() - {"torch_dtype", "transformers_version"}:
        assert config[name] == written[name], name
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert (summary["appended"], summary["rescaled"], summary["merged"]) == ({}, [], ["base"])


@pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "softmax"])
def test_ours_to_published_and_back_is_bitwise(normalization, tmp_path):
    model = save_model(tmp_path / "ours", normalization=normalization, rotary_pct=0.5)
    convert(str(tmp_path / "ours"), str(tmp_path / "published"), to="published")
    convert(str(tmp_path / "published"), str(tmp_path / "back"))
    saved, back = model.state_dict(), load_model(tmp_path / "back").state_dict()
    assert saved.keys() == back.keys()
    assert all(torch.equal(saved[name], back[name]) for name in saved)
    ours, again = (json.loads((tmp_path / name / "config.json").read_text("utf-8")) for name in ("ours", "back"))
    assert again == ours


def published_logits(folder: Path, ids: torch.Tensor) -> np.ndarray:
    tensors = torch.load(folder / BIN, weights_only=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return statement.published_logits(tensors, config, ids.tolist())


def grown_model(folder: Path, normalization: str, scale: str):
    """Trained a little after growing: no zero keys any more."""
    model = save_model(folder, normalization=normalization)
    grow(model, qkv=40, ffn=64, scale=scale, keys="random", name="more")
    grow(model, output=12, ffn=70, scale=scale, keys="random")
    for layer in model.modules():
        if isinstance(layer, Pattention):
            for segment in layer.segments.values():
                torch.nn.init.normal_(segment.key, std=model.config.hidden_size**-0.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "softmax"])
def test_segments_are_merged(normalization, tmp_path):
    model = grown_model(tmp_path / "grown", normalization, "sqrt")
    summary = convert(str(tmp_path / "grown"), str(tmp_path / "out"), to="published")
    tensors = torch.load(tmp_path / "out" / BIN, weights_only=True)
    parts = [segment.value for segment in model.model.layers[1].ffn.segments.values()]
    assert len(parts) == 3
    assert torch.equal(tensors["sequential.3.mlp.value_param_tokens"], torch.cat(parts))
    with torch.no_grad():
        logits = model(IDS[None]).logits[0].numpy()
    np.testing.assert_allclose(logits, published_logits(tmp_path / "out", IDS), rtol=0, atol=1e-4)
    assert summary["merged"] == ["base", "more", "grown1"]
    assert summary["segments"] == [{"name": "base", "qkv": 40, "output": 12, "ffn": 70}]


@pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "softmax"])
@pytest.mark.filterwarnings(
    "ignore:with softmax a token of zero score"
)  # growing warns, and that is not the point here
def test_a_grown_model_that_kept_its_scale_keeps_its_outputs(normalization, tmp_path):
    model = grown_model(tmp_path / "grown", normalization, "keep")
    summary = convert(str(tmp_path / "grown"), str(tmp_path / "out"), to="published")
    with torch.no_grad():
        logits = model(IDS[None]).logits[0].numpy()
    np.testing.assert_allclose(logits, published_logits(tmp_path / "out", IDS), rtol=0, atol=1e-4)
    if normalization == "l2_gelu":
        assert summary["appended"] == {"qkv": 32, "output": 12, "ffn": 32}  # what the keys span, in 32 channels
        assert summary["segments"] == [{"name": "base", "qkv": 72, "output": 24, "ffn": 102}]
    else:
        assert summary["rescaled"] == ["qkv", "output", "ffn"]
        assert summary["segments"] == [{"name": "base", "qkv": 40, "output": 12, "ffn": 70}]
    again = convert(str(tmp_path / "out"), str(tmp_path / "back"))
    assert again["segments"] == summary["segments"]
    with torch.no_grad():
        np.testing.assert_allclose(
            load_model(tmp_path / "back")(IDS[None]).logits[0].numpy(), logits, rtol=0, atol=1e-4
        )


def test_what_is_appended_is_rounded_once_to_the_dtype(tmp_path):
    grown_model(tmp_path / "grown", "l2_gelu", "keep")
    convert(str(tmp_path / "grown"), str(tmp_path / "float32"), to="published")
    convert(str(tmp_path / "grown"), str(tmp_path / "bfloat16"), to="published", dtype="bfloat16")
    whole, rounded = (torch.load(tmp_path / name / BIN, weights_only=True) for name in ("float32", "bfloat16"))
    assert all(torch.equal(tensor.bfloat16(), rounded[name]) for name, tensor in whole.items())
