"""A model made smaller: by prefix and by importance, with each rule for the scale, and with the values fitted.

python examples/elastic.py runs/small data/books --shares 0.25 0.5 --json shrunk.json

The first line is what nested training is for: the model's prefixes as they are.
"""

import argparse
import json
from pathlib import Path

from tokenformer.data import PreparedData
from tokenformer.elastic import prefix, shrink
from tokenformer.elastic.folders import text_batches
from tokenformer.evaluation import evaluate_perplexity
from tokenformer.evaluation.perplexity import evenly_spaced
from tokenformer.hardware import hardware, set_threads, versions
from tokenformer.models.loading import load_model, model_folder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder of a trained model")
parser.add_argument("data", help="folder written by tokenformer data prepare")
parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5], help="of the tokens that stay")
parser.add_argument("--rows", type=int, default=64, help="held-out rows that are measured")
parser.add_argument("--calibration-rows", type=int, default=64, help="training rows for importance, scale and fit")
parser.add_argument("--json", help="file for the figures")
arguments = parser.parse_args()

set_threads(None)
rows = evenly_spaced(PreparedData.load(arguments.data).held_out, arguments.rows)
calibration = text_batches(model_folder(arguments.model), arguments.data, arguments.calibration_rows)
model = load_model(arguments.model)


def perplexity(model) -> float:
    """On held-out rows, in float32."""
    return evaluate_perplexity(model, rows, tokens_per_byte=1.0)["perplexity"]


def sizes(share: float) -> dict[str, int]:
    """Tokens of each kind of layer."""
    return {kind: max(1, round(share * model.config.num_tokens(kind))) for kind in ("qkv", "output", "ffn")}


whole = perplexity(model)
print(f"whole {whole:.2f}\n{'':<32}" + "".join(f"{share:>9g}" for share in arguments.shares), flush=True)
found = {"prefix of the model": {}}
for share in arguments.shares:
    with prefix(model, **sizes(share)):
        found["prefix of the model"][f"{share:g}"] = perplexity(model)
rules = [{"scale": scale} for scale in ("keep", "sqrt", "calibrated")] + [{"scale": "calibrated", "fit": True}]
for rule in rules:
    for by in ("prefix", "importance"):
        needed = by == "importance" or rule["scale"] == "calibrated"
        found[f"{by}, {rule['scale']}{', fit' if 'fit' in rule else ''}"] = {
            f"{share:g}": perplexity(
                shrink(
                    load_model(arguments.model),
                    **sizes(share),
                    by=by,
                    **rule,
                    calibration=calibration if needed else None,
                )
            )
            for share in arguments.shares
        }
for way, figures in found.items():
    print(f"{way:<32}" + "".join(f"{figure:>9.2f}" for figure in figures.values()))
if arguments.json:
    record = {
        "rows": len(rows),
        "calibration_rows": sum(len(batch["input_ids"]) for batch in calibration),
        "parameters": model.num_parameters(),
        "tokens": sizes(1.0),
        "perplexity": {"whole": whole, **found},
        **hardware(),
        **versions(),
    }
    Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
