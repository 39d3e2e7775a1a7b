"""Shrink the model in a folder, on calibration data read from where training data come from too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokenformer.data import PreparedData, tokenizer_hash
from tokenformer.data.prepared import MANIFEST
from tokenformer.elastic.measure import Batch
from tokenformer.elastic.shrinking import By, ScaleRule, check_request, check_rules, needs_calibration, shrink
from tokenformer.elastic.sizes import Sizes, check_sizes, layers_of, present_sizes
from tokenformer.errors import UserError
from tokenformer.evaluation.perplexity import evenly_spaced
from tokenformer.evaluation.text import read_sources
from tokenformer.folders import new_folder
from tokenformer.models.loading import (
    TOKENIZER,
    copy_preprocessing,
    empty_model,
    holds_image_classifier,
    load_config,
    load_tokenformer,
    load_tokenizer,
    load_vision_config,
    model_folder,
    quiet,
)
from tokenformer.sparse import refuse_sparse

_LONGEST_ROW = 512
_ROWS_AT_ONCE = 8


def shrink_folder(
    model: str,
    out: str,
    *,
    qkv: int | None = None,
    output: int | None = None,
    ffn: int | None = None,
    by: By = "prefix",
    segment: str | None = None,
    scale: ScaleRule = "keep",
    fit: bool = False,
    calibration: str | None = None,
    calibration_rows: int = 128,
) -> dict[str, Any]:
    """Shrink the model in a folder and write it to a new one, with its tokenizer or image processor.

    Args:
        model: folder of the model, such as a training run.
        out: folder to write; must not hold anything yet.
        qkv: tokens of each query, key and value layer after shrinking; left alone if not given.
        output: tokens of each output projection of attention after shrinking.
        ffn: tokens of each feed-forward after shrinking.
        by: prefix keeps the first tokens, as a nested model is trained for; importance those that matter most on the
            calibration data; segment all but a segment.
        segment: that is taken out, with by segment.
        scale: keep leaves tau, as nested training does; sqrt multiplies it by the root of the share of tokens that
            stay; calibrated makes the weights of the tokens that stay what they were, on the calibration data.
        fit: move the values that stay, by least squares, so that they make up for those that go, on the calibration
            data. Not for a prefix of a nested model, which needs no repair.
        calibration: text file or folder of `tokenformer data prepare`, of which training rows are read; for an image
            classifier digits, a folder, a Parquet file or a dataset on the Hub.
        calibration_rows: rows of up to 512 tokens, or images, that are read of it, evenly spaced.

    Returns:
        `out`, the `model_type`, the tokens of a layer by kind and the parameters, each `before` and `after`.

    Raises:
        UserError: as `shrink`; a model that cannot be loaded; calibration data that cannot be read or do not fit; a
            folder that is not empty. Nothing is written then.
    """
    check_rules(by, scale)
    wanted = {"qkv": qkv, "output": output, "ffn": ffn}
    sizes: Sizes = {kind: size for kind, size in wanted.items() if size is not None}
    check_request(sizes, by, segment)
    reasons = needs_calibration(by, scale, fit)
    if reasons and calibration is None:
        raise UserError(f"{reasons[0]} needs calibration data: give --calibration FILE")
    if calibration is not None and not reasons:
        raise UserError(
            "calibration is not needed: give it with by importance, scale calibrated or fit, or leave it out"
        )
    if calibration_rows < 1:
        raise UserError(f"calibration_rows must be at least 1, got {calibration_rows}")
    folder = model_folder(model)
    # Before weights and calibration data are read.
    config = load_vision_config(folder) if holds_image_classifier(folder) else load_config(folder)
    empty = empty_model(config)
    refuse_sparse(empty, "shrunk")
    check_sizes(layers_of(empty), sizes)
    with new_folder(Path(out)) as partial:
        whole = load_tokenformer(folder)
        before, tokens = whole.num_parameters(), present_sizes(whole)
        batches = None
        if calibration is not None:
            read = image_batches if holds_image_classifier(folder) else text_batches
            batches = read(folder, calibration, calibration_rows)
        shrink(
            whole,
            qkv=qkv,
            output=output,
            ffn=ffn,
            by=by,
            segment=segment,
            scale=scale,
            fit=fit,
            calibration=batches,
        )
        vars(whole.config).pop("auto_map", None)  # of an exported folder: its code does not come along
        with quiet():
            whole.save_pretrained(partial)
        copy_preprocessing(folder, partial)
    return {
        "out": out,
        "model_type": whole.config.model_type,
        "before": {"tokens": tokens, "parameters": before},
        "after": {"tokens": present_sizes(whole), "parameters": whole.num_parameters()},
    }


def text_batches(folder: Path, source: str, rows: int) -> list[Batch]:
    """Batches of rows of text for the language model in `folder`.

    Args:
        folder: of the model; its tokenizer reads the text.
        source: a text file or anything else that `tokenformer eval` reads; of a prepared folder, its training rows.
        rows: to take, evenly spaced; fewer if there are no more.

    Raises:
        UserError: the source cannot be read, holds too little, or was made with another tokenizer.
    """
    config = load_config(folder)
    length = min(_LONGEST_ROW, config.max_position_embeddings)
    if (Path(source) / MANIFEST).is_file():
        data = PreparedData.load(source, verify=False)
        own = folder / TOKENIZER
        if data.vocab_size > config.vocab_size or (own.is_file() and tokenizer_hash(own) != data.tokenizer_hash):
            raise UserError(
                f"calibration: {source} was prepared with another tokenizer than that of {folder}: prepare it with "
                f"--tokenizer {folder}"
            )
        found: Sequence[list[int]] = [row["input_ids"][:length] for row in evenly_spaced(data.train, rows)]
    else:
        tokenizer = load_tokenizer(folder, vocab_size=config.vocab_size)
        (text,) = read_sources([source], tokenizer)
        ids = [int(token) for document in text.documents for token in document]
        length = min(length, len(ids))
        found = evenly_spaced([ids[start : start + length] for start in range(0, len(ids) - length + 1, length)], rows)
    # Attention layers see all rows; of the logits, which are the largest tensors of a model, none is looked at.
    return [
        {"input_ids": some, "use_cache": False, "logits_to_keep": 1}
        for some in torch.tensor(found, dtype=torch.long).split(_ROWS_AT_ONCE)
    ]


def image_batches(folder: Path, source: str, images: int) -> list[Batch]:
    """Batches of images for the classifier in `folder`.

    Args:
        folder: of the model and its image processor.
        source: of images, as `tokenformer train` takes it; training images are read, without their labels.
        images: to take, evenly spaced; fewer if there are no more.

    Raises:
        UserError: the source or the processor cannot be read.
    """
    from tokenformer.evaluation.images import read_pixels
    from tokenformer.images import open_image_set
    from tokenformer.images.processing import load_processor

    found, _ = open_image_set(source, split="train")
    pixels = read_pixels(found, load_processor(folder), limit=images).pixel_values
    return [{"pixel_values": some} for some in pixels.split(_ROWS_AT_ONCE)]
