"""What training a model needs, from its configuration alone: memory, disk, time.

Memory is that of one device that holds the whole model, without torch.compile, which keeps a quarter to two fifths
less of the activations, and as if every parameter were trained. Buffers of a few numbers per row, the libraries'
workspaces and what the allocator holds in reserve are left out.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPTNeoXConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

from tokenformer.errors import UserError
from tokenformer.hardware import accelerator_peak, autocast_dtype, pick_precision
from tokenformer.models import TokenFormerVisionConfig
from tokenformer.models.cost import tokens_per_image
from tokenformer.models.segments import SegmentedConfig

CPU = "cpu"
_FLOAT32 = 4
# A step of the probe of a CPU's speed is about this large: a fraction of a second.
_PROBE_FLOPS = 3e10


@dataclass(frozen=True)
class Memory:
    """Bytes that one device needs to train a model.

    Attributes:
        weights: in float32, and under autocast their copies in half precision.
        gradients: in float32.
        moments: both of AdamW, in float32.
        activations: what one micro-batch keeps for the backward pass, and the gradients that are there at the peak.
        average: the moving average of the weights, in float32, where one is kept.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    average: int = 0

    @property
    def total(self) -> int:
        """All together, which is the peak."""
        return self.weights + self.gradients + self.moments + self.activations + self.average


def training_memory(
    config: PreTrainedConfig,
    *,
    parameters: int,
    non_embedding_parameters: int,
    rows: int,
    sequence_length: int,
    precision: str,
    gradient_checkpointing: bool = False,
    recompute: bool = False,
    fused_loss: bool = False,
) -> Memory:
    """Memory to train a TokenFormer or GPTNeoX on micro-batches of `rows`.

    Args:
        config: of the model.
        parameters: all of them, a tied embedding counted once.
        non_embedding_parameters: those outside the embeddings.
        rows: sequences of a micro-batch.
        sequence_length: tokens of a sequence.
        precision: fp32, bf16 or fp16.
        gradient_checkpointing: blocks are recomputed in the backward pass.
        recompute: the weights over parameter tokens are made again from their scores.
        fused_loss: the logits of a few positions are there at a time.
    """
    peak = training_peak(
        config,
        precision,
        rows * sequence_length,
        block_weights=non_embedding_parameters // config.num_hidden_layers,
        gradient_checkpointing=gradient_checkpointing,
        recompute=recompute,
        fused_loss=fused_loss,
    )
    return Memory(
        weights=_FLOAT32 * parameters + peak.copies,
        gradients=_FLOAT32 * parameters,
        moments=2 * _FLOAT32 * parameters,
        activations=peak.activations,
    )


def image_training_memory(
    model: PreTrainedModel,
    *,
    images: int,
    precision: str,
    gradient_checkpointing: bool = False,
    recompute: bool = False,
    average: bool = False,
) -> Memory:
    """Memory to train a TokenFormer or ViT that classifies images, on micro-batches of `images`.

    Args:
        model: to be trained; on the meta device will do.
        images: of a micro-batch.
        precision: fp32, bf16 or fp16.
        gradient_checkpointing: blocks are recomputed in the backward pass.
        recompute: the weights over parameter tokens are made again from their scores.
        average: a moving average of the weights is kept.
    """
    parameters = model.num_parameters()
    per_image = activation_bytes_per_image(
        model.config, precision, gradient_checkpointing=gradient_checkpointing, recompute=recompute
    )
    copied = parameters
    if recompute:  # the values are made into half precision again
        copied -= sum(p.numel() for name, p in model.named_parameters() if name.endswith(".value"))
    return Memory(
        weights=_FLOAT32 * parameters + (0 if precision == "fp32" else 2 * copied),
        gradients=_FLOAT32 * parameters,
        moments=2 * _FLOAT32 * parameters,
        activations=images * per_image,
        average=_FLOAT32 * parameters if average else 0,
    )


@dataclass(frozen=True)
class Peak:
    """What a training step holds where most is held, besides weights, their gradients and the moments.

    Attributes:
        copies: bytes of the weights in half precision that the backward pass keeps.
        activations: bytes of what the forward pass keeps for it, and of gradients that are on their way.
    """

    copies: int
    activations: int

    @property
    def total(self) -> int:
        """Both."""
        return self.copies + self.activations


