"""Images as a classifier sees them, and those that activate some of its parameter tokens most."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend

from tokenformer.errors import UserError
from tokenformer.evaluation.images import evenly_chosen
from tokenformer.evaluation.progress import bar
from tokenformer.images import ImageSet
from tokenformer.images.decoding import BadImage
from tokenformer.interpret.addresses import TokenAddress, find_token, pattention_layers
from tokenformer.interpret.capture import LayerRecord, capture
from tokenformer.interpret.payload import short, use_of
from tokenformer.interpret.tallies import Tally, statistics
from tokenformer.models.modeling_tokenformer_vision import TokenFormerForImageClassification
from tokenformer.tuning.adapters import kind_of

# Of a tally: of the rows with the highest weights.
_HIGHEST = ("highest", "row", "position")
# Pixels of the longer side of a thumbnail.
_THUMBNAIL = 96
# Pixels of the longer side of images that are shown to the bit.
_EXACT = 64
# Positions of a batch of images, whose weights over all tokens of a layer exist at once.
_POSITIONS = 4096


def model_pixels(model: TokenFormerForImageClassification, processor: PilBackend, image: Image.Image) -> torch.Tensor:
    """(1, channels, H, W) as the model reads them.

    Raises:
        UserError: the processor gives images of another size than the model takes.
    """
    pixels: torch.Tensor = processor(image, return_tensors="pt")["pixel_values"]
    size = model.config.image_size
    if tuple(pixels.shape[-2:]) != (size, size):
        height, width = pixels.shape[-2:]
        raise UserError(
            f"the model takes images of {size} x {size} pixels and its image processor gives {height} x {width}: "
            "correct size and crop_size in preprocessor_config.json"
        )
    return pixels.to(model.device, model.dtype)


def visible(processor: PilBackend, pixels: torch.Tensor) -> Image.Image:
    """Pixel values (3, H, W) as the image they were made of, after its resizing and cutting."""
    settings: Any = processor  # whose class does not declare them
    values = pixels.detach().float().cpu()
    if settings.do_normalize:
        mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (settings.image_mean, settings.image_std))
        values = values * std + mean
    if settings.do_rescale:
        values = values / settings.rescale_factor
    levels = values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(levels))


def data_uri(image: Image.Image) -> str:
    """An image as a `data:` address: exact if it is small, otherwise as JPEG, which takes a fifth of the room."""
    data = io.BytesIO()
    kind = "PNG" if max(image.size) <= _EXACT else "JPEG"
    image.save(data, kind, optimize=True, **({} if kind == "PNG" else {"quality": 90}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def thumbnail(model: TokenFormerForImageClassification, processor: PilBackend, image: Image.Image) -> str:
    """A small picture of an image as the model sees it, as a `data:` address."""
    seen = visible(processor, model_pixels(model, processor, image)[0])
    seen.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return data_uri(seen)


@dataclass(frozen=True)
class TopImages:
    """What parameter tokens do over many images.

    Attributes:
        read: numbers of the images that could be read, in their order.
        unreadable: how many could not.
        tokens: of each token, by address, its `statistics` (`mean`, `rms` and `max` weight, `active`: share of the
            positions with |weight| > 0.1), `state` (`dead`, `always on` or None) and `images`: where its weight is
            highest, highest first, each image once: `index`, `weight`, and `patch` in raster order (None: class token).
    """

    read: list[int]
    unreadable: int
    tokens: dict[str, dict[str, Any]]


def top_images(
    model: TokenFormerForImageClassification,
    processor: PilBackend,
    images: ImageSet,
    tokens: Sequence[TokenAddress | str],
    *,
    num_images: int | None = 1000,
    count: int = 6,
    progress: bool = False,
) -> TopImages:
    """The images that activate parameter tokens most, found while many go by once; none is kept.

    The class token is not counted for query, key and value layers of the first block: there it has not looked at any
    patch yet, and is the same for all images.

    Args:
        model: an image classifier, in evaluation mode.
        processor: of the model.
        images: to look at.
        tokens: addresses.
        num_images: of the images, read at most, evenly spaced over the classes; all if None.
        count: images of each token.
        progress: show a bar where stderr is a terminal.

    Raises:
        UserError: an unknown token, a count below 1, no images, none that can be read, images of another size than the
            model takes, or weights that are not finite.
        BadImage: an image cannot be read and `images` does not skip it.
    """
    for name, value in (("num_images", num_images), ("count", count)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    reading = _Reading(model, [t if isinstance(t, TokenAddress) else find_token(model, t) for t in tokens], count)
    chosen = evenly_chosen(images, num_images)
    read: list[int] = []
    with bar("looking at images", len(chosen), "images", progress) as advance:
        for numbers, pixels in _batches(model, processor, images, chosen):
            reading.add(pixels, len(read))
            read += numbers
            advance(len(numbers))
    if not read:
        raise UserError(f"none of the {len(chosen)} images can be read: there is nothing to look at")
    return TopImages(read, len(chosen) - len(read), reading.found(read))


class _Reading:
    """Tallies of some tokens, by layer and segment."""

    def __init__(self, model: TokenFormerForImageClassification, tokens: Sequence[TokenAddress], count: int) -> None:
        self._model, self._tokens = model, tokens
        self._class_token = model.config.pooling == "cls"
        backbone: Any = model.base_model
        first = set(backbone.layers[0].attention.modules())
        layers = pattention_layers(model)
        self._first = {name for name, layer in layers.items() if layer in first and kind_of(layer) == "qkv"}
        self._wanted: dict[tuple[str, str], list[int]] = {}
        for token in tokens:
            self._wanted.setdefault((token.layer, token.segment), []).append(token.index)
        self._tallies = {place: Tally(len(indices), count) for place, indices in self._wanted.items()}

    @torch.no_grad()
    def add(self, pixels: torch.Tensor, first: int) -> None:
        """Read images (B, channels, H, W), of which the first is row `first`."""

        def see(record: LayerRecord) -> None:
            for name, segment in record.segments.items():
                if indices := self._wanted.get((record.layer, name)):
                    weights = cast(torch.Tensor, segment.weights)[:, self._left_out(record.layer) :, indices]
                    if not weights.isfinite().all():
                        raise UserError(f"{record.layer}: weights are not finite: model damaged, or dtype too narrow")
                    self._tallies[record.layer, name].add(weights, first)

        with capture(self._model, layers=list({layer for layer, _ in self._wanted}), consume=see):
            self._model.base_model(pixels)

    def found(self, read: Sequence[int]) -> dict[str, dict[str, Any]]:
        """`TopImages.tokens`; row i was image `read[i]`."""
        length = self._model.config.sequence_length
        uses = {
            place: statistics(tally.tensors, len(read) * (length - self._left_out(place[0])))
            for place, tally in self._tallies.items()
        }
        found = {}
        for token in self._tokens:
            place = token.layer, token.segment
            i = self._wanted[place].index(token.index)
            tensors = self._tallies[place].tensors
            images = []
            for weight, row, position in zip(*(tensors[n][i].tolist() for n in _HIGHEST), strict=True):
                if row >= 0:
                    patch = position + self._left_out(token.layer) - self._class_token
                    where = patch if patch >= 0 else None
                    images.append({"index": read[row], "weight": short(weight), "patch": where})
            found[str(token)] = {**use_of(uses[place], i), "images": images}
        return found

    def _left_out(self, layer: str) -> int:
        """Positions that are not counted: the class token in the first block, before it has looked at any patch."""
        return int(self._class_token and layer in self._first)


def _batches(
    model: TokenFormerForImageClassification, processor: PilBackend, images: ImageSet, chosen: Sequence[int]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    size = max(1, _POSITIONS // model.config.sequence_length)
    numbers: list[int] = []
    rows: list[torch.Tensor] = []
    for number in chosen:
        try:
            image, _ = images[number]
        except BadImage:
            if images.on_bad_image == "error":
                raise
            continue
        numbers.append(number)
        rows.append(model_pixels(model, processor, image))
        if len(rows) == size:
            yield numbers, torch.cat(rows)
            numbers, rows = [], []
    if rows:
        yield numbers, torch.cat(rows)
