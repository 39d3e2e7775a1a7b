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
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import Any, cast

from tokenformer.errors import UserError
from tokenformer.folders import CHECKPOINTS, saving, write_atomically
from tokenformer.hardware import hardware, versions
from tokenformer.plans.jobs import (
    BEGINNING_FILE,
    FAILURE_FILE,
    Job,
    begin,
    drop_weights,
    read_json,
    recipe_of,
    train_one,
)
from tokenformer.plans.plan import AnyPlan, Stage, naming
from tokenformer.plans.resolve import resolve
from tokenformer.plans.results import (
    PLAN_FILE,
    RESULTS_FILE,
    STAGES_FILE,
    chosen_rate,
    collect,
    describe,
    difference,
)
from tokenformer.plans.task import ResolvedStage, task_of
from tokenformer.training.callbacks import signals_to
from tokenformer.training.collapse import Collapse
from tokenformer.training.run import SUMMARY_FILE

_STOPPED = "stopped and saved; the same command goes on"


def run_plan(plan: AnyPlan, *, jobs: int = 1, progress: bool = True) -> dict[str, Any]:
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
    if plan.training.threads is None and jobs > 1:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        plan = dataclasses.replace(plan, training=dataclasses.replace(cast(Any, plan.training), threads=threads))
    resolved = resolve_with_data(plan)
    _check_folders(plan, resolved)
    with saving(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / PLAN_FILE, plan.to_yaml())
        stages = {name: describe(plan, stage) for name, stage in resolved.items()}
        record = {"machine": {**hardware(), **versions(), "jobs": jobs}, "stages": stages}
        write_atomically(out / STAGES_FILE, json.dumps(record, indent=2) + "\n")
    _Runner(plan, resolved, progress).run(jobs)
    return collect(out)


def resolve_with_data(plan: AnyPlan) -> dict[str, ResolvedStage]:
    """Resolve a plan against its data, which must be there and belong together.

    Raises:
        UserError: data that are missing or damaged, made with another tokenizer or row length than the plan's, or of
            other classes; a setting that no run can have; and whatever `resolve` finds.
    """
    plan.validate()
    task = task_of(plan)
    resolved = resolve(plan, **task.open(plan))
    rows = {source: task.rows(plan, source) for source in {stage.data for stage in resolved.values()}}
    for name, stage in resolved.items():
        with naming(stage.stage):
            for rate in stage.stage.learning_rates:
                job = Job(name, stage.training.seed, rate)
                source = Path(plan.out) if plan.before(stage.stage) is not None else None
                task.check(recipe_of(job, plan, stage, source), rows[stage.data])
    return resolved


def _check_folders(plan: AnyPlan, resolved: dict[str, ResolvedStage]) -> None:
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
    def __init__(self, plan: AnyPlan, resolved: dict[str, ResolvedStage], progress: bool) -> None:
        self.plan, self.resolved, self.progress = plan, resolved, progress
        self.out = Path(plan.out)

    def run(self, jobs: int) -> None:
        if jobs == 1:
            while (job := next(self._ready(set()), None)) is not None:
                do(job, self.plan, self.resolved[job.stage], self._source(job), progress=self.progress)
                self._after(job)
            return
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker)
        stop = _Stop()
        with pool, signals_to(stop.handle):
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
            self._say(f"{job.title}: {failure.get('error') or self._reached(job)}")
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

    def _reached(self, job: Job) -> str:
        task = task_of(self.plan)
        quality = task.quality
        value = task.figures(read_json(job.folder(self.out) / SUMMARY_FILE))[f"eval_{quality.key}"]
        return f"{quality.words} {value:.2f}{quality.unit}"

    def _say(self, text: str) -> None:
        if self.progress:
            sys.stderr.write(f"{text}\n")


def do(job: Job, plan: AnyPlan, resolved: ResolvedStage, source: Path | None, *, progress: bool) -> None:
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

    def children(self) -> None:
        """Ask the workers to save and end."""
        if self.asked:
            return
        self.asked = True
        for process in multiprocessing.active_children():
            if process.pid is not None:
                os.kill(process.pid, signal.SIGTERM)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of both signals."""
        self.asked = False  # a second signal reaches them too: they stop at once
        self.children()
