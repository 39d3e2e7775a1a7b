"""The figures of a plan's report: what stands where."""

import math
from statistics import mean, stdev

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from made_up_plan import LOSSES, a_plan, results_of
from tokenformer.reports.growth.figures import draw_costs, draw_curves, draw_ends, draw_measures


def points_of(axes: Axes) -> list[PathCollection]:
    """The points of stages; error bars are line collections."""
    return [collection for collection in axes.collections if isinstance(collection, PathCollection)]


def test_points_stand_at_their_cost_with_their_size() -> None:
    results = results_of(a_plan(), LOSSES)
    for cost, unit in (("flops", 1.0), ("seconds", 1e-11)):
        figure = draw_costs(results, cost)
        assert figure is not None
        left, right = figure.axes
        points = points_of(left)
        places = [tuple(collection.get_offsets()[0]) for collection in points]
        flops = [1e14, 1.4e14, 1.8e14, 4e14, 2e14, 2e14, 2.4e14, 2.4e14]
        heights = [mean([math.exp(run[-1]) for run in LOSSES[name]]) for name in results["stages"]]
        assert [x for x, _ in places] == pytest.approx([x * unit for x in flops])
        assert [y for _, y in places] == pytest.approx(heights)
        areas = [collection.get_sizes()[0] for collection in points]
        assert areas[1:] == pytest.approx([2 * areas[0]] * 7, rel=1e-5)
        alone = [point.get_offsets()[0][0] for point in points_of(right)]
        assert alone == pytest.approx([x * unit for x in (1e14, 4e13, 4e13, 4e14, 2e14, 2e14, 4e13, 4e13)])
        assert "cumulative" in left.get_xlabel()
        assert "alone" in right.get_xlabel()
        assert ("FLOPs" if cost == "flops" else "seconds") in left.get_xlabel()
        assert left.get_ylabel() == right.get_ylabel() == "held-out perplexity"
        colours = [to_hex(collection.get_facecolor()[0]) for collection in points]
        assert colours[0] == colours[1] == colours[2]
        assert len(set(colours)) == 6  # the subject's, two from scratch, two grown, and what these two share
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [
            "small → medium → large", "Transformer", "scratch", "neox → hyper", "neox → Net2Net",
        ]  # fmt: skip


def test_error_bars_are_the_spread_over_seeds() -> None:
    figure = draw_costs(results_of(a_plan(), LOSSES))
    assert figure is not None
    bars = [bar for bar in figure.axes[0].containers if bar.has_yerr]
    assert len(bars) == 7  # of net2net there is one seed
    low, high = bars[0].lines[2][0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * stdev([math.exp(4.4), math.exp(4.42)]))


def test_the_jump_at_growing_is_drawn() -> None:
    results = results_of(a_plan(), LOSSES)
    for run in results["stages"]["medium"]["runs"]:
        run["start_loss"] = 6.0
    figure = draw_curves(results, "held_out")
    assert figure is not None
    whole, later = figure.axes
    drawn = [list(zip(*line.get_data(), strict=True)) for line in whole.get_lines()]
    assert [(1e14, mean([4.4, 4.42])), (1e14, 6.0)] in [[(x, pytest.approx(y)) for x, y in line] for line in drawn]
    assert [(1e14, 6.0), (1.2e14, 4.3), (1.4e14, 4.21)] in [[(x, pytest.approx(y)) for x, y in line] for line in drawn]
    assert whole.get_ylim()[1] > 6.0
    assert later.get_xlim()[0] == pytest.approx(1e14, rel=0.03)
    assert "held-out loss" in whole.get_ylabel()
    training = draw_curves(results, "curve")
    assert training is not None
    assert "training loss" in training.axes[0].get_ylabel()


def test_no_curves_without_points() -> None:
    results = results_of(a_plan(baselines=False), {"base": [[4.4]]})
    assert draw_curves(results, "held_out") is None
    assert draw_ends(results) is None
    assert draw_measures(results) is None


def test_a_stage_too_short_to_log_has_no_curve() -> None:
    results = results_of(a_plan(baselines=False), LOSSES)
    for name in ("medium", "large"):
        for run in results["stages"][name]["runs"]:
            run["curve"] = []
    figure = draw_curves(results, "curve")
    assert figure is not None
    assert [len(axes.get_lines()) for axes in figure.axes] == [1, 1]


def test_ends_are_sorted() -> None:
    figure = draw_ends(results_of(a_plan(), LOSSES))
    assert figure is not None
    (axes,) = figure.axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["neox → Net2Net", "neox → hyper", "Transformer", "small → medium → large", "scratch"]