def training_peak(config: PreTrainedConfig, precision: str, positions: int, **options: Any) -> Peak:
    """The larger of `training_phases`, whose arguments these are."""
    return max(training_phases(config, precision, positions, **options), key=lambda phase: phase.total)


def training_phases(
    config: PreTrainedConfig,
    precision: str,
    positions: int,
    *,
    block_weights: int,
    gradient_checkpointing: bool = False,
    recompute: bool = False,
    fused_loss: bool = False,
    tensor: int = 1,
) -> tuple[Peak, Peak, Peak]:
    """Where the backward pass begins, in its first feed-forward layer, and where it ends: one of these is the peak.

    With L layers, D channels, V vocabulary, R positions, n parameter tokens of the largest segment of the ffn, and h
    bytes of a number in products (4, or 2 in half precision):

    - All along the blocks keep what they need (`block_bytes_per_token`); with checkpointing their inputs (4 D R) alone,
      and in the feed-forward layer one block the rest.
    - In half precision the weights of products are kept as copies of 2 bytes: those of all blocks, with checkpointing
      of the one that is there; with `recompute` only the keys, half of them.
    - At the beginning the head has kept the input of the final norm (4 D R), that of the product (D h R) and the
      log-probabilities (4 V R); their gradient and that of the logits (8 V R) are there, and in half precision the copy
      of the head. With `fused_loss` instead the gradient of the head in float32 and once more, scaled (8 V D), the
      output of the norm, and its gradient likewise (16 D R with its input).
    - In the feed-forward layer gradients of n weights and scores are there, and what was made again: 4 n R in float32
      and 8 n R in half precision, with `recompute` 12 n R and 14 n R; in float32 a gradient of its keys or values
      (4 n D); and that of a tied head waits for the embedding's (4 V D).
    - At the end these two and their sum are there (12 V D); of an embedding of its own, its gradient.

    Args:
        config: of a TokenFormer or GPTNeoX; of the latter the beginning alone is known.
        precision: fp32, bf16 or fp16.
        positions: R, of a micro-batch.
        block_weights: parameters of a block, of this process.
        gradient_checkpointing: blocks are recomputed in the backward pass.
        recompute: the weights over parameter tokens are made again from their scores.
        fused_loss: the logits of a few positions are there at a time.
        tensor: processes that share the parameter tokens.

    Raises:
        ValueError: a model of another kind.
    """
    d, v, h = config.hidden_size, config.vocab_size, _bytes_in_products(precision)
    layers, half = config.num_hidden_layers, precision != "fp32"
    block = positions * block_bytes_per_token(config, precision, recompute=recompute, tensor=tensor)
    copy = 0 if not half else block_weights if recompute else 2 * block_weights
    kept = layers * (_FLOAT32 * d * positions if gradient_checkpointing else block)
    head = positions * ((_FLOAT32 + h) * d + 3 * _FLOAT32 * v)
    if fused_loss:
        head = 2 * _FLOAT32 * v * d + 4 * _FLOAT32 * d * positions
    begin = Peak(
        copies=(0 if gradient_checkpointing else layers * copy) + (2 * v * d if half and not fused_loss else 0),
        activations=kept + head,
    )
    waiting = _FLOAT32 * v * d if config.tie_word_embeddings else 0
    inside = Peak(
        copies=copy * (1 if gradient_checkpointing else layers),
        activations=kept
        + (block if gradient_checkpointing else 0)
        + _feed_forward_gradients(config, precision, positions, recompute=recompute) // tensor
        + waiting,
    )
    return begin, inside, Peak(copies=0, activations=(3 if config.tie_word_embeddings else 1) * _FLOAT32 * v * d)


def _feed_forward_gradients(config: PreTrainedConfig, precision: str, positions: int, *, recompute: bool) -> int:
    if not isinstance(config, SegmentedConfig):
        return 0
    largest = max(segment["ffn"] for segment in config.segments)
    if precision == "fp32":
        return largest * (positions * (12 if recompute else 4) + _FLOAT32 * config.hidden_size)
    return largest * positions * (14 if recompute else 8)


