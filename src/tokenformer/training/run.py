"""One training run, from recipe to model: opened or resumed, trained, evaluated, saved and summed up."""

import dataclasses
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.utils.logging import disable_progress_bar

from tokenformer.data import TrainingData, open_data, tokenizer_hash
from tokenformer.errors import UserError
from tokenformer.evaluation import evaluate_perplexity
from tokenformer.folders import CHECKPOINTS, PARTIAL, saving, step_of, whole_checkpoints, write_atomically
from tokenformer.hardware import autocast_dtype, peak_flops, pick_device, pick_precision, set_threads
from tokenformer.models import TokenFormerConfig, TokenFormerForCausalLM
from tokenformer.models.loading import load_model
from tokenformer.training.callbacks import METRICS_FILE, Metrics, ProgressBar, StopOnSignal, read_metrics
from tokenformer.training.recipe import RECIPE_FILE, Recipe
from tokenformer.training.trainer import LanguageTrainer, carried_state, collate

SUMMARY_FILE = "summary.json"
DATA_FILE = "data.json"


def train(recipe: Recipe, *, progress: bool = True, title: str = "train") -> dict[str, Any]:
    """Train a language model as `recipe` says, resuming a run that was stopped.

    Writes to `recipe.out`: recipe.yaml, metrics.jsonl, tensorboard/, checkpoints/, and at the end the model (loadable
    with from_pretrained), its tokenizer and summary.json, whose presence means that the run is complete.

    Args:
        recipe: what to do.
        progress: show a progress bar on stderr.
        title: before the bar.

    Returns:
        The summary: tokens, flops, seconds, tokens_per_second, mfu (None where the peak is unknown), and the held-out
        figures `eval_loss` (nats per token), `eval_perplexity`, `eval_bits_per_byte`.

    Raises:
        UserError: anything in the recipe, the data or the folder that cannot work, before anything is written; a
            non-finite loss; a full disk.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, after saving.
    """
    recipe.validate()
    run = Path(recipe.out)
    finished = _check_folder(run, recipe)
    if finished is not None:
        return finished
    threads = set_threads(recipe.training.threads)
    device = pick_device()
    precision = pick_precision(recipe.training.precision, device)
    data = open_data(**dataclasses.asdict(recipe.data))
    steps = _steps(recipe, data)
    set_seed(recipe.training.seed)
    model = _build_model(recipe, data)
    tokens_per_byte = data.tokens_per_byte("held_out", progress=progress)
    carried = carried_state(Path(str(recipe.model.path))) if recipe.optimizer.state == "carried" else None

    disable_progress_bar()  # transformers' bars for writing a file would tear ours
    with saving(run):
        run.mkdir(parents=True, exist_ok=True)
        if not (run / RECIPE_FILE).exists():
            write_atomically(run / RECIPE_FILE, recipe.to_yaml())
        _check_data(run, data)
    shutil.rmtree(run / CHECKPOINTS / PARTIAL, ignore_errors=True)
    checkpoints = whole_checkpoints(run)
    resumed = checkpoints[-1] if checkpoints else None

    flops_per_token = model.training_flops_per_token(data.sequence_length)
    tokens_per_step = recipe.training.batch_size * data.sequence_length
    metrics = Metrics(run, tokens_per_step, flops_per_token)
    stop = StopOnSignal()
    batch = recipe.training.micro_batch_size or recipe.training.batch_size

    def evaluate(candidate: torch.nn.Module) -> dict[str, float]:
        with metrics.paused():
            return evaluate_perplexity(candidate, data.held_out, tokens_per_byte=tokens_per_byte, batch_size=batch)

    trainer = LanguageTrainer(
        run=run,
        keep_checkpoints=recipe.training.keep_checkpoints,
        autocast=None if precision == "fp16" else autocast_dtype(precision),  # fp16 scales its loss in accelerate
        evaluate_with=evaluate,
        carried=carried,
        model=model,
        args=_arguments(recipe, run, steps, precision, device),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        callbacks=[
            metrics,
            stop,
            TensorBoardCallback(SummaryWriter(str(run / "tensorboard"), purge_step=step_of(resumed) if resumed else 0)),
            *([ProgressBar(title, tokens_per_step)] if progress else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    compile_seconds = 0.0
    with stop:
        if resumed is None or step_of(resumed) < steps:
            compile_seconds = _compile(trainer, recipe, flops_per_token, data)
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        else:
            # Killed between the last checkpoint and the summary.
            trainer._load_from_checkpoint(str(resumed))
            trainer.state.global_step = steps
        if trainer.state.global_step < steps:
            raise KeyboardInterrupt(
                f"stopped at step {trainer.state.global_step} of {steps} and saved; the same command resumes"
            )

    last = read_metrics(run / METRICS_FILE)[-1]
    seconds = last["seconds"]
    tokens = steps * tokens_per_step
    speed = tokens / seconds
    peak = peak_flops(device)
    summary = {
        "steps": steps,
        "tokens": tokens,
        "flops": tokens * flops_per_token,
        "seconds": seconds,
        "compile_seconds": round(compile_seconds, 3),
        "tokens_per_second": speed,
        "mfu": speed * flops_per_token / peak if peak else None,
        **{name: last[name] for name in ("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_tokens")},
        "parameters": model.num_parameters(),
        "token_parameters": model.num_token_parameters(),
        "learning_rate": recipe.optimizer.learning_rate,
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": threads,
        "seed": recipe.training.seed,
    }
    model.config.use_cache = True
    with saving(run):
        model.save_pretrained(run)
        data.save_tokenizer(run)
        write_atomically(run / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def _check_folder(run: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The summary if this very run is complete; raises if the folder holds something else."""
    if not run.exists():
        return None
    if not run.is_dir():
        raise UserError(f"out: {run} is a file: give a folder")
    # A run killed before its recipe had its name has nothing to lose.
    if all(path.name == RECIPE_FILE + PARTIAL for path in run.iterdir()):
        return None
    if not (run / RECIPE_FILE).is_file():
        raise UserError(f"out: {run} is not empty and holds no run: give another folder")
    difference = recipe.difference(run)
    if difference:
        raise UserError(
            f"out: {run} holds another run ({difference}): give another folder, or the old recipe to resume"
        )
    if (run / SUMMARY_FILE).is_file():
        sys.stderr.write(f"{run} is complete already\n")
        summary: dict[str, Any] = json.loads((run / SUMMARY_FILE).read_text(encoding="utf-8"))
        return summary
    return None


def _check_data(run: Path, data: TrainingData) -> None:
    """Remember what the run is trained on, or see that it is still the same: the path alone does not tell."""
    file = run / DATA_FILE
    if not file.exists():
        write_atomically(file, json.dumps(data.fingerprints, indent=2) + "\n")
    elif json.loads(file.read_text(encoding="utf-8")) != data.fingerprints:
        raise UserError(
            f"{data.path} was changed or prepared anew since {run} began: bring the old data back, or give another out"
        )


def _steps(recipe: Recipe, data: TrainingData) -> int:
    batch = recipe.training.batch_size
    if len(data.train) < batch:
        raise UserError(
            f"{data.path} has {len(data.train)} training rows, fewer than training.batch_size {batch}: "
            "use a smaller batch, shorter sequences or more text"
        )
    return math.ceil(recipe.training.tokens / (batch * data.sequence_length))


def _build_model(recipe: Recipe, data: TrainingData) -> TokenFormerForCausalLM:
    """A new model of the recipe's sizes, or the one in model.path, checked against the data."""
    given = recipe.model
    if given.path:
        model = load_model(given.path)
        tokenizer = Path(given.path) / "tokenizer.json"
        if tokenizer.is_file() and tokenizer_hash(tokenizer) != data.tokenizer_hash:
            raise UserError(
                f"the tokenizer of {given.path} is not that of {data.path}: prepare the data with --tokenizer "
                f"{given.path}, or give it as data.tokenizer if it made these files"
            )
    else:
        # A multiple of 64 keeps the largest matrix product aligned; the ids above the tokenizer's are never seen.
        vocab_size = -(-data.vocab_size // 64) * 64
        end = data.tokenizer.eos_token_id
        common: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": end, "eos_token_id": end}
        if given.preset:
            config = TokenFormerConfig.preset(given.preset, **common)
        else:
            config = TokenFormerConfig(
                hidden_size=given.hidden_size,
                num_hidden_layers=given.num_hidden_layers,
                num_attention_heads=given.num_attention_heads,
                segments=[{"name": "base", "qkv": given.qkv, "output": given.output, "ffn": given.ffn}],
                rotary_pct=given.rotary_pct,
                normalization=given.normalization,
                activation=given.activation,
                max_position_embeddings=data.sequence_length,
                **common,
            )
        model = TokenFormerForCausalLM(config)
    if recipe.training.gradient_checkpointing:
        # transformers 5.21 renamed the method.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if data.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{data.path} has a vocabulary of {data.vocab_size}, the model one of {model.config.vocab_size}: "
            "prepare the data with the model's tokenizer"
        )
    if data.sequence_length > model.config.max_position_embeddings:
        raise UserError(
            f"{data.path} is packed to {data.sequence_length} tokens, the model takes "
            f"{model.config.max_position_embeddings}: prepare the data with a shorter --sequence-length, "
            "or lower data.sequence_length of tokenised files"
        )
    return model


def _arguments(recipe: Recipe, run: Path, steps: int, precision: str, device: torch.device) -> TrainingArguments:
    training, optimizer = recipe.training, recipe.optimizer
    micro = training.micro_batch_size or training.batch_size
    cosine = optimizer.schedule == "cosine"
    return TrainingArguments(
        output_dir=str(run / CHECKPOINTS),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=training.batch_size // micro,
        max_steps=steps,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="cosine_with_min_lr" if cosine else "constant_with_warmup",
        lr_scheduler_kwargs={"min_lr_rate": optimizer.min_ratio} if cosine else None,
        warmup_steps=round(optimizer.warmup * steps),
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.max_grad_norm,
        fp16=precision == "fp16",
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=training.eval_every or steps,
        save_strategy="steps",
        save_steps=training.save_every or steps,
        seed=training.seed,
        data_seed=training.seed,
        dataloader_drop_last=True,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        report_to="none",
    )


def _compile(trainer: LanguageTrainer, recipe: Recipe, flops_per_token: int, data: TrainingData) -> float:
    """Compile the model and try one step; go on without where that fails. Returns the seconds it took."""
    choice = recipe.training.compile
    if choice == "off" or (choice == "auto" and not _compile_pays(recipe, flops_per_token, trainer.args.device)):
        return 0.0
    model = cast(torch.nn.Module, trainer.model)
    started = time.perf_counter()
    micro = recipe.training.micro_batch_size or recipe.training.batch_size
    batch = {k: v.to(trainer.args.device) for k, v in collate([data.train[i] for i in range(micro)]).items()}
    try:
        model.compile(dynamic=False)
        model.train()
        with trainer.compute_loss_context_manager():
            model(**batch, use_cache=False).loss.backward()
    except Exception as error:  # whatever the compiler stumbles over, the uncompiled model trains
        if choice == "on":
            raise UserError(f"torch.compile failed ({_first_line(error)}): set training.compile to off") from error
        sys.stderr.write(f"torch.compile failed, going on without it: {_first_line(error)}\n")
        model._compiled_call_impl = None
    model.zero_grad()
    return time.perf_counter() - started


def _compile_pays(recipe: Recipe, flops_per_token: int, device: torch.device) -> bool:
    """Whether the run is long enough to earn back half a minute of compiling; docs/training.md has the figures."""
    flops = recipe.training.tokens * flops_per_token
    return flops > (5e13 if device.type == "cpu" else 1e16)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
