"""Writes the report of a plan: report.html, report.json and figures."""

import json
from pathlib import Path

from tokenformer.evaluation.tables import markdown
from tokenformer.folders import saving, write_atomically
from tokenformer.plans.quality import quality_of
from tokenformer.reports.growth.fairness import fairness
from tokenformer.reports.growth.figures import draw_costs, draw_curves, draw_ends, draw_measures
from tokenformer.reports.growth.findings import Results, answer, chains, comparisons
from tokenformer.reports.growth.tables import Table, all_tables
from tokenformer.reports.page import Page

REPORT_FILE = "report.html"
_POINTS = (
    "The area of a point is the number of parameters {parameters}, a bar one standard deviation over seeds; round"
    " is a TokenFormer, square a {baseline}. "
)
_CAPTIONS = {
    "growth.png": f"{_POINTS}Left: all training FLOPs of a model's life. Right: those of its last stage alone.",
    "growth-seconds.png": f"{_POINTS}The same over wall seconds.",
    "ends.png": "Held-out {words} at the end of every line of stages; bars: one standard deviation over seeds.",
    "held-out.png": (
        "Held-out loss over all training FLOPs of a model's life. Thin: single seeds. An open point is the loss "
        "right after growing, before any step; a dotted line leads there from the stage before. The first tenth of a "
        "model from scratch, and to the right of a grown one, may lie outside the frame."
    ),
    "training.png": "Training loss, a trailing mean over a fortieth of each stage, in the same two frames.",
    "measures.png": (
        "Held-out loss on other data, at the beginning (open) and the end of every stage; only these two were measured."
    ),
}


def write_growth_report(results: Results, folder: Path) -> list[Path]:
    """Write report.html, report.json and the figures that the results allow.

    Args:
        results: of `tokenformer.plans.results.collect`; the plan may be half done.
        folder: to write into; made if it is not there.

    Returns:
        The files, the page first. report.json holds `answer`, `comparisons`, `ends`, `fairness` and all of `results`.

    Raises:
        UserError: the folder cannot be written.
    """
    pictures = {
        "growth.png": draw_costs(results),
        "growth-seconds.png": draw_costs(results, "seconds"),
        "ends.png": draw_ends(results),
        "held-out.png": draw_curves(results, "held_out"),
        "training.png": draw_curves(results, "curve"),
        "measures.png": draw_measures(results),
    }
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [folder / name for name, figure in pictures.items() if figure is not None]
        for name, figure in pictures.items():
            if figure is not None:
                figure.savefig(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)  # of an earlier report, which would not belong to this page
    record = {
        "answer": answer(results),
        "comparisons": comparisons(results),
        "ends": chains(results),
        "fairness": fairness(results),
        **results,
    }
    write_atomically(folder / "report.json", json.dumps(record, indent=2) + "\n")
    write_atomically(folder / REPORT_FILE, _page(results, drawn))
    return [folder / REPORT_FILE, folder / "report.json", *drawn]


def markdown_table(results: Results) -> str:
    """The answer, every table and the answers to a sceptic as Markdown, for a page of results."""
    parts = [answer(results)]
    for table in all_tables(results):
        rows = [
            [f"**{_one_line(cell)}**" if (i, j) in table.bold else _one_line(cell) for j, cell in enumerate(row)]
            for i, row in enumerate(table.rows)
        ]
        parts.append(f"## {table.title}")
        parts.append(markdown(table.header, rows).rstrip())
        if table.note:
            parts.append(table.note)
    parts += ["## How fair is it?", "\n".join(f"- {text}" for text in fairness(results))]
    return "\n\n".join(parts) + "\n"


def _page(results: Results, pictures: list[Path]) -> str:
    page = Page(results["title"] or "Growth")
    page.text(answer(results), "answer")
    tables = all_tables(results)
    for picture in pictures:
        page.figure(picture, _CAPTIONS[picture.name].format(**vars(quality_of(results))))
    for table in tables:
        _add(page, table)
    page.heading("How fair is it?")
    for text in fairness(results):
        page.text(text)
    page.text("Every figure is in report.json beside this page.", "note")
    return page.html()


def _add(page: Page, table: Table) -> None:
    page.heading(table.title)
    page.table(table.header, table.rows, bold=table.bold)
    if table.note:
        page.text(table.note, "note")


def _one_line(cell: str) -> str:
    return " ".join(cell.split())
