"""Tuning by adding tokens, beside LoRA with as many parameters, all weights, and no tuning: on text and on images.

A model of books is tuned on technical proposals, a classifier of digits on the same digits a quarter turned. Every
method gets a sweep of learning rates, judged on one half of the held-out data; the other half gives the figures, over
several seeds. What is there already is not done again.

python benchmarks/tuning.py --model runs/books --old data/books --new data/specs --classifier runs/digits --jobs 2

With --tokens 1200 --epochs 0.2 --rows 2 --seeds 1 it shows in a minute that everything runs.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup, set_seed

from tokenformer.data import open_data
from tokenformer.evaluation import PixelImages, evaluate_images, evaluate_perplexity, read_pixels
from tokenformer.evaluation.perplexity import evenly_spaced
from tokenformer.folders import write_atomically
from tokenformer.hardware import hardware, set_threads, versions
from tokenformer.images import load_processor, open_images
from tokenformer.models.loading import load_image_classifier, load_model
from tokenformer.pattention import Pattention
from tokenformer.tuning import add_adapter

# New tokens of each layer by kind: one budget in several places.
PLACES = {
    "everywhere": {"qkv": 8, "output": 8, "ffn": 32},
    "qkv": {"qkv": 21},
    "output": {"output": 64},
    "ffn": {"ffn": 64},
    "attention": {"qkv": 16, "output": 16},
}
RATES = {
    "tokens": [3e-3, 1e-2, 3e-2],
    "lora": [1e-3, 3e-3, 1e-2],
    "full": [3e-4, 1e-3, 3e-3],
}
# A sweep goes on beyond its edge until the best learning rate lies inside, up to so many.
MOST_RATES = 6
BATCH = {"text": 8, "images": 64}


@dataclass(frozen=True)
class Run:
    """One tuning.

    Attributes:
        problem: text or images.
        method: tokens, lora, full, or none.
        place: of the tokens, a key of PLACES.
        rate: the learning rate at the peak.
        seed: of the new parameters and of the order of the data.
    """

    problem: str
    method: str
    place: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its record."""
        return f"{self.problem}-{self.method}-{self.place}-{self.rate:g}-seed{self.seed}"


@dataclass
class Problem:
    """A model to be tuned, and what it is judged by.

    Attributes:
        model: as it was.
        batches: of the new data, for a seed.
        loss: of a batch.
        measure: figures of a model on `new` or `old` data, on one half of what is held out.
    """

    model: nn.Module
    batches: Callable[[int], Iterator[Any]]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    measure: Callable[[nn.Module, str, int], dict[str, float]]


