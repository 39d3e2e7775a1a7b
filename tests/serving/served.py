"""A model that is served: in a process of its own on a free port, and by transformers in this one."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import openai
import torch

from saved_model import train_tokenizer
from tokenformer import TokenFormerForCausalLM

CONTEXT = 1_000_000  # the whole of it would take half an hour


@dataclass
class Served:
    """A model, and the address where it is served.

    Attributes:
        name: of the model in requests.
        url: ending in /v1.
        model: the same, in this process.
        process: the server's, where it has its own.
    """

    name: str
    url: str
    model: TokenFormerForCausalLM
    process: subprocess.Popen | None = None
    tokenizer: object = field(default_factory=train_tokenizer)

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)

    def complete(self, prompt: str, **options):
        options = {"temperature": 0, **options}
        return self.client.completions.create(model=self.name, prompt=prompt, **options)

    def expected(self, prompt: str, tokens: int, **sampling) -> str:
        """The continuation by transformers' generate, decoded at once."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        unused = list(range(len(self.tokenizer), self.model.config.vocab_size))
        options = {"do_sample": bool(sampling), "max_new_tokens": tokens, "pad_token_id": 0, "suppress_tokens": unused}
        found = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options, **sampling)
        return self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


@contextmanager
def running(folder: Path, model: TokenFormerForCausalLM, *options: str) -> Iterator[Served]:
    """`tokenformer serve` in a process of its own, killed at the end if it still runs."""
    command = [sys.executable, "-m", "tokenformer", "serve", str(folder), "--port", "0", "--threads", "1", *options]
    with (folder.parent / "stderr").open("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            line = process.stdout.readline()
            errors.seek(0)
            assert line.startswith(f"serving {folder} at http://127.0.0.1:"), errors.read()
            yield Served(str(folder), line.split()[-1], model, process)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
