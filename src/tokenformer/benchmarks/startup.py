"""How long commands take from their start to their end: processes, again and again, beside a bare interpreter.

Each is run once before, and its exit code is looked at; the two that must not load torch are run once more to see that
they do not.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers.utils.logging import disable_progress_bar

from tokenformer.benchmarks.conditions import check_options
from tokenformer.benchmarks.models import default_config
from tokenformer.benchmarks.report import as_seconds, new_record
from tokenformer.benchmarks.targets import Target, ratios
from tokenformer.benchmarks.timing import interleave
from tokenformer.data import tokenizer
from tokenformer.errors import UserError
from tokenformer.hardware import set_threads
from tokenformer.models import TokenFormerConfig, TokenFormerForCausalLM

# What the console script does.
COMMAND = "import sys; from tokenformer.cli import main; sys.exit(main(sys.argv[1:]))"
TEXT = "It was the best of times, it was the"
CASES = {
    "python": ["-c", "pass"],
    "import_torch": ["-c", "import torch"],
    "import": ["-c", "import tokenformer"],
    "help": ["-c", COMMAND, "--help"],
    "info": ["-c", COMMAND, "info", "{tiny}"],
    "explain": ["-c", COMMAND, "explain", "{model}", "--text", TEXT, "--json", "{found}", "--threads", "{threads}"],
}
WITHOUT_TORCH = ("import", "help")
# seconds, by case
LIMITS = {"help": 0.3, "import": 0.5, "explain": 10.0}
TARGETS = tuple(
    Target(case, other, ("none",))
    for case, other in (("help", "python"), ("import", "python"), ("info", "import_torch"))
)


def measure(
    config: TokenFormerConfig | None = None,
    *,
    threads: int | None = None,
    repeats: int = 10,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Check, then time the start of commands, each in a process of its own.

    Args:
        config: of the model that is explained; the 150M model if not given.
        threads: that the processes may use; one per physical core if not given.
        repeats: rounds.
        progress: called with a line on what is being done.

    Returns:
        The record (see benchmarks/README.md), with `limits`: cases that must stay below a number of seconds.

    Raises:
        UserError: an option out of range, a command that fails, or torch where it must not be; then nothing was timed.
    """
    check_options(("float32",), repeats=repeats)
    disable_progress_bar()
    threads = set_threads(threads)
    record = new_record("startup", {"dtypes": ["none"], "repeats": repeats}, threads)
    with TemporaryDirectory(prefix="tokenformer-bench-") as folder:
        tiny = TokenFormerConfig(
            vocab_size=256,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            segments=[{"name": "base", "qkv": 32, "output": 32, "ffn": 128}],
        )
        places = {name: str(Path(folder, name)) for name in ("tiny", "model", "found")} | {"threads": str(threads)}
        for name, made in (("tiny", tiny), ("model", config or default_config())):
            TokenFormerForCausalLM(made).save_pretrained(places[name])
        add_tokenizer(Path(places["model"]))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

        def start(arguments: list[str]) -> Callable[[], object]:
            return lambda: run([word.format(**places) for word in arguments], Path(folder), environment)

        cases = {name: start(arguments) for name, arguments in CASES.items()}
        progress("checking")
        for case in cases.values():
            case()
        for name in WITHOUT_TORCH:
            require_no_torch(CASES[name], Path(folder), environment)
        progress(f"timing, {repeats} rounds")
        timings = interleave(cases, repeats)
    record["seconds"] = as_seconds({"none": {"start": timings}})
    record["limits"] = [
        {"case": name, "seconds": timings[name].median, "at_most": limit, "met": timings[name].median <= limit}
        for name, limit in LIMITS.items()
    ]
    record["ratios"] = ratios({"none": timings}, TARGETS, judge=False)
    return record


def add_tokenizer(folder: Path) -> None:
    """Put a small tokenizer beside a model."""
    (folder / "tokenizer.json").write_bytes(tokenizer.train([TEXT], 300))
    (folder / "tokenizer_config.json").write_bytes(tokenizer.tokenizer_config(tokenizer.choose("train:300")))


def run(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Run this Python in another folder; returns what it prints.

    Raises:
        UserError: it fails.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"`python {' '.join(arguments)}` ends with code {done.returncode} ({last}): repair that first")
    return done.stdout


def require_no_torch(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    """See that a command of `CASES` ends without torch among its modules.

    Raises:
        UserError: torch is there.
    """
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {arguments[1]}"
    if run(["-c", code, *arguments[2:]], folder, environment).splitlines()[-1] != "False":
        raise UserError(f"`python {' '.join(arguments)}` loads torch: this is a bug, report it")
