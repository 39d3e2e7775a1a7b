"""Perplexity and bits per byte of a model on text: files, datasets of the Hub, prepared folders, Megatron's files."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tokenformer.data import MegatronData, PreparedData
from tokenformer.data.documents import Source, open_sources
from tokenformer.data.megatron import is_pair
from tokenformer.data.packing import chunks
from tokenformer.data.prepared import MANIFEST
from tokenformer.data.progress import Bars
from tokenformer.data.tokenizer import Encoder
from tokenformer.errors import UserError
from tokenformer.evaluation.loading import start_token
from tokenformer.evaluation.progress import bar
from tokenformer.evaluation.sliding import choose_window, score_documents
from tokenformer.hardware import physical_cores
from tokenformer.models.loading import num_entries


@dataclass(frozen=True)
class TokenSource:
    """The documents of one input, as ids.

    Attributes:
        name: the argument the user gave.
        documents: ids of each document, without a token for its beginning or end; empty documents are left out.
        num_bytes: UTF-8 bytes of their text as it was before tokenisation, or None where only ids are known.
        num_words: words between white space, or None where only ids are known.
    """

    name: str
    documents: list[np.ndarray]
    num_bytes: int | None
    num_words: int | None

    @property
    def num_tokens(self) -> int:
        """Ids in all documents."""
        return sum(map(len, self.documents))


def read_sources(
    inputs: list[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    text_field: str = "text",
    split: str = "test",
    progress: bool = False,
) -> list[TokenSource]:
    """Read and tokenise everything, so that what is wrong with an input is known before a model runs.

    Args:
        inputs: .txt, .jsonl, .json (each also with .gz or .zst) and .parquet files; names of datasets on the Hub;
            folders written by `tokenformer data prepare`, of which the held-out part is read; .idx or .bin files of
            Megatron and GPT-NeoX, made with the model's tokenizer.
        tokenizer: of the model. Text that spells a special token is encoded as text, as in preparing data.
        text_field: the field (JSON) or column (Parquet, Hub) that holds the text.
        split: of datasets on the Hub.
        progress: show bars where stderr is a terminal.

    Raises:
        UserError: an input is missing, damaged, not UTF-8, without any text, or made with another tokenizer.
    """
    if not inputs:
        raise UserError("no input: name at least one file")
    read = []
    with Bars(progress) as bars:
        for name in inputs:
            if (Path(name) / MANIFEST).is_file():
                source = _prepared(name, tokenizer)
            elif is_pair(name):
                source = _megatron(name, tokenizer)
            else:
                (opened,) = open_sources([name], text_field, split)
                with bars.bar(f"reading {opened.name}", opened.num_bytes) as advance:
                    source = _encoded(opened, tokenizer, advance)
            if not source.num_tokens:
                raise UserError(f"'{name}' holds no text: there is nothing to predict")
            read.append(source)
    return read


def evaluate_sources(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    sources: list[TokenSource],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    word_level: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Perplexity and bits per byte, each token predicted once; `tokenformer.evaluation.sliding` has the definition.

    Args:
        model: a causal language model of transformers.
        tokenizer: that made the ids; its beginning-of-text token, or else its end-of-text token, stands before each
            document.
        sources: from `read_sources`.
        context: tokens the model reads at once; as many as it takes, but at most 2048, if not given.
        stride: tokens the window moves by; half of the context if not given.
        batch_size: windows at a time; chosen by memory if not given.
        word_level: give the perplexity per word too.
        progress: show a bar where stderr is a terminal.

    Returns:
        Over all sources, `loss` (nats per token), `perplexity` exp(loss), `bits_per_byte` (bits of all tokens over
        UTF-8 bytes of the text), `word_perplexity` (exp of nats over words, where asked for), and the counts
        `documents`, `tokens`, `words`, `bytes`; the `context` and `stride` used; and under `sources` the same figures
        of each with its `name`. What is not known, because an input holds only ids, is None.

    Raises:
        UserError: context, stride or batch size cannot be; word level is asked for where there are no words; the loss
            is not finite.
    """
    context, stride = choose_window(model, context, stride)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if word_level and (wordless := [source.name for source in sources if not source.num_words]):
        raise UserError(f"'{wordless[0]}' holds no words, only token ids: leave out word-level")
    start_id = start_token(tokenizer)
    losses = []
    with bar("evaluating", sum(source.num_tokens for source in sources), "tokens", progress) as advance:
        for source in sources:
            nats = score_documents(
                model,
                source.documents,
                start_id=start_id,
                context=context,
                stride=stride,
                batch_size=batch_size,
                on_tokens=advance,
            )
            losses.append(nats)
    return {
        **_figures(sum(losses), sources, word_level),
        "context": context,
        "stride": stride,
        "sources": [
            {"name": source.name, **_figures(nats, [source], word_level)}
            for source, nats in zip(sources, losses, strict=True)
        ],
    }


