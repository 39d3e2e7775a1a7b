"""transformers' Trainer with whole-or-absent checkpoints, named optimizer state and a loss that must stay finite."""

import contextlib
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from tokenformer.errors import UserError
from tokenformer.folders import CHECKPOINTS, PARTIAL, saving
from tokenformer.parallel.checkpoints import is_sharded, load_optimizer_shards, load_shards, save_shards
from tokenformer.parallel.folders import load_slices, write_configuration
from tokenformer.parallel.mesh import Ranks
from tokenformer.parallel.sharding import clip_gradients, groups_by_mesh, like_parameter
from tokenformer.training.checkpoints import publish
from tokenformer.training.collapse import Collapse, LossRise, Skip
from tokenformer.training.nested import Nesting
from tokenformer.training.order import RowOrder

OPTIMIZER_FILE = "optimizer.pt"


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of equal length to `input_ids` and `labels`, both (B, T)."""
    ids = torch.tensor([row["input_ids"] for row in rows], dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


class RunTrainer(Trainer):
    """What every run needs of a Trainer, whatever it trains.

    Args:
        run: folder of the run; checkpoints go to `run/checkpoints`.
        keep_checkpoints: newest checkpoints kept.
        milestone_every: checkpoints at multiples of so many steps are kept too; 0 keeps none.
        autocast: dtype of the forward pass, None for that of the parameters.
        evaluate_with: what `evaluate` returns, without its `eval_` prefix.
        carried: named optimizer state to start from (`carried_state`).
        old: names of the parameters that were there before growing (`old_parameters`), where they are to be told apart.
        old_rate: their learning rate as a share of that of the others; 0 freezes them.
        rates: learning rates of single parameters by name, as a share of what they would be otherwise.
        schedule: which part of the learning rate's schedule these steps are, as (from, to) in [0, 1]; the arguments'
            `warmup_steps` are those of the whole schedule.
        loss_rise: what counts as a collapse beside a loss that is not finite.
        skips: batches that the run leaves out.
        skip_rows: rows that it passes over first.
        nesting: the sizes that the passes train; the whole model if None.
        ranks: the processes that train together; the model is cut for them already. None for one process.
        kwargs: passed to transformers' Trainer.
    """

    def __init__(
        self,
        *,
        run: Path,
        keep_checkpoints: int,
        milestone_every: int = 0,
        autocast: torch.dtype | None,
        evaluate_with: Callable[[nn.Module], dict[str, float]],
        carried: dict[str, dict[str, torch.Tensor]] | None = None,
        old: Collection[str] = (),
        old_rate: float = 1.0,
        rates: Mapping[str, float] | None = None,
        schedule: tuple[float, float] = (0.0, 1.0),
        loss_rise: LossRise | None = None,
        skips: Sequence[Skip] = (),
        skip_rows: int = 0,
        nesting: Nesting | None = None,
        ranks: Ranks | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.run = run
        self.keep_checkpoints = keep_checkpoints
        self.milestone_every = milestone_every
        self.autocast = autocast
        self.evaluate_with = evaluate_with
        self.carried = carried
        self.old = old
        self.old_rate = old_rate
        self.rates = rates or {}
        self.schedule = schedule
        self.loss_rise = loss_rise
        self.skips = list(skips)
        self.skip_rows = skip_rows
        self.nesting = nesting
        self.ranks = ranks
        self._pass = (-1, 0)
        self._step_loss = 0.0
        if loss_rise is not None:
            self.add_callback(loss_rise)
        if old_rate == 0:
            for name, parameter in cast(nn.Module, self.model).named_parameters():
                parameter.requires_grad_(name not in old)
        # Micro-batches are equal in size and rows in length, so the mean over micro-batches is that over the batch.
        # Counting labels instead would divide by T where T - 1 tokens are predicted.
        self.model_accepts_loss_kwargs = False

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast around the forward pass alone, so that torch.compile sees the model and not a wrapper."""
        stack = super().compute_loss_context_manager()
        if self.autocast is not None:
            stack.enter_context(torch.autocast(self.args.device.type, dtype=self.autocast))
        return stack

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass; stops before a non-finite loss can reach the parameters.

        Raises:
            Collapse: naming step, learning rate and what to try.
        """
        with self._size_of_pass():
            loss = super().training_step(*args, **kwargs)
        if self.ranks is not None:
            loss = self.ranks.mean(loss)
        self._require_finite("loss", loss)
        if self.loss_rise is not None:
            self._step_loss += loss.item()
        return loss

    def _size_of_pass(self) -> contextlib.AbstractContextManager[None]:
        """The size that this pass trains: from step and pass, not from how many passes there were since a resume."""
        if self.nesting is None:
            return contextlib.nullcontext()
        step, passed = self._pass
        self._pass = (step, passed + 1) if step == self.state.global_step else (self.state.global_step, 0)
        step, passed = self._pass
        model = cast(nn.Module, self.model)
        return self.nesting.at(model, self.nesting.drawn(step * self.nesting.passes + passed))

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float | None:
        # The Trainer comes here once all passes of a step are done, and before it changes a parameter.
        if self.loss_rise is not None:
            risen = self.loss_rise.observe(self._step_loss)
            self._step_loss = 0.0
            if risen:
                raise self._collapse(risen)
        # A finite loss can have an infinite gradient, and a checkpoint written after it would be of no use.
        norm: torch.Tensor | float | None
        if self.ranks is None:
            norm = super()._clip_grad_norm(model)
        else:
            norm = clip_gradients(model, self.args.max_grad_norm, self.ranks)
        if norm is not None and not self.args.fp16:  # the gradient scaler of fp16 skips such a step by itself
            self._require_finite("gradient norm", torch.as_tensor(norm))
        return norm

    def _require_finite(self, what: str, value: torch.Tensor) -> None:
        if not torch.isfinite(value):
            raise self._collapse(f"the {what} became {value.item()}")

    def _collapse(self, what: str) -> Collapse:
        return Collapse(what, self.state.global_step + 1, self._get_learning_rate())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW whose state knows the parameters' names, so that it can follow them into a grown model."""
        if self.optimizer is None:
            model = model or cast(nn.Module, self.model)
            decayed = set(self.get_decay_parameter_names(model))
            # Frozen parameters are not among these.
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            shares = {name: self._rate_of(name) for name, _ in named}
            groups = []
            # The group that comes first has the learning rate that is logged.
            for rate in sorted(set(shares.values()), key=lambda rate: (rate != 1, -rate)):
                pairs = [pair for pair in named if shares[pair[0]] == rate]
                lr = self.args.learning_rate * rate
                decaying, others = ([pair for pair in pairs if (pair[0] in decayed) == does] for does in (True, False))
                groups.append({"params": decaying, "weight_decay": self.args.weight_decay, "lr": lr})
                groups.append({"params": others, "weight_decay": 0.0, "lr": lr})
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups = [part for group in groups for part in groups_by_mesh(group)]
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **options)
            if self.carried is not None:
                _restore(self.optimizer, self.carried)
        return self.optimizer

    def _rate_of(self, name: str) -> float:
        return self.rates.get(name, 1.0) * (self.old_rate if name in self.old else 1.0)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The arguments' schedule, or the part of it that these steps are."""
        begin, end = self.schedule
        if (begin, end) == (0, 1):
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            whole = num_training_steps / (end - begin)
            # An optimizer of its own: a scheduler sets the learning rate of its optimizer, here to that of step 0.
            stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
            scheduler = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer=stand_in,
                num_warmup_steps=self.args.get_warmup_steps(round(whole)),
                num_training_steps=cast(int, whole),  # a fraction too: schedules only divide by it
                scheduler_specific_kwargs=cast(dict[str, Any] | None, self.args.lr_scheduler_kwargs),
            )
            (factor,) = scheduler.lr_lambdas
            self.lr_scheduler = LambdaLR(
                cast(torch.optim.Optimizer, optimizer or self.optimizer), lambda step: factor(begin * whole + step)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        return self.row_order()

    def row_order(self, *, whole_steps: bool = False) -> RowOrder:
        """The rows of this run.

        Args:
            whole_steps: as in `RowOrder`; always so where several processes train together, as the rows of a smaller
                step would depend on their number.
        """
        parts = 1 if self.ranks is None else self.ranks.layout.batch_parts
        return RowOrder(
            cast(Sized, self.train_dataset),
            rank=0 if self.ranks is None else self.ranks.batch_part,
            world=parts,
            seed=cast(int, self.args.data_seed),
            batch_size=self.args.train_batch_size * parts,
            batches_per_step=self.args.gradient_accumulation_steps,
            skips=self.skips,
            skip_rows=self.skip_rows,
            whole_steps=whole_steps or self.ranks is not None,
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure on the held-out rows, log and return it under `eval_` names."""
        with self.compute_loss_context_manager(), torch.compiler.set_stance("force_eager"):
            metrics = {f"eval_{name}": value for name, value in self.measure().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self) -> dict[str, float]:
        """Figures on the held-out rows."""
        return self.evaluate_with(cast(nn.Module, self.model))

    def save_beside(self, checkpoint: Path) -> None:
        """Put into a checkpoint what is not in the model, the optimizer and the Trainer's own state: nothing here."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if is_sharded(folder):
            load_shards(folder, cast(nn.Module, self.model))
            return
        if self.ranks is not None:
            load_slices(cast(PreTrainedModel, self.model), folder)
            return
        # transformers saves some models (ViT) under other names than their parameters have. Its own Trainer looks for
        # the latter, and goes on with new weights where it does not find them.
        target = cast(PreTrainedModel, model or self.model)
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or (self.ranks is None and not is_sharded(Path(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        if is_sharded(Path(checkpoint)):
            load_optimizer_shards(Path(checkpoint), optimizer)
        else:
            _restore(optimizer, carried_state(Path(checkpoint)))
        # Another layout has other groups of parameters. Their learning rates follow from the step.
        scheduler = cast(LambdaLR, self.lr_scheduler)
        step = self.state.global_step
        scheduler.last_epoch, scheduler._step_count = step, step + 1
        scheduler._last_lr = [
            base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.ranks is not None:
            checkpoint = str(Path(checkpoint) / self._of_this_rank)
        super()._load_rng_state(checkpoint)

    @property
    def _of_this_rank(self) -> str:
        return f"rank-{self.ranks.rank if self.ranks is not None else 0}"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run / CHECKPOINTS / PARTIAL)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        partial = self.run / CHECKPOINTS / PARTIAL
        checkpoint = partial / f"checkpoint-{self.state.global_step}"
        if self.ranks is not None:
            self._save_in_parts(checkpoint, self.ranks)
            return
        shutil.rmtree(partial, ignore_errors=True)
        with saving(self.run / CHECKPOINTS):
            super()._save_checkpoint(model, trial)
            self.save_beside(checkpoint)
            publish(checkpoint, self.run, self.keep_checkpoints, self.milestone_every)

    def _save_in_parts(self, checkpoint: Path, ranks: Ranks) -> None:
        """Each process writes its part; the main one all else, and the name once everything is there."""
        model = cast(PreTrainedModel, self.model)
        with saving(checkpoint.parent.parent):
            if ranks.main:
                shutil.rmtree(checkpoint.parent, ignore_errors=True)
                checkpoint.mkdir(parents=True)
            ranks.barrier()
            save_shards(checkpoint, model, self.optimizer)
            self._save_rng_state(str(checkpoint / self._of_this_rank))
            if ranks.main:
                write_configuration(model, checkpoint)
                for callback in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(callback, ExportableState):
                        states = cast(dict[str, Any], self.state.stateful_callbacks)
                        states[type(callback).__name__] = callback.state()
                self.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
            self.save_beside(checkpoint)
            ranks.barrier()
            if ranks.main:
                publish(checkpoint, self.run, self.keep_checkpoints, self.milestone_every)
            # Nobody goes on, and may be killed, before the checkpoint counts.
            ranks.barrier()


class LanguageTrainer(RunTrainer):
    """Trains a causal language model on packed rows; arguments are those of `RunTrainer`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(data_collator=collate, **kwargs)


def old_parameters(model: nn.Module) -> set[str]:
    """Names of all parameters that are not in the newest segment: embeddings and norms are as old as the old tokens.

    Raises:
        UserError: the model was not grown.
    """
    segments = getattr(model.config, "segments", [])
    if len(segments) < 2:
        raise UserError(
            "optimizer.old_tokens: the model in model.path was not grown, so none of its tokens is new; grow it first, "
            "or set optimizer.old_tokens to 1"
        )
    new = f".segments.{segments[-1]['name']}."
    return {name for name, _ in model.named_parameters() if new not in name}


def carried_state(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Optimizer state by parameter name from `folder/optimizer.pt`.

    Raises:
        UserError: there is none, or it was not written by this library.
    """
    path = folder / OPTIMIZER_FILE
    if not path.is_file():
        raise UserError(f"{path} not found: grow with `--optimizer carried`, or set optimizer.state to fresh")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        names = [name for group in saved["param_groups"] for name in group["param_names"]]
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        return {name: saved["state"][index] for name, index in zip(names, indices, strict=True)}
    except Exception as error:
        raise UserError(
            f"{path} is not an optimizer state with names: train again, or set optimizer.state to fresh"
        ) from error


def _restore(optimizer: torch.optim.Optimizer, carried: dict[str, dict[str, torch.Tensor]]) -> None:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in carried:
                state = carried[name]
                if state["exp_avg"].shape != parameter.shape:
                    raise UserError(
                        f"carried optimizer state of {name} has another shape: set optimizer.state to fresh"
                    )
                optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else like_parameter(value, parameter)
                    for key, value in state.items()
                }
