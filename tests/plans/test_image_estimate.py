"""Memory and speed of training an image classifier: the estimates against what torch keeps."""

import contextlib
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForImageClassification, PreTrainedConfig, ResNetConfig, ViTConfig
from transformers.initialization import no_init_weights

from tokenformer.baselines import add_drop_path, vit_config
from tokenformer.models import TokenFormerVisionConfig
from tokenformer.plans import estimate
from tokenformer.plans.estimate import activation_bytes_per_image, image_training_memory, measured_image_rate

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
SIZES = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_labels": 50,
}


def _tokenformer(*segments: tuple[int, int, int], **fields: Any) -> TokenFormerVisionConfig:
    names = ["base", *(f"grown{i}" for i in range(1, len(segments)))]
    listed = [
        {"name": name, "qkv": qkv, "output": output, "ffn": ffn}
        for name, (qkv, output, ffn) in zip(names, segments, strict=True)
    ]
    return TokenFormerVisionConfig(**{**SIZES, "segments": listed, **fields})


def _autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    dtype = DTYPES[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def _model(config: PreTrainedConfig) -> Any:
    model = AutoModelForImageClassification.from_config(config).train()
    if isinstance(config, ViTConfig):
        add_drop_path(model, 0.2)
    return model


SMALL = {
    "tokenformer": _tokenformer((48, 56, 192), drop_path_rate=0.2),
    "mean of patches": _tokenformer((48, 56, 192), pooling="mean", drop_path_rate=0.2),
    "norms with weights": _tokenformer((48, 56, 192), norm_affine=True),
    "grown": _tokenformer((48, 56, 192), (50, 30, 100), (20, 20, 80)),
    "vit": vit_config(**SIZES, intermediate_size=300),
}


def _first_gradients(config: Any, precision: str) -> int:
    """What the backward pass begins with, in the estimate: scores in float32, the rest in the precision of products."""
    tokens = (32 // 4) ** 2 + (getattr(config, "pooling", "cls") == "cls")
    h = 4 if precision == "fp32" else 2
    if isinstance(config, ViTConfig):
        return tokens * 2 * h * config.intermediate_size
    return tokens * (4 + h) * sum(segment["ffn"] for segment in config.segments)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_activations_are_the_tensors_that_autograd_saves(config: PreTrainedConfig, precision: str) -> None:
    model = _model(config)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    images = torch.rand(4, 3, 32, 32)
    targets = torch.rand(4, config.num_labels)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _autocast(precision):
        torch.nn.functional.cross_entropy(model(pixel_values=images).logits, targets)
    kept = sum(storage.nbytes() for storage in saved.values())
    estimated = len(images) * (activation_bytes_per_image(config, precision) - _first_gradients(config, precision))
    if precision == "bf16":
        # The estimate counts copies of the weights as weights, and the images in float32, whose copy is what is saved.
        kept -= 2 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
        estimated -= images.nbytes
    assert estimated == pytest.approx(kept, rel=0.03)


def _base(layers: int, **fields: Any) -> TokenFormerVisionConfig:
    return TokenFormerVisionConfig.preset("base", num_hidden_layers=layers, **fields)


VIT = vit_config(
    image_size=224,
    patch_size=16,
    hidden_size=768,
    num_hidden_layers=2,
    num_attention_heads=12,
    intermediate_size=3072,
    num_labels=1000,
)
LARGE = {
    "base, two layers": (_base(2, drop_path_rate=0.1), 8, "bf16", False),
    "base, two layers, float32": (_base(2, drop_path_rate=0.1), 4, "fp32", False),
    "base, two layers, recomputed": (_base(2), 16, "bf16", True),
    "base, two layers, weights": (_base(2), 8, "bf16", "weights"),
    "base, two layers, weights, float32": (_base(2), 4, "fp32", "weights"),
    "vit, two layers": (VIT, 8, "bf16", False),
}


@pytest.mark.parametrize(("config", "images", "precision", "recomputed"), LARGE.values(), ids=LARGE)
def test_memory_is_the_peak_of_a_training_step(
    config: PreTrainedConfig, images: int, precision: str, recomputed: bool | str
) -> None:
    """At 224 pixels and real widths, with tensors that take no memory: torch's tracker counts what would be alive."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # which would write to them
    with FakeTensorMode(allow_non_fake_inputs=True):
        with no_init_weights():  # a truncated normal looks at its numbers, and here there are none
            model = _model(config)
        if recomputed == "weights":
            model.set_recompute()
        elif recomputed:
            # transformers 5.21 renamed the method.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        average = torch.optim.swa_utils.AveragedModel(model)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, *average.parameters())
        with tracker:
            for _ in range(2):  # in the second step gradients and moments are there
                pixels = torch.rand(images, 3, 224, 224)
                targets = torch.rand(images, config.num_labels)
                with _autocast(precision):
                    loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, targets)
                loss.backward()
                optimizer.step()
                tracker.reset_mod_stats()
            peak = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    memory = image_training_memory(
        model,
        images=images,
        precision=precision,
        gradient_checkpointing=recomputed is True,
        recompute=recomputed == "weights",
        average=True,
    )
    total = sum(p.numel() for p in model.parameters())
    assert memory.moments == 2 * memory.gradients == 2 * memory.average == 8 * total
    # Where blocks are recomputed, the peak lies inside of one, among short-lived gradients that are not estimated.
    assert memory.total == pytest.approx(peak, rel=0.15 if recomputed is True else 0.02)


def test_no_average_takes_no_memory() -> None:
    model = _model(SMALL["vit"])
    with_one, without = (
        image_training_memory(model, images=2, precision="fp32", average=kept) for kept in (True, False)
    )
    assert with_one.total - without.total == 4 * model.num_parameters()


def test_no_estimate_for_other_kinds_of_model() -> None:
    with pytest.raises(ValueError, match="resnet"):
        activation_bytes_per_image(ResNetConfig(hidden_size=8, image_size=32, patch_size=4), "fp32")


def test_rate_of_the_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_PROBE_FLOPS", 1e8)
    for config in (SMALL["tokenformer"], SMALL["vit"]):
        assert 1e6 < measured_image_rate(config, flops_per_image=10**8, precision="fp32") < 1e14  # what any CPU does
