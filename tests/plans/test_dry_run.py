"""The estimates of a dry run against what torch keeps and writes, and its sums against sums by hand."""

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig

from tokenformer import TokenFormerConfig, cli
from tokenformer.baselines import transformer_config
from tokenformer.cli.run import parse
from tokenformer.data import prepare
from tokenformer.errors import UserError
from tokenformer.plans import estimate
from tokenformer.plans.dry_run import dry_run
from tokenformer.plans.estimate import block_bytes_per_token, checkpoint_bytes, training_memory

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def _tokenformer(vocabulary: int, width: int, layers: int, length: int, *segments: tuple[int, int, int]) -> Any:
    names = ["base", *(f"grown{i}" for i in range(1, len(segments)))]
    return TokenFormerConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        segments=[
            {"name": name, "qkv": qkv, "output": output, "ffn": ffn}
            for name, (qkv, output, ffn) in zip(names, segments, strict=True)
        ],
        max_position_embeddings=length,
    )


def _transformer(vocabulary: int, width: int, layers: int, length: int, ffn: int) -> Any:
    return transformer_config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=ffn,
        max_position_embeddings=length,
    )


def _autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    dtype = DTYPES[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def _peak(model: Any, optimizer: torch.optim.Optimizer, rows: int, precision: str) -> int:
    """Bytes at the peak of a training step, by torch's own tracker."""
    config = model.config
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for _ in range(2):  # in the second step gradients and moments are there
            ids = torch.randint(config.vocab_size, (rows, config.max_position_embeddings))
            with _autocast(precision):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            tracker.reset_mod_stats()
        return sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())


# Memory


SMALL = {
    "tokenformer": _tokenformer(640, 96, 3, 96, (48, 56, 192)),
    "grown": _tokenformer(640, 96, 3, 96, (48, 56, 192), (50, 30, 100), (20, 20, 80)),
    "many tokens": _tokenformer(320, 32, 4, 64, (500, 400, 2000)),
    "transformer": _transformer(640, 96, 3, 96, 300),
}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_activations_are_the_tensors_that_autograd_saves(config: PreTrainedConfig, precision: str) -> None:
    model = AutoModelForCausalLM.from_config(config).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    ids = torch.randint(config.vocab_size, (2, config.max_position_embeddings))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _autocast(precision):
        model(input_ids=ids, labels=ids, use_cache=False)
    kept = sum(storage.nbytes() for storage in saved.values())
    if precision == "bf16":  # the copies of weights, which the estimate counts as weights
        kept -= 2 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    h = 4 if precision == "fp32" else 2
    head = (4 + h) * config.hidden_size + 4 * config.vocab_size
    estimated = ids.numel() * (config.num_hidden_layers * block_bytes_per_token(config, precision) + head)
    assert estimated == pytest.approx(kept, rel=0.05)


GROWN = _tokenformer(50304, 768, 2, 1024, (2140, 2140, 8560), (6480, 6480, 25920))
WIDE = _transformer(50304, 1536, 2, 1024, 6144)
FEW_WORDS = _tokenformer(4096, 256, 2, 512, (512, 512, 2048))
LARGE = {
    "354M, two layers": (_tokenformer(50304, 768, 2, 1024, (2140, 2140, 8560)), 4, "fp32", False),
    "1.4B, grown, two layers": (GROWN, 2, "bf16", False),
    "1.4B, grown, two layers, recomputed": (GROWN, 2, "bf16", True),
    "354M, two layers, weights": (_tokenformer(50304, 768, 2, 1024, (2140, 2140, 8560)), 4, "fp32", "weights"),
    "1.4B, grown, two layers, weights": (GROWN, 2, "bf16", "weights"),
    "small vocabulary, weights": (FEW_WORDS, 16, "bf16", "weights"),
    "transformer, two layers": (WIDE, 4, "bf16", False),
    "transformer, two layers, recomputed": (WIDE, 4, "fp32", True),
    "small vocabulary, recomputed": (FEW_WORDS, 16, "fp32", True),
}


