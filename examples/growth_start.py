"""What growing does to the loss before any training: zero or random keys, kept or published scale.

python examples/growth_start.py runs/quickstart/base runs/quickstart/data --json growth-start.json
"""

import argparse
import json

import torch

from tokenformer import grow
from tokenformer.data import PreparedData
from tokenformer.evaluation import evaluate_perplexity
from tokenformer.hardware import hardware, set_threads, versions
from tokenformer.models.loading import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder of a trained model")
parser.add_argument("data", help="folder written by tokenformer data prepare")
parser.add_argument("--factor", type=int, default=2, help="tokens after growing, as a multiple of those before")
parser.add_argument("--json", help="also write the figures here")
arguments = parser.parse_args()

threads = set_threads(None)
data = PreparedData.load(arguments.data)


def held_out_loss(model: torch.nn.Module) -> float:
    """Nats per token in float32."""
    return evaluate_perplexity(model, data.held_out, tokens_per_byte=data.tokens_per_byte("held_out"))["loss"]


before = held_out_loss(load_model(arguments.model))
rows = []
for keys in ("zero", "random"):
    for scale in ("keep", "sqrt"):
        torch.manual_seed(0)
        model = load_model(arguments.model)
        tokens = {kind: arguments.factor * model.config.num_tokens(kind) for kind in ("qkv", "output", "ffn")}
        after = held_out_loss(grow(model, **tokens, keys=keys, scale=scale))
        rows.append({"keys": keys, "scale": scale, "loss": after, "jump": after - before})
        print(f"keys {keys:<6}  scale {scale}  loss {after:.4f}  jump {after - before:+.4f}", flush=True)
if arguments.json:
    record = {
        "command": f"growth_start.py MODEL DATA --factor {arguments.factor}",
        "loss_before": before,
        "grown": rows,
        "threads": threads,
        **hardware(),
        **versions(),
    }
    with open(arguments.json, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=2)
        file.write("\n")
