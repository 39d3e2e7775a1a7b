"""A small model with a tokenizer in a folder, as `tokenformer train` leaves it."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tiny import tiny_model
from tokenformer import TokenFormerForCausalLM, grow

END = "<|endoftext|>"
LINES = ["the quick brown fox jumps over the lazy dog", "größer als 日本語 😀", "naïve café, 東京 🦊"]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def save_model(folder: Path, *, grown: bool = False, **fields: Any) -> TokenFormerForCausalLM:
    """Save a tiny model (vocabulary 320, so that a few rows are padding) and its tokenizer; returns the model."""
    model = tiny_model(**{"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, **fields})
    if grown:
        grow(model, ffn=32)
    model.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return model


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of config.json; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **fields}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}), encoding="utf-8")
