"""What a sceptic asks of a plan's results, answered from the results."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tokenformer.plans.quality import quality_of
from tokenformer.reports.growth.findings import (
    Results,
    chains,
    data_of,
    finished,
    flops_text,
    label,
    labels,
    runs,
)
from tokenformer.reports.growth.tables import rates_of, seeds_of

_SHOWN = 12


def fairness(results: Results) -> list[str]:
    """Statements on data, seeds, settings, learning rates, sizes, costs, machine, collapses and what is missing."""
    made: tuple[Callable[[Results], str], ...] = (
        _data, _seeds, _settings, _rates, _edges, _sizes, _costs, _machine, _skips, _missing,
    )  # fmt: skip
    return [text for text in (make(results) for make in made) if text]


def _data(results: Results) -> str:
    quality = quality_of(results)
    number = results["plan"]["data"].get(quality.held_out)
    which = f"{number:,} held-out {quality.row}s, evenly spaced," if number else f"all held-out {quality.row}s"
    by_data = _group(results, lambda name: data_of(results, name))
    if len(by_data) == 1:
        (data,) = by_data
        held_out = results["plan"]["data"].get("held_out")
        elsewhere = quality.row == "image" and isinstance(held_out, str)
        return f"All stages are trained on {data} and measured on {which} of {held_out if elsewhere else 'it'}."
    listed = "; ".join(f"{labels(results, names)} on {data}" for data, names in by_data.items())
    end = results["subject"][-1]
    return (
        f"Not all stages have the same data: {listed}. Each is measured on {which} of its own, so only those on "
        f"{data_of(results, end)} are compared with {label(results, end)} and drawn beside it."
    )


def _seeds(results: Results) -> str:
    rows = f"{quality_of(results).row}s"
    by_seeds = _group(results, lambda name: tuple(seeds_of(results, name)))
    fixed = (
        f"A seed fixes the initialisation of what is new and the order of the training {rows}, for every stage alike."
    )
    if len(by_seeds) == 1:
        (seeds,) = by_seeds
        shown = f"Seeds of every stage: {_numbers(seeds)}."
    else:
        shown = "Seeds differ: " + "; ".join(f"{labels(results, n)}: {_numbers(s)}" for s, n in by_seeds.items()) + "."
    again = any(
        stage["after"] and data_of(results, name) == data_of(results, stage["after"])
        for name, stage in results["stages"].items()
    )
    if again:
        fixed += " A stage that goes on reads on where the one before it stopped."
    return (
        f"{fixed} {shown} A difference no larger than the root of the sum of both variances over seeds is called "
        "within the spread."
    )


def _settings(results: Results) -> str:
    stages = (*results["plan"]["stages"], *results["plan"]["baselines"])
    own = [stage["name"] for stage in stages if stage["optimizer"] or stage["training"]]
    lengths = _group(results, lambda name: results["stages"][name]["sequence_length"])
    augmentation = results["plan"].get("augmentation")
    text = (
        f"Settings of their own have {labels(results, own)} (last table); the others share batch size and optimizer."
        if own
        else "Batch size and optimizer are the same for every stage, but for the learning rate."
    )
    if augmentation is not None:
        text += f" Augmentation of every stage: {', '.join(f'{name} {value}' for name, value in augmentation.items())}."
    if len(lengths) > 1:
        listed = "; ".join(f"{labels(results, names)}: {length:,}" for length, names in lengths.items())
        text += f" {'Tokens of an image' if augmentation else 'Sequence lengths'} differ: {listed}."
    return text


def _rates(results: Results) -> str:
    by_number = _group(results, lambda name: len(rates_of(results, name)))
    listed = "; ".join(f"{n} for {labels(results, names)}" for n, names in sorted(by_number.items()))
    text = f"Learning rates given to try: {listed}."
    if max(by_number) > 1:
        rows = f"{quality_of(results).row}s"
        text += (
            f" Where there are several, the first seed's loss on the same held-out {rows} that are reported chooses, "
            "so each figure is that of the best of so many."
        )
    few = [name for n, names in by_number.items() if n < 3 for name in names]
    return text + (f" Fewer than three, so hardly tuned: {labels(results, few)}." if few else "")


def _edges(results: Results) -> str:
    edges = [name for name, stage in results["stages"].items() if stage["at_edge"]]
    if not edges:
        return ""
    listed = ", ".join(f"{label(results, name)} ({results['stages'][name]['learning_rate']:g})" for name in edges)
    return f"The best rate lies at the edge of what was tried, so a better one may lie beyond it: {listed}."


def _sizes(results: Results) -> str:
    end, *baselines = chains(results)
    own = results["stages"][end]["non_embedding_parameters"]
    sizes = [
        f"{label(results, name)} {results['stages'][name]['non_embedding_parameters'] / own:.3f}" for name in baselines
    ]
    return (
        f"Parameters {quality_of(results).parameters}, {label(results, end)} = 1: {', '.join(sizes)}." if sizes else ""
    )


def _costs(results: Results) -> str:
    text = f"FLOPs are counted, not measured: {quality_of(results).flops}, forward and backward."
    extra = {name: max(0, len(stage["sweep"]) - 1) for name, stage in results["stages"].items()}
    if number := sum(extra.values()):
        spent = {name: times * results["stages"][name]["flops"] for name, times in extra.items()}
        flops, own = sum(spent.values()), sum(spent[name] for name in results["subject"])
        text += (
            f" The search for learning rates is in no figure: {number} further runs, {flops_text(flops)} FLOPs in all, "
            f"{flops_text(own)} of them for the subject."
        )
    return text


def _machine(results: Results) -> str:
    machine = results["machine"]
    known = {name: value for name, value in machine.items() if value not in (None, [])}
    text = f"Machine: {', '.join(f'{name} {_flat(value)}' for name, value in known.items())}." if known else ""
    if machine.get("jobs", 1) > 1:
        text += f" Up to {machine['jobs']} runs shared it, so each may have taken longer than it would alone."
    how: dict[str, list[str]] = defaultdict(list)
    for name, stage in results["stages"].items():
        for run in runs(stage):
            ways = f"{run['device']}, threads {run['threads']}, {run['precision']}"
            if name not in how[ways]:
                how[ways].append(name)
    if len(how) == 1:
        text += f" Every run: {next(iter(how))}."
    elif how:
        listed = "; ".join(f"{labels(results, names)}: {ways}" for ways, names in how.items())
        text += f" Not all runs were made alike, so seconds compare only among equals: {listed}."
    return text.strip()


def _skips(results: Results) -> str:
    done = [(name, run) for name, stage in results["stages"].items() for run in runs(stage)]
    skipped = [(name, run) for name, run in done if run["skips"]]
    if not done:
        return ""
    if not skipped:
        return "No run collapsed: none left out any training data."
    listed = "; ".join(
        f"{label(results, name)}, seed {run['seed']}, step {skip['step']} ({skip['what']}): batches "
        f"{skip['skipped_batches'][0]} to {skip['skipped_batches'][1]}"
        for name, run in skipped
        for skip in run["skips"]
    )
    return f"Training data skipped after collapses: {listed}."


def _missing(results: Results) -> str:
    missing, stages = results["missing"], results["stages"]
    if not missing:
        return "Every run of the plan is finished." if results["complete"] else "The plan is not finished."
    none = [name for name in stages if not finished(results, name)]
    listed = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
    text = f"Missing runs: {listed}."
    return text + (f" Stages without any finished run: {labels(results, none)}." if none else "")


def _group(results: Results, key: Callable[[str], Any]) -> dict[Any, list[str]]:
    """Stages by what `key` says of them, in order."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name in results["stages"]:
        groups[key(name)].append(name)
    return groups


def _flat(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _numbers(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
