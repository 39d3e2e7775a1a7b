"""`serve`: one model behind an OpenAI-compatible API."""

import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from tokenformer.errors import UserError, require_extra


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    adapters: list[str] | None = None,
    continuous_batching: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    grace: int = 30,
) -> None:
    """Answer `/v1/chat/completions` and `/v1/completions` until SIGTERM or Ctrl-C.

    Prints one line with the address when ready. On SIGTERM no new requests are taken, those in work are finished, and
    the function returns.

    Args:
        model: folder with model and tokenizer, or a name on the Hub; the name by which requests may name it, too.
        host: address to listen on; 0.0.0.0 for all of the machine's.
        port: to listen on; 0 for a free one.
        adapters: folders of `tokenformer tune` for this model; a request chooses one by naming it as its model.
            NAME=FOLDER for another name than the one it has.
        continuous_batching: let requests share the steps of one batch, instead of one after the other.
        dtype: float32, bfloat16 or float16; as saved if not given.
        device: such as cuda; the CPU if not given.
        threads: of torch; one per physical core if not given.
        grace: seconds for requests in work once the server is told to stop.

    Raises:
        UserError: the port is taken, the model or an adapter cannot be read, an option is out of range, or packages
            are missing.
    """
    require_extra("serve", "fastapi", "uvicorn", "pydantic", "openai")
    if grace < 0:
        raise UserError(f"grace must be at least 0, got {grace}")
    if adapters and continuous_batching:
        raise UserError("requests in one batch cannot have different adapters: leave out continuous_batching")
    # First of all, because it fails at once, and loading takes long.
    with listen(host, port) as listener:
        from tokenformer.hardware import set_threads

        set_threads(threads)

        from tokenformer.models.loading import load_model, load_tokenizer
        from tokenformer.serving.app import build_app
        from tokenformer.serving.engine import Batched, OneByOne

        tokenizer = load_tokenizer(model)
        loaded = load_model(model, dtype=dtype, device=device)
        for given in adapters or []:
            _load_adapter(loaded, given, model)
        if tokenizer.chat_template is None:
            sys.stderr.write(f"{model} has no chat template: a chat becomes lines with 'User:' and 'Assistant:'\n")
        engine = (Batched if continuous_batching else OneByOne)(loaded, tokenizer)
        try:
            run_app(build_app(model, loaded, tokenizer, engine), listener, f"serving {model} at", "/v1", grace)
        finally:
            engine.stop()  # again, in case the server was told twice to stop and did not get there


def _load_adapter(model: Any, given: str, served: str) -> None:
    """Load the adapter that `FOLDER` or `NAME=FOLDER` asks for; it takes part in nothing yet."""
    from tokenformer.tuning.files import load_adapter

    name, equals, folder = given.partition("=")
    named = bool(equals) and not Path(given).is_dir()
    found = load_adapter(model, folder if named else given, name if named else None, activate=False)
    if found == served:
        raise UserError(f"adapter '{found}' is called like the model: give it another name, as NAME={given}")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: address of this machine.
        port: 0 for a free one.

    Raises:
        UserError: no such address, no such port, or one that is taken.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"port must be between 0 and 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"host '{host}' is no address of this machine: {error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # now, because two may bind; who connects while the model is loaded waits
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --port, or 0 for a free one"
        ) from error
    return listener


def run_app(app: Any, listener: socket.socket, ready: str, path: str, grace: int) -> None:
    """Serve until told to stop.

    Args:
        app: the application.
        listener: of `listen`.
        ready: said in front of the address once requests are answered.
        path: at the end of the address.
        grace: seconds for requests in work once the server is told to stop.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            sys.stdout.write(f"{ready} http://{f'[{host}]' if ':' in host else host}:{port}{path}\n")
            sys.stdout.flush()

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=grace))
    if threading.current_thread() is threading.main_thread():
        # When all is done uvicorn raises the signal again, which would end the process as if it had been killed.
        signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    server.run(sockets=[listener])
