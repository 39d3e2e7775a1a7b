"""The figures of a plan's report, in the manner of the paper's Figures 3 and 4."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tokenformer.plans.quality import quality_of
from tokenformer.reports.growth.findings import (
    Results,
    chains,
    comparable,
    finished,
    flops_text,
    label,
    mean_curve,
    reached,
    runs,
    spread,
)
from tokenformer.reports.growth.tables import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SUBJECT = "#1f77b4"
_SHARED = "#7f7f7f"
_BASELINES = (
    "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#1b3a57", "#f4a582",
    "#66c2a4",
)  # fmt: skip
_DASHES: tuple[Any, ...] = ("-", "--", (0, (1, 1)))  # where there are more baselines than colours
_MARKERS = {"tokenformer": "o", "gpt_neox": "s", "vit": "s"}
_LARGEST = 380.0  # points squared, the area of the largest model


def draw_costs(results: Results, cost: str = "flops") -> "Figure | None":
    """Held-out quality over the cumulative cost of every finished stage, and over the cost of the stage alone.

    The area of a point is the number of parameters by which models are compared, error bars are standard deviations
    over seeds. Stages measured on other data than the subject's last one are left out: their figures mean something
    else.

    Args:
        results: of a plan.
        cost: flops or seconds.

    Returns:
        The figure, or None where no stage is finished.
    """
    shown = [name for name in results["stages"] if comparable(results, name)]
    if not shown:
        return None
    styles = _styles(results)
    largest = max(results["stages"][name]["non_embedding_parameters"] for name in shown)
    figure, (left, right) = _panels(results, 2)
    unit = {"flops": "training FLOPs", "seconds": "seconds of training"}[cost]
    for axes, cumulative in ((left, True), (right, False)):
        place = {name: _cost(results["stages"][name], cost, cumulative) for name in shown}
        height = {name: reached(results, name) for name in shown}
        for before, after in _steps(results):
            if before in place and after in place:
                axes.plot(
                    [place[before], place[after]],
                    [height[before]["mean"], height[after]["mean"]],
                    **styles[after],
                    linewidth=2.2 if after in results["subject"] else 1.3,
                    alpha=0.8,
                    zorder=1,
                )
        for name in shown:
            stage = results["stages"][name]
            area = _LARGEST * stage["non_embedding_parameters"] / largest
            axes.scatter(
                place[name],
                height[name]["mean"],
                s=area,
                color=styles[name]["color"],
                marker=_MARKERS[stage["family"]],
                alpha=0.8,
                edgecolors="white",
                zorder=2,
            )
            if height[name]["std"] is not None:
                axes.errorbar(
                    place[name],
                    height[name]["mean"],
                    height[name]["std"],
                    color="#222222",
                    capsize=3,
                    linewidth=1,
                    zorder=3,
                )
            if cumulative and name in results["subject"]:
                side = 1 if place[name] < 0.15 * max(place.values()) else -1  # to the left, unless the axis is there
                axes.annotate(
                    count(stage["non_embedding_parameters"]),
                    (place[name], height[name]["mean"]),
                    xytext=(side * (math.sqrt(area) / 2 + 4), 0),
                    textcoords="offset points",
                    ha="left" if side > 0 else "right",
                    va="center",
                    fontsize=8,
                    zorder=4,
                )
        axes.margins(0.14)
        _scale_axis(axes, "x", [float(x) for x in place.values()], 30)
        _scale_axis(axes, "y", [figure["mean"] for figure in height.values()], 3)
        axes.set(
            xlabel=f"{'cumulative ' if cumulative else ''}{unit}{'' if cumulative else ' of the stage alone'}",
            ylabel=f"held-out {quality_of(results).name}",
            title="All stages so far" if cumulative else "Each stage alone",
        )
    return figure


def draw_ends(results: Results) -> "Figure | None":
    """Held-out quality at the end of every line, the lowest on top; None for fewer than three."""
    from matplotlib.figure import Figure

    stages, styles = results["stages"], _styles(results)
    ends = [name for name in chains(results) if comparable(results, name)]
    if len(ends) < 3:
        return None
    ends.sort(key=lambda name: -reached(results, name)["mean"])
    figure = Figure(figsize=(11.0, 1.2 + 0.34 * len(ends)), dpi=130, layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(ends):
        stage, height = stages[name], reached(results, name)
        axes.errorbar(
            height["mean"],
            i,
            xerr=height["std"],
            color=styles[name]["color"],
            marker=_MARKERS[stage["family"]],
            capsize=3,
        )
        cost = f"{height['mean']:.2f}{quality_of(results).unit} at {flops_text(stage['cumulative_flops'])} FLOPs"
        axes.annotate(cost, (height["mean"], i), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(ends)), [_legend(results, stages[name]["chain"]) for name in ends])
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylim(-0.5, len(ends) - 0.3)
    axes.margins(x=0.12)
    axes.set(xlabel=f"held-out {quality_of(results).name}")
    _bare(axes)
    return figure


def draw_curves(results: Results, kind: str) -> "Figure | None":
    """Loss over cumulative FLOPs: all of it, and what comes after the first growing alone.

    Args:
        results: of a plan.
        kind: `held_out`, where the loss was measured on the way and right after growing; a thin line is one seed. Or
            `curve`: the training loss, smoothed.

    Returns:
        The figure, or None where no stage has a curve.
    """
    stages = results["stages"]
    shown = [name for name in stages if comparable(results, name)]
    if not any(len(run[kind]) > 1 for name in shown for run in runs(stages[name])):
        return None
    grown = [name for name in shown if stages[name]["after"]]
    curves = {name: _life(stages[name], kind) for name in shown}
    figure, panels = _panels(results, 2 if grown else 1)
    for axes in panels:
        for name in shown:
            _draw_life(axes, results, name, curves[name], kind)
        loss = f"{'held-out' if kind == 'held_out' else 'training'} loss (nats per {quality_of(results).one})"
        axes.set(xlabel="cumulative training FLOPs", ylabel=loss, title="The whole life")
    # A model from scratch begins at the logarithm of the vocabulary's size, which would flatten the rest.
    values = [loss for name in shown for loss in _after(stages[name], curves[name], 0 if name in grown else 0.1)]
    _frame(panels[0], values)
    if grown:
        begin = min(stages[name]["cumulative_flops"] - stages[name]["flops"] for name in grown)
        end = max(stages[name]["cumulative_flops"] for name in grown)
        _frame(panels[1], [loss for name in grown for loss in _after(stages[name], curves[name], 0.1)])
        panels[1].set_xlim(begin - 0.02 * (end - begin), end + 0.02 * (end - begin))
        panels[1].set_title("From the first growing on")
    return figure


def _life(stage: dict[str, Any], kind: str) -> list[tuple[int, float]]:
    """Cumulative FLOPs and loss of a stage, the mean over seeds."""
    if kind == "curve":
        return _smooth(mean_curve(stage, kind))
    start = spread(run["start_loss"] for run in runs(stage))["mean"]
    begin = [] if start is None else [(stage["cumulative_flops"] - stage["flops"], start)]
    return begin + mean_curve(stage, kind)


def _draw_life(axes: "Axes", results: Results, name: str, curve: list[tuple[int, float]], kind: str) -> None:
    stage, style, subject = results["stages"][name], _styles(results)[name], name in results["subject"]
    colour = style["color"]
    if not curve:
        return
    if kind == "held_out" and len(runs(stage)) > 1:
        for run in runs(stage):
            points = [(point["cumulative_flops"], point["loss"]) for point in run[kind]]
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.6, alpha=0.4)
    axes.plot(*zip(*curve, strict=True), **style, linewidth=2.0 if subject else 1.4, zorder=3 if subject else 2)
    before, start = curve[0]
    if kind == "held_out" and stage["after"] and before == stage["cumulative_flops"] - stage["flops"]:
        axes.plot(before, start, marker="o", markerfacecolor="white", color=colour, markersize=5, zorder=4)
        if comparable(results, stage["after"]):
            ended = results["stages"][stage["after"]]["eval_loss"]["mean"]
            axes.plot([before, before], [ended, start], color=colour, linestyle=":", linewidth=1.2)


def _after(stage: dict[str, Any], curve: list[tuple[int, float]], share: float) -> list[float]:
    """The losses once a share of the stage is over."""
    begin = stage["cumulative_flops"] - (1 - share) * stage["flops"]
    return [loss for flops, loss in curve if flops >= begin]


def _frame(axes: "Axes", values: list[float]) -> None:
    """Show these values, with a little room around them; all that is drawn where there are none."""
    if not values:
        return
    low, high = min(values), max(values)
    room = 0.05 * (high - low or 1)
    axes.set_ylim(low - room, high + room)


def draw_measures(results: Results) -> "Figure | None":
    """The loss on each of the plan's other data at the beginning and the end of every stage."""
    names = [
        other
        for other in results["plan"]["measure"]
        if any(other in run["measures"] for stage in results["stages"].values() for run in runs(stage))
    ]
    if not names:
        return None
    styles = _styles(results)
    figure, panels = _panels(results, len(names))
    for axes, other in zip(panels, names, strict=True):
        ends: dict[str, tuple[int, float]] = {}
        for name, stage in results["stages"].items():
            values = [run["measures"][other] for run in runs(stage) if other in run["measures"]]
            start, end = (spread(value[when] for value in values) for when in ("start", "end"))
            if end["mean"] is None:
                continue
            here = (stage["cumulative_flops"], end["mean"])
            ends[name] = here
            before = stage["cumulative_flops"] - stage["flops"]
            colour = styles[name]["color"]
            if start["mean"] is not None:
                axes.plot([before, here[0]], [start["mean"], here[1]], **styles[name], linewidth=1.5)
                axes.plot(before, start["mean"], marker="o", markerfacecolor="white", color=colour, markersize=5)
                if stage["after"] in ends:
                    axes.plot([before, before], [ends[stage["after"]][1], start["mean"]], color=colour, linestyle=":")
            axes.errorbar(
                *here, end["std"] or 0, color=colour, marker=_MARKERS[stage["family"]], markersize=7, capsize=3
            )
        axes.set(
            xlabel="cumulative training FLOPs",
            ylabel=f"held-out loss (nats per {quality_of(results).one})",
            title=_plain(f"Measured on {other}"),
        )
        axes.title.set_parse_math(False)
    return figure


