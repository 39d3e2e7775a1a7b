"""Images as a classifier sees them, and those that activate some of its parameter tokens most."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
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
from tokenformer.interpret.addresses import TokenAddress, pattention_layers
from tokenformer.interpret.capture import LayerRecord, capture
from tokenformer.interpret.payload import short, use_of
from tokenformer.interpret.tallies import Tally, statistics
from tokenformer.models.modeling_tokenformer_vision import TokenFormerForImageClassification
from tokenformer.tuning.adapters import kind_of

# Of a card: images that activate the token most.
_IMAGES = 6
# Pixels of the longer side of these at most.
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


class ImagesSeen:
    """What some tokens do over many images, read once and not kept.

    Attributes:
        read: numbers of the images that could be read, in their order.
        unreadable: how many could not.
    """

    def __init__(
        self,
        model: TokenFormerForImageClassification,
        processor: PilBackend,
        images: ImageSet,
        tokens: Sequence[TokenAddress],
        num_images: int,
        progress: bool,
    ) -> None:
        self._processor, self._images, self._model = processor, images, model
        self._class_token = model.config.pooling == "cls"
        backbone: Any = model.base_model
        reading = set(backbone.layers[0].attention.modules())
        self._first = {
            name for name, layer in pattention_layers(model).items() if kind_of(layer) == "qkv" and layer in reading
        }
        self._wanted: dict[tuple[str, str], list[int]] = {}
        for token in tokens:
            self._wanted.setdefault((token.layer, token.segment), []).append(token.index)
        self._tallies = {place: Tally(len(indices), _IMAGES) for place, indices in self._wanted.items()}
        self.read: list[int] = []
        chosen = evenly_chosen(images, num_images)
        with bar("looking at images", len(chosen), "images", progress) as advance:
            for numbers, pixels in self._batches(chosen):
                self._add(pixels, len(self.read))
                self.read += numbers
                advance(len(numbers))
        self.unreadable = len(chosen) - len(self.read)
        if not self.read:
            raise UserError(f"none of the {len(chosen)} images can be read: there is nothing to look at")
        self._statistics = {
            place: statistics(tally.tensors, len(self.read) * (model.config.sequence_length - self._left_out(place[0])))
            for place, tally in self._tallies.items()
        }
        # Numbers of the pictures that cards refer to, by row in what was read.
        self._pictures: dict[int, int] = {}

    def _batches(self, chosen: Sequence[int]) -> Iterator[tuple[list[int], torch.Tensor]]:
        size = max(1, _POSITIONS // self._model.config.sequence_length)
        numbers: list[int] = []
        rows: list[torch.Tensor] = []
        for number in chosen:
            try:
                image, _ = self._images[number]
            except BadImage:
                if self._images.on_bad_image == "error":
                    raise
                continue
            numbers.append(number)
            rows.append(model_pixels(self._model, self._processor, image))
            if len(rows) == size:
                yield numbers, torch.cat(rows)
                numbers, rows = [], []
        if rows:
            yield numbers, torch.cat(rows)

    def _left_out(self, layer: str) -> int:
        """Positions that are not counted: the class token in the first block, before it has looked at any patch."""
        return int(self._class_token and layer in self._first)

    @torch.no_grad()
    def _add(self, pixels: torch.Tensor, first: int) -> None:
        def see(record: LayerRecord) -> None:
            for name, segment in record.segments.items():
                if indices := self._wanted.get((record.layer, name)):
                    weights = cast(torch.Tensor, segment.weights)
                    if not weights.isfinite().all():
                        raise UserError(f"{record.layer}: weights are not finite: model damaged, or dtype too narrow")
                    weights = weights[:, self._left_out(record.layer) :, indices]
                    self._tallies[record.layer, name].add(weights, first)

        with capture(self._model, layers=list({layer for layer, _ in self._wanted}), consume=see):
            self._model.base_model(pixels)

    def use(self, token: TokenAddress) -> dict[str, Any]:
        """Statistics, state, and the images in which the weight is highest."""
        place = token.layer, token.segment
        tensors, i = self._tallies[place].tensors, self._wanted[place].index(token.index)
        found = []
        for weight, row, position in zip(
            *(tensors[name][i].tolist() for name in ("highest", "row", "position")), strict=True
        ):
            if row >= 0:
                number = self._pictures.setdefault(row, len(self._pictures))
                patch = position + self._left_out(token.layer) - self._class_token
                found.append({"image": number, "weight": short(weight), "patch": patch if patch >= 0 else None})
        return {**use_of(self._statistics[place], i), "images": found}

    def pictures(self) -> list[dict[str, Any]]:
        """The images that `use` has referred to, small, as the model sees them."""
        found = []
        for row in self._pictures:
            number = self.read[row]
            image, label = self._images[number]
            seen = visible(self._processor, model_pixels(self._model, self._processor, image)[0])
            seen.thumbnail((_THUMBNAIL, _THUMBNAIL))
            name = self._images.name(number).strip("'")
            found.append({"uri": data_uri(seen), "label": self._images.classes[label], "name": Path(name).name})
        return found
