"""`chat`: talk in the terminal to a server with OpenAI's API."""

import sys
from pathlib import Path
from typing import Any

from tokenformer.errors import UserError, require_extra


def chat(
    server: str = "http://127.0.0.1:8000",
    *,
    adapter: str | None = None,
    system: str = "",
    max_tokens: int | None = None,
    temperature: float = 0.8,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int | None = None,
) -> None:
    """Read lines from standard input, send the conversation so far, and print each answer as it comes.

    A line `/clear` forgets the conversation; `/exit` or the end of the input ends it. Ctrl-C cuts an answer short.

    Args:
        server: address of `tokenformer serve`.
        adapter: one of those that the server offers; the model alone if not given.
        system: text put in front of the conversation.
        max_tokens: of an answer; as many as the context holds if not given.
        temperature: above 1 bolder, below 1 more cautious.
        top_p: sample from the fewest tokens that have this probability together.
        greedy: always take the likeliest token.
        seed: equal seeds give equal answers; others each time if not given.

    Raises:
        UserError: no server there, no such adapter, or it refuses a message (in a terminal, that is said and the chat
            goes on).
    """
    require_extra("serve", "openai")
    if "://" not in server:
        start = f"start it with `tokenformer serve {server}`, then run `tokenformer chat` with the address it prints"
        hint = start if Path(server).exists() else "it begins with http://"
        raise UserError(f"'{server}' is not the address of a server: {hint}")
    import openai

    address = server.rstrip("/").removesuffix("/v1") + "/v1"
    # A key must be given; ours does not look at it, and the user's own goes to nobody.
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=None)
    options: dict[str, Any] = {"temperature": 0.0 if greedy else temperature, "top_p": top_p}
    options |= {k: v for k, v in {"max_tokens": max_tokens, "seed": seed}.items() if v is not None}
    try:
        models = list(client.models.list())
    except openai.APIConnectionError as error:
        raise UserError(f"no server answers at {server}: start one with `tokenformer serve MODEL`") from error
    except openai.APIError as error:
        raise UserError(f"{server} is no server with OpenAI's API: {error.message}") from error
    if not models:
        raise UserError(f"{server} serves no model")

    model = models[0].id if adapter is None else adapter
    if model not in (names := [served.id for served in models]):
        offered = f"it has {', '.join(names[1:])}" if names[1:] else "it has none"
        raise UserError(f"{server} has no adapter '{adapter}': {offered}")

    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # gives input() a history and editing keys

        sys.stdout.write(f"Talking to {model}. /clear forgets the conversation, /exit ends it.\n")
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    while (line := _read(terminal)) is not None and line != "/exit":
        if line == "/clear":
            messages = list(beginning)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": _answer(client, model, messages, options)})
            except openai.APIError as error:
                messages.pop()
                if not terminal:
                    raise UserError(f"the server refused: {_reason(error)}") from error
                sys.stdout.write(f"the server refused: {_reason(error)} (/clear begins anew)\n")


def _read(terminal: bool) -> str | None:
    """A line without spaces around it; None at the end."""
    if terminal:
        try:
            return input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return None
    try:
        return line.strip() if (line := sys.stdin.readline()) else None
    except UnicodeDecodeError as error:
        raise UserError(f"the standard input is not text: {error.reason} at byte {error.start}") from error


def _answer(client: Any, model: str, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Print an answer piece by piece; what there is of it if the user interrupts."""
    pieces: list[str] = []
    stream = client.chat.completions.create(model=model, messages=messages, stream=True, **options)
    try:
        with stream:
            for event in stream:
                if event.choices and (piece := event.choices[0].delta.content):
                    pieces.append(piece if pieces else piece.lstrip())
                    sys.stdout.write(pieces[-1])
                    sys.stdout.flush()
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    sys.stdout.write("\n")
    return "".join(pieces)


def _reason(error: Any) -> str:
    body = error.body
    return body["message"] if isinstance(body, dict) and "message" in body else error.message
