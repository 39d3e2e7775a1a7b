"""A prepared folder, read back and checked."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenformer.data.megatron import MegatronData
from tokenformer.data.split import SPLITS
from tokenformer.data.storage import file_sha256, ids_sha256
from tokenformer.data.tokenizer import tokenizer_hash
from tokenformer.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PreparedData:
    """What `tokenformer data prepare` wrote.

    Attributes:
        path: the folder.
        manifest: its manifest.json.
        train: rows of the training split; column `input_ids`, a list of `sequence_length` ids.
        held_out: rows of the held-out split.
        tokenizer: the tokenizer that encoded the text.
        tokenizer_hash: SHA-256 of its tokenizer.json.
        vocab_size: the largest id plus one: the rows an embedding needs.
        sequence_length: ids in a row.
    """

    path: Path
    manifest: dict[str, Any]
    train: "Dataset"
    held_out: "Dataset"
    tokenizer: "PreTrainedTokenizerFast"
    tokenizer_hash: str
    vocab_size: int
    sequence_length: int

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True) -> "PreparedData":
        """Open a prepared folder; the rows stay on disk, memory-mapped.

        Args:
            path: the folder.
            verify: also read all ids and compare their SHA-256, which takes about a second per gigabyte; False only
                checks that every file is there and has the right size.

        Raises:
            UserError: if the folder is missing, incomplete or damaged.
        """
        from transformers import PreTrainedTokenizerFast

        path = Path(path)
        manifest = read_manifest(path)
        splits = {name: _load_split(path, name, manifest, verify) for name in SPLITS}
        expected = manifest["tokenizer"]["sha256"]
        if not (path / "tokenizer" / "tokenizer.json").is_file() or tokenizer_hash(path / "tokenizer") != expected:
            raise damaged(path, "tokenizer/tokenizer.json is missing or was changed")
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path / "tokenizer")
        except Exception as error:  # transformers raises many unrelated types
            raise damaged(path, f"the tokenizer cannot be loaded: {error}") from error
        return cls(
            path=path,
            manifest=manifest,
            train=splits["train"],
            held_out=splits["held_out"],
            tokenizer=tokenizer,
            tokenizer_hash=expected,
            vocab_size=manifest["tokenizer"]["vocab_size"],
            sequence_length=manifest["options"]["sequence_length"],
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the rows of each split."""
        return {name: split["sha256"] for name, split in self.manifest["splits"].items()}

    def save_tokenizer(self, folder: Path) -> None:
        """Copy tokenizer.json and tokenizer_config.json."""
        shutil.copytree(self.path / "tokenizer", folder, dirs_exist_ok=True)

    def tokens_per_byte(self, split: str, *, progress: bool = False) -> float:
        """Return the tokens that stand for one UTF-8 byte of text, end tokens included.

        A loss in nats per token becomes bits per byte as `loss / ln(2) * tokens_per_byte(split)`.

        Args:
            split: `train` or `held_out`.
            progress: has no effect here, where the number is known.

        Raises:
            UserError: if there is no such split.
        """
        if split not in SPLITS:
            raise UserError(f"no split '{split}': use train or held_out")
        counts = self.manifest["splits"][split]
        return counts["tokens"] / counts["bytes"]


def damaged(path: Path, what: str) -> UserError:
    """Return the error for a finished folder that is no longer as it was written."""
    return UserError(
        f"'{path}' is damaged ({what}): delete the folder and run `tokenformer data prepare ... --out {path}` again"
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a finished folder.

    Raises:
        UserError: if the folder is missing, or its preparation did not finish, or the manifest is damaged.
    """
    if not path.is_dir():
        raise UserError(f"no prepared data at '{path}': make it with `tokenformer data prepare ... --out {path}`")
    if not (path / MANIFEST).exists():
        raise UserError(
            f"'{path}' holds no finished preparation (no {MANIFEST}): "
            f"run `tokenformer data prepare ... --out {path}` again, it continues where it stopped"
        )
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version = manifest["format_version"]
        complete = {"options", "files", "tokenizer", "splits"} <= manifest.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"{MANIFEST} cannot be read") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"'{path}' has format {version}, this version reads {FORMAT_VERSION}: "
            "run `tokenformer data prepare` again into a new folder"
        )
    if not complete:
        raise damaged(path, f"{MANIFEST} lacks some of its fields")
    set_default_format(manifest["options"])
    return manifest


def set_default_format(options: dict[str, Any]) -> None:
    """Name the format in the options of a preparation that was begun before there was a choice."""
    options.setdefault("format", "arrow")


def check_shards(path: Path, subfolder: str, shards: list[dict[str, Any]]) -> None:
    """Check that the shards of a split are there and have their sizes.

    To be done before they are opened: reading beyond the end of a memory-mapped file can end the process.

    Raises:
        UserError: if one is missing or has another size.
    """
    for shard in shards:
        file = Path(subfolder, shard["file"])
        if not (path / file).is_file() or (path / file).stat().st_size != shard["bytes"]:
            raise damaged(path, f"{file} is missing or has the wrong size")


def _load_split(path: Path, name: str, manifest: dict[str, Any], verify: bool) -> "Dataset":
    from datasets import load_from_disk

    expected = manifest["splits"][name]
    is_megatron = manifest["options"]["format"] == "megatron"
    check_shards(path, "" if is_megatron else name, expected["shards"])
    try:
        if is_megatron:
            dataset = MegatronData.open(path / name).rows(manifest["options"]["sequence_length"])
            intact = not verify or all(
                file_sha256(path / file["file"]) == file["sha256"] for file in expected["shards"]
            )
        else:
            dataset = load_from_disk(str(path / name))
            intact = not verify or ids_sha256(dataset) == expected["sha256"]
    except Exception as error:  # arrow and datasets raise many unrelated types
        raise damaged(path, f"{name} cannot be opened: {error}") from error
    if not intact or len(dataset) != expected["rows"]:
        raise damaged(path, f"the ids of {name} are not those that were written")
    return dataset