def activation_bytes_per_image(
    config: Any, precision: str, *, gradient_checkpointing: bool = False, recompute: bool = False
) -> int:
    """Bytes that the forward pass keeps for the backward pass, and that are added in its first block, per image.

    In the terms of `block_bytes_per_token`, with T patches and class token, P pixels of C channels and K classes:

    - A TokenFormer block is that of a language model, but for the result of attention, which is the input of the output
      without a copy.
    - A ViT block with F units keeps the inputs of its norms in float32 (8 D); the inputs of its products (D h each):
      one for query, key and value, but in half precision a copy for each, one for the output, which is the result of
      attention, and one for the feed-forward; query, key and value (3 D h); and its units before and after the
      activation (2 F h).
    - The patch embedding keeps the image (4 C P), and in half precision a copy (2 C P).
    - The head keeps the input of the final norm (4 T D), and in float32 with a class token its output too, of which it
      reads one row; then logits, log-probabilities and the gradient of either (12 K).
    - The head is small, so the peak lies in the feed-forward of the last block, at the gradients of its scores and
      weights (N_ffn (4 + h), with `recompute` N_ffn 12 or 14 in half precision), or of its units before and after the
      activation.
    - With checkpointing, every block keeps its input (4 T D), and one block at a time the rest.

    Raises:
        ValueError: a model of another kind.
    """
    d, h = config.hidden_size, _bytes_in_products(precision)
    block = block_bytes_per_token(config, precision, recompute=recompute)  # raises
    if isinstance(config, TokenFormerVisionConfig):
        block -= d * h * (1 if precision == "fp32" else len(config.segments))
        again = 12 if h == _FLOAT32 else 14
        gradients = config.num_tokens("ffn") * (again if recompute else _FLOAT32 + h)
    else:
        gradients = 2 * config.intermediate_size * h
    tokens = tokens_per_image(config)
    pixels = config.num_channels * config.image_size**2 * (_FLOAT32 if precision == "fp32" else _FLOAT32 + h)
    norms = 2 if precision == "fp32" and getattr(config, "pooling", "cls") == "cls" else 1
    head = norms * _FLOAT32 * tokens * d + 3 * _FLOAT32 * config.num_labels
    kept = block if not gradient_checkpointing else _FLOAT32 * d
    peak = gradients + (block if gradient_checkpointing else 0)
    return pixels + tokens * (config.num_hidden_layers * kept + peak) + head


def _bytes_in_products(precision: str) -> int:
    return _FLOAT32 if precision == "fp32" else 2


