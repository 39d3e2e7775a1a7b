"""One training run, from recipe to model: opened or resumed, trained, evaluated, saved and summed up."""

import dataclasses
import gc
import json
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.utils.logging import disable_progress_bar

from tokenformer.elastic.sizes import prefix
from tokenformer.errors import UserError
from tokenformer.folders import CHECKPOINTS, PARTIAL, saving, step_of, sync, whole_checkpoints, write_atomically
from tokenformer.hardware import (
    autocast_dtype,
    peak_flops,
    physical_cores,
    pick_device,
    pick_precision,
    set_threads,
)
from tokenformer.parallel.mesh import (
    Ranks,
    check_launch,
    is_main_process,
    launched_processes,
    local_processes,
    lost_process,
    use_one_gpu,
)
from tokenformer.parallel.opening import lay_out
from tokenformer.parallel.sharding import blocks_of, check_model
from tokenformer.training.callbacks import (
    METRICS_FILE,
    AnnealScale,
    Metrics,
    MoreCheckpoints,
    ProgressBar,
    SameOnAllRanks,
    StopOnSignal,
    read_metrics,
    signals_to,
)
from tokenformer.training.checkpoints import newest_whole
from tokenformer.training.collapse import SKIPS_FILE, Collapse, LossRise, read_skips, skip_batches
from tokenformer.training.image_recipe import ImageRecipe
from tokenformer.training.nested import Nesting
from tokenformer.training.recipe import RECIPE_FILE, Recipe
from tokenformer.training.task import Task
from tokenformer.training.trainer import RunTrainer, carried_state, old_parameters

SUMMARY_FILE = "summary.json"
DATA_FILE = "data.json"
_AT = "_at_"
_SAME_AT_ALL_SIZES = ("tokens", "images")


def train(recipe: Recipe | ImageRecipe, *, progress: bool = True, title: str = "train") -> dict[str, Any]:
    """Train a language model or an image classifier as `recipe` says, resuming a run that was stopped.

    Writes to `recipe.out`: recipe.yaml, metrics.jsonl, tensorboard/, checkpoints/, skips.json where it skipped batches
    after a collapse, and at the end the model (loadable with from_pretrained), its tokenizer or image processor, and
    summary.json, whose presence means that the run is complete.

    Args:
        recipe: what to do.
        progress: show a progress bar on stderr.
        title: before the bar.

    Returns:
        The summary: tokens, flops, seconds, tokens_per_second, mfu (None where the peak is unknown); the held-out
        figures, `eval_loss` (nats per token, or per image) and `eval_perplexity`, `eval_bits_per_byte` or `eval_top1`,
        `eval_top5`; `skips`, what was left out after each collapse.

    Raises:
        UserError: anything in the recipe, the data or the folder that cannot work, before anything is written; a
            collapse that is to stop the run, or that skipping does not cure; a full disk.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, after saving.
    """
    recipe.validate()
    if launched_processes() > 1 and not hasattr(recipe, "parallel"):
        raise UserError("image classifiers train in one process: start it without torchrun")
    check_launch(recipe.layout)
    while True:
        try:
            return _train(recipe, progress and is_main_process(), title)
        except RuntimeError as error:
            if not lost_process(error):
                raise
            lost = UserError(
                f"another process of this run ended or no longer answers ({_first_line(error)}): start the same "
                "command again, which goes on from the last checkpoint, or let torchrun do so with --max-restarts 1"
            )
            lost.everywhere = True
            raise lost from error
        except Collapse as collapse:
            if recipe.training.on_collapse == "stop":
                raise
            gc.collect()  # the model that collapsed
            if not is_main_process():
                continue
            run = Path(recipe.out)
            skip = skip_batches(run, collapse, max(map(step_of, whole_checkpoints(run)), default=0))
        first, last = skip.skipped_batches
        sys.stderr.write(
            f"{skip.what} at step {skip.step}: going back to step {skip.checkpoint} and on without batches "
            f"{first} to {last} ({SKIPS_FILE})\n"
        )


