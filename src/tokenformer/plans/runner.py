"""Carry out a plan: what can be done is done, what is done already is not done again.

All state is in the folders: a plan that was killed goes on from what it finds there.
"""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import Any

from tokenformer.data import TrainingData, open_data
from tokenformer.errors import UserError
from tokenformer.folders import CHECKPOINTS, saving, write_atomically
from tokenformer.hardware import hardware, versions
from tokenformer.plans.jobs import (
    BEGINNING_FILE,
    FAILURE_FILE,
    Job,
    begin,
    data_recipe,
    drop_weights,
    read_json,
    train_one,
)
from tokenformer.plans.plan import Plan, Stage
from tokenformer.plans.resolve import ResolvedStage, resolve
from tokenformer.plans.results import (
    PLAN_FILE,
    RESULTS_FILE,
    STAGES_FILE,
    chosen_rate,
    collect,
    describe,
    difference,
)
from tokenformer.training.collapse import Collapse

_STOPPED = "stopped and saved; the same command goes on"


def run_plan(plan: Plan, *, jobs: int = 1, progress: bool = True) -> dict[str, Any]:
    """Carry out a plan, or what is left of it.

    Args:
        plan: with `out`, the folder for everything.
        jobs: pieces of work done at the same time, each by a process of its own.
        progress: show progress bars (of one job) or a line for each piece of work on stderr.

    Returns:
        The content of results.json.

    Raises:
        UserError: anything in the plan, the data or the folder that cannot work, before any compute is spent.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, after saving.
    """
    if jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}")
    if not plan.out:
        raise UserError("out: give the folder of the plan, for instance --out runs/books-small")
    out = Path(plan.out)
    resolved = resolve_with_data(plan)
    _check_folders(plan, resolved)
    if plan.training.threads is None and jobs > 1:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        plan = dataclasses.replace(plan, training=dataclasses.replace(plan.training, threads=threads))
        resolved = resolve_with_data(plan)
    with saving(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / PLAN_FILE, plan.to_yaml())
        stages = {name: describe(plan, stage) for name, stage in resolved.items()}
        record = {"machine": {**hardware(), **versions(), "jobs": jobs}, "stages": stages}
        write_atomically(out / STAGES_FILE, json.dumps(record, indent=2) + "\n")
    _Runner(plan, resolved, progress).run(jobs)
    return collect(out)


def resolve_with_data(plan: Plan) -> dict[str, ResolvedStage]:
    """Resolve a plan against its data, which must be there and belong together.

    Raises:
        UserError: data that are missing, damaged, or made with another tokenizer or row length than the plan's; and
            whatever `resolve` finds.
    """
    plan.validate()
    if not plan.data.path:
        raise UserError("data.path: give a folder written by `tokenformer data prepare`")
    data = _open(plan, plan.data.path)
    others = {stage.data for stage in plan.all_stages.values() if stage.data} | set(plan.measure.values())
    for path in sorted(others - {plan.data.path}):
        other = _open(plan, path)
        if other.tokenizer_hash != data.tokenizer_hash:
            raise UserError(
                f"{path} was prepared with another tokenizer than {plan.data.path}: "
                f"prepare it with --tokenizer {plan.data.path}/tokenizer"
            )
        if other.sequence_length != data.sequence_length:
            raise UserError(
                f"{path} is cut into rows of {other.sequence_length}, {plan.data.path} of {data.sequence_length}: "
                "prepare both alike"
            )
    resolved = resolve(plan, vocab_size=data.vocab_size, sequence_length=data.sequence_length)
    for name, stage in resolved.items():
        rows = len(_open(plan, stage.data).train)
        if rows < stage.training.batch_size:
            raise UserError(
                f"stage '{name}': {stage.data} has {rows} training rows, fewer than training.batch_size "
                f"{stage.training.batch_size}"
            )
    return resolved


def _open(plan: Plan, path: str) -> TrainingData:
    options = dataclasses.asdict(data_recipe(plan, path))
    del options["held_out_rows"], options["skip_rows"]
    return open_data(**options)


def _check_folders(plan: Plan, resolved: dict[str, ResolvedStage]) -> None:
    """See that what is in the plan's folder is of this plan."""
    out = Path(plan.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file: give a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / STAGES_FILE).is_file():
        raise UserError(f"out: {out} is not empty and holds no plan: give another folder")
    before = read_json(out / STAGES_FILE)["stages"]
    for name, stage in resolved.items():
        if not any((out / name).glob("seed-*")):
            continue
        if name not in before:
            raise UserError(f"out: {out / name} is of another plan: give another out, or remove that folder")
        changed = difference(before[name], describe(plan, stage))
        if changed:
            follow = [f"{out / other}" for other in resolved if name in resolved[other].chain]
            raise UserError(
                f"stage '{name}' has begun with another plan ({changed}): bring the old plan back, give another out, "
                f"or remove {' and '.join(follow)} to do it anew"
            )


