"""The tables of a plan's report, for page, terminal and Markdown alike."""

from dataclasses import dataclass, field
from typing import Any

from tokenformer.plans.quality import quality_of
from tokenformer.reports.growth.findings import (
    Results,
    Spread,
    change_in_words,
    comparisons,
    data_of,
    flops_text,
    label,
    planned,
    reached,
    runs,
    spread,
)

NONE = "-"


@dataclass
class Table:
    """Cells as text, and which of them are set in bold, as (row, column)."""

    title: str
    header: list[str]
    rows: list[list[str]]
    bold: set[tuple[int, int]] = field(default_factory=set)
    note: str = ""


def all_tables(results: Results) -> list[Table]:
    """Every table that has something to say."""
    made = (comparison_table, quality_table, cost_table, measure_table, sweep_table, recipe_table)
    return [table for table in (make(results) for make in made) if table.rows]


def comparison_table(results: Results) -> Table:
    """The subject's last stage against the end of every baseline."""
    quality = quality_of(results)
    rows = []
    for found in comparisons(results):
        reaches = [
            "never" if found[who] is None else f"{100 * found[who]['share']:.0f} %"
            for who in ("subject_reaches", "baseline_reaches")
        ]
        rows.append(
            [
                label(results, found["baseline"]),
                plus_minus(found[quality.key], 2),
                change_in_words(results, found),
                f"{found['non_embedding_parameters']:.3f}",
                f"{found['flops']:.3f}",
                f"{found['stage_flops']:.3f}",
                NONE if found["seconds"] is None else f"{found['seconds']:.3f}",
                *reaches,
            ]
        )
    end = label(results, results["subject"][-1])
    header = ["baseline", quality.name, f"{end} is", "parameters", "FLOPs", "FLOPs of the last stage", "seconds"]
    return Table(
        f"{end} against every baseline",
        [*header, f"reaches its {quality.words} at", "it reaches this at"],
        rows,
        note=(
            f"Parameters ({quality.parameters}), FLOPs and seconds: those of {end} as a multiple of the baseline's, "
            "cumulative over stages. The last two columns: the first measurement at or below the other's final "
            f"{quality.words}, as a share of the baseline's FLOPs; first {end} on its way, then the baseline on its "
            "own."
        ),
    )


def quality_table(results: Results) -> Table:
    """What every stage reached."""
    quality = quality_of(results)
    rows = []
    for name, stage in results["stages"].items():
        done = runs(stage)
        rate = stage["learning_rate"]
        rows.append(
            [
                label(results, name),
                f"{len(done)} of {len(seeds_of(results, name))}",
                count(stage["non_embedding_parameters"]),
                flops_text(stage["cumulative_flops"]),
                NONE if rate is None else f"{rate:g}{' (edge)' if stage['at_edge'] else ''}",
                plus_minus(spread(run["start_loss"] for run in done), 3),
                plus_minus(stage["eval_loss"], 4),
                plus_minus(reached(results, name), 2),
                plus_minus(spread(run[f"eval_{quality.second_key}"] for run in done), quality.second_digits),
            ]
        )
    return Table(
        "What every stage reached",
        [
            "stage",
            "seeds",
            "parameters",
            "cumulative FLOPs",
            "learning rate",
            "start loss",
            "held-out loss",
            quality.name,
            quality.second,
        ],
        rows,
        note=f"Parameters {quality.parameters}. Losses in nats per {quality.one}, on held-out {quality.measured_on}; "
        "the start loss is that right after growing, before any step. ± is the sample standard deviation over seeds.",
    )


def cost_table(results: Results) -> Table:
    """What every stage cost, alone and with all stages before it."""
    counted = quality_of(results).counted
    rows = []
    for name, stage in results["stages"].items():
        speed = spread(run[f"{counted}_per_second"] for run in runs(stage))["mean"]
        utilisation = spread(run["mfu"] for run in runs(stage))["mean"]
        rows.append(
            [
                label(results, name),
                count(stage["parameters"]),
                f"{stage[counted]:,}",
                f"{stage[f'cumulative_{counted}']:,}",
                flops_text(stage["flops"]),
                flops_text(stage["cumulative_flops"]),
                *(_seconds(stage[key]) for key in ("seconds", "cumulative_seconds")),
                NONE if speed is None else f"{speed:,.0f}",
                NONE if utilisation is None else f"{100 * utilisation:.1f} %",
            ]
        )
    return Table(
        "What every stage cost",
        [
            "stage",
            "all parameters",
            counted,
            "cumulative",
            "FLOPs",
            "cumulative",
            "seconds",
            "cumulative",
            f"{counted}/s",
            "MFU",
        ],
        rows,
    )