def _train(recipe: Recipe | ImageRecipe, progress: bool, title: str) -> dict[str, Any]:
    """`train` from the last whole checkpoint on, up to the end or a collapse."""
    run = Path(recipe.out)
    finished = _check_folder(run, recipe)
    if finished is not None:
        return finished
    own_cores = max(1, physical_cores() // local_processes())
    threads = set_threads(own_cores if recipe.training.threads is None else recipe.training.threads)
    use_one_gpu()
    device = pick_device()
    precision = pick_precision(recipe.training.precision, device)
    task = open_task(recipe, progress=progress)
    check_model(task.model, recipe.layout)
    ranks = task.ranks = Ranks(recipe.layout, device) if recipe.layout.processes > 1 else None
    if ranks is not None:
        lay_out(task.model, task.fill, ranks)
    model, steps, optimizer = task.model, task.steps, recipe.optimizer
    carried = carried_state(Path(str(recipe.model.path))) if optimizer.state == "carried" else None
    old = old_parameters(model) if optimizer.old_tokens != 1 else set()
    anneal = [AnnealScale(model, optimizer.anneal_scale * steps)] if optimizer.anneal_scale > 0 else []

    disable_progress_bar()  # transformers' bars for writing a file would tear ours
    main, resumed = ranks is None or ranks.main, None
    if main:
        with saving(run):
            run.mkdir(parents=True, exist_ok=True)
            if not (run / RECIPE_FILE).exists():
                write_atomically(run / RECIPE_FILE, recipe.to_yaml())
            _check_data(run, task)
        shutil.rmtree(run / CHECKPOINTS / PARTIAL, ignore_errors=True)
        resumed = newest_whole(run)
    if ranks is not None:
        resumed = ranks.from_main(resumed)
    skips = read_skips(run)
    metrics = Metrics(run, task.done)
    stop = StopOnSignal()

    def evaluate(candidate: torch.nn.Module) -> dict[str, float]:
        with metrics.paused():
            return evaluate_sizes(task, candidate, device)

    # The model is laid out already: to accelerate, each process is the only one.
    with nullcontext() if ranks is None else ranks.unseen():
        trainer = task.trainer(
            evaluate,
            run=run,
            keep_checkpoints=recipe.training.keep_checkpoints,
            milestone_every=recipe.training.milestone_every,
            autocast=None if precision == "fp16" else autocast_dtype(precision),  # fp16 scales its loss in accelerate
            carried=carried,
            old=old,
            old_rate=optimizer.old_tokens,
            schedule=(optimizer.schedule_from, optimizer.schedule_to),
            loss_rise=LossRise(recipe.training.collapse_rise) if recipe.training.collapse_rise > 0 else None,
            skips=skips,
            nesting=task.nesting,
            ranks=ranks,
            model=model,
            args=_arguments(recipe, task, precision, device),
            train_dataset=task.train_rows,
            eval_dataset=task.held_out_rows,
            callbacks=[
                MoreCheckpoints(recipe.training.save_minutes, recipe.training.milestone_every),
                stop,
                *([] if ranks is None else [SameOnAllRanks(ranks)]),
                *([metrics] if main else []),
                *([_tensorboard(run, resumed)] if main else []),
                *([ProgressBar(title, task.unit, task.per_step[task.unit])] if progress else []),
                *anneal,
            ],
        )
    trainer.remove_callback(PrinterCallback)
    compile_seconds = 0.0
    with signals_to(stop.ask):
        if resumed is None or step_of(resumed) < steps:
            compile_seconds = _compile(trainer, recipe, task)
            try:
                trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            except Collapse as collapse:
                collapse.seconds = metrics.seconds
                # As at the end of a run: bar and TensorBoard close what they hold.
                trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
                raise
        else:
            # Killed between the last checkpoint and the summary.
            trainer._load_from_checkpoint(str(resumed))
            trainer.state.global_step = steps
        if trainer.state.global_step < steps:
            raise KeyboardInterrupt(
                f"stopped at step {trainer.state.global_step} of {steps} and saved; the same command resumes"
            )

    with saving(run):
        task.save(run, trainer)
        if main:
            for path in (*filter(Path.is_file, run.iterdir()), run):  # the summary says that they are there
                sync(path)
    if not main:
        return cast(dict[str, Any], cast(Ranks, ranks).from_main(None))
    last = read_metrics(run / METRICS_FILE)[-1]
    seconds = last["seconds"]
    done = task.done(steps)
    peak = peak_flops(device)
    summary = {
        "steps": steps,
        **done,
        "seconds": seconds,
        "compile_seconds": round(compile_seconds, 3),
        **{f"{name}_per_second": count / seconds for name, count in done.items() if name != "flops"},
        "mfu": done["flops"] / seconds / peak if peak else None,
        **task.summary(last),
        **_smaller_sizes(task, last),
        "learning_rate": task.learning_rate,
        "skips": [dataclasses.asdict(skip) for skip in skips],
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": threads,
        "seed": recipe.training.seed,
    }
    with saving(run):
        write_atomically(run / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary if ranks is None else cast(dict[str, Any], ranks.from_main(summary))


def open_task(recipe: Recipe | ImageRecipe, *, progress: bool = False) -> Task:
    """Data and model of a recipe; nothing is written.

    Raises:
        UserError: they are missing, damaged, or do not fit together.
    """
    task: Task = recipe.open(progress=progress)
    training = recipe.training
    if training.nested:
        task.nesting = Nesting(task.model, training.nested, training.nested_draw, training.seed, recipe.passes)
    return task


def evaluate_sizes(task: Task, model: torch.nn.Module, device: torch.device) -> dict[str, float]:
    """Figures on the held-out rows, and those of every smaller size of a nested run as `loss_at_0.25` and the like."""
    figures = task.evaluate(model, device=device)
    if task.nesting is not None:
        for share in task.nesting.shares[:-1]:
            with task.nesting.at(model, task.nesting.sizes(share)):
                smaller = task.evaluate(model, device=device)
            figures |= {f"{name}{_AT}{share:g}": smaller[name] for name in smaller if name not in _SAME_AT_ALL_SIZES}
    return figures


def _smaller_sizes(task: Task, last: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary says of the smaller sizes of a nested run, from the last line of its metrics."""
    if task.nesting is None:
        return {}
    sizes = {f"{share:g}": task.nesting.sizes(share) for share in task.nesting.shares}
    return {**{name: value for name, value in last.items() if _AT in name}, "nested": sizes}


def _tensorboard(run: Path, resumed: Path | None) -> TensorBoardCallback:
    """Events of this run, without those after the checkpoint that it goes on from."""
    return TensorBoardCallback(SummaryWriter(str(run / "tensorboard"), purge_step=step_of(resumed) if resumed else 0))


def _check_folder(run: Path, recipe: Recipe | ImageRecipe) -> dict[str, Any] | None:
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


def _check_data(run: Path, task: Task) -> None:
    """Remember what the run is trained on, or see that it is still the same: the path alone does not tell."""
    file = run / DATA_FILE
    if not file.exists():
        write_atomically(file, json.dumps(task.fingerprints, indent=2) + "\n")
    elif json.loads(file.read_text(encoding="utf-8")) != task.fingerprints:
        raise UserError(
            f"{task.source} was changed or prepared anew since {run} began: bring the old data back, or give another "
            "out"
        )


def _arguments(recipe: Recipe | ImageRecipe, task: Task, precision: str, device: torch.device) -> TrainingArguments:
    training, optimizer = recipe.training, recipe.optimizer
    cosine = optimizer.schedule == "cosine"
    return TrainingArguments(
        output_dir=str(Path(recipe.out) / CHECKPOINTS),
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.passes,
        max_steps=task.steps,
        learning_rate=task.learning_rate,
        lr_scheduler_type="cosine_with_min_lr" if cosine else "constant_with_warmup",
        lr_scheduler_kwargs={"min_lr_rate": optimizer.min_ratio} if cosine else None,
        warmup_steps=round(task.warmup * task.steps / (optimizer.schedule_to - optimizer.schedule_from)),
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.max_grad_norm,
        fp16=precision == "fp16",
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=training.eval_every or task.steps,
        save_strategy="steps",
        save_steps=training.save_every or task.steps,
        seed=training.seed,
        data_seed=training.seed,
        dataloader_drop_last=True,
        dataloader_num_workers=recipe.data.workers if isinstance(recipe, ImageRecipe) else 0,
        dataloader_persistent_workers=isinstance(recipe, ImageRecipe) and recipe.data.workers > 0,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        report_to="none",
    )


def _compile(trainer: RunTrainer, recipe: Recipe | ImageRecipe, task: Task) -> float:
    """Compile the model and try one step; go on without where that fails. Returns the seconds it took."""
    choice, device, ranks = recipe.training.compile, trainer.args.device, trainer.ranks
    if choice == "off":
        return 0.0
    # Over several processes only where it is asked for: what it brings there has not been measured.
    if choice == "auto" and (ranks is not None or not _compile_pays(task.done(task.steps)["flops"], device)):
        return 0.0
    if task.nesting is not None and not task.nesting.few_sizes:
        return 0.0
    model = cast(torch.nn.Module, trainer.model)
    # What gathers the parameters of a block and sums its gradients stays outside of what is compiled.
    compiled = [model] if ranks is None else list(blocks_of(model))
    started = time.perf_counter()
    torch.compiler.reset()  # a process that has compiled several models would give up on the next one
    try:
        for module in compiled:
            module.compile(dynamic=False)
        model.train()
        # Each size is a program of its own, made here and not in the midst of training.
        for sizes in [{}] if task.nesting is None else map(task.nesting.sizes, task.nesting.shares):
            with prefix(model, **sizes), trainer.compute_loss_context_manager():
                task.example_loss(model, device).backward()
    except Exception as error:  # whatever the compiler stumbles over, the uncompiled model trains
        if choice == "on":
            raise UserError(f"torch.compile failed ({_first_line(error)}): set training.compile to off") from error
        sys.stderr.write(f"torch.compile failed, going on without it: {_first_line(error)}\n")
        for module in compiled:
            module._compiled_call_impl = None
    model.zero_grad()
    return time.perf_counter() - started


def _compile_pays(flops: int, device: torch.device) -> bool:
    """Whether the run is long enough to earn back half a minute of compiling; docs/training.md has the figures."""
    return flops > (5e13 if device.type == "cpu" else 1e16)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
