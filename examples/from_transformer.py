"""How much sooner does a TokenFormer train that begins as a Transformer?

Trains a small Transformer, converts it, and trains what comes out beside TokenFormers of the same shape that begin at
random, each with the best of several learning rates. What is there already is not done again.

python examples/from_transformer.py books.jsonl.gz --out runs/from-transformer
"""

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments
from transformers import set_seed as set_all_seeds

from tokenformer import TokenFormerForCausalLM
from tokenformer.convert.transformer import from_transformer
from tokenformer.data import PreparedData, prepare
from tokenformer.evaluation import evaluate_perplexity
from tokenformer.hardware import hardware, set_threads, versions
from tokenformer.models.loading import copy_tokenizer, load_config, load_model
from tokenformer.training import Recipe, train
from tokenformer.training.callbacks import METRICS_FILE, read_metrics
from tokenformer.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, TrainingRecipe
from tokenformer.training.trainer import collate

CHANNELS, LAYERS, HEADS, CONTEXT, VOCABULARY, BATCH = 128, 4, 4, 128, 2048, 16
PART = 30_000  # characters of a document: parts of books, so that little held-out text comes from many books

# How a TokenFormer begins: learning rates to try.
RATES = {
    "random": [5e-4, 1e-3, 2e-3, 4e-3],
    "embeddings": [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3],
    "weights": [5e-4, 1e-3, 2e-3, 4e-3],
    "fitted": [1.25e-4, 2.5e-4, 5e-4, 1e-3],
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("corpus", help="JSON lines with a field text, compressed by gzip")
parser.add_argument("--out", default="runs/from-transformer")
parser.add_argument("--architecture", choices=["gpt_neox", "gpt2"], default="gpt_neox")
parser.add_argument("--teacher-tokens", type=int, default=3_000_000)
parser.add_argument("--teacher-rate", type=float, default=2e-3)
parser.add_argument("--sweep-tokens", type=int, default=150_000)
parser.add_argument("--tokens", type=int, default=600_000)
parser.add_argument("--no-training", action="store_true", help="only convert, and measure what comes out")
parser.add_argument(
    "--json", help="add the figures to those of the other architecture in this file, and draw them beside it"
)
arguments = parser.parse_args()

out = Path(arguments.out)
threads = set_threads(1)


def prepare_data() -> PreparedData:
    """Parts of books as documents, a few of them held out."""
    parts = out / "parts.jsonl"
    if not parts.exists():
        out.mkdir(parents=True, exist_ok=True)
        with gzip.open(arguments.corpus, "rt", encoding="utf-8") as books, parts.open("w", encoding="utf-8") as file:
            for book in books:
                text = json.loads(book)["text"]
                for start in range(0, len(text), PART):
                    file.write(json.dumps({"text": text[start : start + PART]}) + "\n")
    prepare(
        [str(parts)],
        tokenizer=f"train:{VOCABULARY}",
        out=str(out / "data"),
        sequence_length=CONTEXT,
        held_out=0.003,
    )
    return PreparedData.load(out / "data", verify=False)


def train_teacher(data: PreparedData) -> dict[str, Any]:
    """The Transformer, by transformers' Trainer with the schedule of our recipes."""
    folder = out / arguments.architecture
    record = folder / "teacher.json"
    if record.exists():
        return json.loads(record.read_text(encoding="utf-8"))
    set_all_seeds(0)
    end = data.tokenizer.eos_token_id
    if arguments.architecture == "gpt_neox":
        sizes = {"hidden_size": CHANNELS, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
        config = GPTNeoXConfig(**sizes, intermediate_size=4 * CHANNELS, vocab_size=VOCABULARY)
        config.update({"max_position_embeddings": CONTEXT, "bos_token_id": end, "eos_token_id": end})
        model: torch.nn.Module = GPTNeoXForCausalLM(config)
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=CHANNELS,
                n_layer=LAYERS,
                n_head=HEADS,
                n_positions=CONTEXT,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=end,
                eos_token_id=end,
            )
        )
    steps = math.ceil(arguments.teacher_tokens / (BATCH * CONTEXT))
    options = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=arguments.teacher_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=round(0.02 * steps),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=25,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    started = time.perf_counter()
    trainer = Trainer(model=model, args=options, train_dataset=data.train, data_collator=collate)
    trainer.train()
    seconds = time.perf_counter() - started
    model.save_pretrained(folder / "teacher")
    copy_tokenizer(data.path / "tokenizer", folder / "teacher")
    held_out = evaluate_perplexity(model, data.held_out, tokens_per_byte=data.tokens_per_byte("held_out"))
    summary = {
        "tokens": steps * BATCH * CONTEXT,
        "learning_rate": arguments.teacher_rate,
        "parameters": model.num_parameters(),
        "seconds": round(seconds, 1),
        "held_out": held_out,
        "training_loss": [
            {"tokens": line["step"] * BATCH * CONTEXT, "loss": line["loss"]}
            for line in trainer.state.log_history
            if "loss" in line
        ],
    }
    record.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def make_starts(data: PreparedData) -> dict[str, Any]:
    """The four beginnings, each a model folder; what `from_transformer` says of the fitted one."""
    folder, record = out / arguments.architecture, out / arguments.architecture / "fitted.json"
    teacher = str(folder / "teacher")
    if not (folder / "weights").exists():
        from_transformer(teacher, str(folder / "weights"), calibration_tokens=0)
    if not record.exists():
        record.write_text(json.dumps(from_transformer(teacher, str(folder / "fitted"))) + "\n", encoding="utf-8")
    for name in ("random", "embeddings"):
        if not (folder / name).exists():
            set_all_seeds(0)
            model = TokenFormerForCausalLM(load_config(folder / "weights"))
            if name == "embeddings":
                converted = load_model(folder / "weights")
                model.get_input_embeddings().load_state_dict(converted.get_input_embeddings().state_dict())
                model.get_output_embeddings().load_state_dict(converted.get_output_embeddings().state_dict())
                model.model.norm.load_state_dict(converted.model.norm.state_dict())
            model.save_pretrained(folder / name)
            copy_tokenizer(data.path / "tokenizer", folder / name)
    return json.loads(record.read_text(encoding="utf-8"))