def block_bytes_per_token(config: PreTrainedConfig, precision: str, *, recompute: bool = False, tensor: int = 1) -> int:
    """Bytes that the forward pass of a block keeps for the backward pass, per token of input.

    With D channels, N parameter tokens of a block (3 n_qkv + n_output + n_ffn) and h bytes of a number in products:

    - A TokenFormer block keeps the inputs of its two norms in float32 (8 D); the inputs of its products (D h each): one
      for query, key and value, one for the output, one for the ffn, but in half precision a copy for every Pattention
      and segment; query, key, value and result of the token-token attention (4 D h); and for each parameter token the
      score and the weight in h bytes, and the score times tau over the norm in float32: N (2 h + 4).
      With `recompute`, the score alone: N h. Of these, each process of `tensor` has its part.
    - A GPTNeoX block with F units keeps the input of both norms (4 D), their outputs, the packed query, key and value,
      query and key after rotation, and the result of attention twice (9 D h), and its units before and after the
      activation (2 F h).

    Raises:
        ValueError: a model of another kind.
    """
    d, h = config.hidden_size, _bytes_in_products(precision)
    if isinstance(config, SegmentedConfig):
        tokens = 3 * config.num_tokens("qkv") + config.num_tokens("output") + config.num_tokens("ffn")
        inputs = 3 if precision == "fp32" else 5 * len(config.segments)
        of_tokens = tokens * (h if recompute else 2 * h + _FLOAT32)
        return 2 * _FLOAT32 * d + (inputs + 4) * d * h + -(-of_tokens // tensor)
    if isinstance(config, GPTNeoXConfig):
        return _FLOAT32 * d + 9 * d * h + 2 * config.intermediate_size * h
    if isinstance(config, ViTConfig):
        inputs = 3 if precision == "fp32" else 5
        return 2 * _FLOAT32 * d + (inputs + 3) * d * h + 2 * config.intermediate_size * h
    raise ValueError(f"no estimate for a model of type '{config.model_type}'")


def checkpoint_bytes(parameters: int) -> int:
    """Size of a checkpoint on disk: the weights and both moments of AdamW, all in float32."""
    return 3 * _FLOAT32 * parameters


def check_rate(gpu: str, mfu: float, rate: float | None) -> None:
    """Raise `UserError` on an accelerator that is not known, and on a share of its peak or a speed that cannot be."""
    if not 0 < mfu <= 1:
        raise UserError(f"mfu must lie in (0, 1], got {mfu}")
    if rate is not None and not 0 < rate < math.inf:
        raise UserError(f"rate must be positive and finite, got {rate}")
    if gpu.lower() != CPU:
        accelerator_peak(gpu)


def assumed_rate(gpu: str, mfu: float, rate: float | None, *, measure: Callable[[], float]) -> dict[str, Any]:
    """At which speed the training is taken to run.

    Args:
        gpu: an accelerator whose peak is known, or `cpu`.
        mfu: share of the accelerator's peak that is assumed.
        rate: FLOP/s where they are known.
        measure: measures them on this CPU.

    Returns:
        `device`, its `peak` in FLOP/s or None, `flops_per_second`, `how` these are known (given, assumed, measured) and
        the share of the peak that they are, `mfu`, or None.
    """
    device, peak = (CPU, None) if gpu.lower() == CPU else accelerator_peak(gpu)
    if rate is not None:
        how = {"how": "given", "mfu": rate / peak if peak else None}
    elif peak is not None:
        rate, how = peak * mfu, {"how": "assumed", "mfu": mfu}
    else:
        rate, how = measure(), {"how": "measured", "mfu": None}
    return {"device": device, "peak": peak, "flops_per_second": rate, **how}


def assumed_precision(precision: str, *, on_cpu: bool) -> str:
    """The precision of a recipe, and what `auto` comes to on this CPU or on an accelerator."""
    if on_cpu:
        return pick_precision(precision, torch.device(CPU))
    # Every accelerator whose peak we know multiplies bf16.
    return "bf16" if precision == "auto" else precision


def measured_rate(config: PreTrainedConfig, *, flops_per_token: int, sequence_length: int, precision: str) -> float:
    """FLOP/s at which the CPU trains a language model, not compiled.

    Args:
        config: of a model of the plan, best a small one: it is built.
        flops_per_token: of training it.
        sequence_length: tokens of a row.
        precision: fp32 or bf16.
    """
    rows = max(1, int(_PROBE_FLOPS / (flops_per_token * sequence_length)))
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(config.vocab_size, (rows, sequence_length))
    seconds = _seconds_per_step(model, precision, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    return rows * sequence_length * flops_per_token / seconds


def measured_image_rate(config: Any, *, flops_per_image: int, precision: str) -> float:
    """FLOP/s at which the CPU trains an image classifier, not compiled and without augmentation.

    Args:
        config: of the model, which is built.
        flops_per_image: of training it.
        precision: fp32 or bf16.
    """
    images = max(1, int(_PROBE_FLOPS / flops_per_image))
    model = AutoModelForImageClassification.from_config(config).train()
    pixels = torch.rand(images, config.num_channels, config.image_size, config.image_size)
    labels = torch.randint(config.num_labels, (images,))
    seconds = _seconds_per_step(
        model, precision, lambda: nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels)
    )
    return images * flops_per_image / seconds


def _seconds_per_step(model: PreTrainedModel, precision: str, loss: Callable[[], torch.Tensor]) -> float:
    """The best of three short steps after one to warm up."""
    dtype = autocast_dtype(precision)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        with torch.autocast(CPU, dtype=dtype, enabled=dtype is not None):
            value = loss()
        torch.autograd.backward(value)
        model.zero_grad()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
