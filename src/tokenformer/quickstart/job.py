"""Train a small TokenFormer, grow it and train on; train one of the grown size from scratch for the same FLOPs."""

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenformer.data import PreparedData, prepare
from tokenformer.errors import UserError
from tokenformer.folders import write_atomically
from tokenformer.generation import generate_text
from tokenformer.growth import grow_folder
from tokenformer.models.loading import load_model, load_tokenizer
from tokenformer.quickstart.corpus import write_corpus
from tokenformer.training import Recipe, train
from tokenformer.training.callbacks import METRICS_FILE, read_metrics
from tokenformer.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, TrainingRecipe

STAGES = ("base", "grown", "scratch")
PROMPT = "def read(self, size=-1):\n"


@dataclass(frozen=True)
class Plan:
    """Sizes and budgets of the quickstart, chosen for six minutes on two CPU cores.

    Attributes:
        vocabulary: entries of the tokenizer.
        sequence_length: tokens in a row.
        hidden_size: channels.
        layers: blocks.
        heads: attention heads.
        base: tokens of qkv, output and ffn layers before growing.
        grown: the same after growing.
        base_tokens: training tokens of the first stage.
        grown_tokens: training tokens after growing.
        batch_size: rows per step.
        held_out: fraction of the documents kept for evaluation.
    """

    vocabulary: int = 2048
    sequence_length: int = 256
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    base: tuple[int, int, int] = (128, 128, 512)
    grown: tuple[int, int, int] = (384, 384, 1536)
    base_tokens: int = 1_000_000
    grown_tokens: int = 400_000
    batch_size: int = 8
    held_out: float = 0.03


