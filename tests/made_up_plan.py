"""Results of a plan, as `tokenformer.plans.results.collect` gives them, to be worked out by hand."""

import dataclasses
import math
from statistics import mean, stdev
from typing import Any

from tokenformer.plans.plan import Growth, Plan, Stage, Start

RATES = [1e-3, 2e-3, 4e-3]


def run_of(
    stage: dict[str, Any], seed: int, losses: list[float], *, chosen: bool = True, **other: Any
) -> dict[str, Any]:
    """A finished run, measured at equal distances, the last time at its end. It trains 1e11 FLOPs a second."""
    before = stage["cumulative_flops"] - stage["flops"]
    steps = [stage["flops"] * (i + 1) // len(losses) for i in range(len(losses))]
    points = [
        {"tokens": 1, "flops": f, "cumulative_flops": before + f, "seconds": f / 1e11, "loss": loss}
        for f, loss in zip(steps, losses, strict=True)
    ]
    return {
        "seed": seed,
        "learning_rate": 0.002,
        "chosen": chosen,
        "eval_loss": losses[-1],
        "eval_perplexity": math.exp(losses[-1]),
        "eval_bits_per_byte": losses[-1] / 2,
        "start_loss": None,
        "measures": {},
        "seconds": stage["flops"] / 1e11,
        "cumulative_seconds": stage["cumulative_flops"] / 1e11,
        "tokens_per_second": 1000.0,
        "mfu": None,
        "threads": 1,
        "precision": "float32",
        "device": "cpu",
        "skips": [],
        "curve": [point | {"loss": point["loss"] + 0.1} for point in points],
        "held_out": [point | {"cumulative_seconds": point["cumulative_flops"] / 1e11} for point in points],
        **other,
    }


def summed(values: list[float]) -> dict[str, Any]:
    """As `collect` gives means."""
    return {
        "mean": mean(values) if values else None,
        "std": stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def results_of(plan: Plan, losses: dict[str, list[list[float]]], **changes: Any) -> dict[str, Any]:
    """Results of a plan by its stages' held-out losses, one list for each seed that is finished.

    A stage costs its tokens times its FLOPs per token: 1e7 for what is called base, 2e7 for all others.
    """
    stages: dict[str, Any] = {}
    for name, stage in plan.all_stages.items():
        before = plan.before(stage)
        chain = [*(stages[before.name]["chain"] if before else []), name]
        per_token = 10_000_000 if name == "base" else 20_000_000
        flops = per_token * (stage.tokens or 0)
        own: dict[str, Any] = {
            "label": stage.title,
            "family": plan.family(name),
            "after": before.name if before else None,
            "chain": chain,
            "baseline": stage in plan.baselines,
            "grow": vars(stage.grow) | {"noise": stage.grow.noise or 0.0} if stage.grow else None,
            "schedule": stage.schedule,
            "parameters": per_token // 5,
            "non_embedding_parameters": per_token // 6,
            "tokens": stage.tokens,
            "steps": 100,
            "sequence_length": 128,
            "flops_per_token": per_token,
            "flops": flops,
            "cumulative_tokens": (stage.tokens or 0) + (stages[before.name]["cumulative_tokens"] if before else 0),
            "cumulative_flops": flops + (stages[before.name]["cumulative_flops"] if before else 0),
        }
        runs = [run_of(own, seed, those) for seed, those in enumerate(losses.get(name, []))]
        several = len(stage.learning_rates) > 1 and runs
        own |= {
            "sweep": {f"{r:g}": losses[name][0][-1] + 100 * abs(r - 0.002) for r in stage.learning_rates if several},
            "learning_rate": 0.002 if runs else None,
            "at_edge": bool(several) and 0.002 in (min(stage.learning_rates), max(stage.learning_rates)),
            "runs": runs,
            **{
                key: summed([run[key] for run in runs])
                for key in ("eval_loss", "eval_perplexity", "seconds", "cumulative_seconds")
            },
        }
        stages[name] = own
    return {
        "title": plan.title,
        "plan": dataclasses.asdict(plan),
        "machine": {"cpu": "a processor", "cores": 2, "flags": [], "torch": "2.13.0", "commit": None, "jobs": 1},
        "complete": all(len(losses.get(name, [])) == len(plan.seeds) for name in stages),
        "missing": [
            f"{name}/seed-{seed}" for name in stages for seed in plan.seeds if seed >= len(losses.get(name, []))
        ],
        "subject": [stage.name for stage in plan.stages],
        "stages": stages,
        **changes,
    }


def stage(name: str, tokens: int = 2_000_000, **other: Any) -> Stage:
    """A stage that tries three rates."""
    return Stage(name=name, tokens=tokens, **{"learning_rate": RATES} | other)


def a_plan(*, baselines: bool = True, **other: Any) -> Plan:
    """Base (1e14 FLOPs) grown twice (4e13 each); a Transformer of 4e14 and a TokenFormer of 2e14 from scratch.

    Beside them a small Transformer (2e14), from which two larger ones are grown (4e13 each).
    """
    plan = Plan(title="Three stages", seeds=[0, 1], **other)
    plan.data.path = "data/books"
    plan.stages = [
        stage("base", 10_000_000, train=Start(qkv=128), label="small"),
        stage("medium", grow=Growth(qkv=256)),
        stage("large", grow=Growth(qkv=512)),
    ]
    if baselines:
        plan.baselines = [
            stage("transformer", 20_000_000, family="gpt_neox", train=Start(like="large"), label="Transformer"),
            stage("scratch", 10_000_000, train=Start(like="large")),
            stage("neox", 10_000_000, family="gpt_neox", train=Start(like="base")),
            stage("hyper", after="neox", grow=Growth()),
            stage("net2net", after="neox", grow=Growth(method="net2net"), label="Net2Net"),
        ]
    return plan


LOSSES = {
    "base": [[5.5, 5.0, 4.5, 4.4], [5.5, 5.0, 4.5, 4.42]],
    "medium": [[4.3, 4.2], [4.3, 4.22]],
    "large": [[4.08, 4.05], [4.10, 4.07]],
    "transformer": [[5.0, 4.5, 4.2, 4.1], [5.0, 4.5, 4.2, 4.1]],
    "scratch": [[5.0, 4.0], [5.0, 4.02]],
    "neox": [[4.5], [4.5]],
    "hyper": [[4.25], [4.3]],
    "net2net": [[4.4]],
}
