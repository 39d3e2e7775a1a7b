"""`tokenformer explain`: what a text or image uses of a model, what activates its tokens, what growing changed."""

import shlex
import sys
from pathlib import Path
from typing import Any

from tokenformer.cli.parser import Parser, add_signature
from tokenformer.errors import UserError, require_extra

EXAMPLE = """\
  tokenformer explain runs/small --text 'def read(self, size):' --out report.html
  tokenformer explain runs/small --text 'Once upon a' --target ' time' --change 'off 3.ffn/base/17'
  tokenformer explain runs/small --data data/books --index runs/small-index
  tokenformer explain runs/large --before runs/small --data data/books --out grown.html
  tokenformer explain runs/small --data data/books --faithfulness faithfulness.json
  tokenformer explain runs/cifar10 --image cat.png --images data/cifar10 --out cat.html
"""

# What each mode needs besides the option that names it, and what else it takes.
_MODES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": ((), ("position", "target", "index", "change", "out", "json")),
    "image": ((), ("target", "images", "num_images", "change", "out", "json")),
    "before": (("data",), ("num_rows", "contexts", "out", "json")),
    "faithfulness": (("data",), ("num_rows",)),
    "index": (("data",), ("num_tokens", "contexts")),
}
_CHOICE = (
    "--text TEXT, --image FILE, --before MODEL with --data, --index IDX with --data, or --faithfulness FILE with --data"
)


def main(argv: list[str]) -> None:
    """Run `tokenformer explain`."""
    summary = (
        "Look into a model: what a text or image uses of it, what activates its parameter tokens, what growing changed."
    )
    parser = Parser("explain", summary, EXAMPLE)
    add_signature(parser, explain, skip=("command",))
    options = vars(parser.parse_args(argv))
    given = [name for name, value in options.items() if name != "model" and value != parser.get_default(name)]
    _check_mode(given)
    explain(**options, command=shlex.join(["tokenformer", "explain", *argv]))


def _check_mode(given: list[str]) -> str:
    """The one mode that the options ask for; --index is a mode only where no other is."""
    modes = [mode for mode in _MODES if mode in given and mode != "index"]
    modes = modes or [mode for mode in ("index",) if mode in given]
    if len(modes) != 1:
        which = f"{' and '.join(map(_flag, modes))} were given" if modes else "there is nothing to explain"
        raise UserError(f"{which}: give one of {_CHOICE}")
    needed, taken = _MODES[modes[0]]
    for name in needed:
        if name not in given:
            raise UserError(f"{_flag(modes[0])} needs {_flag(name)}")
    for name in given:
        if name not in (modes[0], *needed, *taken, "dtype", "device", "threads"):
            raise UserError(f"{_flag(name)} does not belong to {_flag(modes[0])}")
    return modes[0]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def explain(
    model: str,
    *,
    text: str | None = None,
    image: str | None = None,
    position: int | None = None,
    target: str | None = None,
    change: list[str] | None = None,
    before: str | None = None,
    data: str | None = None,
    index: str | None = None,
    num_tokens: int = 1_000_000,
    contexts: int = 16,
    faithfulness: str | None = None,
    num_rows: int | None = None,
    images: str | None = None,
    num_images: int = 1000,
    out: str | None = None,
    json: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    command: str | None = None,
) -> None:
    """Explain what a model does, as a page, as JSON, or in short on the terminal.

    Args:
        model: folder of the model, or a name on the Hub.
        text: that the model reads: which of its parameter tokens it uses, and what each does to what comes next.
        image: file that an image classifier looks at, or the number of one of --images: which of its parameter tokens
            it uses, and where in the image.
        position: of the token of the text behind which the prediction is explained, from 0; the last one if not given.
        target: the next token whose logit is explained, such as ' the', or the class; the likeliest if not given.
        change: changes to make, each 'off ADDRESS', 'scale ADDRESS FACTOR' or 'swap ADDRESS ADDRESS', in quotes.
        before: folder of the model before it was grown or trained on, to compare with.
        data: folder of `tokenformer data prepare`, or a text file.
        index: folder of the corpus index: with --data it is built, or gone on with; with --text it is read.
        num_tokens: of the corpus, read at most for the index.
        contexts: kept (--index) or compared (--before) of each parameter token.
        faithfulness: JSON file (and a picture beside it) for how far the attributions can be believed.
        images: which of these activate each token that --image uses most: digits (of scikit-learn), a folder with a
            folder for each class, a Parquet file or a dataset on the Hub.
        num_images: of --images, read at most.
        num_rows: rows of held-out text, 64 for --faithfulness and 256 for --before if not given.
        out: HTML file for the page; if not given, a summary is printed.
        json: file for what was found, as JSON.
        dtype: of the weights (float32, bfloat16, float16); as saved if not given.
        device: such as cuda; the CPU if not given.
        threads: of torch; one per physical core if not given.
        command: written into the record of --faithfulness.
    """
    for name, file in (("out", out), ("json", json)):
        if file is not None and (not Path(file).parent.is_dir() or Path(file).is_dir()):
            raise UserError(f"--{name}: '{file}' cannot be written: give a file in a folder that exists")
    if out is not None:
        require_extra("explain", "plotly")  # before anything is loaded
    from tokenformer.hardware import set_threads

    set_threads(threads)
    from tokenformer.models.loading import load_tokenizer, model_folder

    folder = model_folder(model)
    load: dict[str, Any] = {"dtype": dtype, "device": device}
    rows: dict[str, Any] = {} if num_rows is None else {"num_rows": num_rows}
    _check_kind(folder, image)
    if image is not None:
        payload = _of_image(folder, image, target, images, num_images, change, load)
    elif text is not None:
        payload = _of_text(folder, load_tokenizer(folder), text, position, target, index, change, load)
    else:
        from tokenformer.models.loading import load_model

        tokenizer = load_tokenizer(folder)
        if before is not None:
            from tokenformer.interpret.lineage import compare_lineage

            models = load_model(before, **load), load_model(folder, **load)
            payload = compare_lineage(*models, tokenizer, data or "", contexts=contexts, **rows)
        elif faithfulness is not None:
            from tokenformer.interpret.faithfulness import measure_faithfulness

            loaded = load_model(folder, **load)
            measure_faithfulness(loaded, tokenizer, data or "", out=faithfulness, command=command, **rows)
            sys.stdout.write(f"record: {faithfulness}\npicture: {Path(faithfulness).with_suffix('.png')}\n")
            return
        else:
            from tokenformer.interpret.building import build_index

            loaded = load_model(folder, **load)
            read: dict[str, Any] = {"model_folder": folder, "num_tokens": num_tokens, "contexts": contexts}
            built = build_index(loaded, tokenizer, data or "", index or "", **read)
            sys.stdout.write(f"{built.rows.numel():,} tokens read: {index}\n")
            return
    _give(payload, out, json)


