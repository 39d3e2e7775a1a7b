"""A model as an ONNX graph: one for prefill and decoding, checked against torch with ONNX Runtime before it is kept.

Inputs and outputs have the names and shapes that the exporters of the Hub's ecosystem use. B batch, T new positions,
P past positions (0 for a prefill), H heads, E channels of a head, V vocabulary:

    input_ids (B, T), attention_mask (B, P + T), position_ids (B, T)         int64
    past_key_values.{layer}.key, past_key_values.{layer}.value               (B, H, P, E)
    logits                                                                   (B, T, V)
    present.{layer}.key, present.{layer}.value                               (B, H, P + T, E)
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import DynamicCache
from transformers.utils.logging import disable_progress_bar

from tokenformer.errors import UserError, require_extra
from tokenformer.folders import new_folder
from tokenformer.models import TokenFormerForCausalLM
from tokenformer.models.loading import copy_tokenizer, load_model, model_folder

if TYPE_CHECKING:
    import onnxruntime

GRAPH = "model.onnx"
# Largest difference of a logit from torch's in float32, as a share of the largest logit. Both sides sum the same
# products in their own order, through all layers.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2}


class CachedForward(nn.Module):
    """The model as a function of tensors alone: the cache goes in and comes out as keys and values per layer."""

    def __init__(self, model: TokenFormerForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Logits, then keys and values of each layer; arguments as in the head of this file."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, layer)
        length, total = input_ids.shape[1], attention_mask.shape[1]
        new = torch.arange(length, device=input_ids.device) + (total - length)
        causal = torch.arange(total, device=input_ids.device) <= new[:, None]
        visible = causal & attention_mask[:, None, None, :].bool()
        # Not minus infinity: the row of a padded position sees nothing, and its NaN would spread through the cache.
        mask = torch.where(visible, 0.0, torch.finfo(self.model.dtype).min).to(self.model.dtype)
        outputs = self.model(
            input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        layers = outputs.past_key_values.layers
        return (outputs.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


def export_onnx(model: str, out: str, *, dtype: Literal["float32", "float16"] = "float32") -> dict[str, Any]:
    """Write an ONNX graph of a model, with configuration and tokenizer beside it.

    The graph serves prefill (no past) and decoding (the present of one call is the past of the next), with any batch
    and any lengths; left padding is masked. The weights stand in a file of their own, so that their size has no limit.
    The graph is compared with torch in all these uses before the folder gets its name.

    Args:
        model: folder of the model, such as a training run, or a name on the Hub.
        out: folder to write; must not hold anything yet.
        dtype: of weights, cache and logits; float16 halves the files, and is compared with float32 all the same.

    Returns:
        `out`, the `files` in it, their `bytes`, and `difference`: the largest of a logit, and `largest_logit`.

    Raises:
        UserError: onnx, onnxruntime or onnxscript is not installed, a model that cannot be loaded, a folder
            that is not empty, or a graph whose logits differ from torch's. Nothing is written.
    """
    require_extra("onnx", "onnx", "onnxruntime", "onnxscript")
    with new_folder(Path(out)) as partial:
        source = model_folder(model)
        loaded = load_model(source, dtype=torch.float32)
        disable_progress_bar()
        write_graph(loaded if dtype == "float32" else load_model(source, dtype=dtype), partial / GRAPH)
        difference, largest = compare_graph(loaded, partial / GRAPH)
        if not difference <= TOLERANCE[dtype] * largest:
            fix = "the versions of torch, onnxscript and onnxruntime in constraints.txt"
            raise UserError(
                f"the graph's logits differ from torch's by {difference:.2g} where the largest is {largest:.2g}, more "
                f"than {TOLERANCE[dtype]:g} of it: use {fix if dtype == 'float32' else 'float32'}"
            )
        vars(loaded.config).pop("auto_map", None)  # of an exported folder: its code does not come along
        loaded.config.save_pretrained(partial)
        loaded.generation_config.save_pretrained(partial)
        copy_tokenizer(source, partial)
        files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    return {
        "out": out,
        "files": list(files),
        "bytes": sum(files.values()),
        "difference": difference,
        "largest_logit": largest,
    }


def write_graph(model: TokenFormerForCausalLM, file: Path) -> None:
    """Export `model` to `file`, and its weights to `file` + `.data`."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    config = model.config
    batch, length, past = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
    total = torch.export.Dim("total")
    # Sizes that differ from each other and from 1, so that the tracer takes none for a constant.
    ids, mask, positions, cache = _inputs(model, rows=2, past=3, length=5)
    cache_names = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            CachedForward(model).eval(),
            (ids, mask, positions, *cache),
            dynamo=True,
            verbose=False,
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *(f"past_key_values.{name}" for name in cache_names),
            ],
            output_names=["logits", *(f"present.{name}" for name in cache_names)],
            dynamic_shapes=(
                {0: batch, 1: length},
                {0: batch, 1: total},
                {0: batch, 1: length},
                tuple({0: batch, 2: past} for _ in cache_names),
            ),
        )
    assert program is not None
    # Each node carries the stack trace of its making, with the paths of this machine.
    ClearMetadataAndDocStringPass()(program.model)
    program.save(file, external_data=True)


def compare_graph(model: TokenFormerForCausalLM, file: Path) -> tuple[float, float]:
    """Run the graph in ONNX Runtime beside a float32 model.

    A batch with left padding is prefilled, then continued by one token, by several, and by one again. The model runs
    without a cache, so that the graph's is checked as well.

    Returns:
        The largest difference of a logit, and the largest logit.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    ids, mask, positions, _ = _inputs(model, rows=2, past=0, length=12)
    mask[0, :3] = 0
    positions[0] = (positions[0] - 3).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    present = _no_past(session, rows=2)
    difference = 0.0
    for start, end in pairwise((0, 7, 8, 11, 12)):
        inputs = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        logits, *states = session.run(None, feed | present)
        present = dict(zip(present, states, strict=True))
        seen = mask[:, start:end].bool()
        gap = (torch.from_numpy(logits) - expected[:, start:end])[seen].abs().max()
        difference = max(difference, gap.item())
    return difference, expected[mask.bool()].abs().max().item()


def _inputs(
    model: TokenFormerForCausalLM, *, rows: int, past: int, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Random ids, a mask that hides nothing, positions, and a cache of zeros."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (rows, length), generator=generator)
    positions = torch.arange(past, past + length).repeat(rows, 1)
    state = torch.zeros(rows, config.num_attention_heads, past, config.head_dim, dtype=model.dtype)
    cache = [state.clone() for _ in range(2 * config.num_hidden_layers)]
    return ids, torch.ones(rows, past + length, dtype=torch.long), positions, cache


def _no_past(session: "onnxruntime.InferenceSession", rows: int) -> dict[str, Any]:
    import numpy as np

    states = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return {value.name: np.zeros((rows, value.shape[1], 0, value.shape[3]), dtypes[value.type]) for value in states}


@contextmanager
def _quiet() -> Iterator[None]:
    """No remarks of the exporter on what it skips and renames: what matters is whether the graph computes the same."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