def compare_counts(data: PreparedData) -> list[dict[str, Any]]:
    """Held-out loss before any training, by numbers of tokens, from the weights alone and fitted on training text."""
    folder = out / arguments.architecture
    text = out / "calibration.txt"
    if not text.exists():
        rows = data.train.shuffle(seed=0).select(range(300))["input_ids"]
        text.write_text(data.tokenizer.decode([i for row in rows for i in row]), encoding="utf-8")
    found = []
    for qkv, ffn in [(96, 384), (128, 512), (256, 512), (256, 638)]:
        losses = {}
        for name, options in (("weights", {"calibration_tokens": 0}), ("fitted", {"calibration": str(text)})):
            target = folder / f"{name}-{qkv}-{ffn}"
            if not target.exists():
                from_transformer(str(folder / "teacher"), str(target), qkv=qkv, output=qkv, ffn=ffn, **options)
            losses[name] = held_out_loss(target, data)
        found.append({"qkv": qkv, "output": qkv, "ffn": ffn, "loss": losses})
        print(found[-1], flush=True)
    return found


def held_out_loss(folder: Path, data: PreparedData) -> float:
    """Nats per token of a model in a folder."""
    model = load_model(folder)
    return evaluate_perplexity(model, data.held_out, tokens_per_byte=data.tokens_per_byte("held_out"))["loss"]


