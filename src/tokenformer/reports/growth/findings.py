"""What the results of a plan say: who is compared with whom, at which cost, and whether the seeds allow to tell.

`results` is everywhere what `tokenformer.plans.results.collect` returns.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import fmean, stdev
from typing import Any

from tokenformer.plans.quality import quality_of

Results = dict[str, Any]
Spread = dict[str, Any]  # mean, std (None for a single seed) and n


def spread(values: Iterable[float | None]) -> Spread:
    """Mean and sample standard deviation of what is there."""
    known = [value for value in values if value is not None]
    return {
        "mean": fmean(known) if known else None,
        "std": stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def label(results: Results, name: str) -> str:
    """What the report calls a stage, on one line."""
    return " ".join((results["stages"][name].get("label") or name).split())


def labels(results: Results, names: Iterable[str]) -> str:
    """Several of them, as words of a sentence."""
    return ", ".join(label(results, name) for name in names)


def runs(stage: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished runs with the chosen learning rate, one for each seed."""
    return [run for run in stage["runs"] if run["chosen"]]


def finished(results: Results, name: str) -> bool:
    """Whether a stage has at least one run to show."""
    return bool(runs(results["stages"][name]))


def planned(results: Results, name: str) -> dict[str, Any]:
    """A stage as the plan has it."""
    plan = results["plan"]
    found: dict[str, Any] = next(stage for stage in (*plan["stages"], *plan["baselines"]) if stage["name"] == name)
    return found


def data_of(results: Results, name: str) -> str:
    """The prepared folder, or the images, that a stage is trained and measured on."""
    data = results["plan"]["data"]
    found: str = planned(results, name)["data"] or data.get("path") or data["train"]
    return found


def reached(results: Results, name: str) -> Spread:
    """How good a stage is at its end, over seeds; lower is better."""
    found: Spread = results["stages"][name][f"eval_{quality_of(results).key}"]
    return found


def reached_at(results: Results, point: dict[str, Any]) -> float:
    """How good a run is at a point of its held-out curve."""
    # Of language models the perplexity follows from the loss; the error of others does not.
    return float(point.get(f"eval_{quality_of(results).key}", math.exp(point["loss"])))


def chains(results: Results) -> dict[str, list[str]]:
    """Every line of stages that is compared, by its last one: the subject, then the baselines nothing comes after."""
    stages = results["stages"]
    went_on = {stage["after"] for stage in stages.values()}
    ends = [results["subject"][-1]]
    ends += [name for name, stage in stages.items() if stage["baseline"] and name not in went_on]
    return {end: stages[end]["chain"] for end in ends}


def comparable(results: Results, name: str) -> bool:
    """Whether a stage is finished and measured on the same text as the subject's last one."""
    return finished(results, name) and data_of(results, name) == data_of(results, results["subject"][-1])


def mean_curve(
    stage: dict[str, Any], curve: str, of: Callable[[dict[str, Any]], float] = lambda point: float(point["loss"])
) -> list[tuple[int, float]]:
    """Cumulative FLOPs and the mean over seeds of what `of` takes from a point, where every seed has one.

    Args:
        stage: of the results.
        curve: `curve`, the training loss, or `held_out`.
        of: the loss if not given.
    """
    values: dict[int, list[float]] = defaultdict(list)
    for run in runs(stage):
        for point in run[curve]:
            values[point["cumulative_flops"]].append(of(point))
    count = len(runs(stage))
    return sorted((flops, fmean(losses)) for flops, losses in values.items() if len(losses) == count)


def flops_to_reach(results: Results, end: str, goal: float) -> int | None:
    """Cumulative FLOPs of the first measurement in the life of `end` at or below a perplexity or error.

    Only what was measured counts, nothing in between: the true cost may be lower, never higher.
    """
    for name in results["stages"][end]["chain"]:
        if not comparable(results, name):
            continue
        stage = results["stages"][name]
        curve = mean_curve(stage, "held_out", lambda point: reached_at(results, point))
        if not curve or curve[-1][0] < stage["cumulative_flops"]:
            curve.append((stage["cumulative_flops"], reached(results, name)["mean"]))
        for flops, value in curve:
            if value <= goal:
                return flops
    return None