def quickstart(
    *, out: str = "runs/quickstart", seed: int = 0, tokens: int = Plan.base_tokens, threads: int | None = None
) -> dict[str, Any]:
    """Train, grow and compare three small models on the standard library's source text, and write a report.

    Args:
        out: folder for everything; the same command goes on where it was stopped.
        seed: of the held-out split, the initial values and the order of the data.
        tokens: training tokens of the first stage; the other stages change in proportion.
        threads: CPU threads; all cores if not given.

    Returns:
        The content of report.json.

    Raises:
        UserError: a folder that holds another run, and whatever the stages raise.
    """
    if tokens < 1:
        raise UserError(f"tokens must be at least 1, got {tokens}")
    plan = replace(Plan(), base_tokens=tokens, grown_tokens=tokens * Plan.grown_tokens // Plan.base_tokens)
    folder = Path(out)
    started = time.perf_counter()
    found = chosen_learning_rates()
    say = _Stages(7)

    say("corpus and tokenizer")
    data = _prepare(folder, plan, seed)
    say(f"training the small model ({plan.base_tokens:,} tokens)")
    base = train(_recipe(folder, "base", plan, seed, threads, found["base"]), title="base   ")
    say("growing it")
    _grow(folder, plan, seed)
    unchanged = _held_out_loss(folder / "grown-start", data)
    say(f"training it on ({plan.grown_tokens:,} tokens)")
    grown = train(_recipe(folder, "grown", plan, seed, threads, found["grown"]), title="grown  ")
    say("training a model of the grown size from scratch, for the same FLOPs")
    budget = base["flops"] + grown["flops"]
    scratch = train(_recipe(folder, "scratch", plan, seed, threads, found["scratch"], flops=budget), title="scratch")
    say("samples")
    samples = {stage: _sample(folder / stage, seed) for stage in STAGES}
    say("report")
    report = {
        "plan": asdict(plan),
        "seed": seed,
        "corpus": {
            "what": f"source text of Python {platform.python_version()}'s standard library, without tests",
            "splits": data.manifest["splits"],
        },
        "machine": _machine(),
        "learning_rates": found,
        "sweep": sweep_results(),
        "models": {"base": base, "grown": grown, "scratch": scratch},
        "grown_before_training": {"eval_loss": unchanged, "difference_from_base": unchanged - base["eval_loss"]},
        "cumulative_flops": {"base": base["flops"], "grown": budget, "scratch": scratch["flops"]},
        "curves": {stage: read_metrics(folder / stage / METRICS_FILE) for stage in STAGES},
        "samples": {"prompt": PROMPT, **samples},
    }
    report["seconds"] = round(time.perf_counter() - started, 1)
    from tokenformer.reports.quickstart import write_report

    write_report(report, folder)
    return report


def sweep(
    *,
    out: str,
    learning_rates: dict[str, list[float]],
    seed: int = 1,
    tokens: int = Plan.base_tokens,
    threads: int | None = None,
) -> dict[str, dict[str, float]]:
    """Held-out loss of the quickstart's three models at each learning rate; the best base is what is grown.

    The seed differs from the quickstart's, so that rates are not chosen on the documents that it reports.

    Args:
        out: folder for the runs and sweep.json.
        learning_rates: to try, for each of `base`, `grown` and `scratch`.
        seed: of the split, the initial values and the order of the data.
        tokens: as in `quickstart`.
        threads: CPU threads; all cores if not given.

    Returns:
        `{model: {learning rate: held-out loss in nats per token}}`.
    """
    plan = replace(Plan(), base_tokens=tokens, grown_tokens=tokens * Plan.grown_tokens // Plan.base_tokens)
    folder = Path(out)
    _prepare(folder, plan, seed)
    losses: dict[str, dict[str, float]] = {}
    flops: dict[str, int] = {}
    for stage in STAGES:
        losses[stage] = {}
        for rate in learning_rates[stage]:
            budget = flops["base"] + flops["grown"] if stage == "scratch" else 0
            recipe = _recipe(folder, stage, plan, seed, threads, rate, flops=budget)
            summary = train(replace(recipe, out=str(folder / f"{stage}-{rate:g}")), title=f"{stage} {rate:g}")
            losses[stage][f"{rate:g}"] = summary["eval_loss"]
            flops[stage] = summary["flops"]
        if stage == "base":
            best = min(losses["base"], key=losses["base"].__getitem__)
            (folder / "base").symlink_to(f"base-{best}") if not (folder / "base").exists() else None
            _grow(folder, plan, seed)
    write_atomically(
        folder / "sweep.json",
        json.dumps({"plan": asdict(plan), "seed": seed, "machine": _machine(), "held_out_loss": losses}, indent=2)
        + "\n",
    )
    return losses


def sweep_results() -> dict[str, Any]:
    """The sweep that the learning rates were chosen by, as `sweep` wrote it."""
    results: dict[str, Any] = json.loads(files("tokenformer.quickstart").joinpath("sweep.json").read_text("utf-8"))
    return results


def chosen_learning_rates() -> dict[str, float]:
    """The learning rate of least held-out loss for each of the three models."""
    losses = sweep_results()["held_out_loss"]
    return {stage: float(min(losses[stage], key=losses[stage].__getitem__)) for stage in STAGES}


class _Stages:
    """Numbers what is being done, on stderr."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total

    def __call__(self, what: str) -> None:
        self.done += 1
        sys.stderr.write(f"[{self.done}/{self.total}] {what}\n")


def _prepare(folder: Path, plan: Plan, seed: int) -> PreparedData:
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_corpus(corpus)
    prepare(
        [str(corpus)],
        tokenizer=f"train:{plan.vocabulary}",
        out=str(folder / "data"),
        sequence_length=plan.sequence_length,
        held_out=plan.held_out,
        seed=seed,
    )
    return PreparedData.load(folder / "data")


def _recipe(
    folder: Path, stage: str, plan: Plan, seed: int, threads: int | None, learning_rate: float, flops: int = 0
) -> Recipe:
    qkv, output, ffn = plan.base if stage == "base" else plan.grown
    sizes = ModelRecipe(
        hidden_size=plan.hidden_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        qkv=qkv,
        output=output,
        ffn=ffn,
    )
    tokens = {"base": plan.base_tokens, "grown": plan.grown_tokens}.get(stage)
    return Recipe(
        out=str(folder / stage),
        model=ModelRecipe(path=str(folder / "grown-start")) if stage == "grown" else sizes,
        data=DataRecipe(path=str(folder / "data")),
        optimizer=OptimizerRecipe(learning_rate=learning_rate, warmup=0.05),
        training=TrainingRecipe(
            tokens=tokens or _tokens_for(sizes, plan, flops),
            batch_size=plan.batch_size,
            seed=seed,
            threads=threads,
            log_every=5,
            save_every=100,
            keep_checkpoints=1,
        ),
    )


def _tokens_for(sizes: ModelRecipe, plan: Plan, flops: int) -> int:
    """The whole number of batches that comes closest to `flops` of training."""
    from tokenformer.models import TokenFormerConfig
    from tokenformer.models.loading import empty_model

    model = empty_model(
        TokenFormerConfig(
            vocab_size=plan.vocabulary,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_hidden_layers,
            num_attention_heads=sizes.num_attention_heads,
            segments=[{"name": "base", "qkv": sizes.qkv, "output": sizes.output, "ffn": sizes.ffn}],
        )
    )
    batch = plan.batch_size * plan.sequence_length
    return max(1, round(flops / (model.training_flops_per_token(plan.sequence_length) * batch))) * batch


def _grow(folder: Path, plan: Plan, seed: int) -> None:
    target = folder / "grown-start"
    if not target.exists():
        qkv, output, ffn = plan.grown
        grow_folder(str(folder / "base"), str(target), qkv=qkv, output=output, ffn=ffn, seed=seed)


def _held_out_loss(model: Path, data: PreparedData) -> float:
    import torch

    from tokenformer.evaluation import evaluate_perplexity
    from tokenformer.hardware import autocast_dtype, pick_device, pick_precision

    device = pick_device()
    dtype = autocast_dtype(pick_precision("auto", device))
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        loaded = load_model(model, device=device)
        result = evaluate_perplexity(loaded, data.held_out, tokens_per_byte=data.tokens_per_byte("held_out"))
    return result["loss"]


def _sample(model: Path, seed: int) -> str:
    return "".join(
        generate_text(load_model(model), load_tokenizer(model), PROMPT, max_new_tokens=96, temperature=0.7, seed=seed)
    )


def _machine() -> dict[str, Any]:
    from tokenformer.hardware import hardware, versions

    return {**hardware(), **versions()}
