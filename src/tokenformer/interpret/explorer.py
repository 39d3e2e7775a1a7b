"""The page over one model, which runs every text and every change that is asked for.

The server answers on this machine alone unless told otherwise, and only to requests that name it by its own address, so
that no other page a browser has open can reach it by a host name that points here. One request at a time runs the
model, in a thread, so that the page itself always answers.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal

from tokenformer.errors import UserError
from tokenformer.interpret.page import CHARTS, FORMAT, SCRIPTS, STYLE, content_policy, served_page, web_file

if TYPE_CHECKING:
    from fastapi import FastAPI
    from transformers import PreTrainedTokenizerFast

    from tokenformer.interpret.index import Index
    from tokenformer.models.modeling_tokenformer import TokenFormerForCausalLM

# A text that fits any context is far smaller.
_MOST_BYTES = 1 << 20
_MOST_CHANGES = 64
_MOST_LISTED = 200
_STATES = {"", "dead", "always on"}
_HEADERS = {
    "Content-Security-Policy": content_policy("script-src 'self'", "connect-src 'self'", "'self' 'unsafe-inline'")
    + "; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def build_app(
    model: "TokenFormerForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    index: "Index | None" = None,
    *,
    host: str = "127.0.0.1",
) -> "FastAPI":
    """The page and its requests, as an application of FastAPI.

    Args:
        model: a language model, in evaluation mode.
        tokenizer: of the model.
        index: of the model.
        host: that requests may name besides this machine's own names; of 0.0.0.0 and :: any, as the machine may have
            any name there.

    Raises:
        UserError: a model without Pattention layers.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    page = served_page(start_payload(model, index))
    web = {name: web_file(name) for name in (STYLE, *SCRIPTS)}
    desk = Desk(model, tokenizer, index)
    turn = asyncio.Lock()
    app = FastAPI(openapi_url=None)
    names = ["*"] if host in ("0.0.0.0", "::") else ["127.0.0.1", "localhost", "[::1]", "::1", host]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)

    @app.middleware("http")
    async def with_headers(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await answer(request)
        response.headers.update(_HEADERS)
        return response

    def refusal(status: int, message: str) -> JSONResponse:
        text = " ".join(message.encode("utf-8", "replace").decode()[:1000].split())
        return JSONResponse({"error": text}, status)

    async def wrong(_: Request, error: Exception) -> JSONResponse:
        return refusal(400, str(error))

    async def refused(_: Request, error: Any) -> JSONResponse:
        return refusal(error.status_code, str(error.detail))

    async def failed(_: Request, error: Exception) -> JSONResponse:
        return refusal(500, f"the server failed: {type(error).__name__}: {error}")

    app.add_exception_handler(UserError, wrong)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Exception, failed)

    async def asked(request: Request) -> dict[str, Any]:
        # A page of another origin can send anything but this type without being allowed to.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise UserError("the body must be JSON, with the header Content-Type: application/json")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MOST_BYTES:
                raise UserError(f"the request is larger than {_MOST_BYTES} bytes: give a shorter text")
        return read_body(body)

    async def in_turn(work: Callable[..., Any], *arguments: Any) -> JSONResponse:
        async with turn:
            return JSONResponse(await asyncio.to_thread(work, *arguments))

    @app.get("/")
    async def start() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/web/{name}")
    async def file(name: str) -> Response:
        if name not in web:
            raise HTTPException(404, f"there is no '{name}' here")
        kind = "text/css" if name == STYLE else "text/javascript"
        cached = {"Cache-Control": "max-age=3600"} if name == CHARTS else {}
        return Response(web[name], media_type=kind, headers=cached)

    @app.post("/api/explain")
    async def explain(request: Request) -> Response:
        return await in_turn(desk.explain, await asked(request))

    @app.post("/api/token")
    async def token(request: Request) -> Response:
        return await in_turn(desk.card, await asked(request))

    @app.post("/api/change")
    async def change(request: Request) -> Response:
        return await in_turn(desk.change, await asked(request))

    @app.get("/api/tokens")
    async def tokens(
        layer: str, segment: str, sort: str = "max", state: str = "", offset: str = "0", limit: str = "25"
    ) -> Response:
        return await in_turn(desk.listed, layer, segment, sort, state, offset, limit)

    from fastapi.exceptions import RequestValidationError

    async def invalid(_: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        return refusal(400, f"{first['loc'][-1]}: {first['msg']}")

    app.add_exception_handler(RequestValidationError, invalid)
    return app


def start_payload(model: "TokenFormerForCausalLM", index: "Index | None") -> dict[str, Any]:
    """What the page shows before the first text.

    Raises:
        UserError: a model without Pattention layers.
    """
    from tokenformer.interpret.explain import NOTES
    from tokenformer.interpret.payload import describe_model

    described = describe_model(model)
    return {
        "format": FORMAT,
        "kind": "language",
        "live": True,
        "model": described,
        "index": index is not None,
        "text": None,
        "tokens": {},
        "notes": NOTES,
    }


def read_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        UserError: it is none.
    """
    import json

    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError("the body is not JSON") from error
    if not isinstance(fields, dict):
        raise UserError("the body must be a JSON object")
    return fields


class Desk:
    """Answers requests with the model, one after the other."""

    def __init__(
        self, model: "TokenFormerForCausalLM", tokenizer: "PreTrainedTokenizerFast", index: "Index | None"
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.index = index

    def explain(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The payload of a text."""
        from tokenformer.interpret.explain import explain_text

        text = _field(fields, "text", str)
        position = None if fields.get("position") is None else _field(fields, "position", int)
        found = explain_text(self.model, self.tokenizer, text, position=position, index=self.index)
        return {**found, "live": True, "index": self.index is not None}

    def card(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The card of a token."""
        from tokenformer.interpret.addresses import find_token
        from tokenformer.interpret.explain import token_cards

        token = find_token(self.model, _field(fields, "address", str))
        return token_cards(self.model, self.tokenizer, [token], index=self.index)[str(token)]

    def change(self, fields: dict[str, Any]) -> dict[str, Any]:
        """What changes do to a text."""
        from tokenformer.interpret.effects import change_effect
        from tokenformer.interpret.intervention import parse_change

        texts = _field(fields, "changes", list)
        if len(texts) > _MOST_CHANGES:
            raise UserError(f"{len(texts)} changes are too many at once: take some back, {_MOST_CHANGES} are possible")
        if not all(isinstance(text, str) for text in texts):
            raise UserError("changes: expected texts such as 'off 3.ffn/base/17'")
        text, position = _field(fields, "text", str), _field(fields, "position", int)
        changes = [parse_change(text, self.model) for text in texts]
        found = change_effect(self.model, self.tokenizer, changes, text, position=position)
        numbers = [one["probability"] for one in found["after"]]
        if not all(map(math.isfinite, numbers)):
            raise UserError("with these changes the model gives no finite probabilities: choose a smaller factor")
        return found

    def listed(self, layer: str, segment: str, sort: str, state: str, offset: str, limit: str) -> dict[str, Any]:
        """A page of the tokens of a segment."""
        from tokenformer.interpret.addresses import TokenAddress, find_segment

        if self.index is None:
            raise UserError("this list needs an index: start explore with --index")
        order: Literal["max", "mean", "active"] | str = sort
        if order not in ("max", "mean", "active"):
            raise UserError(f"sort: '{sort}' is none of max, mean and active")
        if state not in _STATES:
            raise UserError(f"state: '{state}' is none of dead and always on")
        if not (offset.isdecimal() and limit.isdecimal()):
            raise UserError("offset and limit must be numbers")
        layer, segment = find_segment(self.model, f"{layer}/{segment}")
        figures = self.index.statistics(layer, segment)
        special: dict[int, str] = dict.fromkeys(self.index.dead(layer, segment), "dead")
        special |= dict.fromkeys(self.index.always_on(layer, segment), "always on")
        places = [
            i
            for i in figures[order].argsort(descending=True, stable=True).tolist()
            if not state or special.get(i) == state
        ]
        first, count = int(offset), min(int(limit), _MOST_LISTED)
        tokens = []
        for place in places[first : first + count]:
            address = TokenAddress(layer, segment, place)
            contexts = self.index.contexts(address)
            numbers = {name: figures[name][place].item() for name in ("mean", "max", "active")}
            top = {name: contexts[0][name] for name in ("before", "token", "after", "weight")} if contexts else None
            tokens.append({"address": str(address), **numbers, "state": special.get(place), "top": top})
        return {"total": len(places), "tokens": tokens}


def _field(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        words = {str: "a text", int: "a whole number", list: "a list"}
        raise UserError(f"{name}: expected {words[kind]}")
    return value