def compare(results: Results, baseline: str) -> dict[str, Any]:
    """The subject's last stage against the last stage of a baseline; ratios are the subject's over the baseline's.

    Returns:
        `perplexity_change`: relative, negative where the subject is better. `perplexity_spread`: root of the sum of
        both variances over seeds, on the same scale; None with a single seed. Of image classifiers `error_change` and
        `error_spread`, in points. `clear`: whether the change is larger than the spread. `flops`, `stage_flops`,
        `seconds`, `non_embedding_parameters`: ratios. `subject_reaches` and `baseline_reaches`: FLOPs at which one
        first has the final perplexity or error of the other, and their share of the baseline's FLOPs; None where it
        never does.
    """
    subject = results["subject"][-1]
    own, other = results["stages"][subject], results["stages"][baseline]
    mine, theirs = reached(results, subject), reached(results, baseline)
    quality = quality_of(results)
    scale = theirs["mean"] if quality.change == "ratio" else 1.0
    change = mine["mean"] / scale - 1 if quality.change == "ratio" else mine["mean"] - theirs["mean"]
    both = None if mine["std"] is None or theirs["std"] is None else math.hypot(mine["std"], theirs["std"])
    band = None if both is None else both / scale

    def when(flops: int | None) -> dict[str, float] | None:
        return None if flops is None else {"flops": flops, "share": flops / other["cumulative_flops"]}

    seconds = [stage["cumulative_seconds"]["mean"] for stage in (own, other)]
    return {
        "baseline": baseline,
        "from_scratch": len(other["chain"]) == 1,
        quality.key: theirs,
        f"subject_{quality.key}": mine,
        f"{quality.key}_change": change,
        f"{quality.key}_spread": band,
        "clear": None if band is None else abs(change) > band,
        "non_embedding_parameters": own["non_embedding_parameters"] / other["non_embedding_parameters"],
        "flops": own["cumulative_flops"] / other["cumulative_flops"],
        "stage_flops": own["flops"] / other["flops"],
        "seconds": seconds[0] / seconds[1] if all(seconds) else None,
        "subject_reaches": when(flops_to_reach(results, subject, theirs["mean"])),
        "baseline_reaches": when(flops_to_reach(results, baseline, mine["mean"])),
    }


def comparisons(results: Results) -> list[dict[str, Any]]:
    """The subject against the end of every baseline that is finished and measured on the same text."""
    subject, *baselines = chains(results)
    if not finished(results, subject):
        return []
    return [compare(results, name) for name in baselines if comparable(results, name)]


def answer(results: Results) -> str:
    """What came out, whichever way it came out, and no more than that."""
    stages, end = results["stages"], results["subject"][-1]
    own = stages[end]
    if not finished(results, end):
        done = sum(finished(results, name) for name in stages)
        return (
            f"Not finished: {done} of {len(stages)} stages have a finished run. The last one, {label(results, end)}, "
            "has none, so nothing can be compared yet."
        )
    quality = quality_of(results)
    counted = f", all {len(own['chain'])} stages counted" if len(own["chain"]) > 1 else ""
    said = [
        f"{label(results, end)} ends at held-out {quality.words} {told(results, reached(results, end))} after "
        f"{flops_text(own['cumulative_flops'])} training FLOPs{counted}."
    ]
    found = comparisons(results)
    scratch = [comparison for comparison in found if comparison["from_scratch"]]
    said += [_against(results, comparison) for comparison in scratch]
    if not scratch:
        wanted = [name for name, chain in chains(results).items() if stages[name]["baseline"] and len(chain) == 1]
        said.append(
            f"Nothing from scratch to compare with is finished ({labels(results, wanted)})."
            if wanted
            else "The plan has no baseline from scratch."
        )
    if len(found) > len(scratch):
        best = min(
            (end, *(comparison["baseline"] for comparison in found)), key=lambda n: float(reached(results, n)["mean"])
        )
        said.append(
            f"It is the lowest of the {len(found) + 1} models compared."
            if best == end
            else f"The lowest of the {len(found) + 1} models compared is {label(results, best)} with "
            f"{told(results, reached(results, best))}."
        )
    if any(comparison["clear"] is None for comparison in found):
        said.append("Where there is a single seed, the spread is unknown.")
    if results["missing"]:
        said.append(f"Runs still missing: {len(results['missing'])}.")
    return " ".join(said)


def told(results: Results, figure: Spread) -> str:
    """Such as `104.21 ± 0.35 (3 seeds)`, or `12.30 ± 0.35 % (3 seeds)`."""
    error = "" if figure["std"] is None else f" ± {figure['std']:.2f}"
    seeds = f"{figure['n']} seed{'s' if figure['n'] != 1 else ''}"
    return f"{figure['mean']:.2f}{error}{quality_of(results).unit} ({seeds})"


def flops_text(flops: float) -> str:
    """Such as `1.02e14`."""
    return f"{flops:.3g}".replace("e+", "e")


def change_in_words(results: Results, comparison: dict[str, Any]) -> str:
    """Such as `2.6 % lower` or `0.35 points lower`, and whether the seeds allow to say so."""
    quality = quality_of(results)
    change = comparison[f"{quality.key}_change"]
    ratio = quality.change == "ratio"
    amount = f"{100 * abs(change):.1f}" if ratio else f"{abs(change):.2f}"
    words = (
        "equal"
        if float(amount) == 0
        else f"{amount} {'%' if ratio else 'points'} {'lower' if change < 0 else 'higher'}"
    )
    return f"{words}, within the spread over seeds" if comparison["clear"] is False else words


def _against(results: Results, comparison: dict[str, Any]) -> str:
    name, quality = label(results, comparison["baseline"]), quality_of(results)
    size = comparison["non_embedding_parameters"]
    sized = "" if abs(size - 1) < 0.02 else f", a model {1 / size:.2f} times its size"
    there = comparison["subject_reaches"]
    share = None if there is None else f"{100 * there['share']:.0f} %"
    reaches = (
        f"it reaches that {quality.words} at no point measured"
        if there is None
        else f"it reaches that {quality.words} after {share} of that model's FLOPs"
    )
    return (
        f"Against {name} with {told(results, comparison[quality.key])}{sized}: "
        f"{change_in_words(results, comparison)}, at "
        f"{comparison['flops']:.2f} times the FLOPs; {reaches}."
    )
