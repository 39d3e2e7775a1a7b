"""What a training run needs on many processes: memory of each, what they send each other, and how fast that can be.

Memory and bytes follow from the recipe, and are those of `tokenformer.parallel`: with weights in float32, tokens cut
over `tensor`, everything cut over `shard` and gathered a block at a time. Times follow from what is assumed of the
machines.

Letters: P parameters in tokens, p those of a block, E of the embedding, L blocks, D channels, V vocabulary; M
positions of a micro-batch; t, s, d processes of tensor, shard and data.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from tokenformer.errors import UserError
from tokenformer.hardware import accelerator_peak
from tokenformer.models import TokenFormerConfig
from tokenformer.parallel.mesh import Layout
from tokenformer.plans.estimate import assumed_precision, training_phases
from tokenformer.training.building import model_config
from tokenformer.training.recipe import Recipe

_FLOAT32 = 4
# Pattention layers of a block: query, key, value, output, ffn.
_LAYERS = 5


@dataclass(frozen=True)
class Machines:
    """What the processes run on, one to an accelerator.

    Attributes:
        gpu: an accelerator whose peak is known, such as h100.
        memory: of one, in GB (10^9 bytes).
        per_node: accelerators of a machine.
        mfu: share of its peak that one reaches alone. An assumption: measure yours.
        inside: GB/s that one sends to others of its machine.
        between: GB/s that one sends to other machines, when all do.
    """

    gpu: str = "h100"
    memory: float = 80.0
    per_node: int = 8
    mfu: float = 0.4
    inside: float = 300.0
    between: float = 40.0

    def __post_init__(self) -> None:
        """See that they can be.

        Raises:
            UserError: they cannot.
        """
        accelerator_peak(self.gpu)
        for name in ("memory", "per_node", "inside", "between"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 < self.mfu <= 1:
            raise UserError(f"mfu must lie in (0, 1], got {self.mfu}")


@dataclass(frozen=True)
class Shape:
    """The sizes of a run that its cost follows from.

    Attributes:
        config: of the model.
        rows: of a micro-batch of one process.
        sequence_length: positions of a row.
        batch_size: rows of a step, of all processes.
        precision: fp32, bf16 or fp16.
        gradient_checkpointing: blocks are recomputed in the backward pass.
        recompute: the weights over parameter tokens are made again from their scores.
        fused_loss: the logits of a few positions are there at a time.
    """

    config: TokenFormerConfig
    rows: int
    sequence_length: int
    batch_size: int
    precision: str
    gradient_checkpointing: bool = False
    recompute: bool = False
    fused_loss: bool = False

    @property
    def block_tokens(self) -> int:
        """Parameter tokens of a block."""
        return 3 * self.config.num_tokens("qkv") + self.config.num_tokens("output") + self.config.num_tokens("ffn")

    @property
    def block_parameters(self) -> int:
        """p: 2 D for each token of a block."""
        return 2 * self.config.hidden_size * self.block_tokens

    @property
    def embedding_parameters(self) -> int:
        """E: the embedding, tied to the head, and the final norm."""
        return (self.config.vocab_size + 2) * self.config.hidden_size

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.config.num_hidden_layers * self.block_parameters + self.embedding_parameters

    @property
    def flops_per_token(self) -> int:
        """Forward and backward (paper, Table 3), without recomputation."""
        config = self.config
        products = config.num_hidden_layers * self.block_parameters + config.vocab_size * config.hidden_size
        return 3 * (2 * products + 4 * config.num_hidden_layers * config.hidden_size * self.sequence_length)


def rank_memory(shape: Shape, layout: Layout) -> dict[str, int]:
    """Bytes that one process holds at the peak of a training step, by what they are.

    - `parameters`, `gradients` and `moments`: 4, 4 and 8 bytes for each of P / (t s) + E / s.
    - `copies` and `activations`: those of one device (`training_phases`), 1 / t of what belongs to parameter tokens.
      They are made of what was gathered, and are not cut over `shard`.
    - `gathered`: 4 E; and with `shard` the blocks that are there whole, 4 p / t each: one where the backward pass
      begins, inside a block itself and its gradients, and the next one too where blocks are recomputed. Gradients that
      `data` sums are there once more.

    The peak lies where the backward pass begins, in a block, or where it ends, whichever is highest.
    """
    t, s = layout.tensor, layout.shard
    blocks = shape.config.num_hidden_layers
    block = shape.block_parameters // t
    own = blocks * block // s + shape.embedding_parameters // s
    whole = _FLOAT32 * shape.embedding_parameters if layout.batch_parts > 1 else 0
    begin, inside, end = training_phases(
        shape.config,
        shape.precision,
        shape.rows * shape.sequence_length,
        block_weights=block,
        gradient_checkpointing=shape.gradient_checkpointing,
        recompute=shape.recompute,
        fused_loss=shape.fused_loss,
        tensor=t,
    )
    sharded, summed = int(s > 1), int(layout.data > 1)
    there = sharded, (3 if shape.gradient_checkpointing else 2) * sharded + summed, sharded + summed
    parts = [
        dataclasses.asdict(phase) | {"gathered": whole + _FLOAT32 * block * count}
        for phase, count in zip((begin, inside, end), there, strict=True)
    ]
    fixed = {"parameters": _FLOAT32 * own, "gradients": _FLOAT32 * own, "moments": 2 * _FLOAT32 * own}
    return fixed | max(parts, key=lambda part: sum(part.values()))


def step_traffic(shape: Shape, layout: Layout) -> dict[str, int]:
    """Bytes that one process sends in a step of the optimizer, by what for; rings, as NCCL and gloo make them.

    - `gather`: for each micro-batch, blocks forward and backward and the embedding once, in float32: 4 (2 P / t + E)
      (s - 1) / s.
    - `reduce`: their gradients, 4 (P / t + E) (s - 1) / s for each micro-batch.
    - `replicate`: the gradients that a process is left with, summed over `data`: 8 (P / t + E) / s (d - 1) / d for each
      micro-batch.
    - `tensor`: 2 (t - 1) / t of L M times the outputs of five Pattention layers, with h bytes of a number in products
      (5 D h), the gradients of their inputs, of which four are layer norms in float32 ((16 + h) D), and a number for
      each norm and its gradient (40); with recomputation, the forward part twice.
    """
    t, s, d = layout.tensor, layout.shard, layout.data
    rounds = micro_batches(shape, layout)
    tokens = shape.config.num_hidden_layers * shape.block_parameters // t
    rest = shape.embedding_parameters
    positions = shape.rows * shape.sequence_length
    size = 2 if shape.precision != "fp32" else _FLOAT32
    channels = shape.config.hidden_size
    forward = _LAYERS * (channels * size + _FLOAT32)
    backward = channels * ((_LAYERS - 1) * _FLOAT32 + size) + _LAYERS * _FLOAT32
    passes = 2 if shape.gradient_checkpointing else 1
    tensor = 2 * shape.config.num_hidden_layers * positions * (passes * forward + backward)
    return {
        "gather": rounds * _FLOAT32 * (2 * tokens + rest) * (s - 1) // s,
        "reduce": rounds * _FLOAT32 * (tokens + rest) * (s - 1) // s,
        "replicate": rounds * 2 * _FLOAT32 * (tokens + rest) // s * (d - 1) // d,
        "tensor": rounds * tensor * (t - 1) // t,
    }


def micro_batches(shape: Shape, layout: Layout) -> int:
    """Forward passes of a process in a step.

    Raises:
        UserError: the batch cannot be cut into so many parts of so many rows.
    """
    parts = layout.batch_parts * shape.rows
    if shape.batch_size % parts:
        raise UserError(
            f"training.batch_size {shape.batch_size} is not a multiple of {shape.rows} rows on {layout.batch_parts} "
            "parts of the batch: change training.micro_batch_size or parallel"
        )
    return shape.batch_size // parts


def step_time(shape: Shape, layout: Layout, machines: Machines) -> dict[str, float]:
    """Seconds of a step by part, tokens/s of all processes, and the share of their peak that this is.

    What `tensor` sends is waited for; what the others send goes on beside the products, as far as these last. Tensor
    groups are neighbours, then come shard and data: a group that does not fit into a machine sends between machines.
    """
    _, peak = accelerator_peak(machines.gpu)
    positions = shape.batch_size * shape.sequence_length
    flops = positions * shape.flops_per_token
    again = 4 / 3 if shape.gradient_checkpointing else 1.0
    compute = again * flops / (layout.processes * peak * machines.mfu)
    traffic = step_traffic(shape, layout)
    tensor = traffic["tensor"] / _speed(layout.tensor, machines)
    shard = (traffic["gather"] + traffic["reduce"]) / _speed(layout.tensor * layout.shard, machines)
    data = traffic["replicate"] / _speed(layout.processes, machines)
    step = max(compute + tensor, shard + data)
    return {
        "compute": compute,
        "tensor": tensor,
        "shard": shard,
        "data": data,
        "step": step,
        "tokens_per_second": positions / step,
        "mfu": flops / (step * layout.processes * peak),
    }


def _speed(group: int, machines: Machines) -> float:
    """Bytes per second that a process of a group of neighbours sends."""
    return 1e9 * (machines.inside if group <= machines.per_node else machines.between)


def plan_scale(
    recipe: Recipe,
    machines: Machines | None = None,
    *,
    processes: int | None = None,
    vocab_size: int = 50304,
    sequence_length: int = 2048,
) -> dict[str, Any]:
    """Plan a run of a language model on many processes; nothing is built, run or written.

    Args:
        recipe: of the run; its data need not be there.
        machines: what it is to run on.
        processes: try every layout of so many instead of the recipe's own.
        vocab_size: of the tokenizer.
        sequence_length: of a row, where the recipe does not say (data.sequence_length).

    Returns:
        `parameters`, `precision`, `machines`, and `layouts`, each with `memory` by part and its `total`, `fits`,
        `traffic` by kind, `time`, `micro_batches`, and `days` for the recipe's tokens; those that fit come first, the
        fastest before the others.

    Raises:
        UserError: a recipe of something else than a TokenFormer, or sizes that cannot be.
    """
    machines = machines or Machines()
    given = recipe.model
    if given.path or given.family != "tokenformer":
        raise UserError("plan-scale: give the sizes of a TokenFormer or a preset, not model.path or another family")
    if vocab_size < 1 or sequence_length < 1:
        raise UserError("vocab_size and sequence_length must be at least 1")
    if processes is not None and processes < 1:
        raise UserError(f"processes must be at least 1, got {processes}")
    length = recipe.data.sequence_length or sequence_length
    training = recipe.training
    config = model_config(given, vocab_size=vocab_size, sequence_length=length)
    if processes is None:
        layouts = [recipe.layout]
    else:
        layouts = [layout for layout in _layouts(processes) if layout.tensor <= machines.per_node]
    found = []
    for layout in layouts:
        rows = training.micro_batch_size or training.batch_size // layout.batch_parts
        shape = Shape(
            config=config,
            rows=rows,
            sequence_length=length,
            batch_size=training.batch_size,
            precision=assumed_precision(training.precision, on_cpu=False),
            gradient_checkpointing=training.gradient_checkpointing,
            recompute=training.recompute,
            fused_loss=training.fused_loss,
        )
        if processes is not None and (not rows or training.batch_size % (rows * layout.batch_parts)):
            continue
        found.append(_planned(shape, layout, machines, training.tokens))
    if not found:
        raise UserError(
            f"no layout of {processes} processes divides training.batch_size {training.batch_size} into whole "
            f"micro-batches{f' of {training.micro_batch_size}' if training.micro_batch_size else ''}"
        )
    found.sort(key=lambda plan: (not plan["fits"], plan["time"]["step"]))
    return {
        "parameters": shape.parameters,
        "non_embedding_parameters": shape.parameters - config.vocab_size * config.hidden_size,
        "flops_per_token": shape.flops_per_token,
        "precision": shape.precision,
        "gradient_checkpointing": shape.gradient_checkpointing,
        "recompute": shape.recompute,
        "fused_loss": shape.fused_loss,
        "sequence_length": length,
        "batch_size": training.batch_size,
        "tokens": training.tokens,
        "machines": dataclasses.asdict(machines),
        "layouts": found,
    }


def _planned(shape: Shape, layout: Layout, machines: Machines, tokens: int) -> dict[str, Any]:
    memory = rank_memory(shape, layout)
    total = sum(memory.values())
    time = step_time(shape, layout, machines)
    return {
        "data": layout.data,
        "shard": layout.shard,
        "tensor": layout.tensor,
        "processes": layout.processes,
        "micro_batch_size": shape.rows,
        "micro_batches": micro_batches(shape, layout),
        "memory": memory | {"total": total},
        "fits": total <= machines.memory * 1e9,
        "traffic": step_traffic(shape, layout),
        "time": time,
        "days": tokens / time["tokens_per_second"] / 86400,
    }


def _layouts(processes: int) -> list[Layout]:
    sizes = [n for n in range(1, processes + 1) if processes % n == 0]
    return [
        Layout(data=processes // (shard * tensor), shard=shard, tensor=tensor)
        for shard, tensor in itertools.product(sizes, sizes)
        if processes % (shard * tensor) == 0
    ]
