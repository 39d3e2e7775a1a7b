"""Perplexity over size: a nested model, models trained apart, and the largest of them cut or pruned.

python examples/elastic_sizes.py recipes/elastic/books.yaml --data data/books512 --jobs 2

Runs the plan and measures what came out. The same command goes on where it was stopped. Writes elastic.json and
elastic.png into the folder of the plan.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from tokenformer.cli.run import parse
from tokenformer.data import PreparedData
from tokenformer.elastic import prefix, shrink
from tokenformer.elastic.folders import text_batches
from tokenformer.evaluation import evaluate_perplexity
from tokenformer.evaluation.perplexity import evenly_spaced
from tokenformer.folders import write_atomically
from tokenformer.hardware import hardware, set_threads, versions
from tokenformer.models.loading import load_model
from tokenformer.plans import run_plan
from tokenformer.plans.jobs import Job
from tokenformer.plans.results import chosen_rate

APART = {1.0: "whole", 0.5: "half", 0.25: "quarter"}
BETWEEN = (0.375, 0.75)
NESTED = ("nested", "nested-once")
# How the largest of the models trained apart is made smaller.
PRUNED = {
    "truncated": {"by": "prefix"},
    "important": {"by": "importance"},
    "important, tau calibrated": {"by": "importance", "scale": "calibrated"},
    "truncated, values fitted": {"by": "prefix", "scale": "calibrated", "fit": True},
    "important, values fitted": {"by": "importance", "scale": "calibrated", "fit": True},
}
LINES = {
    "trained apart": "k-o",
    "nested": "C0-o",
    "nested-once": "C0:o",
    "truncated": "C3--s",
    "important": "C1--s",
    "important, tau calibrated": "C1:s",
    "truncated, values fitted": "C2--^",
    "important, values fitted": "C2-^",
}
# Of the perplexity of a nested model over that of a model trained apart.
TARGET = 1.03


class Experiment:
    """A plan that was run, and what is measured of its models.

    Args:
        plan: the plan.
        out: its folder.
        data: folder of the prepared text.
        rows: held-out rows that are measured, and calibration rows.
    """

    def __init__(self, plan, out: Path, data: str, rows: int) -> None:
        self.plan, self.out, self.data, self.rows = plan, out, data, rows
        self.held_out = evenly_spaced(PreparedData.load(data).held_out, rows)
        self.file = out / "elastic.json"
        self.record = json.loads(self.file.read_text("utf-8")) if self.file.is_file() else {}
        rates = {name: self.rate(name) for name in (*APART.values(), *NESTED)}
        # What was measured of a run is void once another learning rate is better.
        if self.record.get("rates") != rates:
            self.record = {"rates": rates, "perplexity": {}}
        self.perplexity = self.record["perplexity"]

    def rate(self, name: str) -> float:
        """The best learning rate of a stage."""
        return chosen_rate(self.plan, self.plan.all_stages[name], self.plan.seeds[0], self.out)

    def folder(self, name: str) -> Path:
        """The run of a stage at its best learning rate."""
        return Job(name, self.plan.seeds[0], self.rate(name)).folder(self.out)

    def sizes(self, share: float) -> dict[str, int]:
        """Tokens by kind of layer."""
        whole = self.plan.all_stages["whole"].train
        return {kind: round(share * getattr(whole, kind)) for kind in ("qkv", "output", "ffn")}

    def measure(self, way: str, share: float, make, **prefix_sizes: int) -> None:
        """Held-out perplexity in float32 of the model that `make` gives, written down at once; nothing if known."""
        if f"{share:g}" in self.perplexity.get(way, {}):
            return
        model = make()
        with prefix(model, **prefix_sizes):
            found = evaluate_perplexity(model, self.held_out, tokens_per_byte=1.0, batch_size=8)["perplexity"]
        self.perplexity.setdefault(way, {})[f"{share:g}"] = found
        self.write()
        print(f"{way:<28} {share:<7g} {found:.2f}", flush=True)

    def measure_all(self) -> None:
        """Every way at every size."""
        for share, name in APART.items():
            self.measure("trained apart", share, lambda name=name: load_model(self.folder(name)))
        for way in NESTED:
            for share in sorted((*APART, *BETWEEN)):
                self.measure(way, share, lambda way=way: load_model(self.folder(way)), **self.sizes(share))
        calibration = text_batches(self.folder("whole"), self.data, self.rows)
        for way, rule in PRUNED.items():
            for share in sorted(APART)[:-1]:
                batches = None if rule == {"by": "prefix"} else calibration
                self.measure(
                    way,
                    share,
                    lambda share=share, rule=rule, batches=batches: shrink(
                        load_model(self.folder("whole")), **self.sizes(share), **rule, calibration=batches
                    ),
                )

    def conclude(self) -> None:
        """Cost of every run, nested beside apart, and the machine."""
        kept = ("tokens", "flops", "seconds", "learning_rate", "non_embedding_parameters", "eval_perplexity")
        runs = {}
        for name in (*APART.values(), *NESTED):
            summary = json.loads((self.folder(name) / "summary.json").read_text("utf-8"))
            runs[name] = {key: summary[key] for key in kept}
        sweep = {
            f"{name}/{file.parent.name}": json.loads(file.read_text("utf-8"))["eval_perplexity"]
            for name in APART.values()
            for file in sorted((self.out / name).glob("seed-*/lr-*/summary.json"))
        }
        apart = self.perplexity["trained apart"]
        ratios = {way: {share: self.perplexity[way][share] / found for share, found in apart.items()} for way in NESTED}
        self.record |= {
            "runs": runs,
            "sweep": sweep,
            "flops_over_all_apart": {
                way: runs[way]["flops"] / sum(runs[name]["flops"] for name in APART.values()) for way in NESTED
            },
            "over_apart": ratios,
            "target": {"at_most": TARGET, "reached": max(ratios["nested"].values()) <= TARGET},
            "rows": len(self.held_out),
            "sizes": {f"{share:g}": self.sizes(share) for share in sorted((*APART, *BETWEEN))},
            **hardware(),
            **versions(),
        }
        self.write()
        for way, found in ratios.items():
            print(f"{way} / trained apart: {', '.join(f'{share} {ratio:.3f}' for share, ratio in found.items())}")

    def write(self) -> None:
        """The record as it stands."""
        write_atomically(self.file, json.dumps(self.record, indent=2) + "\n")

    def draw(self) -> None:
        """The chart."""
        figure = Figure(figsize=(7.5, 4.8), dpi=110, layout="constrained")
        axes = figure.subplots()
        whole = self.record["runs"]["whole"]["non_embedding_parameters"]
        for way, style in LINES.items():
            found = self.perplexity[way]
            shares = sorted(map(float, found))
            axes.plot([whole * s / 1e6 for s in shares], [found[f"{s:g}"] for s in shares], style, label=way, ms=4)
        axes.set(xscale="log", yscale="log", xlabel="parameters in tokens, millions", ylabel="held-out perplexity")
        ticks = [whole * share / 1e6 for share in sorted(APART)]
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        figure.savefig(self.out / "elastic.png")


def main() -> None:
    """Run the plan, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="recipes/elastic/books.yaml")
    parser.add_argument("--data", required=True, help="folder written by tokenformer data prepare")
    parser.add_argument("--out", default="runs/elastic", help="folder of the plan and of the results")
    parser.add_argument("--jobs", type=int, default=2, help="runs done at the same time")
    parser.add_argument("--rows", type=int, default=128, help="held-out rows that are measured, and calibration rows")
    arguments, overrides = parser.parse_known_args()
    plan, _ = parse([arguments.plan, "--data.path", arguments.data, "--out", arguments.out, *overrides])
    run_plan(plan, jobs=arguments.jobs)
    set_threads(plan.training.threads)
    experiment = Experiment(plan, Path(arguments.out), arguments.data, arguments.rows)
    experiment.measure_all()
    experiment.conclude()
    experiment.draw()
    print(f"{experiment.file}, {experiment.out / 'elastic.png'}")


if __name__ == "__main__":  # the plan's processes import this file
    main()