def _of_text(
    folder: Path,
    tokenizer: Any,
    text: str,
    position: int | None,
    target: str | None,
    index: str | None,
    changes: list[str] | None,
    load: dict[str, Any],
) -> dict[str, Any]:
    from tokenformer.interpret.explain import explain_text
    from tokenformer.interpret.index import Index
    from tokenformer.interpret.intervention import parse_change
    from tokenformer.models.loading import load_model

    opened = None if index is None else Index.open(index, folder, tokenizer=tokenizer)
    model = load_model(folder, **load)
    made = [parse_change(change, model) for change in changes or []]
    return explain_text(model, tokenizer, text, position=position, target=target, index=opened, changes=made)


def _check_kind(folder: Path, image: str | None) -> None:
    """Images are for image classifiers, and all else for language models."""
    from tokenformer.models.loading import holds_image_classifier

    if holds_image_classifier(folder) and image is None:
        raise UserError(f"{folder} is an image classifier: give --image FILE")
    if image is not None and not holds_image_classifier(folder):
        raise UserError(f"{folder} is no TokenFormer image classifier: --image needs one")


def _of_image(
    folder: Path,
    image: str,
    target: str | None,
    source: str | None,
    num_images: int,
    changes: list[str] | None,
    load: dict[str, Any],
) -> dict[str, Any]:
    require_extra("vision", "PIL")
    from tokenformer.images import load_processor, open_image_set
    from tokenformer.interpret.intervention import parse_change
    from tokenformer.interpret.vision import explain_image
    from tokenformer.models.loading import load_image_classifier

    images = None if source is None else open_image_set(source, on_bad_image="skip")[0]
    shown: Any = image
    name = Path(image).name
    if images is not None and source is not None and image.isdecimal() and not Path(image).exists():
        if int(image) >= len(images):
            raise UserError(f"--image {image}: {source} has the images 0 to {len(images) - 1}")
        shown, name = images[int(image)][0], f"image {image} of {Path(source).name}"
    model = load_image_classifier(folder, **load)
    made = [parse_change(change, model) for change in changes or []]
    return explain_image(
        model,
        load_processor(folder),
        shown,
        target=target,
        changes=made,
        images=images,
        num_images=num_images,
        name=name,
        source=None if source is None else Path(source).name,
        progress=True,
    )


def _give(payload: dict[str, Any], out: str | None, json: str | None) -> None:
    if json is not None:
        from json import dumps

        from tokenformer.folders import write_atomically

        write_atomically(Path(json), dumps(payload, indent=1) + "\n")
        sys.stdout.write(f"JSON: {json}\n")
    if out is not None:
        from tokenformer.interpret.page import write_page

        write_page(payload, out)
        sys.stdout.write(f"page: {out}\n")
    elif json is None:
        from tokenformer.interpret.summaries import summary

        sys.stdout.write(summary(payload))