def open_text(arguments: argparse.Namespace) -> Problem:
    """The language model, and rows of both corpora."""
    data = {"old": open_data(arguments.old), "new": open_data(arguments.new)}
    rows = {name: evenly_spaced(each.held_out, 2 * arguments.rows) for name, each in data.items()}
    train = data["new"].train

    def batches(seed: int) -> Iterator[torch.Tensor]:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        steps = max(1, arguments.tokens // (BATCH["text"] * data["new"].sequence_length))
        for step in range(steps):
            chosen = [order[i % len(order)] for i in range(step * BATCH["text"], (step + 1) * BATCH["text"])]
            yield torch.tensor(train[chosen]["input_ids"])

    def measure(model: nn.Module, which: str, half: int) -> dict[str, float]:
        part = [rows[which][i] for i in range(half, len(rows[which]), 2)]
        figures = evaluate_perplexity(model, part, tokens_per_byte=1.0)
        return {"loss": figures["loss"], "perplexity": figures["perplexity"]}

    def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    return Problem(load_model(arguments.model), batches, loss, measure)


def open_pictures(arguments: argparse.Namespace) -> Problem:
    """The classifier; its own images are old, and new when turned by a quarter."""
    data = open_images("digits")
    processor = load_processor(arguments.classifier)
    pixels = {"train": read_pixels(data.train, processor), "old": read_pixels(data.held_out, processor)}
    turned = {name: torch.rot90(each.pixel_values, dims=(2, 3)) for name, each in pixels.items()}
    labels, count = pixels["train"].labels, len(pixels["train"])

    def batches(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        per_epoch = count // BATCH["images"]
        for step in range(max(1, round(arguments.epochs * per_epoch))):
            if step % per_epoch == 0:
                order = torch.randperm(count, generator=generator)
            chosen = order[(step % per_epoch) * BATCH["images"] :][: BATCH["images"]]
            yield turned["train"][chosen], labels[chosen]

    def measure(model: nn.Module, which: str, half: int) -> dict[str, float]:
        values = turned["old"] if which == "new" else pixels["old"].pixel_values
        part = PixelImages(values[half::2], pixels["old"].labels[half::2], data.classes)
        figures = evaluate_images(model, part, batch_size=256)
        return {"loss": figures["loss"], "accuracy": figures["top1"]}

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = model(pixel_values=batch[0], labels=batch[1]).loss
        return found

    return Problem(load_image_classifier(arguments.classifier), batches, loss, measure)


def folder_of(arguments: argparse.Namespace) -> Path:
    """Of the records of runs of this length."""
    return Path(arguments.out) / f"{arguments.tokens}-tokens-{arguments.epochs:g}-epochs-{arguments.rows}-rows"


def prepare(model: nn.Module, run: Run) -> nn.Module:
    """What is to be trained, with everything else frozen."""
    if run.method == "tokens":
        return add_adapter(model, "tuned", **PLACES[run.place])
    if run.method == "lora":
        layers = [layer for layer in model.modules() if isinstance(layer, Pattention)]
        wanted = sum(
            PLACES[run.place].get(str(layer.kind), 0) * (layer.in_features + layer.out_features) for layer in layers
        )
        each = sum(2 * layer.num_tokens + layer.in_features + layer.out_features for layer in layers)
        rank = max(1, round(wanted / each))
        tokens = ["segments.base.key", "segments.base.value"]
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_parameters=tokens))
    return model.requires_grad_(run.method == "full")


