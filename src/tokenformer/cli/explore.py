"""`tokenformer explore`: the page of a model, live in a browser."""

import sys

from tokenformer.cli.parser import Parser, call
from tokenformer.errors import UserError, require_extra

EXAMPLE = """\
  tokenformer explore runs/small
  tokenformer explore runs/small --index runs/small-index --port 7860
"""
# Seconds that requests have to end after Ctrl-C.
_GRACE = 2


def main(argv: list[str]) -> None:
    """Run `tokenformer explore`."""
    summary = "Look into a model in a browser: any text, any parameter token, any change."
    call(explore, Parser("explore", summary, EXAMPLE), argv)


def explore(
    model: str,
    *,
    index: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> None:
    """Serve the page of a language model until Ctrl-C.

    Prints one line with the address when ready.

    Args:
        model: folder with model and tokenizer, or a name on the Hub.
        index: folder of `tokenformer explain MODEL --data DIR --index IDX`, for contexts and statistics.
        host: address to listen on; 0.0.0.0 for all of the machine's: then whoever reaches it may use the page.
        port: to listen on; 0 for a free one.
        dtype: float32, bfloat16 or float16; as saved if not given.
        device: such as cuda; the CPU if not given.
        threads: of torch; one per physical core if not given.

    Raises:
        UserError: the port is taken, the model or the index cannot be read, the index is of another model, or packages
            are missing.
    """
    require_extra("explain", "plotly", "fastapi", "uvicorn")
    from tokenformer.serving.server import listen, run_app

    # First of all, because it fails at once, and loading takes long.
    with listen(host, port) as listener:
        from tokenformer.hardware import set_threads

        set_threads(threads)

        from tokenformer.interpret.explorer import build_app
        from tokenformer.interpret.index import Index
        from tokenformer.models.loading import holds_image_classifier, load_model, load_tokenizer, model_folder

        folder = model_folder(model)
        if holds_image_classifier(folder):
            raise UserError(f"{folder} is an image classifier: use tokenformer explain {model} --image FILE --out FILE")
        tokenizer = load_tokenizer(folder)
        opened = None if index is None else Index.open(index, folder, tokenizer=tokenizer)
        loaded = load_model(folder, dtype=dtype, device=device)
        app = build_app(loaded, tokenizer, opened, host=host)
        if host not in ("127.0.0.1", "localhost", "::1"):
            sys.stderr.write(f"{host}: whoever reaches this address may use the page; there is no password\n")
        run_app(app, listener, f"exploring {model} at", "/", _GRACE)
