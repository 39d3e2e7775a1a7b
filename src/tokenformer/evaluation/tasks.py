"""The tasks of lm-eval on a model: any of its own, the six of the paper as a group, local ones without a network."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tokenformer.errors import UserError, require_extra
from tokenformer.evaluation.loading import start_token
from tokenformer.evaluation.sliding import choose_window, rows_that_fit
from tokenformer.evaluation.tables import paper_tasks

PAPER = "paper"
_STDERR = 2


@dataclass(frozen=True)
class TaskSelection:
    """Tasks that lm-eval has found.

    Attributes:
        names: of tasks, groups and tags, with patterns and the group `paper` written out.
        local: those of them that the user described.
        manager: the TaskManager of lm-eval.
    """

    names: list[str]
    local: set[str]
    manager: Any


def select_tasks(names: list[str], *, include_path: str | Path | None = None) -> TaskSelection:
    """Find tasks by name. Their data is loaded when they are run.

    Args:
        names: tasks, groups, tags or patterns (`arc_*`) of lm-eval, or `paper` for the six tasks of the paper.
        include_path: folder with further tasks as YAML files. Where it has all that is asked for, the thousands of
            lm-eval's own are not looked through, which saves seconds.

    Raises:
        UserError: lm-eval is not installed; no such folder; an unknown name.
    """
    require_extra("eval", "lm_eval")
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"include-path: there is no folder '{include_path}'")
    wanted = [task for name in names for task in (paper_tasks() if name == PAPER else [name])]
    if not wanted:
        raise UserError(f"no tasks: name some of lm-eval's, or '{PAPER}' for the six of the paper")
    with _quiet():
        from lm_eval.tasks import TaskManager

        local: set[str] = set()
        if include_path is not None:
            manager = TaskManager(include_path=str(include_path), include_defaults=False)
            local = set(manager.all_subtasks)
        # A local group or tag may name tasks of lm-eval.
        if not local.issuperset(wanted):
            manager = TaskManager(include_path=None if include_path is None else str(include_path))
        matches: dict[str, None] = {}
        for name in wanted:
            found = manager.match_tasks([name])
            if not found:
                raise UserError(_unknown(name, manager.all_tasks))
            matches |= dict.fromkeys(found)
    return TaskSelection(list(matches), local.intersection(matches), manager)


def check_options(num_fewshot: int | None, limit: float | None, batch_size: int | None) -> None:
    """Say what is wrong with the options of `run_tasks` before anything is loaded.

    Raises:
        UserError: one is out of range.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"num_fewshot must be at least 0, got {num_fewshot}")
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise UserError(f"limit must be a number of documents, or a fraction between 0 and 1, got {limit:g}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}: or use auto")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    selection: TaskSelection,
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | None = None,
    context: int | None = None,
) -> dict[str, Any]:
    """Run tasks with lm-eval, which gives what its own command gives for the same model and options.

    Args:
        model: a causal language model of transformers.
        tokenizer: of the model.
        selection: from `select_tasks`.
        num_fewshot: solved examples before each question; as the task says if not given.
        limit: so many documents of each task, or such a fraction of them, to see that it runs.
        batch_size: requests at a time; if not given, as many as `rows_that_fit` allows for the longest.
        context: tokens the model reads at most; as many as it takes if not given.

    Returns:
        The content of the JSON file that lm-eval writes, with `results`, `configs`, `versions`, `n-shot`, `config`, ...

    Raises:
        UserError: an option out of range; data that cannot be loaded; a task that lm-eval cannot run on this model.
    """
    check_options(num_fewshot, limit, batch_size)
    start_token(tokenizer)
    if context is not None:
        context, _ = choose_window(model, context, stride=1)
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.utils import handle_non_serializable

        # Anew for each run: lm-eval writes the options of a run into them.
        tasks = [task for name in selection.names for task in _load(selection, name)]
        try:
            results = simple_evaluate(
                model=_language_model(model, tokenizer, batch_size, context),
                tasks=tasks,
                task_manager=selection.manager,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size or "auto",
                log_samples=False,
            )
        except (ValueError, AssertionError) as error:
            reason = (
                " ".join(str(error).split()) or "a check of it failed; perhaps an answer is longer than the context"
            )
            raise UserError(f"lm-eval cannot run {', '.join(selection.names)}: {reason}") from error
    # What its own command writes: functions, dtypes and numpy's numbers as JSON.
    plain: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return plain


def _language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int | None, context: int | None
) -> Any:
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):
        """HFLM, with a batch size `auto` that is computed: searching for it on a CPU ends in swap, not in an error."""

        def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
            length = self.max_length
            if requests:
                _, question, answer = requests[pos]
                length = min(len(question) + len(answer), length)
            return rows_that_fit(model, length)

    return LanguageModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or "auto", max_length=context)


def _load(selection: TaskSelection, name: str) -> list[Any]:
    try:
        found = selection.manager.load([name])
    except Exception as error:  # YAML, jinja, datasets and the Hub's client raise dozens of unrelated types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        way_out = (
            "check its YAML file and the paths in it"
            if name in selection.local
            else "its data comes from the Hub, so run it once with a network, after which it is in the cache; or "
            "describe a local copy in a YAML file (dataset_path: json, dataset_kwargs: data_files) and give its folder "
            "as --include-path"
        )
        raise UserError(f"task '{name}' cannot be loaded ({reason}): {way_out}") from error
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())


def _unknown(name: str, known: list[str]) -> str:
    near = get_close_matches(name, [*known, PAPER], n=1)
    hint = f"did you mean '{near[0]}'?" if near else "`lm-eval ls tasks` lists all"
    return f"lm-eval has no task '{name}': {hint}"


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's progress on stderr if somebody is looking, and nothing else of what it says, nor anything on stdout."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with suppress(OSError):
        os.set_inheritable(_STDERR, False)  # lm-eval asks git for a commit, and git complains where there is none
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        stream = sys.stderr if sys.stderr.isatty() else nowhere
        try:
            with redirect_stdout(stream), redirect_stderr(stream):
                yield
        finally:
            with suppress(OSError):
                os.set_inheritable(_STDERR, True)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
