"""Who generates the answers: one after the other, or in batches that requests join and leave (continuous batching).

Both stand where transformers' own generation managers stand in its server (`transformers.cli.serving.utils`), and add
what those lack: the context is respected, stop strings are cut from the text, seeds and sampling belong to one request
even among others, a request without a stream can be cancelled, and text cut inside a character is not lost.
"""

import asyncio
import json
import logging
import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from fastapi import HTTPException
from transformers import ContinuousBatchingConfig, PreTrainedTokenizerFast, StoppingCriteriaList
from transformers.cli.serving.utils import BaseGenerateManager, _StreamError

from tokenformer.errors import UserError
from tokenformer.generation import (
    LOWEST_TEMPERATURE,
    StopWhen,
    TextStream,
    TokenStreamer,
    check_length,
    generation_config,
)
from tokenformer.models import TokenFormerForCausalLM
from tokenformer.serving.requests import Sampling
from tokenformer.tuning.adapters import set_adapter

# Requests in work or waiting; more are refused, so that a crowd cannot fill the memory.
MOST_REQUESTS = 256
# On a CPU, continuous batching has memory for so many texts of full length, and reads prompts in pieces of this size.
FULL_TEXTS, PREFILL_TOKENS = 8, 512


class Answer:
    """The text of one request on its way from the model to the client.

    Also the `streamer` that transformers' handlers ask for `total_tokens` and tell to `cancel`.

    Attributes:
        ids: the prompt.
        sampling: what the client asked for.
        tokens: ids generated so far.
        queue: pieces of text, then None, or a `_StreamError` in its place.
        ended: nobody needs further tokens.
    """

    def __init__(self, ids: list[int], sampling: Sampling, tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids = ids
        self.sampling = sampling
        self.tokens: list[int] = []
        self.queue: asyncio.Queue[str | _StreamError | None] = asyncio.Queue()
        self.ended = Event()
        self.on_end: Callable[[], None] = lambda: None
        self._text = TextStream(tokenizer, ids, sampling.stop)
        self._loop = asyncio.get_running_loop()

    @property
    def total_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens)

    def add(self, token: int) -> None:
        """Take a new token; from any thread."""
        if self.ended.is_set():
            return
        self.tokens.append(token)
        if piece := self._text.add(token):
            self._put(piece)
        if self._text.stopped:
            self.finish()

    def finish(self) -> None:
        """There are no more tokens."""
        if not self.ended.is_set():
            if rest := self._text.rest():
                self._put(rest)
            self._end(None)

    def fail(self, error: BaseException | str) -> None:
        """There are no more tokens, and this is why."""
        if not self.ended.is_set():
            # The handlers put the message between quotation marks of JSON as it is.
            self._end(_StreamError(json.dumps(f"generation failed: {error}")[1:-1]))

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        if not self.ended.is_set():
            self._end(None)

    def _end(self, item: _StreamError | None) -> None:
        self.ended.set()
        self._put(item)
        if not self._loop.is_closed():
            self.on_end()

    def _put(self, item: str | _StreamError | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server was told twice to stop
            self._loop.call_soon_threadsafe(self.queue.put_nowait, item)


class Engine(BaseGenerateManager):
    """What transformers' handlers ask to generate.

    Args:
        model: on its device, in evaluation mode.
        tokenizer: its own.
    """

    def __init__(self, model: TokenFormerForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.answers: dict[str, Answer] = {}

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple["asyncio.Queue[Any]", Any]:
        """Begin an answer; its queue gives pieces of text."""
        answer = self._begin(inputs, gen_config, request_id)
        return answer.queue, answer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """The whole answer: text, tokens of the prompt, ids."""
        answer = self._begin(inputs, gen_config, request_id)
        pieces = []
        while (item := await answer.queue.get()) is not None:
            if isinstance(item, _StreamError):
                raise RuntimeError(item.msg)
            pieces.append(item)
        return "".join(pieces), len(answer.ids), answer.tokens

    def end(self, request_id: str) -> None:
        """Forget a request, and stop working for it if it is not answered yet."""
        if answer := self.answers.pop(request_id, None):
            answer.cancel()

    @property
    def trouble(self) -> str | None:
        """Why nothing can be generated any more; None while all is well."""
        return None

    def _begin(self, inputs: Any, sampling: Sampling, request_id: str) -> Answer:
        if self.trouble:
            raise HTTPException(503, f"the model has stopped ({self.trouble}): restart the server")
        if len(self.answers) >= MOST_REQUESTS:
            raise HTTPException(503, f"{MOST_REQUESTS} requests are waiting already: try again later")
        ids: list[int] = inputs["input_ids"][0].tolist()
        context = self.model.config.max_position_embeddings
        if sampling.max_new_tokens is None:
            # At least one, so that a prompt which fills the context is refused like any other that is too long. The
            # handler holds the same object, and compares it with the length of the answer.
            sampling.max_new_tokens = max(context - len(ids), 1)
        check_length(len(ids), sampling.max_new_tokens, context, sampling.option)
        answer = Answer(ids, sampling, self.tokenizer)
        self._submit(answer, request_id)
        self.answers[request_id] = answer
        return answer

    @abstractmethod
    def _submit(self, answer: Answer, request_id: str) -> None:
        """Generate it in another thread; called in the event loop."""


class OneByOne(Engine):
    """`model.generate` for one request after the other, in one thread."""

    def __init__(self, model: TokenFormerForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(model, tokenizer)
        self._waiting: SimpleQueue[Answer | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="tokenformer-serve", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all answers and the thread."""
        for request_id in list(self.answers):
            self.end(request_id)
        self._waiting.put(None)
        self._thread.join()

    def _submit(self, answer: Answer, request_id: str) -> None:
        self._waiting.put(answer)

    def _work(self) -> None:
        while answer := self._waiting.get():
            try:
                self._generate(answer)
                answer.finish()
            except Exception as error:  # noqa: PERF203 (one request must not end the thread of all)
                logging.getLogger("uvicorn.error").exception("generation failed")
                answer.fail(error)

    def _generate(self, answer: Answer) -> None:
        sampling = answer.sampling
        if answer.ended.is_set() or sampling.max_new_tokens is None:
            return
        options: dict[str, Any] = {}
        if sampling.temperature >= LOWEST_TEMPERATURE:
            options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
            # Here, not where the request arrived: another one may be sampling then.
            torch.seed() if sampling.seed is None else torch.manual_seed(sampling.seed)
        prompt = torch.tensor([answer.ids], device=self.model.device)
        set_adapter(self.model, sampling.adapter)
        self.model.generate(  # type: ignore[misc]  # declared for a class of its own, GenerativePreTrainedModel
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=generation_config(
                self.model, self.tokenizer, max_new_tokens=sampling.max_new_tokens, **options
            ),
            streamer=TokenStreamer(answer.add),
            stopping_criteria=StoppingCriteriaList([StopWhen(answer.ended)]),
        )


class Batched(Engine):
    """Continuous batching of transformers: all requests share the steps of one batch."""

    def __init__(self, model: TokenFormerForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(model, tokenizer)
        context = model.config.max_position_embeddings
        memory: dict[str, Any] = {}
        if model.device.type == "cpu":  # its default takes most of the machine's memory; right for a GPU alone
            page = max(min(256, context), 4)
            memory = {
                "page_size": page,
                "num_blocks": FULL_TEXTS * math.ceil(context / page),
                "max_batch_tokens": PREFILL_TOKENS,
            }
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        # A filter takes settings per request only if it exists, that is, if the common setting filters something.
        shared = generation_config(model, tokenizer, max_new_tokens=context, temperature=0.5, top_k=1, top_p=0.5)
        self._end = shared.eos_token_id
        self._manager = model.init_continuous_batching(
            generation_config=shared,
            continuous_batching_config=ContinuousBatchingConfig(per_request_processors=True, **memory),
        )
        self._manager.start()

    @property
    def trouble(self) -> str | None:
        """The error that ended the thread of the batch, if one did."""
        error = self._manager.background_thread_status.fatal_error
        return None if error is None else str(error)

    def stop(self) -> None:
        """End all answers and the thread."""
        for request_id in list(self.answers):
            self.end(request_id)
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)

    def _submit(self, answer: Answer, request_id: str) -> None:
        sampling = answer.sampling
        if sampling.seed is not None:
            raise UserError("with continuous batching requests share their random numbers: leave out seed")
        greedy = sampling.temperature < LOWEST_TEMPERATURE

        def take(output: Any) -> None:
            if output.error is not None or output.is_finished():
                answer.on_end = lambda: None  # transformers is done with it, too
            for token in output.generated_tokens[answer.total_tokens :]:
                answer.add(token)
            if output.error is not None:
                answer.fail(output.error)
            elif output.is_finished():
                answer.finish()

        handlers = self._manager.output_router.result_handlers
        loop = asyncio.get_running_loop()

        def ended() -> None:
            self._manager.cancel_request(request_id)
            # transformers forgets handlers of finished requests only. Not at once: what is still under way to this one
            # would then pile up elsewhere.
            loop.call_later(60, handlers.pop, request_id, None)

        answer.on_end = ended
        self._manager.register_result_handler(request_id, take)
        self._manager.add_request(
            answer.ids,
            request_id=request_id,
            max_new_tokens=sampling.max_new_tokens,
            streaming=True,
            eos_token_id=self._end,
            temperature=1.0 if greedy else float(sampling.temperature),
            top_k=1 if greedy else sampling.top_k or self.model.config.vocab_size,
            top_p=float(sampling.top_p),
        )
