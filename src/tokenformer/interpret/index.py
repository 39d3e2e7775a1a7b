"""A corpus index, read back and checked: statistics of parameter tokens, and the contexts that activate them most."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tokenformer.data.storage import file_sha256
from tokenformer.errors import UserError
from tokenformer.interpret.contexts import WINDOW, context, pieces
from tokenformer.interpret.tallies import ALWAYS_ON, statistics
from tokenformer.models.checkpoints import WEIGHTS_FILES
from tokenformer.models.loading import CONFIG, load_tokenizer
from tokenformer.models.loading import INDEX as WEIGHTS_INDEX

FORMAT = 1
INDEX = "index.json"
_FIELDS = ("format", "kind", "model", "tokenizer", "data", "options", "rows", "files")


@dataclass(frozen=True)
class Index:
    """What `build_index` wrote.

    Attributes:
        folder: of the index.
        manifest: its index.json.
        rows: token ids (R, T) that were read.
        tokenizer: that decodes them.
    """

    folder: Path
    manifest: dict[str, Any]
    rows: torch.Tensor
    tokenizer: PreTrainedTokenizerFast
    _tensors: dict[str, torch.Tensor]
    _pieces: dict[int, list[str]] = field(default_factory=dict)

    @classmethod
    def open(
        cls, folder: str | Path, model_folder: str | Path, *, tokenizer: PreTrainedTokenizerFast | None = None
    ) -> "Index":
        """Open an index of the model in `model_folder`.

        Raises:
            UserError: there is none, it is unfinished or damaged, or of another model.
        """
        folder, model_folder = Path(folder), Path(model_folder)
        manifest = read_index(folder)
        if manifest["model"]["fingerprint"] != model_fingerprint(model_folder):
            raise UserError(
                f"{folder} is an index of another model ('{manifest['model']['name']}', not '{model_folder.name}'): "
                "give that of this model, or build one into another folder"
            )
        rows = manifest["rows"]
        if rows["done"] < rows["total"]:
            raise UserError(
                f"{folder} is unfinished ({rows['done']} of {rows['total']} rows): run the command that builds it "
                "again, it goes on from there"
            )
        check_files(folder, manifest)
        tensors: dict[str, torch.Tensor] = {}
        for file in manifest["files"]:
            tensors |= load_file(folder / file)
        return cls(folder, manifest, tensors.pop("rows"), tokenizer or load_tokenizer(model_folder), tensors)

    @property
    def segments(self) -> list[tuple[str, str]]:
        """Layer and segment of all that was indexed."""
        addresses = [name.removesuffix("/sum") for name in self._tensors if name.endswith("/sum")]
        return [(layer, segment) for layer, _, segment in (address.rpartition("/") for address in addresses)]

    def statistics(self, layer: str, segment: str) -> dict[str, torch.Tensor]:
        """Of each token (N,), in float64: `mean`, `rms` and `max` weight, `active`: share of |weight| > 0.1.

        Raises:
            UserError: no such layer or segment in the index.
        """
        parts = ("sum", "squares", "highest", "active")
        return statistics({name: self._tensor(layer, segment, name) for name in parts}, self.rows.numel())

    def dead(self, layer: str, segment: str) -> list[int]:
        """Tokens that are active nowhere."""
        return (self.statistics(layer, segment)["active"] == 0).nonzero().flatten().tolist()

    def always_on(self, layer: str, segment: str) -> list[int]:
        """Tokens that are active at 99 % of the positions or more."""
        return (self.statistics(layer, segment)["active"] >= ALWAYS_ON).nonzero().flatten().tolist()

    def contexts(self, address: object, *, window: int = WINDOW) -> list[dict[str, Any]]:
        """Where the weight of a token is highest, highest first, one context of a row.

        Args:
            address: a `TokenAddress` or its text, `layer/segment/number`.
            window: tokens shown on each side.

        Returns:
            `before`, `token` and `after` as text, `weight`, `row` and `position`.

        Raises:
            UserError: no such token in the index.
        """
        layer, segment, number = _parts(str(address))
        highest = self._tensor(layer, segment, "highest")
        if not 0 <= number < len(highest):
            raise UserError(f"{layer}/{segment} has tokens 0 to {len(highest) - 1}, not {number}")
        places = [self._tensor(layer, segment, name)[number].tolist() for name in ("row", "position")]
        found = []
        for weight, row, position in zip(highest[number].tolist(), *places, strict=True):
            if row >= 0:
                text = context(self._row(row), position, window)
                found.append({**text, "weight": weight, "row": row, "position": position})
        return found

    def _row(self, row: int) -> list[str]:
        if row not in self._pieces:
            if len(self._pieces) >= 1024:  # so that a page left open does not collect the corpus as text
                self._pieces.clear()
            self._pieces[row] = pieces(self.tokenizer, self.rows[row].tolist())
        return self._pieces[row]

    def _tensor(self, layer: str, segment: str, name: str) -> torch.Tensor:
        if (key := f"{layer}/{segment}/{name}") not in self._tensors:
            raise UserError(
                f"{self.folder} has no '{layer}/{segment}': the first it has is '{'/'.join(self.segments[0])}'"
            )
        return self._tensors[key]


def _parts(address: str) -> tuple[str, str, int]:
    layer, _, rest = address.partition("/")
    segment, _, number = rest.partition("/")
    if not number.isdecimal():
        raise UserError(f"'{address}' is no token: write layer/segment/number, as model.layers.0.ffn/base/17")
    return layer, segment, int(number)


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over the configuration and the weights of a model.

    Raises:
        UserError: the folder holds none.
    """
    weights = sorted(folder.glob("*.safetensors")) or [folder / n for n in WEIGHTS_FILES if (folder / n).is_file()]
    files = [folder / CONFIG, *weights, *folder.glob(WEIGHTS_INDEX)]
    if not weights or not files[0].is_file():
        raise UserError(f"'{folder}' holds no model to tell the index by: save it first (save_pretrained)")
    return hashlib.sha256("".join(f"{path.name} {file_sha256(path)}\n" for path in files).encode()).hexdigest()


def read_index(folder: Path) -> dict[str, Any]:
    """The manifest of an index, finished or not.

    Raises:
        UserError: there is none, or it is damaged or of another format.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / INDEX).read_bytes())
        version = manifest["format"]
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no corpus index (no {INDEX}): build one, or correct the path") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/{INDEX} is damaged: remove the folder and build the index again") from error
    if version != FORMAT:
        raise UserError(f"{folder} has format {version}, this version reads {FORMAT}: build the index again")
    if missing := [name for name in _FIELDS if name not in manifest]:
        raise UserError(f"{folder}/{INDEX} is damaged (no '{missing[0]}'): remove the folder and build the index again")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare the files of an index with their SHA-256.

    Raises:
        UserError: one is missing, or is not as it was written.
    """
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or file_sha256(path) != expected:
            raise UserError(f"{path} is missing or damaged: remove {folder} and build the index again")
