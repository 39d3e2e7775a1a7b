"""The corpus index of a language model: which contexts activate each of its parameter tokens, over many rows.

A folder with `index.json` and two files of safetensors: `rows.safetensors`, the token ids that were read, and
`tokens-<rows done>.safetensors`, what `Tally` found in them. The manifest names both with their SHA-256 and is replaced
last, so that whatever ends a run, the folder holds a whole state that the same command goes on from.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tokenformer.data.prepared import MANIFEST, PreparedData
from tokenformer.data.storage import file_sha256
from tokenformer.elastic.sizes import layers_of, segments_of
from tokenformer.errors import UserError
from tokenformer.evaluation.loading import start_token
from tokenformer.evaluation.progress import bar
from tokenformer.evaluation.text import read_sources
from tokenformer.folders import PARTIAL, new_folder, saving, write_atomically
from tokenformer.interpret.addresses import require_language_model
from tokenformer.interpret.capture import LayerRecord, capture
from tokenformer.interpret.index import FORMAT, INDEX, Index, check_files, model_fingerprint, read_index
from tokenformer.interpret.tallies import Tally
from tokenformer.sparse import refuse_sparse

ROWS = "rows.safetensors"
_LONGEST_ROW = 512
_POSITIONS = 2048
_SECONDS = 30.0


@torch.no_grad()
def build_index(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: str | Path | Sequence[str | Path],
    folder: str | Path,
    *,
    model_folder: str | Path | None = None,
    num_tokens: int = 1_000_000,
    contexts: int = 16,
    batch_size: int | None = None,
    save_every: float = _SECONDS,
    progress: bool = True,
) -> Index:
    """Read a corpus and keep, of each parameter token, statistics and the contexts in which its weight is highest.

    Interrupted, the same call goes on where it was saved last; what comes out is the same to the byte. A finished index
    is only opened.

    Args:
        model: a language model with Pattention layers, in evaluation mode.
        tokenizer: of the model.
        data: a folder of `tokenformer data prepare`, whose training rows are read, evenly spaced; or text files and
            what else `read_sources` takes, laid end to end and cut into rows.
        folder: of the index.
        model_folder: where the model lies; where it was loaded from if not given.
        num_tokens: of the corpus, to be read at most.
        contexts: kept of each token.
        batch_size: rows at a time; as many as hold 2048 tokens if not given.
        save_every: seconds between two savings.
        progress: show a bar where stderr is a terminal.

    Raises:
        UserError: a model that reads no text, has no Pattention layers, or has adapters or limits; data that are
            missing, empty or of another tokenizer; a folder that holds something else, or an index of another model,
            other data or options; a weight that is not finite; the folder cannot be written.
    """
    for name, value in (("num_tokens", num_tokens), ("contexts", contexts), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    refuse_sparse(model, "indexed")
    require_language_model(model)
    folder, source = Path(folder), Path(model_folder or str(model.name_or_path))
    rows, name = read_rows(tokenizer, data, num_tokens=num_tokens, longest=model.config.max_position_embeddings)
    state: dict[str, Any] = {
        "format": FORMAT,
        "kind": "language",
        "model": {"name": source.name, "fingerprint": model_fingerprint(source)},
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "data": {"name": name, "fingerprint": hashlib.sha256(rows.numpy().tobytes()).hexdigest()},
        "options": {"contexts": contexts, "batch_size": batch_size or max(1, _POSITIONS // rows.shape[1])},
        "rows": {"done": 0, "total": len(rows), "length": rows.shape[1]},
        "files": {},
    }
    if (folder / INDEX).is_file():
        state = _resumed(folder, state)
    else:
        with new_folder(folder) as partial:
            save_file({"rows": rows}, partial / ROWS)
            state["files"] = {ROWS: file_sha256(partial / ROWS)}
            _write_manifest(partial, state)
    _run(model, rows, folder, state, save_every, progress)
    return Index.open(folder, source, tokenizer=tokenizer)


def empty_tallies(model: PreTrainedModel, contexts: int) -> dict[str, Tally]:
    """Tallies in which nothing has been counted yet, by `layer/segment`.

    Raises:
        UserError: a model without Pattention layers, or with adapters or limits.
    """
    return {
        f"{name}/{segment}": Tally(tokens.num_tokens, contexts)
        for name, layer in layers_of(model).items()
        for segment, tokens in segments_of(layer).items()
    }


@torch.no_grad()
def add_rows(model: PreTrainedModel, rows: torch.Tensor, tallies: dict[str, Tally], first: int) -> None:
    """Read rows (B, T), of which the first is row `first` of the corpus, into `tallies`.

    Raises:
        UserError: a weight that is not finite.
    """
    shape = rows.shape

    def see(record: LayerRecord) -> None:
        for name, segment in record.segments.items():
            weights = cast(torch.Tensor, segment.weights).view(*shape, segment.num_tokens)
            if not weights.isfinite().all():
                raise UserError(f"{record.layer}: weights are not finite: model damaged, or its dtype too narrow")
            tallies[f"{record.layer}/{name}"].add(weights, first)

    # The backbone alone: nothing is predicted.
    with capture(model, consume=see):
        model.base_model(input_ids=rows.long().to(model.device), use_cache=False)


def _run(
    model: PreTrainedModel, rows: torch.Tensor, folder: Path, state: dict[str, Any], save_every: float, progress: bool
) -> None:
    tallies = empty_tallies(model, state["options"]["contexts"])
    for file in state["files"]:
        if file != ROWS:
            for key, tensor in load_file(folder / file).items():
                address, _, part = key.rpartition("/")
                tallies[address].tensors[part] = tensor
    first = state["rows"]["done"]
    length, size = rows.shape[1], state["options"]["batch_size"]

    saved = time.monotonic()
    with bar("indexing", rows.numel(), "tokens", progress) as advance:
        advance(first * length)
        for batch in rows[first:].split(size):
            add_rows(model, batch, tallies, first)
            first += len(batch)
            advance(batch.numel())
            if first == len(rows) or time.monotonic() - saved >= save_every:
                _save(folder, state, tallies, first)
                saved = time.monotonic()


def _save(folder: Path, state: dict[str, Any], tallies: dict[str, Tally], done: int) -> None:
    tensors = {f"{address}/{name}": t for address, tally in tallies.items() for name, t in tally.tensors.items()}
    old = [file for file in state["files"] if file != ROWS]
    file = folder / f"tokens-{done:09d}.safetensors"
    partial = folder / (file.name + PARTIAL)
    with saving(folder):
        save_file(tensors, partial)
        os.replace(partial, file)
    state["rows"]["done"] = done
    state["files"] = {ROWS: state["files"][ROWS], file.name: file_sha256(file)}
    _write_manifest(folder, state)
    for name in old:
        (folder / name).unlink(missing_ok=True)


def _write_manifest(folder: Path, state: dict[str, Any]) -> None:
    write_atomically(folder / INDEX, json.dumps(state, indent=2, ensure_ascii=False) + "\n")


def _resumed(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The state of an index that was begun, if it is the one that is wanted."""
    found = read_index(folder)
    for name in ("kind", "model", "tokenizer", "data", "options"):
        mine, other = wanted[name], found[name]
        # A folder that was moved or renamed holds the same model and the same rows.
        same = mine["fingerprint"] == other["fingerprint"] if "fingerprint" in mine else mine == other
        if not same:
            raise UserError(
                f"{folder} is an index with another {name} ({_shown(other)}, not {_shown(mine)}): give another folder, "
                "or remove it"
            )
    check_files(folder, found)
    # What a run left that was ended between writing a file and naming it in the manifest.
    for path in folder.glob("tokens-*"):
        if path.name not in found["files"]:
            path.unlink()
    return found


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)[:12]
    if "fingerprint" in value:
        return f"'{value['name']}' {value['fingerprint'][:12]}"
    return ", ".join(f"{name} {item}" for name, item in value.items())


