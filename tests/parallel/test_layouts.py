"""A model cut over 2 and 4 processes against the whole one, in float64: numbers, checkpoints, folders, growing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts_worker import LAYOUTS, whole_model

from tokenformer import TokenFormerForCausalLM
from tokenformer.errors import UserError
from tokenformer.parallel import Layout, export_checkpoint, load_shards
from tokenformer.parallel.sharding import check_model

pytestmark = pytest.mark.slow  # processes that start torch: half a minute

WORKER = str(Path(__file__).with_name("layouts_worker.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., Any]) -> Path:
    """What the processes wrote; four of them go first, and two read what they left."""
    folder = tmp_path_factory.mktemp("layouts")
    for processes in (4, 2):
        launch(processes, WORKER, str(folder))
    return folder


@pytest.mark.parametrize("sizes", [sizes for processes in (2, 4) for sizes in LAYOUTS[processes]], ids=str)
def test_a_model_in_parts_is_the_whole_model(folder: Path, sizes: tuple[int, int, int]) -> None:
    layout = Layout(*sizes)
    for rank in range(layout.processes):
        found = json.loads((folder / f"rank-{rank}-of-{layout.processes}.json").read_text())[str(layout)]
        for what, value in found.items():
            # The norm is handed on in float32.
            close = (
                value is True if isinstance(value, bool) else value < (1e-6 if what in ("norm", "clipped") else 1e-10)
            )
            assert close, (rank, what, value)


@pytest.mark.parametrize("name", ["212", "122", "221"])
def test_one_process_reads_what_four_wrote(folder: Path, name: str, tmp_path: Path) -> None:
    written = TokenFormerForCausalLM.from_pretrained(folder / f"model-{name}", dtype=torch.float64)
    model = whole_model()
    load_shards(folder / f"checkpoint-{name}", model)
    for key, tensor in written.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_a_checkpoint_becomes_an_ordinary_folder(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "checkpoint-122"
    with pytest.raises(UserError, match="no checkpoint of several processes"):
        export_checkpoint(str(folder / "model-122"), str(tmp_path / "out"))
    (checkpoint / "config.json").write_bytes((folder / "model-122" / "config.json").read_bytes())
    export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    exported = TokenFormerForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).state_dict()
    written = TokenFormerForCausalLM.from_pretrained(folder / "model-122", dtype=torch.float64).state_dict()
    assert all(torch.equal(exported[name], written[name]) for name in written)


def test_damaged_or_other_shards_are_one_line(folder: Path) -> None:
    other = whole_model()
    other.model.layers[0].ffn.add_segment("more", 3)
    with pytest.raises(UserError, match="is of another model"):
        load_shards(folder / "checkpoint-122", other)
    (folder / "checkpoint-212" / "shards" / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(UserError, match="cannot be read"):
        load_shards(folder / "checkpoint-212", whole_model())


def test_layouts_that_do_not_fit_name_the_field() -> None:
    with pytest.raises(UserError, match=r"parallel.tensor 8: .* has only 5 tokens"):
        check_model(whole_model(), Layout(tensor=8))
    with pytest.raises(UserError, match=r"parallel.shard 3 .* must divide the 32 channels"):
        check_model(whole_model(), Layout(shard=3, tensor=2))
    with pytest.raises(UserError, match="no parameter tokens"):
        check_model(torch.nn.Linear(2, 2), Layout(tensor=2))