def train_start(start: str, rate: float, tokens: int, seed: int, evaluations: int) -> dict[str, Any]:
    """One run; returns its folder's held-out losses by tokens."""
    folder = out / arguments.architecture
    steps = math.ceil(tokens / (BATCH * CONTEXT))
    run = folder / f"runs-{tokens}-{seed}" / f"{start}-{rate:g}"
    recipe = Recipe(
        out=str(run),
        model=ModelRecipe(path=str(folder / start)),
        data=DataRecipe(path=str(out / "data")),
        optimizer=OptimizerRecipe(learning_rate=rate, warmup=0.05),
        training=TrainingRecipe(
            tokens=tokens,
            batch_size=BATCH,
            precision="fp32",
            compile="off",
            eval_every=max(1, steps // evaluations),
            save_every=0,
            log_every=10,
            keep_checkpoints=1,
            seed=seed,
            threads=1,
        ),
    )
    summary = train(recipe, progress=False)
    curve = {line["tokens"]: line["eval_loss"] for line in read_metrics(run / METRICS_FILE) if "eval_loss" in line}
    return {"learning_rate": rate, "seed": seed, "loss": summary["eval_loss"], "held_out": curve}


def tokens_to_reach(loss: float, curve: dict[int, float]) -> float | None:
    """Tokens at which a curve first comes down to `loss`, between measurements along a straight line."""
    points = sorted(curve.items())
    for (t0, l0), (t1, l1) in zip([points[0], *points], points, strict=False):
        if l1 <= loss:
            return t1 if l0 <= loss else t0 + (t1 - t0) * (l0 - loss) / (l0 - l1)
    return None


def compare(data: PreparedData) -> dict[str, Any]:
    """Sweep each start, train it on at its best rate, and put its held-out curve behind the loss it begins with."""
    results: dict[str, Any] = {}
    for start, rates in RATES.items():
        sweep = {
            f"{rate:g}": train_start(start, rate, arguments.sweep_tokens, seed=1, evaluations=1)["loss"]
            for rate in rates
        }
        best = float(min(sweep, key=sweep.__getitem__))
        run = train_start(start, best, arguments.tokens, seed=0, evaluations=10)
        begins = held_out_loss(out / arguments.architecture / start, data)
        results[start] = {**run, "sweep": sweep, "held_out": {0: begins, **run["held_out"]}}
        print(
            f"{start:<10} {best:g}  begins at {begins:.4f}  ends at {run['loss']:.4f}  sweep {sweep}",
            flush=True,
        )
    # What the Transformer itself was given, for a TokenFormer that begins at random.
    rate, budget = results["random"]["learning_rate"], arguments.teacher_tokens
    results["random, long"] = train_start("random", rate, budget, seed=0, evaluations=10)
    for result in results.values():
        result["tokens_to_reach_random"] = tokens_to_reach(results["random"]["loss"], result["held_out"])
    return results


def draw(reports: dict[str, Any], path: Path) -> None:
    """Held-out loss over tokens trained, one panel per architecture."""
    from matplotlib.figure import Figure

    colours = {"random": "#d62728", "embeddings": "#7f7f7f", "weights": "#ff9d3b", "fitted": "#1f77b4"}
    reports = {architecture: report for architecture, report in reports.items() if report["starts"]}
    if not reports:
        return
    figure = Figure(figsize=(5.5 * len(reports), 4.4), dpi=130, layout="constrained")
    # The long run has another scale and its own schedule: it is in the figures, not in the picture.
    for axes, (architecture, report) in zip(
        figure.subplots(1, len(reports), squeeze=False)[0], reports.items(), strict=True
    ):
        for start in RATES:
            result = report["starts"][start]
            tokens = [int(count) / 1e6 for count in result["held_out"]]
            axes.plot(tokens, list(result["held_out"].values()), color=colours[start], label=start, marker=".")
        teacher = report["teacher"]["held_out"]["loss"]
        axes.axhline(teacher, color="black", linestyle=":", linewidth=1, label=f"the Transformer ({teacher:.2f})")
        axes.set(
            title={"gpt_neox": "GPT-NeoX", "gpt2": "GPT-2"}[architecture],
            xlabel="million tokens trained after conversion",
            ylabel="held-out loss (nats per token)",
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    data = prepare_data()
    teacher = train_teacher(data)
    print(f"teacher: {teacher['parameters']:,} parameters, held-out loss {teacher['held_out']['loss']:.4f}", flush=True)
    fitted = make_starts(data)
    report = {
        "command": f"from_transformer.py CORPUS --architecture {arguments.architecture} "
        f"--teacher-tokens {arguments.teacher_tokens}" + " --no-training" * arguments.no_training,
        "teacher": teacher,
        "fitted": {name: value for name, value in fitted.items() if name != "out"},
        "counts": compare_counts(data),
        "starts": {} if arguments.no_training else compare(data),
        "data": data.manifest["splits"],
        "threads": threads,
        **hardware(),
        **versions(),
    }
    if arguments.json:
        file = Path(arguments.json)
        reports = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        reports[arguments.architecture] = report
        file.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
        draw(json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".png"))
