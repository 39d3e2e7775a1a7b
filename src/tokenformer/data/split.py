"""Which documents are held out: those whose texts have the smallest hashes, whatever file or order they come in."""

import hashlib
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tokenformer.data.documents import Advance, Source
from tokenformer.data.tokenizer import pieces
from tokenformer.errors import UserError

SPLITS = ("train", "held_out")
# Byte-pair merges hardly change beyond this, while the training time does.
TRAINING_SAMPLE_BYTES = 1 << 27
_NOT_SPACE = re.compile(r"\S")


def text_hash(text: str, seed: int) -> int:
    """Return the first 8 bytes, as a big-endian number, of the SHA-256 of `"{seed}\\n{text}"` in UTF-8."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{text}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Split:
    """How the documents of a corpus are divided, and what the first reading counted.

    Attributes:
        by: `documents`, or `tail` where there is only one document, whose end is held out.
        threshold: documents with a hash up to this one are held out.
        held_out: the fraction asked for.
        seed: varies the hashes.
        num_documents: documents of each input, those without text excepted.
        num_empty: documents without text.
        num_bytes: UTF-8 bytes of all texts.
    """

    by: str
    threshold: int
    held_out: float
    seed: int
    num_documents: list[int]
    num_empty: int
    num_bytes: int

    @classmethod
    def scan(cls, sources: list[Source], held_out: float, seed: int, advance: Advance) -> "Split":
        """Read every document once, which also proves that all of them can be read.

        Raises:
            UserError: if a document is damaged, or there is not enough text to divide.
        """
        hashes = array("Q")
        num_documents, num_empty, num_bytes = [], 0, 0
        for source in sources:
            before = len(hashes)
            for text in source.documents(advance):
                if _NOT_SPACE.search(text):
                    hashes.append(text_hash(text, seed))
                    num_bytes += len(text.encode())
                else:
                    num_empty += 1
            num_documents.append(len(hashes) - before)
        if not hashes:
            names = ", ".join(f"'{source.name}'" for source in sources[:3])
            raise UserError(f"no text in the input ({names}): every document is empty")
        by, threshold = "tail", 0
        if len(hashes) > 1:
            count = min(max(round(held_out * len(hashes)), 1), len(hashes) - 1)
            ordered = np.partition(np.frombuffer(hashes, dtype=np.uint64), [count - 1, len(hashes) - 1])
            by, threshold = "documents", int(ordered[count - 1])
            if threshold == int(ordered[-1]):
                raise UserError(
                    f"too few different documents to hold any out: of {len(hashes)} documents, those left "
                    "for training have the same text as held-out ones; add documents or lower --held-out"
                )
        return cls(by, threshold, held_out, seed, num_documents, num_empty, num_bytes)

    def parts(self, sources: list[Source], skip: int = 0) -> Iterator[tuple[str, str]]:
        """Stream (split name, text) of every document with text, in order of the inputs.

        Args:
            sources: the inputs that were scanned.
            skip: leave out this many from the start; whole files of them are not even read.
        """
        for source, count in zip(sources, self.num_documents, strict=True):
            # The two parts of a single document are few enough to be skipped by reading them.
            if self.by == "documents" and skip >= count:
                skip -= count
                continue
            for text in source.documents(lambda _: None):
                if not _NOT_SPACE.search(text):
                    continue
                for part in self._divide(text):
                    if skip:
                        skip -= 1
                    else:
                        yield part

    def _divide(self, text: str) -> list[tuple[str, str]]:
        if self.by == "documents":
            is_held_out = text_hash(text, self.seed) <= self.threshold
            return [("held_out" if is_held_out else "train", text)]
        cut = round(len(text) * (1 - self.held_out))
        # Rather at the start of a line, unless that doubles the held-out part.
        line = text.rfind("\n", max(0, 2 * cut - len(text)), cut) + 1
        cut = line or cut
        return [("train", text[:cut]), ("held_out", text[cut:])]

    def training_sample(self, sources: list[Source], advance: Advance) -> Iterator[str]:
        """Stream training text to train a tokenizer on, never held-out text.

        All of it, or of a large corpus pieces of documents chosen by their hashes, `TRAINING_SAMPLE_BYTES` in
        expectation.
        """
        keep = min(1.0, TRAINING_SAMPLE_BYTES / self.num_bytes)
        for split, text in self.parts(sources):
            if split == "train":
                for piece in pieces(text):
                    if keep == 1 or text_hash(piece, self.seed) >= (1 - keep) * 2**64:
                        yield piece
            advance(len(text.encode()))