def measure_table(results: Results) -> Table:
    """The losses on other data before and after each stage: what was learned of it, and what forgotten."""
    rows = []
    names = list(results["plan"]["measure"])
    for name, stage in results["stages"].items():
        done = [run for run in runs(stage) if run["measures"]]
        if not done:
            continue
        cells = []
        for other in names:
            start, end = (spread(run["measures"].get(other, {}).get(when) for run in done) for when in ("start", "end"))
            known = start["mean"] is not None and end["mean"] is not None
            cells += [
                plus_minus(start, 4),
                plus_minus(end, 4),
                f"{end['mean'] - start['mean']:+.4f}" if known else NONE,
            ]
        rows.append([label(results, name), data_of(results, name), *cells])
    header = [f"{other}: {what}" for other in names for what in ("start", "end", "change")]
    return Table(
        "Measured on other data",
        ["stage", "trained on", *header],
        rows,
        note=f"Held-out loss in nats per {quality_of(results).one} before and after the stage; a change above zero is "
        "what was forgotten, one below zero what was learned.",
    )


def sweep_table(results: Results) -> Table:
    """Every learning rate tried, with its loss; the best of each stage in bold."""
    stages = results["stages"]
    rates = sorted({float(rate) for name in stages for rate in (*rates_of(results, name), *stages[name]["sweep"])})
    rows, bold = [], set()
    for row, (name, stage) in enumerate(stages.items()):
        losses = {float(rate): loss for rate, loss in stage["sweep"].items()}
        known = {rate: loss for rate, loss in losses.items() if loss is not None}
        if known:
            bold.add((row, 1 + rates.index(min(known, key=lambda rate: known[rate]))))
        cells = [("" if rate not in losses else _loss(losses[rate])) for rate in rates]
        rows.append([label(results, name), *cells, sweep_in_words(results, name)])
    return Table(
        "Learning rates",
        ["stage", *(f"{rate:g}" for rate in rates), "remark"],
        rows,
        bold,
        note=f"Held-out loss in nats per {quality_of(results).one}, first seed; the best of each stage in bold.",
    )


def recipe_table(results: Results) -> Table:
    """How every stage begins, and what it sets otherwise than the plan."""
    rows = []
    for name, stage in results["stages"].items():
        plan = planned(results, name)
        after = label(results, stage["after"]) if stage["after"] else NONE
        own = _settings(plan["optimizer"] | plan["training"]) or NONE
        rows.append(
            [label(results, name), stage["family"], after, *_beginning(stage, plan["train"]), stage["schedule"], own]
        )
    return Table(
        "How every stage begins",
        [
            "stage",
            "family",
            "after",
            "size",
            "keys or method",
            "scale",
            "noise",
            "old tokens",
            "optimizer state",
            "schedule",
            "settings of its own",
        ],
        rows,
        note="Old tokens: their learning rate, as a multiple of the stage's; 0 is frozen.",
    )


def sweep_in_words(results: Results, name: str) -> str:
    """Whether a stage's learning rate was searched for, and whether the search had room on both sides."""
    stage, wanted = results["stages"][name], rates_of(results, name)
    tried, rate = len(stage["sweep"]), stage["learning_rate"]
    if len(wanted) == 1:
        return f"one rate, {wanted[0]:g}, not searched for"
    if tried < len(wanted):
        return f"unfinished: {tried} of {len(wanted)} tried"
    if stage["at_edge"]:
        side, beyond = ("least", "lower") if rate == min(wanted) else ("greatest", "higher")
        return f"{rate:g} is the {side} of those tried: a {beyond} one may be better"
    return f"{rate:g}, between others"


def rates_of(results: Results, name: str) -> list[float]:
    """The learning rates that the plan gives a stage."""
    given = planned(results, name)["learning_rate"]
    return list(given) if isinstance(given, list | tuple) else [given]


def seeds_of(results: Results, name: str) -> list[int]:
    """The seeds that the plan gives a stage."""
    own = planned(results, name)["seeds"]
    return list(results["plan"]["seeds"] if own is None else own)


def plus_minus(figure: Spread, digits: int) -> str:
    """Such as `104.21 ± 0.35`."""
    if figure["mean"] is None:
        return NONE
    error = "" if figure["std"] is None else f" ± {figure['std']:.{digits}f}"
    return f"{figure['mean']:,.{digits}f}{error}"


def _seconds(figure: Spread) -> str:
    return plus_minus(figure, 1 if (figure["mean"] or 0) < 100 else 0)


def count(parameters: int) -> str:
    """Such as `8.13 M`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)


def _beginning(stage: dict[str, Any], train: dict[str, Any] | None) -> list[str]:
    """Size, keys or method, scale, noise, learning rate of old tokens and optimizer state."""
    grow = stage["grow"]
    if not grow:
        return [_settings(train or {}) or NONE, *([NONE] * 5)]
    size = {name: grow[name] for name in ("like", "qkv", "output", "ffn", "hidden_size", "intermediate_size")}
    if stage["family"] == "gpt_neox":
        how, scale = grow["method"], NONE
    else:
        how = grow["keys"]
        scale = grow["scale"] + (f" over {grow['anneal']:g}" if grow["scale"] == "anneal" else "")
    noise = f"{grow['noise']:g}"
    return [_settings(size) or NONE, how, scale, noise, f"{grow['old_tokens']:g}", grow["optimizer"]]


def _loss(loss: float | None) -> str:
    return "failed" if loss is None else f"{loss:.4f}"


def _settings(values: dict[str, Any]) -> str:
    shown = {name: value for name, value in values.items() if value is not None}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )
