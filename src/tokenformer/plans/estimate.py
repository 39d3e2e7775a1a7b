"""What training a model needs, from its configuration alone: memory, disk, time.

Memory is that of one device that holds the whole model, without torch.compile, which keeps a quarter to two fifths
less of the activations, and as if every parameter were trained. Buffers of a few numbers per row, the libraries'
workspaces and what the allocator holds in reserve are left out.
"""

import time
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedConfig

from tokenformer.hardware import autocast_dtype
from tokenformer.models import TokenFormerConfig

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
        activations: what one micro-batch keeps for the backward pass, and the gradients of its logits.
    """

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        """All together, which is the peak: at the start of a backward pass."""
        return self.weights + self.gradients + self.moments + self.activations


def training_memory(
    config: PreTrainedConfig,
    *,
    parameters: int,
    non_embedding_parameters: int,
    rows: int,
    sequence_length: int,
    precision: str,
    gradient_checkpointing: bool = False,
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
    """
    # All weights of products, the output embedding among them, are kept in half precision for the backward pass.
    cast = 0 if precision == "fp32" else 2 * (non_embedding_parameters + config.vocab_size * config.hidden_size)
    per_token = activation_bytes_per_token(config, precision, gradient_checkpointing=gradient_checkpointing)
    return Memory(
        weights=_FLOAT32 * parameters + cast,
        gradients=_FLOAT32 * parameters,
        moments=2 * _FLOAT32 * parameters,
        activations=rows * sequence_length * per_token,
    )


def activation_bytes_per_token(
    config: PreTrainedConfig, precision: str, *, gradient_checkpointing: bool = False
) -> int:
    """Bytes that the forward pass keeps for the backward pass, and that this begins with, per token of input.

    With L layers, D channels, V vocabulary, N parameter tokens of a block (3 n_qkv + n_output + n_ffn) and h bytes of
    a number in products (4, or 2 in half precision):

    - A TokenFormer block keeps the inputs of its two norms in float32 (8 D); the inputs of its products (D h each): one
      for query, key and value, one for the output, one for the ffn, but in half precision a copy for every Pattention
      and segment; query, key, value and result of the token-token attention (4 D h); and for each parameter token the
      score and the weight in h bytes, and the score times tau over the norm in float32: N (2 h + 4).
    - A GPTNeoX block with F units keeps the input of both norms (4 D), their outputs, the packed query, key and value,
      query and key after rotation, and the result of attention twice (9 D h), and its units before and after the
      activation (2 F h).
    - The head keeps the input of the final norm (4 D) and of the product (D h), and the log-probabilities (4 V); their
      gradient and that of the logits (8 V) are there before anything is released.
    - With checkpointing, every block keeps its input (4 D), and either the head or one block at a time the rest.

    Raises:
        ValueError: a model of another kind.
    """
    d, h = config.hidden_size, _FLOAT32 if precision == "fp32" else 2
    if isinstance(config, TokenFormerConfig):
        tokens = 3 * config.num_tokens("qkv") + config.num_tokens("output") + config.num_tokens("ffn")
        inputs = 3 if precision == "fp32" else 5 * len(config.segments)
        block = 2 * _FLOAT32 * d + (inputs + 4) * d * h + tokens * (2 * h + _FLOAT32)
    elif isinstance(config, GPTNeoXConfig):
        block = _FLOAT32 * d + 9 * d * h + 2 * config.intermediate_size * h
    else:
        raise ValueError(f"no estimate for a model of type '{config.model_type}'")
    head = (_FLOAT32 + h) * d + 3 * _FLOAT32 * config.vocab_size
    if gradient_checkpointing:
        return config.num_hidden_layers * _FLOAT32 * d + max(block, head)
    return config.num_hidden_layers * block + head


def checkpoint_bytes(parameters: int) -> int:
    """Size of a checkpoint on disk: the weights and both moments of AdamW, all in float32."""
    return 3 * _FLOAT32 * parameters


def measured_rate(config: PreTrainedConfig, *, flops_per_token: int, sequence_length: int, precision: str) -> float:
    """FLOP/s at which the CPU trains a model: the best of three short steps after one to warm up, not compiled.

    Args:
        config: of a model of the plan, best a small one: it is built.
        flops_per_token: of training it.
        sequence_length: tokens of a row.
        precision: fp32 or bf16.
    """
    rows = max(1, int(_PROBE_FLOPS / (flops_per_token * sequence_length)))
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(config.vocab_size, (rows, sequence_length))
    dtype = autocast_dtype(precision)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - started)
    return rows * sequence_length * flops_per_token / min(seconds[1:])
