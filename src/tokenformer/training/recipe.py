"""Recipes of training runs: typed, written as YAML, every field overridable on the command line."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from tokenformer.errors import UserError
from tokenformer.parallel.mesh import Layout


class RunRecipe:
    """What every recipe has, whatever is trained: a folder, an optimizer, steps, and its own file."""

    out: str
    model: Any
    data: Any
    optimizer: Any
    training: Any

    @property
    def layout(self) -> Layout:
        """Of the processes that run it."""
        parallel = getattr(self, "parallel", None)
        return Layout(**dataclasses.asdict(parallel)) if parallel is not None else Layout()

    @property
    def micro_batch_size(self) -> int:
        """Rows of a forward pass of one process."""
        given: int | None = self.training.micro_batch_size
        return int(given or self.training.batch_size // self.layout.batch_parts)

    @property
    def passes(self) -> int:
        """Forward passes of one process in an optimizer step."""
        return int(self.training.batch_size // (self.micro_batch_size * self.layout.batch_parts))

    def open(self, *, progress: bool = False) -> Any:
        """Data and model, as a `Task`; nothing is written.

        Args:
            progress: show a bar while text is read.

        Raises:
            UserError: they are missing, damaged, or do not fit together.
        """
        raise NotImplementedError

    def to_yaml(self) -> str:
        """The recipe as it is written into the run's folder."""
        return yaml.safe_dump(dataclasses.asdict(cast(Any, self)), sort_keys=False)

    def difference(self, folder: Path) -> str | None:
        """The first field in which this recipe differs from the one that made `folder`, as a sentence; None if none.

        `out` may differ (a run's folder can be moved), and so may what does not touch the numbers. A field that the
        version which made `folder` did not have counts as its default.
        """
        theirs = _flatten(dataclasses.asdict(cast(Any, type(self)())))
        theirs |= _flatten(yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8")) or {})
        for name, mine in _flatten(dataclasses.asdict(cast(Any, self))).items():
            if name not in _FREE and theirs.get(name) != mine:
                return f"{name} is {theirs.get(name)} there and {mine} here"
        return None

    def _validate_shared(self) -> None:
        """Raise `UserError` on the first value that no run can have, naming the field."""
        if not self.out:
            raise UserError("out: give the folder of the run, for instance --out runs/first")
        if self.model.path and self.model.preset:
            raise UserError("model.path and model.preset exclude each other: a folder already has its sizes")
        if self.optimizer.state == "carried" and not self.model.path:
            raise UserError("optimizer.state 'carried' needs model.path: a new model has no moments to carry")
        require_positive(self, {"optimizer": ("learning_rate", "max_grad_norm"), "training": _STEPS})
        for name in ("eval_every", "save_every", "save_minutes", "milestone_every"):
            value = getattr(self.training, name)
            if not 0 <= value < math.inf:
                raise UserError(f"training.{name} must not be negative, got {value}")
        for name in ("warmup", "min_ratio", "anneal_scale", "schedule_from", "schedule_to"):
            if not 0 <= getattr(self.optimizer, name) <= 1:
                raise UserError(f"optimizer.{name} must lie between 0 and 1, got {getattr(self.optimizer, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self.optimizer, name) < 1:
                raise UserError(f"optimizer.{name} must lie in [0, 1), got {getattr(self.optimizer, name)}")
        if self.optimizer.schedule_from >= self.optimizer.schedule_to:
            raise UserError(
                f"optimizer.schedule_from {self.optimizer.schedule_from} must lie below "
                f"optimizer.schedule_to {self.optimizer.schedule_to}"
            )
        self._validate_growth()
        self._validate_nested()
        if not 0 <= self.training.collapse_rise < math.inf:
            raise UserError(f"training.collapse_rise must not be negative, got {self.training.collapse_rise}")
        if self.optimizer.weight_decay < 0:
            raise UserError(f"optimizer.weight_decay must not be negative, got {self.optimizer.weight_decay}")
        micro = self.training.micro_batch_size
        parts = self.layout.batch_parts
        if parts > 1 and self.training.batch_size % (parts * (micro or 1)):
            rows = f"parallel.data {self.layout.data} x parallel.shard {self.layout.shard}"
            rows += f" x training.micro_batch_size {micro}" if micro else ""
            raise UserError(f"training.batch_size {self.training.batch_size} is not a multiple of {rows}")
        if micro is not None and self.training.batch_size % micro:
            raise UserError(
                f"training.batch_size {self.training.batch_size} is not a multiple of training.micro_batch_size {micro}"
            )

    def _validate_nested(self) -> None:
        training = self.training
        shares = training.nested
        if not shares:
            if training.nested_draw != "sizes":
                raise UserError(f"training.nested_draw {training.nested_draw} needs training.nested: give the sizes")
            return
        if len(set(shares)) < len(shares) or not all(0 < share <= 1 for share in shares) or 1 not in shares:
            raise UserError(
                "training.nested must hold different shares between 0 and 1, the whole model (1) among them, got "
                f"{shares}"
            )
        if len(shares) == 1:
            raise UserError("training.nested [1] is the whole model alone: add smaller shares, or leave it out")
        if training.compile == "on" and (training.nested_draw != "sizes" or len(shares) > MOST_COMPILED_SIZES):
            raise UserError(
                f"training.compile on: of a nested run {MOST_COMPILED_SIZES} sizes at most are compiled, and with "
                "training.nested_draw sizes alone; set it to off or auto"
            )

    def _validate_growth(self) -> None:
        """What only a model that was grown can be asked for."""
        optimizer = self.optimizer
        if not 0 <= optimizer.old_tokens <= _MAX_OLD_TOKENS:
            raise UserError(
                f"optimizer.old_tokens must lie between 0 (frozen) and {_MAX_OLD_TOKENS}, got {optimizer.old_tokens}"
            )
        if optimizer.old_tokens != 1 and not self.model.path:
            raise UserError(
                f"optimizer.old_tokens {optimizer.old_tokens} needs model.path, a folder of `tokenformer grow`: a new "
                "model has no old tokens"
            )
        if optimizer.anneal_scale > 0 and not self.model.path:
            raise UserError(
                f"optimizer.anneal_scale {optimizer.anneal_scale} needs model.path: the scale of a new model is the "
                "published one"
            )


@dataclass
class ModelRecipe:
    """What is trained: a folder to go on from, a preset of the paper, or sizes.

    Args:
        path: model folder to go on from, such as one written by `tokenformer grow`; the sizes are then its own.
        family: tokenformer, or gpt_neox: transformers' Transformer, to compare with.
        preset: a size of the paper (150M, 450M, 900M, 1.5B, 124M, 354M, 757M, 1.4B) in place of the sizes below.
        hidden_size: channels of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: heads; must divide hidden_size.
        qkv: parameter tokens of each query, key and value layer.
        output: parameter tokens of each output projection.
        ffn: parameter tokens of each feed-forward.
        rotary_pct: share of a head's channels that carries positions.
        normalization: l2_gelu (the paper's), gelu_l2, gelu_l1 or softmax.
        activation: nonlinearity of Pattention.
        value_initializer_range: standard deviation of the first values; the published one, which is large for small
            models, if not given.
        intermediate_size: units of a Transformer's feed-forward; 4 hidden_size if not given.
    """

    path: str | None = None
    family: Literal["tokenformer", "gpt_neox"] = "tokenformer"
    preset: str | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    qkv: int = 256
    output: int = 256
    ffn: int = 1024
    rotary_pct: float = 0.25
    normalization: str = "l2_gelu"
    activation: str = "gelu"
    value_initializer_range: float | None = None
    intermediate_size: int | None = None


@dataclass
class DataRecipe:
    """What it is trained on.

    Args:
        path: folder written by `tokenformer data prepare`, or tokenised .bin and .idx files of GPT-NeoX or Megatron-LM,
            named without the ending. The fields below describe such files; a folder knows them itself.
        tokenizer: tokenizer.json that the files were made with, or a folder that holds it.
        held_out: other files, or the fraction of the documents to hold out, at the end (0.01).
        sequence_length: tokens in a row.
        held_out_rows: held-out rows that are measured, evenly spaced over all; all if not given.
        skip_rows: training rows to pass over first, in the order of the seed: those that the model has seen.
    """

    path: str = ""
    tokenizer: str | None = None
    held_out: float | str | None = None
    sequence_length: int | None = None
    held_out_rows: int | None = None
    skip_rows: int = 0


@dataclass
class OptimizerRecipe:
    """AdamW and its schedule.

    Args:
        learning_rate: at the peak.
        schedule: cosine down to min_ratio times the peak, or constant; both after a linear warm-up.
        warmup: share of the steps spent warming up.
        min_ratio: learning rate at the end of a cosine, as a share of the peak.
        weight_decay: of everything but norms.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        max_grad_norm: gradients are scaled down to this norm.
        state: fresh moments, or those carried by the folder in model.path (`tokenformer grow --optimizer carried`).
        old_tokens: learning rate of all that is not in the newest segment, as a share of learning_rate: 1 trains it
            like the new tokens, 0 freezes it.
        anneal_scale: share of the steps over which tau goes linearly from its value in model.path to the root of the
            number of tokens, the published value; 0 leaves it.
        schedule_from: where in the schedule this run begins; more than 0 goes on with one that an earlier run began.
        schedule_to: where in the schedule it ends. Warm-up is a share of the whole schedule.
    """

    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.01
    min_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    state: Literal["fresh", "carried"] = "fresh"
    old_tokens: float = 1.0
    anneal_scale: float = 0.0
    schedule_from: float = 0.0
    schedule_to: float = 1.0


@dataclass
class StepsRecipe:
    """How large and how exact the steps of a run are, and what is written down beside them.

    Args:
        batch_size: rows (sequences or images) per optimizer step.
        micro_batch_size: rows per forward pass; the batch itself if not given.
        precision: auto takes bf16 where the hardware multiplies it fast, else fp32; fp16 needs a GPU.
        compile: torch.compile; auto compiles when the run is long enough to earn the compile time back, in one process.
        gradient_checkpointing: recompute blocks in the backward pass to save memory.
        recompute: keep the scores of parameter tokens alone for the backward pass, which makes their weights again:
            saves less than gradient_checkpointing, at a far smaller cost, and goes with it.
        eval_every: steps between evaluations on the held-out split; 0 for the end only.
        save_every: steps between checkpoints; 0 for the end only.
        save_minutes: minutes after a checkpoint at which the next is written in any case; 0 for never.
        milestone_every: steps between checkpoints that are never dropped; 0 for none.
        log_every: steps between lines of metrics.jsonl.
        keep_checkpoints: newest checkpoints kept, beside the milestones.
        seed: of initialisation and data order.
        threads: CPU threads; all cores if not given.
        on_collapse: what follows a loss or gradient that is not finite, or a loss that rises by collapse_rise: stop, or
            go back to the last checkpoint and skip the batches from there up to the collapse.
        collapse_rise: nats by which the loss of a step exceeds its running mean when it counts as a collapse; 0 counts
            only what is not finite.
        nested: shares of the tokens, the last one 1, such as [0.25, 0.5, 1]: each pass (micro-batch) trains the first
            tokens of every layer alone, so that the model works at each of these sizes. Trains the whole if not given.
        nested_draw: what a pass draws: one of the sizes for all layers; for each of the kinds qkv, output and ffn its
            own; or for each kind any number of tokens from the smallest size on.
    """

    batch_size: int = 16
    micro_batch_size: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    gradient_checkpointing: bool = False
    recompute: bool = False
    eval_every: int = 0
    save_every: int = 500
    save_minutes: float = 0.0
    milestone_every: int = 0
    log_every: int = 10
    keep_checkpoints: int = 2
    seed: int = 0
    threads: int | None = None
    on_collapse: Literal["stop", "skip"] = "stop"
    collapse_rise: float = 0.0
    nested: list[float] = field(default_factory=list)
    nested_draw: Literal["sizes", "kinds", "any"] = "sizes"


@dataclass
class TrainingRecipe(StepsRecipe):
    """How long a language model is trained, and the fields of `StepsRecipe`.

    Args:
        tokens: budget; training stops at the first step that reaches it.
        fused_loss: compute the loss a few positions at a time, without the logits of the whole batch; for large
            vocabularies. Its rounding is another.
    """

    tokens: int = 10_000_000
    fused_loss: bool = False


@dataclass
class ParallelRecipe:
    """The processes that train together, as torchrun starts them; the product is their number.

    Args:
        data: groups that each hold the whole model and read other rows.
        shard: processes that share the parameters of such a group, each reading other rows (FSDP2).
        tensor: processes that share every layer's parameter tokens and read the same rows.
    """

    data: int = 1
    shard: int = 1
    tensor: int = 1


@dataclass
class Recipe(RunRecipe):
    """A training run of a language model.

    Args:
        out: folder of the run: recipe, metrics, checkpoints and, at the end, the model.
        model: what is trained.
        data: on what.
        optimizer: by which rule.
        training: for how long.
        parallel: on how many processes.
    """

    out: str = ""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)

    def open(self, *, progress: bool = False) -> Any:
        """A LanguageTask."""
        from tokenformer.training.language import LanguageTask  # which needs recipes

        return LanguageTask(self, progress=progress)

    def validate(self) -> None:
        """Raise `UserError` on the first value that cannot be, naming the field."""
        if not self.data.path:
            raise UserError("data.path: give a folder written by `tokenformer data prepare`, or tokenised .bin files")
        if self.model.family == "gpt_neox" and self.model.preset:
            raise UserError("model.preset: the presets are TokenFormers; give the sizes of a gpt_neox")
        require_positive(self, {"parallel": ("data", "shard", "tensor")})
        self._validate_shared()
        self._validate_parallel()
        require_positive(self, {"model": SIZES, "data": ("sequence_length", "held_out_rows"), "training": ("tokens",)})
        if self.data.skip_rows < 0:
            raise UserError(f"data.skip_rows must not be negative, got {self.data.skip_rows}")

    def _validate_parallel(self) -> None:
        if self.layout.processes == 1:
            return
        if self.training.precision == "fp16":
            raise UserError("training.precision fp16 trains in one process: use bf16 or fp32 with parallel")
        if self.training.nested and self.parallel.tensor > 1:
            raise UserError(
                "training.nested takes the first tokens of each layer, which parallel.tensor gives to one process: "
                "use parallel.data and parallel.shard"
            )


RECIPE_FILE = "recipe.yaml"
_MAX_OLD_TOKENS = 1000
# torch.compile gives up on a function after eight versions of it.
MOST_COMPILED_SIZES = 8
# on_collapse is free so that a run which stopped over a collapse can go on by skipping.
CHECKPOINT_FIELDS = {
    f"training.{name}" for name in ("save_every", "save_minutes", "milestone_every", "keep_checkpoints")
}
# The layout is free so that a run can go on with more or fewer processes.
_LAYOUT_FIELDS = {"parallel.data", "parallel.shard", "parallel.tensor"}
_FREE = {"out", "training.threads", "training.on_collapse", *CHECKPOINT_FIELDS, *_LAYOUT_FIELDS}
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "qkv",
    "output",
    "ffn",
    "value_initializer_range",
    "intermediate_size",
)
_STEPS = ("batch_size", "micro_batch_size", "log_every", "keep_checkpoints", "threads")


def require_positive(recipe: Any, fields: Mapping[str, Iterable[str]]) -> None:
    """Raise `UserError` on the first of the fields, named by section, that is given and not above 0."""
    for section, names in fields.items():
        for name in names:
            value = getattr(getattr(recipe, section), name)
            if value is not None and not value > 0:
                raise UserError(f"{section}.{name} must be positive, got {value}")


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
