"""What an image uses of a classifier, as one JSON object: what the page shows, and what Python reads.

As `explain.py` for a text: one forward pass with gradients, one with a row for each token that is switched off. Where
in the image a token is used is its weight at each patch; which images activate it most is seen while others go by.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend

from tokenformer.errors import UserError
from tokenformer.evaluation.classes import class_names
from tokenformer.images import ImageSet
from tokenformer.images.decoding import decode
from tokenformer.interpret.addresses import TokenAddress, pattention_layers
from tokenformer.interpret.attribution import Contributions, Trace, shares_of, trace
from tokenformer.interpret.intervention import Change, intervene, measured_ablation
from tokenformer.interpret.lens import WRITING, promoted_by
from tokenformer.interpret.payload import (
    FORMAT,
    GRADIENT,
    LISTED,
    MEASURED,
    SHARES,
    STRONGEST,
    describe_model,
    layer_effects,
    likeliest,
    own_address,
    ranked,
    short,
    target_of,
)
from tokenformer.interpret.pictures import TopImages, data_uri, model_pixels, thumbnail, top_images, visible
from tokenformer.models.modeling_tokenformer_vision import TokenFormerForImageClassification
from tokenformer.tuning.adapters import kind_of

NOTES = [
    STRONGEST,
    "A map shows where a weight is high. From the second block on attention has brought to a patch what other patches "
    "hold: a bright patch need not show what the token responds to.",
    "Direct contributions add up to the logit exactly, with the embedding and a bias; they hold the final norm at what "
    "it was and count no effect through later layers. With a class token they come from that position alone.",
    GRADIENT,
    MEASURED,
    SHARES,
    "Promoted classes are those of a positive weight; later layers and the final norm's division are left out.",
]
_ATTRIBUTED = 100


def explain_image(
    model: TokenFormerForImageClassification,
    processor: PilBackend,
    image: bytes | str | PathLike[str] | Image.Image,
    *,
    target: str | int | None = None,
    num_tokens: int = 8,
    ablations: int = 12,
    changes: Iterable[Change] = (),
    images: ImageSet | None = None,
    num_images: int = 1000,
    name: str | None = None,
    source: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The parameter tokens that an image uses, where in it, and what each does to a class.

    Args:
        model: an image classifier, in evaluation mode.
        processor: of the model.
        image: bytes or path of a file, or an image of Pillow.
        target: name or number of the class whose logit is explained; the likeliest if not given.
        num_tokens: parameter tokens listed for each layer.
        ablations: tokens of the greatest gradient contribution to switch off, one at a time.
        changes: to make; what the model predicts with them is given beside what it predicts without.
        images: to find those in that activate each token most.
        num_images: of these, read at most, evenly spaced over the classes.
        name: of the image, to show; the name of its file if not given.
        source: name of `images`, to show.
        progress: show a bar where stderr is a terminal.

    Returns:
        Lists, dictionaries, strings and finite numbers only; `model`, `target`, `attribution`, `layers`, `ablations`,
        `changes` and `notes` as in `explain_text`, of classes in place of next tokens. `weight` is the one of largest
        magnitude in the image, `shares` are means over its positions, and:

        `image`: `name`, `uri` (the image as the model sees it), `width`, `height`.
        `grid`: `rows` and `columns` of patches; `class_token`, whether there is one.
        `predictions`: the likeliest classes.
        `strongest`: by layer, the addresses of the tokens with the largest |weight| times length of the value.
        `maps`: by address, `weights` and `contributions` at each patch in raster order, `class` and
        `class_contribution` at the class token or None.
        `images`: those that cards refer to by number: `uri`, `label`, `name`.
        `source`: None, or the `name` and number of `images` that were read.
        `tokens`: cards as in `explain_text`, with `images` of the highest weights in place of contexts.

    Raises:
        UserError: another model, no such class, a count that cannot be, an image of another size than the model takes,
            or what `intervene` refuses.
        BadImage: the image cannot be read, or one of `images` that are not to be skipped.
    """
    for option, value, least in (
        ("num_tokens", num_tokens, 1),
        ("ablations", ablations, 0),
        ("num_images", num_images, 1),
    ):
        if value < least:
            raise UserError(f"{option} must be at least {least}, got {value}")
    if not isinstance(model, TokenFormerForImageClassification):
        pattention_layers(model)
        raise UserError(
            f"{type(model).__name__} is no TokenFormer image classifier: an image cannot be explained with it"
        )
    name = name or (Path(image).name if isinstance(image, str | PathLike) else "image")
    pixels = model_pixels(model, processor, decode(image))
    found = trace(model, pixels)
    logits = found.logits.detach()[0]
    if not bool(logits.isfinite().all()):
        raise UserError(
            "the model gives logits that are not finite: its weights are damaged, or its dtype is too narrow"
        )
    target_id = _class(model, target, int(logits.argmax()))
    places = found.gradient(found.logits[0, target_id], by_position=True)
    contributions = {layer: {segment: c[0].sum(0) for segment, c in parts.items()} for layer, parts in places.items()}
    attribution = ranked(contributions, found.direct(None, target_id).tokens, _largest(found), _ATTRIBUTED)
    strongest = _strongest(found, num_tokens)
    shown = list(
        dict.fromkeys([*(e["address"] for e in attribution), *(a for listed in strongest.values() for a in listed)])
    )
    tokens = [own_address(text) for text in shown]
    off: dict[str, Any] = {}
    if without := [entry["address"] for entry in attribution[:ablations]]:
        changed = measured_ablation(model, pixels, without)
        off = {a: {"predictions": _predictions(model, row)} for a, row in zip(without, changed, strict=True)}
        effects = dict(zip(without, (changed[:, target_id] - logits[target_id]).tolist(), strict=True))
    for entry in attribution:
        entry["measured"] = short(effects[entry["address"]]) if entry["address"] in off else None
    seen, numbers = None, dict[int, int]()
    if images is not None:
        seen = top_images(model, processor, images, tokens, num_images=num_images, progress=progress)
        for token in tokens:
            for one in seen.tokens[str(token)]["images"]:
                numbers.setdefault(one["index"], len(numbers))
    notes = list(NOTES)
    if seen is not None and seen.unreadable:
        notes.append(f"{seen.unreadable} of the images could not be read and were left out.")
    height, width = (int(side) for side in pixels.shape[-2:])
    patch, class_token = model.config.patch_size, model.config.pooling == "cls"
    return {
        "format": FORMAT,
        "kind": "vision",
        "live": False,
        "model": describe_model(model),
        "image": {"name": name, "uri": data_uri(visible(processor, pixels[0])), "width": width, "height": height},
        "grid": {"rows": height // patch, "columns": width // patch, "class_token": class_token},
        "predictions": _predictions(model, logits),
        "target": target_of(logits, target_id, class_names(model).__getitem__),
        "attribution": attribution,
        "layers": layer_effects(contributions),
        "shares": _shares(found),
        "strongest": strongest,
        "maps": {str(token): _maps(found, places, token, class_token) for token in tokens},
        "ablations": off,
        "changes": _changed(model, pixels, list(changes)),
        "images": [] if images is None else [_picture(model, processor, images, index) for index in numbers],
        "source": None if seen is None else {"name": source or "images", "images": len(seen.read)},
        "tokens": _cards(model, tokens, seen, numbers),
        "notes": notes,
    }


def _class(model: TokenFormerForImageClassification, target: str | int | None, best: int) -> int:
    names = class_names(model)
    if target is None:
        return best
    if target in names:
        return names.index(str(target))
    if str(target).isdecimal() and int(target) < len(names):
        return int(target)
    close = get_close_matches(str(target), names, 1)
    hint = f"did you mean '{close[0]}'?" if close else f"it has {len(names)}, from '{names[0]}' to '{names[-1]}'"
    raise UserError(f"the model has no class '{target}': {hint}")


def _predictions(model: TokenFormerForImageClassification, logits: torch.Tensor) -> list[dict[str, Any]]:
    return likeliest(logits, class_names(model).__getitem__)


def _largest(found: Trace) -> Any:
    """Of a token, its weight where that is largest in magnitude."""
    peaks = {
        name: {segment: w[0].gather(0, w[0].abs().argmax(0, keepdim=True))[0] for segment, w in layer.weights.items()}
        for name, layer in found.layers.items()
    }
    return lambda layer, segment, i: peaks[layer][segment][i].item()


def _strongest(found: Trace, num_tokens: int) -> dict[str, list[str]]:
    """Of each layer the addresses of the tokens with the largest |weight| times length of the value, anywhere."""
    listed = {}
    for name, layer in found.layers.items():
        sizes = [(w[0].abs().amax(0) * layer.values[segment].norm(dim=-1)) for segment, w in layer.weights.items()]
        addresses = [str(TokenAddress(name, segment, i)) for segment, v in layer.values.items() for i in range(len(v))]
        best = torch.cat(sizes).topk(min(num_tokens, len(addresses))).indices
        listed[name] = [addresses[i] for i in best.tolist()]
    return listed


def _shares(found: Trace) -> dict[str, dict[str, float]]:
    """The share of each segment in a layer's output, as the mean over positions."""
    return {
        name: {
            segment: short(share.mean().item())
            for segment, share in shares_of({s: w[0] @ layer.values[s] for s, w in layer.weights.items()}).items()
        }
        for name, layer in found.layers.items()
    }


def _maps(found: Trace, places: Contributions, token: TokenAddress, class_token: bool) -> dict[str, Any]:
    """Weight and gradient contribution of a token at each patch, in raster order, and at the class token."""
    maps: dict[str, Any] = {}
    for name, single, values in (
        ("weights", "class", found.layers[token.layer].weights[token.segment]),
        ("contributions", "class_contribution", places[token.layer][token.segment]),
    ):
        column = [short(value) for value in values[0, :, token.index].tolist()]
        maps |= {name: column[class_token:], single: column[0] if class_token else None}
    return maps


def _changed(
    model: TokenFormerForImageClassification, pixels: torch.Tensor, changes: list[Change]
) -> dict[str, Any] | None:
    if not changes:
        return None
    with torch.no_grad(), intervene(model, changes):
        logits = model(pixels).logits[0]
    return {"changes": [str(change) for change in changes], "predictions": _predictions(model, logits)}


def _picture(
    model: TokenFormerForImageClassification, processor: PilBackend, images: ImageSet, index: int
) -> dict[str, Any]:
    image, label = images[index]
    name = Path(images.name(index).strip("'")).name
    return {"uri": thumbnail(model, processor, image), "label": images.classes[label], "name": name}


def _cards(
    model: TokenFormerForImageClassification,
    tokens: Sequence[TokenAddress],
    seen: TopImages | None,
    numbers: Mapping[int, int],
) -> dict[str, dict[str, Any]]:
    """Cards of tokens; `numbers` are those of the pictures of images."""
    layers, names = pattention_layers(model), class_names(model)
    cards: dict[str, dict[str, Any]] = {}
    for token in tokens:
        use: dict[str, Any] = {"statistics": None, "state": None, "images": []}
        if seen is not None:
            use = dict(seen.tokens[str(token)])
            use["images"] = [
                {"image": numbers[one["index"]], "weight": one["weight"], "patch": one["patch"]}
                for one in use["images"]
            ]
        cards[str(token)] = {
            "address": str(token),
            "layer": token.layer,
            "kind": kind_of(layers[token.layer]),
            "segment": token.segment,
            "index": token.index,
            "promotes": None,
            "suppresses": None,
            "nearest": None,
            "contexts": [],
            **use,
        }
    writing = [token for token in tokens if cards[str(token)]["kind"] in WRITING]
    count = max(1, min(LISTED, len(names) // 2))  # no class in both lists
    for token, (up, down) in zip(writing, promoted_by(model, writing, count), strict=True):
        lists = {"promotes": up, "suppresses": down}
        cards[str(token)] |= {kind: [[names[i], short(x)] for i, x in pairs] for kind, pairs in lists.items()}
    return cards