def _panels(results: Results, number: int) -> "tuple[Figure, list[Axes]]":
    """A figure with panels side by side, and a legend of all lines of stages below."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    styles = _styles(results)
    lines = [[name for name in chain if finished(results, name)] for chain in chains(results).values()]
    shown: list[list[str]] = []
    for names in lines:
        # One that has not gone beyond what it has in common with others is no line of its own yet.
        if names and names not in shown and not any(names[-1] in other[:-1] for other in lines):
            shown.append(names)
    texts = [_legend(results, names) for names in shown]
    columns = 3 if max(map(len, texts)) < 40 else 2
    rows = math.ceil(len(texts) / columns)
    figure = Figure(figsize=(max(11.0, 5.0 * number), 4.4 + 0.22 * rows), dpi=130, layout="constrained")
    panels = list(figure.subplots(1, number, squeeze=False)[0])
    for axes in panels:
        _bare(axes)
    handles = [
        Line2D(
            [],
            [],
            **styles[names[-1]],
            marker=_MARKERS[results["stages"][names[-1]]["family"]],
            linewidth=2,
            markersize=5,
        )
        for names in shown
    ]
    legend = figure.legend(
        handles, texts, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=3.5
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a label is no formula, whatever it holds
    return figure, panels


def _bare(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def _legend(results: Results, chain: list[str]) -> str:
    """A line of stages by the names of its stages, or by the last one where that grows too long."""
    text = " → ".join(label(results, name) for name in chain)
    return _plain(text if len(text) <= 60 else label(results, chain[-1]))


def _plain(text: str) -> str:
    """matplotlib leaves labels that begin with an underscore out of legends."""
    return f" {text}" if text.startswith("_") else text


def _styles(results: Results) -> dict[str, dict[str, Any]]:
    """Colour and dashes for each stage: those of its line, or grey where several baselines have it in common."""
    lines = chains(results)
    of_line = {}
    for i, end in enumerate(list(lines)[1:]):
        again, which = divmod(i, len(_BASELINES))
        of_line[end] = {"color": _BASELINES[which], "linestyle": _DASHES[again % len(_DASHES)]}
    styles = {}
    for name in results["stages"]:
        owners = [end for end, chain in lines.items() if name in chain]
        if name in results["subject"]:
            styles[name] = {"color": _SUBJECT, "linestyle": "-"}
        else:
            styles[name] = of_line[owners[0]] if len(owners) == 1 else {"color": _SHARED, "linestyle": "-"}
    return styles


def _steps(results: Results) -> Iterator[tuple[str, str]]:
    """Each stage and the one before it."""
    for name, stage in results["stages"].items():
        if stage["after"]:
            yield stage["after"], name


def _cost(stage: dict[str, Any], cost: str, cumulative: bool) -> float:
    key = f"cumulative_{cost}" if cumulative else cost
    value = stage[key]
    return float(value["mean"] if isinstance(value, dict) else value)


def _smooth(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Trailing mean over a fortieth of the curve, which leaves the first points of a stage where they are."""
    window = max(1, len(curve) // 40)
    losses = [loss for _, loss in curve]
    return [
        (flops, sum(losses[max(0, i + 1 - window) : i + 1]) / len(losses[max(0, i + 1 - window) : i + 1]))
        for i, (flops, _) in enumerate(curve)
    ]


def _scale_axis(axes: "Axes", which: str, values: list[float], ratio: float) -> None:
    """A logarithmic axis where the values differ by more than `ratio`; else a linear one, from 0 for costs."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    if min(values) > 0 and max(values) / min(values) > ratio:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        if which == "y":
            axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.set_major_formatter("{x:.4g}")
        axis.set_minor_formatter(NullFormatter())
    elif which == "x":
        axes.set_xlim(left=0)