def read_rows(
    tokenizer: PreTrainedTokenizerFast,
    data: str | Path | Sequence[str | Path],
    *,
    num_tokens: int | None = None,
    num_rows: int | None = None,
    longest: int,
    held_out: bool = False,
) -> tuple[torch.Tensor, str]:
    """Rows (R, T) of int32 ids, and what the data are called.

    Args:
        tokenizer: of the model.
        data: as in `build_index`.
        num_tokens: at most so many tokens; this or `num_rows`.
        num_rows: at most so many rows.
        longest: row that the model takes.
        held_out: read the held-out rows of a prepared folder, not the training rows.

    Raises:
        UserError: data that are missing, empty or of another tokenizer.
    """
    names = [str(data)] if isinstance(data, (str, Path)) else [str(name) for name in data]
    if len(names) == 1 and (Path(names[0]) / MANIFEST).is_file():
        prepared = PreparedData.load(names[0], verify=False)
        if prepared.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UserError(f"'{names[0]}' was prepared with another tokenizer than the model's")
        split = prepared.held_out if held_out else prepared.train
        length = min(prepared.sequence_length, longest)
        count = min(len(split), num_rows or max(1, (num_tokens or 0) // length))
        if not count:
            kind = "held-out" if held_out else "training"
            raise UserError(f"'{names[0]}' has no {kind} rows: there is nothing to read")
        chosen = [i * len(split) // count for i in range(count)]
        read = split.select(chosen).with_format("numpy")["input_ids"][:]
        return torch.stack([torch.as_tensor(row[:length].astype("int32")) for row in read]), Path(names[0]).name
    longest = min(_LONGEST_ROW, longest)
    most = num_rows * longest if num_rows else num_tokens
    ids: list[int] = []
    for source in read_sources(names, tokenizer):
        for document in source.documents:
            ids += [start_token(tokenizer), *document.tolist()]
            if most is not None and len(ids) >= most:
                break
    ids = ids[:most]
    length = min(longest, len(ids))
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.int32).view(count, length), ", ".join(
        Path(name).name for name in names
    )
