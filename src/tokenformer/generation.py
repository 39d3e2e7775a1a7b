"""Text from a model, piece by piece, with the sampling of transformers."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import (
    CompileConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from tokenformer.errors import UserError
from tokenformer.models import TokenFormerForCausalLM
from tokenformer.models.loading import load_model, load_tokenizer, num_entries

# Dividing by less would make logits infinite.
LOWEST_TEMPERATURE = 1e-6


def generate_text(
    model: TokenFormerForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    num_beams: int = 1,
    assistant: TokenFormerForCausalLM | None = None,
    compile: bool = False,
) -> Iterator[str]:
    """Continue `prompt`, until the end-of-text token or `max_new_tokens` tokens.

    Args:
        model: to sample from; its state of training or evaluation is left alone.
        tokenizer: the one it was trained with.
        prompt: what to continue; an empty one stands for the beginning of a text.
        max_new_tokens: at most so many.
        temperature: divides the logits.
        top_k: sample from the so many likeliest tokens; 0 from all.
        top_p: sample from the fewest tokens that have this probability together.
        greedy: take the likeliest token instead; temperature, top_k, top_p and seed then mean nothing.
        seed: equal seeds give equal texts. The state of torch's generator is put back at the end.
        num_beams: above 1, search for the likeliest text with so many candidates instead of sampling; the text then
            comes in one go at the end, and temperature, top_k, top_p and seed mean nothing.
        assistant: a smaller model with the same tokenizer (`load_assistant`), whose guesses `model` checks several at a
            time. Greedy text is the same as without; sampled text follows the same distribution.
        compile: decode with torch.compile and a cache of fixed size: half a minute or more before the second token,
            faster ones after it.

    Returns:
        Pieces of text as they are generated; whole characters only. Joined, they are the continuation without the
        prompt. Dropping the iterator stops the model.

    Raises:
        UserError: an option out of range, options that exclude each other, a prompt and continuation longer than the
            model's context, ids the model has no embedding for, or an empty prompt with a tokenizer that has no
            end-of-text token. While iterating: torch.compile does not work here.
    """
    ways = {"greedy": greedy and num_beams != 1, "num_beams": num_beams != 1}
    ways |= {"assistant": assistant is not None, "compile": compile}
    if len(both := [name for name, given in ways.items() if given]) > 1:
        raise UserError(f"{both[0]} and {both[1]} exclude each other: give one of them")
    if num_beams < 1:
        raise UserError(f"num_beams must be at least 1, got {num_beams}")
    if assistant is not None and assistant.config.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the assistant's vocab_size is {assistant.config.vocab_size}, the model's {model.config.vocab_size}: "
            "they must be the same"
        )
    greedy = greedy or num_beams > 1
    _check_options(max_new_tokens, temperature, top_k, top_p, greedy)
    ids = _prompt_ids(model, tokenizer, prompt)
    check_length(len(ids), max_new_tokens, model.config.max_position_embeddings, "max_new_tokens")
    sampling = {} if greedy else {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = generation_config(
        model,
        tokenizer,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        **sampling,
        **(static_cache_options() if compile else {}),
    )
    return _pieces(model, tokenizer, ids, options, seed, assistant)


def load_assistant(
    path: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> TokenFormerForCausalLM:
    """A model for `generate_text(..., assistant=)`.

    Args:
        path: its folder, or name on the Hub.
        tokenizer: of the model to assist.
        dtype: as in `load_model`.
        device: as in `load_model`; the one of the model to assist.

    Raises:
        UserError: its tokenizer is another one, or what `load_model` and `load_tokenizer` raise.
    """
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the assistant '{path}' has another tokenizer than the model: choose one trained with the same"
        )
    return load_model(path, dtype=dtype, device=device)


def generation_config(
    model: TokenFormerForCausalLM, tokenizer: PreTrainedTokenizerFast, *, max_new_tokens: int, **options: Any
) -> GenerationConfig:
    """What `model.generate` needs to give text that the tokenizer can decode and that ends where it should.

    Args:
        model: to generate with.
        tokenizer: its own.
        max_new_tokens: at most so many.
        options: of transformers' GenerationConfig; sampling if a temperature is among them, otherwise the likeliest
            token or beam.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else model.config.eos_token_id
    # Rows of the embedding beyond the tokenizer are padding: they have a logit but no text.
    unused = list(range(num_entries(tokenizer), model.config.vocab_size))
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample="temperature" in options,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
        suppress_tokens=unused or None,
        **options,
    )


def static_cache_options() -> dict[str, Any]:
    """Options of `model.generate` that compile decoding: a cache of fixed size, and torch.compile on the CPU too.

    The prompt is not compiled. The step is compiled anew for each batch size and each sum of prompt and new tokens.
    """
    compilation = CompileConfig(mode="default", fullgraph=True, dynamic=False)
    compilation._compile_all_devices = True  # type: ignore[assignment]  # the switch for the CPU, declared as None
    return {"cache_implementation": "static", "compile_config": compilation}


