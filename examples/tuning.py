"""An adapter of parameter tokens: added, trained by a loop of one's own, saved, loaded, weighted, and taken away again.

python examples/tuning.py runs/small data/law --out runs/law
"""

import argparse

import torch

from tokenformer import tuning
from tokenformer.data import PreparedData
from tokenformer.evaluation import evaluate_perplexity
from tokenformer.evaluation.perplexity import evenly_spaced
from tokenformer.hardware import set_threads
from tokenformer.models.loading import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder of a trained model")
parser.add_argument("data", help="folder of tokenformer data prepare, made with the model's tokenizer")
parser.add_argument("--out", required=True, help="new folder for the adapter")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--rows", type=int, default=64, help="held-out rows that are measured")
arguments = parser.parse_args()

set_threads(None)
data = PreparedData.load(arguments.data)
held_out = evenly_spaced(data.held_out, arguments.rows)


def perplexity(model: torch.nn.Module) -> float:
    """On held-out rows."""
    return evaluate_perplexity(model, held_out, tokens_per_byte=1.0)["perplexity"]


model = load_model(arguments.model)
print(f"base                      {perplexity(model):8.2f}", flush=True)

torch.manual_seed(0)
tuning.add_adapter(model, "law", qkv=8, output=8, ffn=32)
print(f"with new tokens           {perplexity(model):8.2f}", flush=True)

trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
order = torch.randperm(len(data.train))
model.train()
for step in range(arguments.steps):
    ids = torch.tensor(data.train[[int(order[i % len(order)]) for i in range(8 * step, 8 * step + 8)]]["input_ids"])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
print(f"trained, {sum(p.numel() for p in trained):9,} numbers {perplexity(model):8.2f}", flush=True)
tuning.save_adapter(model, "law", arguments.out)

model = load_model(arguments.model)
tuning.load_adapter(model, arguments.out)
for weight in (1.0, 0.5):
    tuning.set_adapter(model, {"law": weight})
    print(f"loaded, with weight {weight}   {perplexity(model):8.2f}", flush=True)
with tuning.disable_adapters(model):
    print(f"disabled                  {perplexity(model):8.2f}")