class _Runner:
    def __init__(self, plan: Plan, resolved: dict[str, ResolvedStage], progress: bool) -> None:
        self.plan, self.resolved, self.progress = plan, resolved, progress
        self.out = Path(plan.out)

    def run(self, jobs: int) -> None:
        if jobs == 1:
            while (job := next(self._ready(set()), None)) is not None:
                do(job, self.plan, self.resolved[job.stage], self._source(job), progress=self.progress)
                self._after(job)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker) as pool, _Stop() as stop:
            running: dict[Future[None], Job] = {}
            while True:
                for job in list(self._ready(set(running.values())))[: jobs - len(running)]:
                    arguments = (job, self.plan, self.resolved[job.stage], self._source(job))
                    running[pool.submit(do, *arguments, progress=False)] = job
                    self._say(f"begins  {job.title}")
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        future.result()
                    except KeyboardInterrupt as interrupt:
                        stop.children()
                        raise KeyboardInterrupt(_STOPPED) from interrupt
                    except BrokenProcessPool as broken:
                        if stop.asked:  # it was not training, so there was nothing to save
                            raise KeyboardInterrupt(_STOPPED) from broken
                        raise UserError(
                            f"the process of {job.title} was killed, perhaps for memory: the same command goes on; "
                            "fewer --jobs need less"
                        ) from broken
                    except UserError:
                        stop.children()
                        raise
                    self._after(job)

    def _ready(self, running: set[Job]) -> Iterator[Job]:
        """Work that can be begun now: all stages with their first seed, in the order of the plan, then the others."""
        stages = self.plan.all_stages.values()
        for turn in range(max(len(self.plan.seeds_of(stage)) for stage in stages)):
            for stage in stages:
                for seed in self.plan.seeds_of(stage)[turn : turn + 1]:
                    for job in self._wanted(stage, seed):
                        if job not in running and not job.is_done(self.out):
                            yield job

    def _wanted(self, stage: Stage, seed: int) -> list[Job]:
        """What a stage needs next for a seed, done or not; nothing while it waits for other stages."""
        before = self.plan.before(stage)
        if before is not None:
            if chosen_rate(self.plan, before, seed, self.out) is None:
                return []
            start = Job(stage.name, seed, None)
            if not start.is_done(self.out):
                return [start]
            self._check_source(start)
        if seed == self.plan.seeds_of(stage)[0]:
            return [Job(stage.name, seed, rate) for rate in stage.learning_rates]
        rate = chosen_rate(self.plan, stage, self.plan.seeds_of(stage)[0], self.out)
        return [] if rate is None else [Job(stage.name, seed, rate)]

    def _source(self, job: Job) -> Path | None:
        """The finished run that the stage of `job` goes on from."""
        before = self.plan.before(self.plan.all_stages[job.stage])
        if before is None:
            return None
        rate = chosen_rate(self.plan, before, job.seed, self.out)
        return Job(before.name, job.seed, rate).folder(self.out)

    def _check_source(self, start: Job) -> None:
        record = read_json(start.folder(self.out).parent / BEGINNING_FILE)
        source = self._source(start)
        assert source is not None
        if record["from"] != str(source.relative_to(self.out)):
            raise UserError(
                f"stage '{start.stage}' went on from {record['from']}, but now {source.relative_to(self.out)} is the "
                f"better one: remove {self.out / start.stage} to do it anew, or take the new learning rates back"
            )

    def _after(self, job: Job) -> None:
        """Say what came out, drop what is no longer needed, and write the results so far."""
        if job.learning_rate is not None:
            failure = read_json(job.folder(self.out) / FAILURE_FILE)
            summary = read_json(job.folder(self.out) / "summary.json")
            self._say(f"{job.title}: {failure.get('error') or 'perplexity {:.2f}'.format(summary['eval_perplexity'])}")
        self._tidy(job)
        write_atomically(self.out / RESULTS_FILE, json.dumps(collect(self.out), indent=2) + "\n")

    def _tidy(self, job: Job) -> None:
        """Keep the weights of the chosen run alone, and its optimizer only where a stage carries it on."""
        stage = self.plan.all_stages[job.stage]
        rate = chosen_rate(self.plan, stage, job.seed, self.out)
        if rate is None:
            return
        chosen = Job(job.stage, job.seed, rate).folder(self.out)
        for run in chosen.parent.glob("lr-*"):
            if run != chosen:
                drop_weights(run)
        following = [other for other in self.plan.all_stages.values() if self.plan.before(other) is stage]
        if not any(other.grow is not None and other.grow.optimizer == "carried" for other in following):
            shutil.rmtree(chosen / CHECKPOINTS, ignore_errors=True)

    def _say(self, text: str) -> None:
        if self.progress:
            sys.stderr.write(f"{text}\n")


def do(job: Job, plan: Plan, resolved: ResolvedStage, source: Path | None, *, progress: bool) -> None:
    """Do one job. A learning rate under which training collapses is a result if there are others to try."""
    if job.learning_rate is None:
        assert source is not None
        begin(job, plan, resolved, source)
        return
    try:
        train_one(job, plan, resolved, source, progress=progress)
    except Collapse as collapse:
        if len(resolved.stage.learning_rates) == 1 or job.seed != plan.seeds_of(resolved.stage)[0]:
            raise
        folder = job.folder(Path(plan.out))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FAILURE_FILE, json.dumps({"error": str(collapse)}, indent=2) + "\n")


def _begin_worker() -> None:
    """Let a worker end with the process that began it, even by SIGKILL, and hear of Ctrl-C from that one alone."""
    os.setpgrp()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Stop:
    """Passes SIGTERM and Ctrl-C on to the workers, which save and end."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> "_Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def children(self) -> None:
        """Ask the workers to save and end."""
        if self.asked:
            return
        self.asked = True
        for process in multiprocessing.active_children():
            if process.pid is not None:
                os.kill(process.pid, signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = False  # a second signal reaches them too: they stop at once
        self.children()
