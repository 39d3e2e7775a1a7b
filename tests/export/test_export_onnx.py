"""`tokenformer export-onnx`: one graph for prefill and decoding, run by ONNX Runtime, against the model in torch."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import DynamicCache

from saved_model import save_model, train_tokenizer
from tokenformer.cli import main
from tokenformer.export import onnx as export_module
from tokenformer.export.onnx import TOLERANCE, compare_graph

DOCUMENT = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A grown model, and a session on its graph."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("onnx")
    model = save_model(root / "model", grown=True)
    for name, parameter in model.named_parameters():
        if ".grown1." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(root / "model")
    assert main(["export-onnx", str(root / "model"), str(root / "out")]) == 0
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return model, root / "out", onnxruntime.InferenceSession(root / "out" / "model.onnx", options)


def empty_cache(session: onnxruntime.InferenceSession, rows: int) -> dict[str, np.ndarray]:
    names = [value.name for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    return {name: np.zeros((rows, 2, 0, 16), np.float32) for name in names}


def run(session, past: dict[str, np.ndarray], ids, mask, positions) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """Logits, and the cache for the next call."""
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits, *present = session.run(None, {name: np.asarray(value) for name, value in feed.items()} | past)
    return torch.from_numpy(logits), dict(zip(past, present, strict=True))


def random_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(320, (rows, length), generator=torch.Generator().manual_seed(rows * length))


def test_inputs_and_outputs(exported) -> None:
    _, folder, session = exported
    caches = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert {value.name: value.shape for value in session.get_inputs()} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        **{f"past_key_values.{name}": ["batch", 2, "past", 16] for name in caches},
    }
    assert [value.name for value in session.get_outputs()] == ["logits", *(f"present.{name}" for name in caches)]
    assert [value.type for value in session.get_inputs()[:3]] == ["tensor(int64)"] * 3
    # The weights lie beside the graph: one file has a limit of 2 GB.
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    stored = [tensor for tensor in graph.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert sum(np.prod(tensor.dims) for tensor in stored) >= 20_000
    assert b"stack_trace" not in (folder / "model.onnx").read_bytes()
    assert str(folder.parent).encode() not in (folder / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("rows", "past", "length"),
    [(1, 0, 7), (2, 0, 5), (1, 0, 1), (3, 0, 64), (1, 4, 1), (3, 1, 1), (2, 6, 4), (1, 63, 1), (2, 1, 2)],
    ids=lambda value: str(value),
)
def test_logits_and_cache_equal_torch(exported, rows, past, length) -> None:
    model, _, session = exported
    ids, cache = random_ids(rows, past + length), DynamicCache(config=model.config)
    given = empty_cache(session, rows)
    with torch.no_grad():
        if past:
            model(ids[:, :past], past_key_values=cache)
            states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
            given = {name: state.numpy().copy() for name, state in zip(given, states, strict=True)}
        expected = model(ids[:, past:], past_key_values=cache)
    mask, positions = torch.ones_like(ids), torch.arange(past, past + length).repeat(rows, 1)
    logits, present = run(session, given, ids[:, past:], mask, positions)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=3e-5)
    states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
    for name, state in zip(present, states, strict=True):
        torch.testing.assert_close(torch.from_numpy(present[name]), state, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("padding", [0, 3], ids=["whole", "left-padded"])
def test_greedy_decoding_equals_generate(exported, padding) -> None:
    model, _, session = exported
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    generated = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    past, new, text = empty_cache(session, 2), ids, ids
    for _ in range(20):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        logits, past = run(session, past, new, mask, positions)
        new = logits[:, -1:].argmax(-1)
        text, mask = torch.cat([text, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    assert torch.equal(text, generated)


def test_beside_the_graph_stand_configuration_and_tokenizer(exported) -> None:
    model, folder, _ = exported
    assert json.loads((folder / "config.json").read_text())["segments"] == model.config.segments
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads(
        train_tokenizer().backend_tokenizer.to_str()
    )
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0


def test_the_documented_loop_runs(exported, capsys) -> None:
    model, folder, _ = exported
    (snippet,) = re.findall(r"```python\n(import numpy.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    exec(snippet.replace("onnx/large", str(folder)), {})
    tokenizer = train_tokenizer()
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert capsys.readouterr().out == tokenizer.backend_tokenizer.decode(generated[0].tolist()) + "\n"


def test_half_the_size_in_float16(tmp_path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    assert main(["export-onnx", str(tmp_path / "model"), str(tmp_path / "out"), "--dtype", "float16"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert {value.type for value in session.get_inputs()} == {"tensor(int64)", "tensor(float16)"}
    assert {value.type for value in session.get_outputs()} == {"tensor(float16)"}
    size = (tmp_path / "out" / "model.onnx.data").stat().st_size
    assert size == pytest.approx(2 * model.num_parameters(), rel=0.05)
    ids = random_ids(2, 9)
    past = {name: state.astype(np.float16) for name, state in empty_cache(session, 2).items()}
    logits, _ = run(session, past, ids, torch.ones_like(ids), torch.arange(9).repeat(2, 1))
    expected = model(ids).logits
    assert (logits.float() - expected).abs().max() < 1e-2 * expected.abs().max()


# What cannot be exported


def refused(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """Code 2, one line with all of `parts`, and nothing new on disk."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["export-onnx", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("tokenformer export-onnx: error: ")
    assert all(part in line for part in parts), line
    assert captured.out == ""
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_folders_that_are_missing_or_taken(tmp_path, capsys) -> None:
    save_model(tmp_path / "model")
    refused([str(tmp_path / "none"), str(tmp_path / "out")], tmp_path, capsys, "no folder", "none")
    refused([str(tmp_path / "model"), str(tmp_path / "model")], tmp_path, capsys, "exists already")
    refused([str(tmp_path / "model")], tmp_path, capsys, "out")
    arguments = [str(tmp_path / "model"), str(tmp_path / "out"), "--dtype", "bfloat16"]
    refused(arguments, tmp_path, capsys, "dtype", "float16", "bfloat16")


