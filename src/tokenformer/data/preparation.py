"""Preparing a corpus: read and check everything, choose the held-out documents, tokenise, pack, write.

Nothing is written before the whole input has been read once. From then on the folder is always in one of two states: it
has a manifest.json and is complete, or it has a preparing.json that says what is already there. Every chunk is safe on
disk before preparing.json counts it, so a killed run writes at most the last chunk again, with the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokenformer.data.documents import Source, open_sources
from tokenformer.data.megatron_writer import LENGTHS, MegatronStore
from tokenformer.data.packing import ArrowStore, SplitProgress, chunks
from tokenformer.data.prepared import FORMAT_VERSION, MANIFEST, PreparedData, damaged, read_manifest, set_default_format
from tokenformer.data.progress import Bars
from tokenformer.data.split import SPLITS, Split
from tokenformer.data.storage import ids_sha256, write_atomically, write_json, writing
from tokenformer.data.tokenizer import Encoder, TokenizerChoice, choose, pieces, tokenizer_config, train
from tokenformer.errors import UserError

STATE = "preparing.json"
LOCK = "preparing.lock"
STORES: dict[str, type[ArrowStore] | type[MegatronStore]] = {"arrow": ArrowStore, "megatron": MegatronStore}


def prepare(
    input: list[str],
    *,
    tokenizer: str,
    out: str,
    sequence_length: int = 512,
    held_out: float = 0.05,
    text_field: str = "text",
    workers: int | None = None,
    seed: int = 0,
    format: Literal["arrow", "megatron"] = "arrow",
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenise and pack text into a folder whose rows `PreparedData.load` memory-maps, the same rows in each format.

    Calling it again with the same arguments continues where a killed call stopped, with the same bytes as a result;
    once it is finished, nothing is changed.

    Args:
        input: files (.txt, .jsonl, .json, each also as .gz or .zst, and .parquet), or names of datasets on the Hub.
        tokenizer: a tokenizer.json, a folder that holds one, or train:N to train byte-level BPE with N entries.
        out: the folder to write.
        sequence_length: tokens in a row.
        held_out: the fraction of the documents to hold out, between 0 and 1.
        text_field: the field (JSON) or column (Parquet, Hub) that holds the text.
        workers: threads that tokenise; all cores if not given. It does not change the result.
        seed: varies which documents are held out.
        format: arrow for rows that `datasets` opens, megatron for the .bin and .idx files of GPT-NeoX and Megatron-LM.
        progress: show progress bars where stderr is a terminal.

    Returns:
        The content of manifest.json.

    Raises:
        UserError: if an argument, the input or the folder is wrong; unless writing itself failed, nothing was written.
    """
    _check_numbers(sequence_length, held_out, workers)
    if format not in STORES:
        raise UserError(f"no format '{format}': use {' or '.join(STORES)}")
    choice = choose(tokenizer)
    sources = open_sources(input, text_field)
    folder = Path(out)
    options = {
        "tokenizer": choice.label,
        "end_token": choice.end_token,
        "sequence_length": sequence_length,
        "held_out": held_out,
        "text_field": text_field,
        "seed": seed,
        "format": format,
    }
    with Bars(progress) as bars:
        _look(folder)  # refuse a folder that holds something else before reading a large input
        with bars.bar("checking", sum(source.num_bytes for source in sources)) as advance:
            files = [
                {"name": source.name, "bytes": source.num_bytes, "sha256": source.sha256(advance)} for source in sources
            ]
        found = _look(folder, options, files)
        if isinstance(found, dict):
            _remove_leftovers(folder)
            return PreparedData.load(folder).manifest
        job = _Job(folder, sources, choice, workers or _cores(), bars)
        begun = None if found else job.begin(options, files)
        with _locked(folder):
            # Another process may have been here since the first look.
            found = _look(folder, options, files)
            if isinstance(found, dict):
                return found
            if found:
                tokenizer_json = job.resume(found)
            else:
                assert begun is not None
                found, tokenizer_json = begun
            return job.write(found, tokenizer_json)


