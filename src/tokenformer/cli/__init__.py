"""The `tokenformer` command: one module per verb, imported only when its verb is called.

A verb module offers `main(argv: list[str]) -> None`. It parses with `tokenformer.cli.parser.Parser`, calls a plain
function of the library, and lets `UserError` fly: this file turns it into one line and exit code 2.
"""

import os
import sys
from importlib import import_module

# verb -> (module, one-line summary); `tokenformer --help` prints this table without importing any of them
VERBS: dict[str, tuple[str, str]] = {
    "quickstart": ("tokenformer.cli.quickstart", "train, grow and compare small models on an embedded corpus"),
    "data": ("tokenformer.cli.data", "prepare text for training: tokenise, pack, hold out"),
    "train": ("tokenformer.cli.train", "train a model from a recipe; the same command resumes"),
    "convert": ("tokenformer.cli.convert", "published checkpoints to ours and back; a Transformer to a TokenFormer"),
    "run": ("tokenformer.cli.run", "carry out a plan: train, grow, train on, with baselines; the same command goes on"),
    "plan-scale": ("tokenformer.cli.plan_scale", "memory, traffic and speed of a run on many processes, beforehand"),
    "report": ("tokenformer.cli.report", "perplexity over cost of a plan's stages, against every baseline"),
    "grow": ("tokenformer.cli.grow", "append parameter tokens to a model"),
    "shrink": ("tokenformer.cli.shrink", "take parameter tokens out of a model"),
    "tune": ("tokenformer.cli.tune", "add parameter tokens and train them alone: an adapter of a few MB"),
    "sparsify": ("tokenformer.cli.sparsify", "make a model compute, for each input, only some of its tokens"),
    "generate": ("tokenformer.cli.generate", "continue a prompt, streaming"),
    "serve": ("tokenformer.cli.serve", "serve a model with the API of OpenAI"),
    "chat": ("tokenformer.cli.chat", "talk to a served model in the terminal"),
    "export-hub": ("tokenformer.cli.export_hub", "write a folder for the Hub that loads without this package"),
    "export-onnx": ("tokenformer.cli.export_onnx", "write an ONNX graph with a cache, checked against torch"),
    "eval": ("tokenformer.cli.eval", "perplexity on text, the tasks of lm-eval, accuracy on images"),
    "explain": ("tokenformer.cli.explain", "what a text uses of a model, what its tokens hold, what growing changed"),
    "explore": ("tokenformer.cli.explore", "look into a model in a browser: any text, any token, any change"),
    "info": ("tokenformer.cli.info", "segments, parameters, FLOPs and bytes of a model"),
    "bench": (
        "tokenformer.cli.bench",
        "measure speed: operator, training step, decoding, loaders, checkpoints, start-up",
    ),
}


def _help() -> str:
    rows = "\n".join(f"  {verb:<12} {summary}" for verb, (_, summary) in VERBS.items())
    return (
        "usage: tokenformer VERB [options]\n\n"
        "TokenFormer: train language models made of parameter tokens, and grow them.\n\n"
        f"verbs:\n{rows}\n\n"
        "`tokenformer VERB --help` shows the options of a verb and an example.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 done, 2 the user's input is wrong, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        from tokenformer import __version__

        sys.stdout.write(f"tokenformer {__version__}\n")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "see tokenformer --help"
        return _fail(f"unknown verb '{verb}': {hint}", "tokenformer")
    # Set before torch and transformers are imported: their chatter would hide our own lines.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from tokenformer.errors import UserError

    try:
        import_module(VERBS[verb][0]).main(rest)
    except UserError as error:
        return _fail(str(error), f"tokenformer {verb}", everywhere=error.everywhere)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted", f"tokenformer {verb}", code=130)
    except BrokenPipeError:
        # The reader went away (`| head`); flushing again at exit would raise the same error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(message: str, where: str, code: int = 2, *, everywhere: bool = False) -> int:
    rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    if rank != "0" and not everywhere:
        return code
    where = where if rank == "0" else f"{where} (process {rank})"
    kind = "error: " if code == 2 else ""
    sys.stderr.write(f"{where}: {kind}{' '.join(message.split())}\n")
    return code