def _figures(nats: float, sources: list[TokenSource], word_level: bool) -> dict[str, Any]:
    tokens = sum(source.num_tokens for source in sources)
    num_bytes, words = _sum([s.num_bytes for s in sources]), _sum([s.num_words for s in sources])
    figures: dict[str, Any] = {
        "loss": nats / tokens,
        "perplexity": _exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
    }
    if word_level and words:
        figures["word_perplexity"] = _exp(nats / words)
    documents = sum(len(source.documents) for source in sources)
    return {**figures, "documents": documents, "tokens": tokens, "words": words, "bytes": num_bytes}


def _sum(numbers: list[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond, a float overflows


def _encoded(source: Source, tokenizer: PreTrainedTokenizerFast, advance: Callable[[int], None]) -> TokenSource:
    end = str(tokenizer.convert_ids_to_tokens(start_token(tokenizer)))
    encoder = Encoder(tokenizer.backend_tokenizer.to_str().encode(), end, workers=physical_cores())
    documents, num_bytes, num_words = [], 0, 0
    for chunk in chunks((source.name, text) for text in source.documents(advance)):
        texts = [text for _, text in chunk]
        for text, ids in zip(texts, encoder.encode(texts), strict=True):
            num_bytes += len(text.encode())
            num_words += len(text.split())
            if len(ids) > 1:
                documents.append(ids[:-1])  # the last one is the end token
    return TokenSource(source.name, documents, num_bytes, num_words)


def _prepared(name: str, tokenizer: PreTrainedTokenizerFast) -> TokenSource:
    """The held-out part of a prepared folder, cut into its documents again."""
    data = PreparedData.load(name)
    if data.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"'{name}' was prepared with another tokenizer than the model's: prepare it with --tokenizer and the "
            "model's folder"
        )
    counts = data.manifest["splits"]["held_out"]
    ids = np.concatenate([chunk.flatten().to_numpy() for chunk in data.held_out.data.column("input_ids").chunks])
    documents = _documents(ids, data.tokenizer.eos_token_id)
    # The rows lack the end of the last document, so of the text's bytes they stand for that share of its tokens.
    share = sum(map(len, documents)) / (counts["tokens"] - counts["documents"])
    return TokenSource(name, documents, round(counts["bytes"] * share), None)


def _megatron(name: str, tokenizer: PreTrainedTokenizerFast) -> TokenSource:
    data = MegatronData.open(name, vocab_size=num_entries(tokenizer))
    documents = [part for ids in data.documents() for part in _documents(ids, tokenizer.eos_token_id)]
    return TokenSource(name, documents, None, None)


def _documents(ids: np.ndarray, end_id: int | None) -> list[np.ndarray]:
    """The parts between end tokens, which are left out, and so are empty parts."""
    ends = np.flatnonzero(ids == end_id) if end_id is not None else np.zeros(0, dtype=np.int64)
    parts = zip([0, *(ends + 1)], [*ends, len(ids)], strict=True)
    return [ids[start:stop] for start, stop in parts if stop > start]