def carry_out(run: Run, arguments: argparse.Namespace) -> None:
    """Train and measure, and write the record."""
    record = folder_of(arguments) / f"{run.name}.json"
    if record.exists():
        return
    set_threads(1)
    problem = open_text(arguments) if run.problem == "text" else open_pictures(arguments)
    set_seed(run.seed)
    model = prepare(problem.model, run)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seconds = 0.0
    steps = 0
    if trained:
        steps = sum(1 for _ in problem.batches(run.seed))
        optimizer = torch.optim.AdamW(trained, lr=run.rate, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, max(1, steps // 20), steps, min_lr_rate=0.1)
        model.train()
        start = time.perf_counter()
        for batch in problem.batches(run.seed):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=run.problem == "text"):
                loss = problem.loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        seconds = time.perf_counter() - start
        model.eval()
    figures = {
        "choice": problem.measure(model, "new", 0),
        "new": problem.measure(model, "new", 1),
        "old": problem.measure(model, "old", 1),
    }
    found = {**asdict(run), "parameters": sum(p.numel() for p in trained), "steps": steps, "seconds": seconds}
    record.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(record, json.dumps(found | figures, indent=2) + "\n")
    print(f"{run.name}: new {figures['new']}  old {figures['old']}  {seconds:.0f} s", flush=True)


def swept(problem: str, method: str, arguments: argparse.Namespace) -> dict[float, float]:
    """Loss by learning rate, on the half of the held-out data that is for choosing."""
    wanted = (problem, method, "everywhere", 0)
    records = read_records(arguments)
    found = [r for r in records if (r["problem"], r["method"], r["place"], r["seed"]) == wanted]
    return {record["rate"]: record["choice"]["loss"] for record in found}


def best_rate(problem: str, method: str, arguments: argparse.Namespace) -> float:
    """The learning rate of the lowest loss."""
    losses = swept(problem, method, arguments)
    return min(losses, key=lambda rate: losses[rate])


def rates_beyond(problem: str, method: str, arguments: argparse.Namespace) -> set[float]:
    """The next learning rate to try where the best one is the lowest or the highest tried; none after MOST_RATES."""
    losses = swept(problem, method, arguments)
    best = best_rate(problem, method, arguments)
    if len(losses) >= MOST_RATES or min(losses) < best < max(losses):
        return set()
    # About three steps a decade: 1e-3, 3e-3, 1e-2.
    return {float(f"{best * (10**0.5 if best == max(losses) else 10**-0.5):.0e}")}


def read_records(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All that were written."""
    files = sorted(folder_of(arguments).glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def table(records: list[dict[str, Any]], problem: str, chosen: dict[tuple[str, str], float]) -> str:
    """A row for each method and place at its best learning rate, mean and spread over the seeds."""
    figure = "perplexity" if problem == "text" else "accuracy"
    lines = [
        f"| {problem} | learning rate | trained | {figure}, new data | {figure}, old data | seconds | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for (method, place), rate in chosen.items():
        rows = [
            r for r in records if (r["problem"], r["method"], r["place"], r["rate"]) == (problem, method, place, rate)
        ]
        cells = []
        for which in ("new", "old"):
            values = [row[which][figure] for row in rows]
            spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}")
        label = method if method != "tokens" else f"tokens, {place}"
        trained, seconds = rows[0]["parameters"], statistics.mean(row["seconds"] for row in rows)
        lines.append(f"| {label} | {rate:g} | {trained:,} | {cells[0]} | {cells[1]} | {seconds:.0f} | {len(rows)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Everything, with what is missing done first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a language model")
    parser.add_argument("--old", required=True, help="prepared folder that it was trained on")
    parser.add_argument("--new", required=True, help="prepared folder that it is tuned on")
    parser.add_argument("--classifier", required=True, help="folder of `tokenformer train recipes/vision/digits.yaml`")
    parser.add_argument("--out", default="runs/tuning")
    parser.add_argument("--tokens", type=int, default=120_000, help="of text, for each run")
    parser.add_argument("--epochs", type=float, default=20, help="of images, for each run")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows of text in each half")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each")
    parser.add_argument("--json", help="write all figures here")
    arguments = parser.parse_args()

    problems, places = ("text", "images"), list(PLACES)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:

        def carry_out_all(runs: list[Run]) -> None:
            list(pool.map(carry_out, runs, itertools.repeat(arguments)))

        carry_out_all([Run(problem, "none", "everywhere", 0.0, 0) for problem in problems])
        sweep = {(problem, method): set(rates) for problem in problems for method, rates in RATES.items()}
        while sweep:
            carry_out_all([Run(*key, "everywhere", rate, 0) for key, rates in sweep.items() for rate in sorted(rates)])
            sweep = {key: beyond for key in sweep if (beyond := rates_beyond(*key, arguments))}
        chosen = {(p, m, "everywhere"): best_rate(p, m, arguments) for p in problems for m in RATES}
        # Tokens in other places take the learning rate that was best for tokens everywhere.
        chosen |= {(p, "tokens", place): chosen[p, "tokens", "everywhere"] for p in problems for place in places[1:]}
        carry_out_all([Run(*key, rate, seed) for key, rate in chosen.items() for seed in range(arguments.seeds)])

    records = read_records(arguments)
    for problem in problems:
        shown = {("none", "everywhere"): 0.0}
        shown |= {(method, place): rate for (p, method, place), rate in chosen.items() if p == problem}
        print(table(records, problem, shown))
    if arguments.json:
        about = {"tokens": arguments.tokens, "epochs": arguments.epochs, "rows": arguments.rows, "places": PLACES}
        result = {
            "command": "benchmarks/tuning.py --model BOOKS --old BOOKS_DATA --new SPECS_DATA --classifier DIGITS",
            **about,
            "chosen": {f"{p} {m} {place}": rate for (p, m, place), rate in chosen.items()},
            "runs": records,
            "threads": 1,
            "jobs": arguments.jobs,
            **hardware(),
            **versions(),
        }
        write_atomically(Path(arguments.json), json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