@pytest.mark.parametrize("module", ["onnx", "onnxruntime", "onnxscript"])
def test_without_the_extra(module, tmp_path, capsys, monkeypatch) -> None:
    save_model(tmp_path / "model")
    monkeypatch.setattr("tokenformer.errors.find_spec", lambda name: None if name == module else name)
    line = f"this needs {module}, which is not installed: pip install 'tokenformer[onnx]'"
    refused([str(tmp_path / "model"), str(tmp_path / "out")], tmp_path, capsys, line)


def test_the_comparison_sees_what_differs(exported, tmp_path) -> None:
    model, folder, _ = exported

    def gap(other: Any, file: Path = folder / "model.onnx") -> float:
        difference, largest = compare_graph(other, file)
        return difference / (TOLERANCE["float32"] * largest)

    assert gap(model) < 0.1
    for change in (
        lambda other: other.model.layers[1].ffn.scale.mul_(1.001),
        lambda other: setattr(other.config, "rope_parameters", {**other.config.rope_parameters, "rope_theta": 5000.0}),
        lambda other: other.model.layers[0].attention.key.segments["base"].value.data.mul_(1.001),
    ):
        other = copy.deepcopy(model)
        change(other)
        assert gap(other) > 1
    graph = onnx.load(folder / "model.onnx")
    (compare,) = [node for node in graph.graph.node if node.op_type == "LessOrEqual"]
    compare.op_type = "Less"  # a position no longer sees itself
    onnx.save(graph, tmp_path / "model.onnx")
    assert gap(model, tmp_path / "model.onnx") > 1


def test_a_graph_that_computes_something_else_is_not_kept(exported, tmp_path, capsys, monkeypatch) -> None:
    def write_other(model: Any, file: Path) -> None:
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copy(exported[1] / name, file.with_name(name))

    torch.manual_seed(1)
    save_model(tmp_path / "model", grown=True)
    monkeypatch.setattr(export_module, "write_graph", write_other)
    arguments = [str(tmp_path / "model"), str(tmp_path / "out")]
    refused(arguments, tmp_path, capsys, "logits differ from torch's", "constraints.txt")