@pytest.mark.parametrize(("config", "rows", "precision", "recomputed"), LARGE.values(), ids=LARGE)
def test_memory_is_the_peak_of_a_training_step(
    config: PreTrainedConfig, rows: int, precision: str, recomputed: bool | str
) -> None:
    """At real sizes, with tensors that take no memory: torch's own tracker counts what would be alive."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # which would write to them
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config).train()
        if recomputed == "weights":
            model.set_recompute()
        elif recomputed:
            # transformers 5.21 renamed the method.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        peak = _peak(model, torch.optim.AdamW(model.parameters(), foreach=False), rows, precision)
    total = sum(p.numel() for p in model.parameters())
    memory = training_memory(
        config,
        parameters=total,
        non_embedding_parameters=total - model.get_input_embeddings().weight.numel(),
        rows=rows,
        sequence_length=config.max_position_embeddings,
        precision=precision,
        gradient_checkpointing=recomputed is True,
        recompute=recomputed == "weights",
    )
    assert memory.moments == 2 * memory.gradients == 8 * total
    # Where the blocks of a Transformer are recomputed, the peak lies among short-lived gradients, not estimated.
    is_transformer = recomputed is True and config.model_type == "gpt_neox"
    assert memory.total == pytest.approx(peak, rel=0.15 if is_transformer else 0.02)


SAVING = [
    options
    for count in range(4)
    for options in itertools.combinations(("gradient_checkpointing", "recompute", "fused_loss"), count)
]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("saving", SAVING, ids="+".join)
@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (_tokenformer(16384, 128, 2, 128, (128, 128, 512)), 8),
        (_tokenformer(512, 64, 4, 128, (512, 512, 4096)), 4),
        (_tokenformer(4096, 192, 3, 128, (192, 192, 768), (100, 80, 900)), 4),
    ],
    ids=["large vocabulary", "many tokens", "grown"],
)
def test_what_saves_memory_saves_as_much(
    config: PreTrainedConfig, rows: int, saving: tuple[str, ...], precision: str
) -> None:
    """Forward and backward pass alone: a step of the optimizer may need more, which `adamw_torch_fused` does not."""
    model = AutoModelForCausalLM.from_config(config).train()
    if "gradient_checkpointing" in saving:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if "recompute" in saving:
        model.set_recompute()
    model.fused_loss = "fused_loss" in saving
    peak = _peak(model, torch.optim.AdamW(model.parameters(), fused=True), rows, precision)
    total = sum(p.numel() for p in model.parameters())
    memory = training_memory(
        config,
        parameters=total,
        non_embedding_parameters=total - model.get_input_embeddings().weight.numel(),
        rows=rows,
        sequence_length=config.max_position_embeddings,
        precision=precision,
        **dict.fromkeys(saving, True),
    )
    assert memory.total == pytest.approx(peak, rel=0.03)


def test_no_estimate_for_other_kinds_of_model() -> None:
    with pytest.raises(ValueError, match="gpt2"):
        block_bytes_per_token(GPT2Config(), "fp32")


def test_checkpoint_has_the_size_of_its_files(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(_tokenformer(4096, 256, 2, 64, (256, 256, 1024)))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert checkpoint_bytes(model.num_parameters()) == pytest.approx(written, rel=0.02)


# Plans


PLAN: dict[str, Any] = {
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "rotary_pct": 0.5},
    "training": {"batch_size": 4, "micro_batch_size": 2, "save_every": 10, "keep_checkpoints": 2, "precision": "fp32"},
    "optimizer": {"warmup": 0.1},
    "seeds": [0, 1, 2],
    "assumed": {"vocab_size": 320, "sequence_length": 32},
    "stages": [
        {
            "name": "base",
            "train": {"qkv": 16, "output": 16, "ffn": 48},
            "tokens": 12_800,
            "learning_rate": [1e-3, 3e-3],
        },
        {
            "name": "large",
            "grow": {"qkv": 32, "output": 32, "ffn": 96},
            "tokens": 3200,
            "learning_rate": [1e-3, 2e-3, 4e-3],
        },
    ],
    "baselines": [{"name": "scratch", "train": {"like": "large"}, "tokens": 6400, "seeds": [0]}],
}


@pytest.fixture
def write_plan(tmp_path: Path) -> Any:
    """Writes PLAN with some fields changed; returns its path."""

    def write(**fields: Any) -> str:
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({**PLAN, "data": {"path": str(tmp_path / "none")}, **fields}), encoding="utf-8")
        return str(path)

    return write


def test_costs_by_hand(write_plan: Any) -> None:
    report = dry_run(parse([write_plan()])[0], gpu="h100", mfu=0.5)
    assert report["rate"] == {
        "device": "H100",
        "peak": 989e12,
        "flops_per_second": 989e12 / 2,
        "how": "assumed",
        "mfu": 0.5,
    }
    base, large, scratch = report["stages"].values()
    tokens = 2 * 2 * 32 * (4 * 16 + 48)  # keys and values, layers, channels
    assert base["non_embedding_parameters"] == tokens + 64
    flops = 3 * (2 * (tokens + 320 * 32) + 4 * 2 * 32 * 32)
    assert (base["flops_per_token"], base["flops"]) == (flops, 12_800 * flops)
    assert (base["steps"], large["steps"], base["warmup_steps"]) == (100, 25, 10)
    assert [row["runs"] for row in (base, large, scratch)] == [2 + 2, 3 + 2, 1]  # the first seed tries all rates
    assert large["cumulative_flops"] == base["flops"] + large["flops"]
    assert large["hours"] == pytest.approx(large["flops"] / (0.5 * 989e12) / 3600)
    assert large["non_embedding_parameters"] == scratch["non_embedding_parameters"] == 2 * tokens + 64
    totals = report["totals"]
    assert (totals["runs"], totals["tokens"]) == (10, 4 * 12_800 + 5 * 3200 + 6400)
    assert totals["flops"] == 4 * base["flops"] + 5 * large["flops"] + scratch["flops"]
    assert totals["hours"] == pytest.approx(totals["flops"] / (0.5 * 989e12) / 3600)
    assert totals["memory"] == max(row["memory"]["total"] for row in report["stages"].values())


def test_disk_by_hand(write_plan: Any) -> None:
    report = dry_run(parse([write_plan()])[0])
    base, large, scratch = report["stages"].values()
    checkpoint = 12 * base["parameters"]
    assert base["checkpoint_bytes"] == checkpoint
    assert base["disk_bytes"] == 3 * (2 * checkpoint + checkpoint / 3)  # seeds, each with two checkpoints and a model
    checkpoint = 12 * large["parameters"]
    assert large["disk_bytes"] == 3 * (2 * checkpoint + 2 * checkpoint / 3)  # and what it was grown to at first
    widest = 2 * (2 * checkpoint + checkpoint / 3) + checkpoint  # two more rates, and one checkpoint half written
    assert report["totals"]["disk_bytes"] == sum(row["disk_bytes"] for row in (base, large, scratch)) + widest


def test_carried_moments_are_on_disk_too(write_plan: Any) -> None:
    stages = [PLAN["stages"][0], {**PLAN["stages"][1], "grow": {**PLAN["stages"][1]["grow"], "optimizer": "carried"}}]
    fresh = dry_run(parse([write_plan()])[0])
    carried = dry_run(parse([write_plan(stages=stages)])[0])
    parameters = fresh["stages"]["large"]["parameters"]
    more = carried["stages"]["large"]["disk_bytes"] - fresh["stages"]["large"]["disk_bytes"]
    assert more == 3 * 8 * parameters


def test_continued_schedule_warms_up_once(write_plan: Any) -> None:
    stages = [PLAN["stages"][0], {**PLAN["stages"][1], "schedule": "continue"}]
    rows = dry_run(parse([write_plan(stages=stages, baselines=[])])[0])["stages"]
    assert rows["base"]["warmup_steps"] == 12  # a tenth of the 125 steps of both
    assert rows["large"]["warmup_steps"] == 0


def test_given_rate_stands_for_peak_and_share(write_plan: Any) -> None:
    plan = parse([write_plan()])[0]
    on_gpu, on_cpu = dry_run(plan, gpu="A100", rate=78e12), dry_run(plan, gpu="cpu", rate=1e11)
    assert (on_gpu["rate"]["how"], on_gpu["rate"]["mfu"]) == ("given", 0.25)
    assert on_gpu["totals"]["hours"] == pytest.approx(on_gpu["totals"]["flops"] / 78e12 / 3600)
    assert on_cpu["rate"] == {"device": "cpu", "peak": None, "flops_per_second": 1e11, "how": "given", "mfu": None}


def test_rate_of_the_cpu_is_measured(write_plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_PROBE_FLOPS", 1e8)
    report = dry_run(parse([write_plan()])[0], gpu="cpu")
    assert report["rate"]["how"] == "measured"
    assert 1e6 < report["rate"]["flops_per_second"] < 1e14  # what any CPU does
    assert report["totals"]["hours"] * 3600 * report["rate"]["flops_per_second"] == pytest.approx(
        report["totals"]["flops"]
    )


def test_data_that_are_there_are_used(write_plan: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    words = "growing appends new key value tokens to each layer and keeps the old ones"
    text.write_text("\n".join(json.dumps({"text": f"{words} {i} " * 4}) for i in range(80)), encoding="utf-8")
    folder = tmp_path / "data"
    prepare([str(text)], tokenizer="train:280", out=str(folder), sequence_length=16, held_out=0.1, progress=False)
    report = dry_run(parse([write_plan(data={"path": str(folder)})])[0])
    assert report["assumed"] is None
    base = report["stages"]["base"]
    assert base["sequence_length"] == 16
    assert base["parameters"] - base["non_embedding_parameters"] == 320 * 32  # the vocabulary in whole 64s
    assert base["steps"] == 12_800 / (4 * 16)


def test_command_shows_the_table_and_writes_the_figures(
    write_plan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = write_plan()
    assert cli.main(["run", plan, "--dry-run", "--gpu", "H100", "--json", str(tmp_path / "cost.json")]) == 0
    shown = capsys.readouterr().out
    assert json.loads((tmp_path / "cost.json").read_text(encoding="utf-8")) == dry_run(parse([plan])[0], gpu="H100")
    # parameters: 14336 in tokens, twice that when grown; 10240 in the embedding, 64 in the norm
    rows = [line.split() for line in shown.splitlines()]
    assert ["base", "24.64k", "14.4k", "12.8k", "100"] in [row[:5] for row in rows]
    assert ["large", "base", "38.98k", "28.74k", "3.2k", "25"] in [row[:6] for row in rows]
    assert "0.4 of its peak (MFU), which is an assumption" in shown
    assert f"none at {tmp_path / 'none'}" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cost.json", "plan.yaml"]


WRONG: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "accelerator": ({}, ["--gpu", "h1000"], ["unknown accelerator 'h1000'", "H100", "cpu"]),
    "share of the peak": ({}, ["--mfu", "1.4"], ["mfu must lie in (0, 1]", "1.4"]),
    "shrinking": (
        {"stages": [PLAN["stages"][0], {"name": "large", "grow": {"qkv": 8}, "tokens": 3200}]},
        [],
        ["stage 'large'", "qkv", "8", "16", "shrink"],
    ),
    "budget": (
        {"stages": [{**PLAN["stages"][0], "tokens": 100}], "baselines": []},
        [],
        ["stage 'base'", "100 tokens", "one step"],
    ),
}


@pytest.mark.parametrize(("fields", "words", "said"), WRONG.values(), ids=WRONG)
def test_wrong_plan_is_named_and_nothing_is_written(
    write_plan: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    words: list[str],
    said: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", write_plan(**fields), "--dry-run", "--json", "cost.json", *words]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert all(part in error for part in said), error
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_rate_must_be_a_speed(write_plan: Any) -> None:
    with pytest.raises(UserError, match="rate must be positive and finite, got 0"):
        dry_run(parse([write_plan()])[0], rate=0)
