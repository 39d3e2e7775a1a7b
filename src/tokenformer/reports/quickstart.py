"""The quickstart's report: report.json, growth.png and report.html."""

import json
from pathlib import Path
from typing import Any

from tokenformer.folders import saving, write_atomically
from tokenformer.reports.page import Page

_COLOURS = {"base": "#7f7f7f", "grown": "#1f77b4", "scratch": "#d62728"}
_NAMES = {"base": "small", "grown": "small, then grown", "scratch": "grown size from scratch"}


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.json, growth.png and report.html into `folder`."""
    write_atomically(folder / "report.json", json.dumps(report, indent=2) + "\n")
    with saving(folder):
        draw_growth(report, folder / "growth.png")
    write_atomically(folder / "report.html", _page(report, folder / "growth.png"))


def answer(report: dict[str, Any]) -> str:
    """What came out, in one sentence, whichever way it came out."""
    grown, scratch = (report["models"][name]["eval_perplexity"] for name in ("grown", "scratch"))
    difference = 100 * (grown / scratch - 1)
    if abs(difference) < 0.5:
        verdict = "equal within half a percent"
    else:
        verdict = f"{abs(difference):.1f} % {'lower (better)' if difference < 0 else 'higher (worse)'} when grown"
    saved = _flops_to_reach(report)
    tail = ""
    if saved is not None:
        tail = f" The model from scratch reached the grown one's training loss after {saved:.0%} of its FLOPs."
    return (
        f"For the same total training FLOPs, held-out perplexity is {grown:.2f} grown and {scratch:.2f} from scratch: "
        f"{verdict}.{tail}"
    )


def draw_growth(report: dict[str, Any], path: Path) -> None:
    """Loss over cumulative training FLOPs, and held-out perplexity over the FLOPs of each model's life."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    for stage, name in _NAMES.items():
        flops, losses = _curve(report, stage)
        curves.plot(flops, losses, color=_COLOURS[stage], label=name, linewidth=1.6)
    grown_at = report["cumulative_flops"]["base"]
    curves.axvline(grown_at, color="#bbbbbb", linestyle=":", linewidth=1)
    top = curves.get_ylim()[1]
    curves.annotate("grown here", (grown_at, top), xytext=(4, -12), textcoords="offset points", fontsize=9)
    curves.set(xlabel="cumulative training FLOPs", ylabel="training loss (nats per token)", title="Training")
    curves.set_yscale("log")
    curves.yaxis.set_major_formatter("{x:.3g}")
    curves.yaxis.set_minor_formatter("{x:.2g}")
    curves.legend(frameon=False)

    for stage, name in _NAMES.items():
        model = report["models"][stage]
        x, y = report["cumulative_flops"][stage], model["eval_perplexity"]
        ends.scatter(x, y, s=model["parameters"] / 8000, color=_COLOURS[stage], alpha=0.75, edgecolors="white")
        ends.annotate(
            f"{name}\n{model['parameters'] / 1e6:.1f} M parameters, {y:.1f}",
            (x, y),
            xytext=(-10 if x > grown_at else 14, 16 if stage != "grown" else -30),
            textcoords="offset points",
            ha="right" if x > grown_at else "left",
            fontsize=9,
        )
    ends.margins(0.35, 0.35)
    ends.set(xlabel="cumulative training FLOPs", ylabel="perplexity", title="Held-out text (area: parameters)")
    for axes in (curves, ends):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.savefig(path)


def _curve(report: dict[str, Any], stage: str) -> tuple[list[float], list[float]]:
    """FLOPs and training loss, the grown model's counted from where the small one ended."""
    offset = report["cumulative_flops"]["base"] if stage == "grown" else 0
    lines = [line for line in report["curves"][stage] if "loss" in line]
    return [offset + line["flops"] for line in lines], [line["loss"] for line in lines]


def _flops_to_reach(report: dict[str, Any], window: int = 5) -> float | None:
    """Share of its FLOPs after which the from-scratch loss (mean of `window` logs) is at the grown model's last one."""
    _, grown = _curve(report, "grown")
    flops, scratch = _curve(report, "scratch")
    if len(grown) < window or len(scratch) < window:
        return None
    target = sum(grown[-window:]) / window
    for i in range(window, len(scratch) + 1):
        if sum(scratch[i - window : i]) / window <= target:
            return flops[i - 1] / flops[-1]
    return None


def _page(report: dict[str, Any], picture: Path) -> str:
    page = Page("TokenFormer: grown against trained from scratch")
    corpus, machine = report["corpus"], report["machine"]
    page.text(answer(report), "answer")
    page.figure(
        picture, "Left: training loss over cumulative FLOPs. Right: held-out perplexity of the finished models."
    )
    page.heading("The three models")
    best = min(("grown", "scratch"), key=lambda name: report["models"][name]["eval_perplexity"])
    page.table(
        [
            "model",
            "parameters",
            "tokens",
            "FLOPs",
            "cumulative",
            "seconds",
            "learning rate",
            "perplexity",
            "bits/byte",
        ],
        [
            [
                _NAMES[stage],
                f"{model['parameters'] / 1e6:.2f} M",
                f"{model['tokens']:,}",
                f"{model['flops']:.3g}",
                f"{report['cumulative_flops'][stage]:.3g}",
                f"{model['seconds']:.0f}",
                f"{model['learning_rate']:g}",
                f"{model['eval_perplexity']:.2f}",
                f"{model['eval_bits_per_byte']:.3f}",
            ]
            for stage, model in report["models"].items()
        ],
        best=list(report["models"]).index(best),
    )
    unchanged = report["grown_before_training"]["difference_from_base"]
    page.text(
        f"Growing itself changed the held-out loss by {unchanged:.1e} nats: new keys are zero and the scale is kept, "
        "so the grown model begins as the function that the small one had become."
    )
    page.heading("How fair is it?")
    sweep = report["sweep"]["held_out_loss"]
    page.text(
        "Each model uses the learning rate of least held-out loss in a sweep of its own (below, nats per token), run "
        f"with seed {report['sweep']['seed']}, so on another held-out split than this report's ({report['seed']}). "
        "Same data, batch size, schedule (linear warm-up, cosine to a tenth) and evaluation for all. This is one seed "
        "of a tiny model on little text: it shows the mechanism, not what growing saves at scale."
    )
    rates = sorted({rate for losses in sweep.values() for rate in losses}, key=float)
    page.table(
        ["learning rate", *rates],
        [[_NAMES[s], *(f"{sweep[s][r]:.4f}" if r in sweep[s] else "-" for r in rates)] for s in _NAMES],
    )
    page.heading("Samples")
    for stage, name in _NAMES.items():
        page.text(name, "note")
        page.code(report["samples"]["prompt"] + report["samples"][stage])
    page.heading("On what")
    train, held_out = corpus["splits"]["train"], corpus["splits"]["held_out"]
    run = report["models"]["base"]
    page.text(
        f"{corpus['what']}: {train['documents']} files ({train['bytes'] / 1e6:.1f} MB) for training, "
        f"{held_out['documents']} files ({held_out['bytes'] / 1e6:.2f} MB) held out. {machine['cpu']}, "
        f"{run['threads']} threads, {run['precision']}, torch {machine['torch']}, Python {machine['python']}; "
        f"{report['seconds']:.0f} seconds in all. Every figure is in report.json beside this page."
    )
    return page.html()
