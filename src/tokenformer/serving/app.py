"""The HTTP side: OpenAI's routes for one model, by transformers' own handlers.

The handlers of `transformers.cli.serving` turn prompts and messages into ids, and answers into OpenAI's JSON and
events. The server around them is not used as it is: it offers routes that unload and download models, answers 500 to
fields that are missing or of the wrong type, and takes bodies of any size.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerFast
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import BaseHandler, Modality

from tokenformer.errors import UserError
from tokenformer.models import TokenFormerForCausalLM
from tokenformer.serving.engine import Engine
from tokenformer.serving.requests import ChatRequest, CompletionRequest, Sampling
from tokenformer.tuning.adapters import list_adapters

# For tokenizers without a template: lines of a play, the form of dialogue that text of all kinds is full of.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
CHAT_STOP = ("\nUser:",)

# A prompt that fits any context is far smaller.
MOST_BYTES = 1 << 20

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


def build_app(name: str, model: TokenFormerForCausalLM, tokenizer: PreTrainedTokenizerFast, engine: Engine) -> FastAPI:
    """The routes of one model and of its adapters, each of which is named like a model of its own.

    Args:
        name: by which requests may name the model without adapters, which is also meant where they name none.
        model: what answers.
        tokenizer: its own; without a chat template it gets `CHAT_TEMPLATE`.
        engine: how it generates; stopped with the server.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_middleware(_BodyLimit)
    for kind, answer in (
        (RequestValidationError, _invalid),
        (HTTPException, _refused),
        (UserError, _wrong),
        (TemplateError, _wrong),
        (Exception, _failed),
    ):
        app.add_exception_handler(kind, answer)

    chat_stop: tuple[str, ...] = ()
    if tokenizer.chat_template is None:
        tokenizer.chat_template, chat_stop = CHAT_TEMPLATE, CHAT_STOP
    served = _Served(name, model, tokenizer, engine)
    chat_handler, completion_handler = _Chat(served), _Completion(served)
    card = {"object": "model", "created": int(time.time()), "owned_by": "tokenformer"}
    card |= {"max_model_len": model.config.max_position_embeddings}
    about: dict[str, dict[str, Any]] = {name: {"id": name, **card}}
    about |= {adapter.name: {"id": adapter.name, **card, "parent": name} for adapter in list_adapters(model)}

    def _known(model_id: str) -> str:
        if model_id not in about:
            which = f"this is '{name}'" if len(about) == 1 else f"there are {', '.join(map(repr, about))}"
            raise HTTPException(404, f"the model '{model_id}' is not served here: {which}")
        return model_id

    async def respond(
        request: Request, handler: _Chat | _Completion, body: dict[str, Any], sampling: Sampling
    ) -> Response:
        sampling.adapter = None if _known(body.get("model", name)) == name else body["model"]
        request_id = uuid4().hex
        try:
            answering = handler.handle_request({**body, "sampling": sampling}, request_id)
            response = await _unless_hung_up(request, answering)
        except BaseException:
            engine.end(request_id)
            raise
        if isinstance(response, StreamingResponse):
            response.body_iterator = _with_end(response.body_iterator)
        return _Ending(response, lambda: engine.end(request_id))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        sampling = body.sampling()
        sampling.stop += chat_stop
        return await respond(request, chat_handler, body.model_dump(exclude_none=True), sampling)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        fields = body.model_dump(exclude_none=True)
        if not body.prompt:
            fields["prompt"] = tokenizer.eos_token or tokenizer.bos_token
            if fields["prompt"] is None:
                raise UserError("the prompt is empty, and the tokenizer has no end-of-text token to begin with")
        return await respond(request, completion_handler, fields, body.sampling())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(about.values())}

    @app.get("/v1/models/{model_id:path}")
    async def model_by_id(model_id: str) -> dict[str, Any]:
        return about[_known(model_id)]

    @app.get("/health")
    async def health() -> Response:
        status = {"status": "ok" if not engine.trouble else "unhealthy", "requests": len(engine.answers)}
        return JSONResponse(status, 503 if engine.trouble else 200)

    return app


class _Served:
    """Stands where transformers' handlers expect what loads models and what chooses who generates."""

    def __init__(self, name: str, model: Any, tokenizer: PreTrainedTokenizerFast, engine: Engine) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.engine = engine

    def get_model_modality(self, model: Any, **kwargs: Any) -> Modality:
        return Modality.LLM

    def use_continuous_batching(self, model: Any, modality: Modality) -> bool:
        return False  # the engine takes the same inputs either way

    def get_manager(self, model_id: str, **kwargs: Any) -> Engine:
        return self.engine


class _OneModel(BaseHandler):
    """A handler of transformers for the one model, and requests that are checked already."""

    def __init__(self, served: Any) -> None:
        super().__init__(model_manager=served, generation_state=served)
        self.served: _Served = served

    def _validate_request(self, body: dict[str, Any]) -> None:
        """Nothing: the body was made of a `ChatRequest` or `CompletionRequest`."""

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return body["sampling"].adapter or self.served.name, self.served.model, self.served.tokenizer

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        return body["sampling"]  # the handlers only look at its max_new_tokens, and hand it to the engine


class _Chat(_OneModel, ChatCompletionHandler):
    pass


class _Completion(_OneModel, CompletionHandler):
    pass


class _Ending(Response):
    """A response that ends the request when it is sent, when the client hangs up, and when the server gives up."""

    def __init__(self, response: Response, end: Callable[[], None]) -> None:
        super().__init__()
        self.response = response
        self.end = end

    async def __call__(self, scope: Any, receive: _Receive, send: _Send) -> None:
        try:
            await self.response(scope, receive, send)
        finally:
            self.end()


async def _unless_hung_up(request: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """What `answering` gives, unless the client goes away first: then it is cancelled."""
    answer = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=499)  # which nobody reads
    finally:
        answer.cancel()
        gone.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _with_end(events: Any) -> AsyncGenerator[str, None]:
    """The events, and OpenAI's last one, which transformers leaves out."""
    async for event in events:
        yield event
    yield "data: [DONE]\n\n"


class _BodyLimit:
    """Refuses bodies above `MOST_BYTES`, and reads them to the end so that the client gets to read the answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: _Receive, send: _Send) -> None:
        size = 0

        async def limited() -> _Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MOST_BYTES:
                while message.get("more_body"):
                    message = await receive()
                raise HTTPException(413, f"the body is larger than {MOST_BYTES} bytes")
            return message

        await self.app(scope, limited, send)


# Errors, in OpenAI's form


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = "model_not_found" if status == 404 and message.startswith("the model") else None
    text = " ".join(message.encode("utf-8", "replace").decode()[:1000].split())
    return JSONResponse({"error": {"message": text, "type": kind, "param": None, "code": code}}, status)


def _invalid(_: Request, error: Any) -> Response:
    found = error.errors()[0]
    if found["type"] == "json_invalid":
        return _error(400, f"the body is not JSON: {found['ctx']['error']} at character {found['loc'][-1]}")
    if found["loc"] == ("body",):
        return _error(400, "the body must be a JSON object, with the header Content-Type: application/json")
    message = "not supported here" if found["type"] == "extra_forbidden" else found["msg"]
    return _error(400, f"{'.'.join(map(str, found['loc'][1:]))}: {message}")


def _refused(_: Request, error: Any) -> Response:
    return _error(error.status_code, str(error.detail))


def _wrong(_: Request, error: Exception) -> Response:
    return _error(400, str(error))


def _failed(_: Request, error: Exception) -> Response:
    return _error(500, f"the server failed: {type(error).__name__}: {error}")