@dataclass
class _State:
    """The content of preparing.json.

    Attributes:
        options: what the result depends on besides the inputs.
        files: name, bytes and SHA-256 of each input.
        split: how the documents are divided.
        tokenizer: SHA-256 and vocabulary size.
        progress: what is written of each split.
    """

    options: dict[str, Any]
    files: list[dict[str, Any]]
    split: Split
    tokenizer: dict[str, Any]
    progress: dict[str, SplitProgress] = field(default_factory=lambda: {name: SplitProgress() for name in SPLITS})

    def write(self, folder: Path) -> None:
        write_json(folder / STATE, {"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "_State":
        try:
            content = json.loads((folder / STATE).read_bytes())
            if content.pop("format_version") != FORMAT_VERSION:
                raise ValueError("written by another version")
            split = Split(**content.pop("split"))
            progress = {name: SplitProgress(**done) for name, done in content.pop("progress").items()}
            set_default_format(content["options"])
            return cls(**content, split=split, progress=progress)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(folder, f"{STATE} cannot be read: {error}") from error


@dataclass
class _Job:
    """The steps of one preparation.

    Attributes:
        folder: where to write.
        sources: the inputs.
        choice: what to use as tokenizer.
        workers: threads that tokenise.
        bars: where progress is shown.
    """

    folder: Path
    sources: list[Source]
    choice: TokenizerChoice
    workers: int
    bars: Bars

    def begin(self, options: dict[str, Any], files: list[dict[str, Any]]) -> tuple[_State, bytes]:
        """Read everything once and return the first state and the tokenizer.json; writes nothing."""
        with self.bars.bar("reading", sum(source.num_bytes for source in self.sources)) as advance:
            split = Split.scan(self.sources, options["held_out"], options["seed"], advance)
        tokenizer_json = self._tokenizer_json(split)
        encoder = self._encoder(tokenizer_json)
        _require_rows(split, self.sources, encoder, options["sequence_length"])
        tokenizer = {"sha256": hashlib.sha256(tokenizer_json).hexdigest(), "vocab_size": encoder.vocab_size}
        return _State(options, files, split, tokenizer), tokenizer_json

    def resume(self, state: _State) -> bytes:
        """Check what a killed run left and return its tokenizer.json."""
        store = self._store(state)
        for name, done in state.progress.items():
            store.check(name, done)
        saved = self.folder / "tokenizer" / "tokenizer.json"
        tokenizer_json = saved.read_bytes() if saved.exists() else self._tokenizer_json(state.split)
        if hashlib.sha256(tokenizer_json).hexdigest() != state.tokenizer["sha256"]:
            raise damaged(self.folder, "its tokenizer is not the one it was begun with")
        return tokenizer_json

    def write(self, state: _State, tokenizer_json: bytes) -> dict[str, Any]:
        """Write what is missing and return the manifest."""
        if not (self.folder / STATE).exists():
            state.write(self.folder)
        tokenizer_files = {"tokenizer.json": tokenizer_json, "tokenizer_config.json": tokenizer_config(self.choice)}
        for name, content in tokenizer_files.items():
            if not (self.folder / "tokenizer" / name).exists():
                write_atomically(self.folder / "tokenizer" / name, content)
        encoder = self._encoder(tokenizer_json)
        store = self._store(state)
        parts = state.split.parts(self.sources, skip=sum(done.documents for done in state.progress.values()))
        bytes_done = sum(done.bytes for done in state.progress.values())
        with self.bars.bar("tokenising", state.split.num_bytes, bytes_done) as advance:
            for chunk in chunks(parts):
                encoded: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
                for (name, text), ids in zip(chunk, encoder.encode(text for _, text in chunk), strict=True):
                    size = len(text.encode())
                    encoded[name].append(ids)
                    state.progress[name].documents += 1
                    state.progress[name].bytes += size
                    advance(size)
                for name, done in state.progress.items():
                    store.append(name, done, encoded[name])
                state.write(self.folder)
        return self._finish(state, store)

    def _finish(self, state: _State, store: ArrowStore | MegatronStore) -> dict[str, Any]:
        splits = {}
        for name, done in state.progress.items():
            rows, shards = store.finish(name, done)
            splits[name] = {
                "documents": done.documents,
                "bytes": done.bytes,
                "tokens": done.tokens,
                "rows": done.rows,
                "dropped_tokens": done.tokens - done.rows * store.sequence_length,
                "sha256": ids_sha256(rows),
                "shards": shards,
            }
        manifest = {
            "format_version": FORMAT_VERSION,
            "options": state.options,
            "files": state.files,
            "tokenizer": state.tokenizer,
            "dtype": store.dtype.name,
            "split_by": state.split.by,
            "empty_documents": state.split.num_empty,
            "splits": splits,
        }
        write_json(self.folder / MANIFEST, manifest)
        _remove_leftovers(self.folder)
        return manifest

    def _store(self, state: _State) -> ArrowStore | MegatronStore:
        store = STORES[state.options["format"]]
        return store(self.folder, state.options["sequence_length"], state.tokenizer["vocab_size"])

    def _tokenizer_json(self, split: Split) -> bytes:
        if self.choice.given is not None:
            return self.choice.given
        assert self.choice.vocab_size is not None
        with self.bars.bar("training the tokenizer", split.num_bytes) as advance:
            return train(split.training_sample(self.sources, advance), self.choice.vocab_size)

    def _encoder(self, tokenizer_json: bytes) -> Encoder:
        return Encoder(tokenizer_json, self.choice.end_token, self.workers)


def _look(
    folder: Path, options: dict[str, Any] | None = None, files: list[dict[str, Any]] | None = None
) -> dict[str, Any] | _State | None:
    """Return the manifest or the state in `folder`, or None if nothing was begun there.

    Raises:
        UserError: if it holds something else, or a preparation with other options or inputs than the given ones.
    """
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if existing.is_file():
        raise UserError(f"cannot write to '{folder}': '{existing}' is a file; give another --out")
    if not folder.exists():
        return None
    found: dict[str, Any] | _State
    if (folder / MANIFEST).exists():
        found = read_manifest(folder)
        old_options, old_files = found["options"], found["files"]
    elif (folder / STATE).exists():
        found = _State.read(folder)
        old_options, old_files = found.options, found.files
    elif {path.name for path in folder.iterdir()} - {LOCK, f"{STATE}.tmp"}:
        raise UserError(f"'{folder}' is not empty and holds no preparation: give another --out")
    else:
        return None
    if options is None or files is None:
        return found
    changes = [
        f"{key.replace('_', ' ')} {old_options.get(key)}, not {value}"
        for key, value in options.items()
        if old_options.get(key) != value
    ]
    if [file["sha256"] for file in old_files] != [file["sha256"] for file in files]:
        changes.append("other input files")
    if changes:
        raise UserError(f"'{folder}' holds another preparation ({'; '.join(changes)}): give another --out or delete it")
    return found


def _remove_leftovers(folder: Path) -> None:
    """Remove what a finished folder no longer needs; a kill right after the manifest was written leaves it."""
    for name in (STATE, LOCK, *(split + LENGTHS for split in SPLITS)):
        if (folder / name).exists():
            with writing(folder):
                (folder / name).unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of `folder`; the lock goes with the process, however it ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"another process is preparing '{folder}': wait for it, or give another --out") from error
    try:
        yield
    finally:
        lock.release()


def _require_rows(split: Split, sources: list[Source], encoder: Encoder, sequence_length: int) -> None:
    """Stop early where a split would not fill one row; reads only until both do."""
    missing = dict.fromkeys(SPLITS, sequence_length)
    for name, text in split.parts(sources):
        for piece in pieces(text):
            if missing[name] > 0:
                # Without the end tokens of the pieces: only the document has one.
                missing[name] -= sum(len(ids) - 1 for ids in encoder.encode([piece]))
        missing[name] -= 1
        if all(count <= 0 for count in missing.values()):
            return
    name, count = max(missing.items(), key=lambda item: item[1])
    raise UserError(
        f"too little text: the {name.replace('_', '-')} part has {sequence_length - count} tokens, "
        f"fewer than one row of {sequence_length}; add text, lower --sequence-length or change --held-out"
    )


def _check_numbers(sequence_length: int, held_out: float, workers: int | None) -> None:
    if sequence_length < 1:
        raise UserError(f"sequence length {sequence_length}: a row needs at least 1 token, for example 512")
    if not 0 < held_out < 1:
        raise UserError(f"held-out fraction {held_out}: it must lie between 0 and 1, for example 0.05")
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers: give at least 1, or leave it out to use all cores")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
