"""Text from a model, piece by piece, with the sampling of transformers."""

import math
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tokenformer.errors import UserError
from tokenformer.models import TokenFormerForCausalLM
from tokenformer.models.loading import num_entries


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

    Returns:
        Pieces of text as they are generated; whole characters only. Joined, they are the continuation without the
        prompt. Dropping the iterator stops the model.

    Raises:
        UserError: an option out of range, a prompt and continuation longer than the model's context, ids the model has
            no embedding for, or an empty prompt with a tokenizer that has no end-of-text token.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, greedy)
    ids = _prompt_ids(model, tokenizer, prompt)
    context = model.config.max_position_embeddings
    if len(ids) + max_new_tokens > context:
        ways = [f"shorten the prompt to {context - max_new_tokens} tokens"] if max_new_tokens < context else []
        ways += [f"set max_new_tokens to {context - len(ids)}"] if len(ids) < context else []
        raise UserError(
            f"the prompt ({len(ids)} tokens) and max_new_tokens ({max_new_tokens}) exceed the model's context of "
            f"{context} tokens: {' or '.join(ways) or 'give less of both'}"
        )
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else model.config.eos_token_id
    sampling = {} if greedy else {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    # Rows of the embedding beyond the tokenizer are padding: they have a logit but no text.
    unused = list(range(num_entries(tokenizer), model.config.vocab_size))
    options = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
        suppress_tokens=unused or None,
        **sampling,
    )
    return _pieces(model, tokenizer, ids, options, seed)


def _check_options(max_new_tokens: int, temperature: float, top_k: int, top_p: float, greedy: bool) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if greedy:
        return
    if not 0 < temperature < math.inf:
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
) -> Iterator[str]:
    """Run the model in a thread, decode what it gives in this one."""
    generated: SimpleQueue[int | BaseException | None] = SimpleQueue()
    stopped = Event()
    prompt = torch.tensor([ids], device=model.device)

    def run() -> None:
        outcome: BaseException | None = None
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model.generate(  # type: ignore[misc]
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=options,
                    streamer=_Queue(generated),
                    stopping_criteria=StoppingCriteriaList([_Stop(stopped)]),
                )
        except BaseException as error:
            outcome = error
        generated.put(outcome)

    thread = Thread(target=run, name="tokenformer-generate", daemon=True)
    thread.start()
    decoder = tokenizer.backend_tokenizer
    # Given the prompt, so that a tokenizer which marks the beginning of a text does not find one here.
    stream = DecodeStream(ids=list(ids), skip_special_tokens=True)
    seen, emitted = list(ids), ""
    try:
        while isinstance(item := generated.get(), int):
            seen.append(item)
            if piece := stream.step(decoder, item):
                emitted += piece
                yield piece
        if item is not None:
            raise item
        # What the stream held back: bytes that never became a character.
        whole = decoder.decode(seen, skip_special_tokens=True)
        if rest := whole[len(decoder.decode(ids, skip_special_tokens=True)) + len(emitted) :]:
            yield rest
    finally:
        stopped.set()
        thread.join()


class _Queue(BaseStreamer):
    """Puts each new id into a queue; the first call brings the prompt."""

    def __init__(self, queue: "SimpleQueue[Any]") -> None:
        self.queue = queue
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            for token in value.flatten().tolist():
                self.queue.put(token)
        self.is_prompt = False

    def end(self) -> None:
        """Nothing: the thread says when it is done, also after an error."""


class _Stop(StoppingCriteria):
    """Ends generation once nobody reads it."""

    def __init__(self, stopped: Event) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stopped.is_set(), device=input_ids.device)
