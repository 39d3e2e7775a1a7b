"""What sparsity costs a trained model: how its weights are spread, and perplexity over the tokens that it computes.

python examples/sparsity.py runs/small data/books --json sparsity.json

Half of the held-out rows are there to choose settings by (`rise_chosen_by`); the other half gives the figures (`rise`).
Every line is written to the JSON file as soon as it is known; the same command goes on where it was stopped.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from tokenformer.data import PreparedData
from tokenformer.evaluation import evaluate_perplexity
from tokenformer.evaluation.perplexity import evenly_spaced
from tokenformer.hardware import hardware, set_threads, versions
from tokenformer.models.loading import load_model
from tokenformer.sparsity import activation_statistics, sparsify
from tokenformer.sparsity.calibration import read_rows

EVERY_LAYER = {"dense_above": 9.0}
SETTINGS = [
    {"keep": 0.25, **EVERY_LAYER},
    {"keep": 0.25},  # the layers for which it pays
    {"keep": 0.25, "group_size": 1, "rank": 64, "router_rank": 64, **EVERY_LAYER},
    *({"keep": keep, **EVERY_LAYER} for keep in (0.125, 0.5)),
    {"keep": 0.125, "rank": 16, "router_rank": 16, **EVERY_LAYER},  # what decodes fast: see `tokenformer bench sparse`
    {"keep": 0.0625, "rank": 8, "router_rank": 8, **EVERY_LAYER},
    {"keep": 0.25, "rank": 0, **EVERY_LAYER},
    {"keep": 0.25, "router": "centroid", **EVERY_LAYER},
    *({"keep": 0.25, "group_size": size, **EVERY_LAYER} for size in (1, 4)),
    {"keep": 0.25, "grouping": "random", **EVERY_LAYER},
    {"keep": 0.25, "budgets": "uniform", **EVERY_LAYER},
    *({"keep": keep, **EVERY_LAYER} for keep in (0.0625, 0.375)),
    {"keep": 0.25, "grouping": "keys", **EVERY_LAYER},
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder of a trained model")
parser.add_argument("data", help="folder written by tokenformer data prepare: calibration and held-out text")
parser.add_argument("--tokens", type=int, default=16384, help="of calibration text")
parser.add_argument("--rows", type=int, default=256, help="of held-out text, in both halves together")
parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of the settings, from the first")
parser.add_argument("--threads", type=int, help="of torch; one per physical core if not given")
parser.add_argument("--json", help="file for the figures")
arguments = parser.parse_args()

threads = set_threads(arguments.threads)
data = PreparedData.load(arguments.data)
held_out = list(evenly_spaced(data.held_out, arguments.rows))
file = Path(arguments.json) if arguments.json else None
record = {"command": f"sparsity.py MODEL DATA --tokens {arguments.tokens} --rows {arguments.rows}", "sparse": []}
if file is not None and file.exists():
    record = json.loads(file.read_text(encoding="utf-8"))


def losses(model: torch.nn.Module) -> list[float]:
    """Nats per token in float32, of the rows that settings are chosen by and of the others."""
    halves = (held_out[0::2], held_out[1::2])
    return [
        evaluate_perplexity(model, rows, tokens_per_byte=data.tokens_per_byte("held_out"))["loss"] for rows in halves
    ]


def save() -> None:
    """Write what is known so far."""
    if file is not None:
        whole = {**record, "threads": threads, **hardware(), **versions()}
        file.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


model = load_model(arguments.model)
rows = read_rows(
    Path(arguments.data),
    Path(arguments.model),
    vocab_size=model.config.vocab_size,
    longest=model.config.max_position_embeddings,
    num_tokens=arguments.tokens,
)
if "losses" not in record:
    record["statistics"] = activation_statistics(model, rows[:16])
    record["losses"] = losses(model)
    record["perplexity"] = math.exp(record["losses"][1])
    save()
print(f"all tokens: perplexity {record['perplexity']:.2f}", flush=True)
for settings in SETTINGS[: arguments.settings]:
    if any(done["settings"] == settings for done in record["sparse"]):
        continue
    model = load_model(arguments.model)
    report = sparsify(model, rows, **settings)
    pairs = zip(losses(model), record["losses"], strict=True)
    report["rise_chosen_by"], report["rise"] = (math.exp(found - dense) - 1 for found, dense in pairs)
    record["sparse"].append({"settings": settings, **report})
    save()
    print(
        f"{settings}: computed {report['computed']:.3f}, read {report['read']:.3f}, {report['rise']:+.2%}", flush=True
    )
