"""The tokenizer of a preparation: given as a file, or trained on the training documents as byte-level BPE."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tokenformer.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# For a tokenizer.json without a tokenizer_config.json beside it, which would name the token.
_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")

PIECE_CHARACTERS = 1 << 18
_GROUP_CHARACTERS = 1 << 16
# Between two words: there every usual pre-tokenizer splits anyway, so that cutting here does not change the ids.
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")


@dataclass(frozen=True)
class TokenizerChoice:
    """What the option `--tokenizer` asks for.

    Attributes:
        label: `train:N`, or the SHA-256 of the given tokenizer.json: the same label gives the same tokenizer.
        vocab_size: entries to train, or None if `given` is set.
        given: the bytes of the given tokenizer.json.
        end_token: the token that follows each document.
        start_token: what `transformers` calls the bos token.
    """

    label: str
    vocab_size: int | None = None
    given: bytes | None = None
    end_token: str = END_OF_TEXT
    start_token: str = END_OF_TEXT


def choose(option: str) -> TokenizerChoice:
    """Read and check the option `--tokenizer`.

    Raises:
        UserError: if the vocabulary is too small, the file is missing or no tokenizer, or has no end-of-text token.
    """
    if option.startswith("train:"):
        size = option.removeprefix("train:")
        if not re.fullmatch(r"[0-9]{1,9}", size):
            raise UserError(f"tokenizer '{option}': '{size}' is not a vocabulary size: write for example train:4096")
        if int(size) < 257:
            raise UserError(f"tokenizer '{option}': the 256 bytes and the end token need at least train:257")
        return TokenizerChoice(f"train:{int(size)}", vocab_size=int(size))
    path = _tokenizer_json(option)
    try:
        given = path.read_bytes()
        vocabulary = _tokenizer(given).get_vocab()
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"'{path}' is not a tokenizer.json of the tokenizers library ({error})") from error
    end_token = _configured(path, "eos_token") or next((name for name in _END_TOKENS if name in vocabulary), None)
    if end_token not in vocabulary:
        raise UserError(
            f"'{path}' has no end-of-text token (looked for {', '.join(_END_TOKENS)}): "
            "name it as eos_token in a tokenizer_config.json beside it"
        )
    start_token = _configured(path, "bos_token")
    return TokenizerChoice(
        hashlib.sha256(given).hexdigest(),
        given=given,
        end_token=end_token,
        start_token=start_token if start_token in vocabulary else end_token,
    )


def tokenizer_hash(path_or_folder: str | Path) -> str:
    """Return the SHA-256 (hexadecimal) of a tokenizer.json, which identifies the tokenizer.

    Args:
        path_or_folder: a tokenizer.json, or a folder that holds one.

    Raises:
        UserError: if there is none.
    """
    path = _tokenizer_json(path_or_folder)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error


def _tokenizer_json(path_or_folder: str | Path) -> Path:
    path = Path(path_or_folder)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise UserError(f"no tokenizer.json in the folder '{path}': give a tokenizer's folder, or train:4096")
        return path / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"no tokenizer at '{path}': give a tokenizer.json or its folder, or train:4096 to train one")
    return path


def _configured(tokenizer_json: Path, key: str) -> str | None:
    try:
        token = json.loads((tokenizer_json.parent / "tokenizer_config.json").read_bytes()).get(key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"'{tokenizer_json.parent / 'tokenizer_config.json'}' is damaged ({error})") from error
    return token.get("content") if isinstance(token, dict) else token


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train byte-level BPE on `texts` and return its tokenizer.json.

    The end token has id 0 and the 256 bytes follow, so any text can be encoded and is decoded exactly. The vocabulary
    is smaller than `vocab_size` where the texts have too few different pairs. The result depends on nothing but the
    texts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True).encode()


def tokenizer_config(choice: TokenizerChoice) -> bytes:
    """Return the tokenizer_config.json that `transformers` wants beside the tokenizer.json."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": choice.start_token,
        "eos_token": choice.end_token,
        # Otherwise decoding would remove spaces before punctuation.
        "clean_up_tokenization_spaces": False,
    }
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _tokenizer(tokenizer_json: bytes) -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer_json.decode())


def ids_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest integer type that holds every id of a vocabulary and that torch can take."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


class Encoder:
    """Encodes documents on several threads, each document followed by the end token.

    Text that spells a special token, such as `<|endoftext|>`, is encoded as the text it is: the end token then appears
    in the ids at the ends of documents only.

    Args:
        tokenizer_json: content of a tokenizer.json.
        end_token: the token that follows each document.
        workers: threads that encode.

    Attributes:
        vocab_size: the largest id plus one: the rows an embedding needs.
        dtype: the smallest integer type that holds every id.
    """

    def __init__(self, tokenizer_json: bytes, end_token: str, workers: int) -> None:
        self._tokenizer = _tokenizer(tokenizer_json)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._workers = workers
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1
        self.dtype = ids_dtype(self.vocab_size)
        self._end = np.array([self._tokenizer.token_to_id(end_token)], dtype=self.dtype)

    def encode(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of each text in order, the end token last; `texts` is read ahead as a whole.

        Own threads instead of the pool inside tokenizers, because that one takes its size from the environment once
        per process. One text a call keeps it idle, and encoding releases the interpreter lock.
        """
        pool = ThreadPoolExecutor(self._workers)
        try:
            parts: list[np.ndarray] = []
            for encoded in pool.map(self._encode_group, _groups(texts)):
                for ids, is_last in encoded:
                    parts.append(ids)
                    if is_last:
                        yield np.concatenate([*parts, self._end])
                        parts = []
        finally:
            pool.shutdown(cancel_futures=True)

    def _encode_group(self, group: list[tuple[str, bool]]) -> list[tuple[np.ndarray, bool]]:
        encode = self._tokenizer.encode_batch_fast
        return [
            (np.array(encode([piece], add_special_tokens=False)[0].ids, dtype=self.dtype), is_last)
            for piece, is_last in group
        ]


def pieces(text: str) -> Iterator[str]:
    """Cut a long text into pieces of about `PIECE_CHARACTERS`, between words where it has any.

    A tokenizer needs a hundred times the memory of its text, so a book shelf in one file must not be encoded at once.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        goal = start + PIECE_CHARACTERS
        found = _BETWEEN_WORDS.search(text, goal, goal + PIECE_CHARACTERS // 16)
        end = found.start() if found else goal
        yield text[start:end]
        start = end
    yield text[start:]


def _groups(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Gather pieces, each with whether its text ends there: handing over a short one costs more than encoding it."""
    group: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        end = 0
        for piece in pieces(text):
            end += len(piece)
            group.append((piece, end == len(text)))
            size += len(piece)
            if size >= _GROUP_CHARACTERS:
                yield group
                group, size = [], 0
    if group:
        yield group