def check_length(prompt: int, new: int, context: int, option: str) -> None:
    """Refuse what the model was not trained to see.

    Args:
        prompt: tokens in it.
        new: tokens asked for.
        context: the model's, in tokens.
        option: what the caller calls `new`.

    Raises:
        UserError: together they exceed the context.
    """
    if prompt + new > context:
        ways = [f"shorten the prompt to {context - new} tokens"] if new < context else []
        ways += [f"set {option} to {context - prompt}"] if prompt < context else []
        raise UserError(
            f"the prompt ({prompt} tokens) and {option} ({new}) exceed the model's context of {context} tokens: "
            f"{' or '.join(ways) or 'give less of both'}"
        )


def _check_options(max_new_tokens: int, temperature: float, top_k: int, top_p: float, greedy: bool) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if greedy:
        return
    if not LOWEST_TEMPERATURE <= temperature < math.inf:
        raise UserError(f"temperature must be positive, got {temperature}: for the likeliest token, use greedy")
    if top_k < 0:
        raise UserError(f"top_k must be at least 0 (0: sample from all tokens), got {top_k}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, got {top_p}")


def _prompt_ids(model: TokenFormerForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt)["input_ids"] if prompt else []
    if not ids:
        start = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
        if start is None:
            raise UserError(
                "the prompt is empty, and the tokenizer has no end-of-text token to begin with: give a prompt"
            )
        ids = [start]
    if max(ids) >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer gives id {max(ids)} but the model's vocab_size is {model.config.vocab_size}: use the "
            "tokenizer that the model was trained with"
        )
    return ids


def _pieces(
    model: TokenFormerForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    options: GenerationConfig,
    seed: int,
    assistant: TokenFormerForCausalLM | None,
) -> Iterator[str]:
    """Run the model in a thread, decode what it gives in this one."""
    generated: SimpleQueue[int | BaseException | None] = SimpleQueue()
    stopped = Event()
    prompt = torch.tensor([ids], device=model.device)
    searching = options.num_beams > 1  # then no token is certain before the end

    def run() -> None:
        outcome: BaseException | None = None
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                found = model.generate(  # type: ignore[misc]  # declared for a class of its own, GenerativePreTrainedModel
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=options,
                    streamer=None if searching else TokenStreamer(generated.put),
                    stopping_criteria=StoppingCriteriaList([StopWhen(stopped)]),
                    assistant_model=assistant,
                )
                for token in found[0, len(ids) :].tolist() if searching else []:
                    generated.put(token)
        except BaseException as error:
            outcome = error
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                line = str(error).strip().partition("\n")[0][:200]
                outcome = UserError(f"torch.compile does not work here ({line}): leave out compile")
                outcome.__cause__ = error
        generated.put(outcome)

    thread = Thread(target=run, name="tokenformer-generate", daemon=True)
    thread.start()
    text = TextStream(tokenizer, ids)
    try:
        while isinstance(item := generated.get(), int):
            if piece := text.add(item):
                yield piece
        if item is not None:
            raise item
        if rest := text.rest():
            yield rest
    finally:
        stopped.set()
        thread.join()


class TextStream:
    """Turns generated ids into text as they come: whole characters only, and nothing from a stop string on.

    Attributes:
        stopped: a stop string was found; what comes after it is dropped.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decoder = tokenizer.backend_tokenizer
        # Given the prompt, so that a tokenizer which marks the beginning of a text does not find one here.
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        self._seen = list(prompt)
        # Characters of what was decoded, first the prompt.
        self._decoded = len(self._decoder.decode(self._seen, skip_special_tokens=True))
        self._stop = stop
        self._held = ""

    def add(self, token: int) -> str:
        """The text that an id completes, often none."""
        self._seen.append(token)
        piece = self._stream.step(self._decoder, token) or ""
        self._decoded += len(piece)
        return self._until_stop(piece)

    def rest(self) -> str:
        """What was held back: bytes that never became a character, and the beginning of a stop string."""
        return self._until_stop(self._decoder.decode(self._seen, skip_special_tokens=True)[self._decoded :], last=True)

    def _until_stop(self, piece: str, last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        if found := [place for stop in self._stop if (place := text.find(stop)) >= 0]:
            self.stopped = True
            return text[: min(found)]
        # The longest end of the text that may be the beginning of a stop string.
        longest = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        keep = 0 if last else longest
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class TokenStreamer(BaseStreamer):
    """Hands each new id of `model.generate` to a function; the first call brings the prompt."""

    def __init__(self, take: Any) -> None:
        self.take = take
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the ids of one step."""
        if not self.is_prompt:
            for token in value.flatten().tolist():
                self.take(token)
        self.is_prompt = False

    def end(self) -> None:
        """Nothing: the thread says when it is done, also after an error."""


class StopWhen(StoppingCriteria):
    """Ends `model.generate` once an event is set: nobody reads what it gives."""

    def __init__(self, stopped: Event) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Whether each row is done (B,)."""
        return torch.full((input_ids.shape[0],), self.stopped.is_set(), device=input_ids.device)
