"""`tokenformer generate`: continue a prompt, streaming."""

import io
import sys

from tokenformer.cli.parser import Parser, call
from tokenformer.errors import UserError

EXAMPLE = """\
  tokenformer generate runs/small --prompt 'Once upon a time' --max-new-tokens 50
  cat story.txt | tokenformer generate runs/small --prompt - --greedy
  tokenformer generate runs/large --prompt 'Once upon a time' --greedy --assistant runs/small
  tokenformer generate runs/small --adapter runs/small-law --prompt 'The party'
"""


def main(argv: list[str]) -> None:
    """Run `tokenformer generate`."""
    summary = "Continue a prompt. Prints the continuation alone, as it is generated; beams at the end."
    call(generate, Parser("generate", summary, EXAMPLE), argv)


def generate(
    model: str,
    *,
    prompt: str = "",
    adapter: list[str] | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    num_beams: int = 1,
    assistant: str | None = None,
    compile: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> None:
    """Print the continuation of a prompt.

    Args:
        model: folder with model and tokenizer, or a name on the Hub.
        prompt: text to continue; - reads it from standard input; if empty, a new text is begun.
        adapter: folders of `tokenformer tune` for this model, active together; FOLDER=WEIGHT for another weight than 1.
        max_new_tokens: stop after so many tokens at the latest.
        temperature: above 1 bolder, below 1 more cautious.
        top_k: sample from the so many likeliest tokens; 0 for all.
        top_p: sample from the fewest tokens that have this probability together.
        greedy: always take the likeliest token.
        seed: equal seeds give equal texts.
        num_beams: search for the likeliest text with so many candidates, instead of sampling.
        assistant: folder of a smaller model with the same tokenizer, whose guesses the model checks several at a time.
        compile: decode with torch.compile; it pays for long texts.
        dtype: float32, bfloat16 or float16; as saved if not given.
        device: such as cuda; the CPU if not given.
        threads: of torch; one per physical core if not given.
    """
    from tokenformer.hardware import set_threads

    set_threads(threads)
    text = _standard_input() if prompt == "-" else prompt

    from tokenformer.generation import generate_text, load_assistant
    from tokenformer.models.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype=dtype, device=device)
    if adapter is not None:
        from tokenformer.tuning.files import load_adapters

        load_adapters(loaded, adapter)
    pieces = generate_text(
        loaded,
        tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        greedy=greedy,
        seed=seed,
        num_beams=num_beams,
        assistant=None if assistant is None else load_assistant(assistant, tokenizer, dtype=dtype, device=device),
        compile=compile,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character need not end the text
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _standard_input() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt on standard input is not UTF-8: {error.reason} at byte {error.start}") from error
    return text.removesuffix("\n").removesuffix("\r")  # the one that `echo` adds
