"""Figures of image classifiers as Markdown, from confusions written by hand."""

import json

import pytest

from tokenformer.evaluation.image_tables import confusion_table, image_table, prediction_table, worst_classes
from tokenformer.evaluation.record import write_record


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def results(confusion, names=None, **more):
    count = sum(map(sum, confusion))
    names = [f"c{i}" for i in range(len(confusion))] if names is None else names
    columns = [sum(column) for column in zip(*confusion, strict=True)]
    per_class = [
        {
            "name": name,
            "images": sum(row),
            "recall": row[i] / sum(row) if sum(row) else None,
            "precision": row[i] / columns[i] if columns[i] else None,
        }
        for i, (name, row) in enumerate(zip(names, confusion, strict=True))
    ]
    return {
        "top1": sum(row[i] for i, row in enumerate(confusion)) / count,
        "top5": 0.9,
        "top": min(5, len(names)),
        "loss": 1.25,
        "classes": names,
        "confusion": confusion,
        "per_class": per_class,
        "images": count,
        "unreadable": 0,
        "seconds": 2.0,
        "images_per_second": count / 2,
        **more,
    }


THREE = [[900, 100, 0], [0, 0, 0], [1, 2, 997]]


def test_figures():
    # Of 2000 images 1897 are right: sqrt(0.9485 * 0.0515 / 2000) = 0.494 %.
    heads, _, row = cells(image_table(results(THREE), "data|x"))
    assert heads == ["source", "images", "top-1 %", "nats/image", "images/s"]
    heads, _, row = cells(image_table(results(THREE), "data"))
    assert row == ["data", "2,000", "94.85 ± 0.49", "1.2500", "1,000"]
    heads, _, row = cells(image_table(results(THREE, top=2, top2=0.99, unreadable=3), "data"))
    assert heads == ["source", "images", "top-1 %", "top-2 %", "nats/image", "images/s", "unreadable"]
    assert row[-1] == "3"


def test_top_k_is_left_out_where_it_says_nothing():
    six = [[int(i == j) for j in range(6)] for i in range(6)]
    assert "top-5 %" in image_table(results(six), "data")
    assert "90.00" in image_table(results(six), "data")
    assert "top-5" not in image_table(results([row[:5] for row in six[:5]]), "data")
    assert image_table(results(six, top=1), "data").count("top-") == 1


def test_worst_classes():
    rows = cells(worst_classes(results(THREE)))[2:]
    assert rows == [["c0", "1,000", "90.0", "99.9", "c1 (100)"], ["c2", "1,000", "99.7", "100.0", "c1 (2)"]]
    assert cells(worst_classes(results(THREE), count=1))[2:] == rows[:1]
    assert cells(worst_classes(results([[4, 0], [5, 0]])))[2:] == [
        ["c1", "5", "0.0", "-", "c0 (5)"],
        ["c0", "4", "100.0", "44.4", "-"],
    ]


def test_confusions_of_few_classes():
    heads, _, *rows = cells(confusion_table(results(THREE, ["ant", "bee", "cat"])))
    assert heads == ["true \\ taken for", "ant", "bee", "cat"]
    assert rows == [["ant", "900", "100", "."], ["bee", ".", ".", "."], ["cat", "1", "2", "997"]]


def test_most_frequent_confusions_of_many():
    confusion = [[10 * (i == j) for j in range(21)] for i in range(21)]
    confusion[3][7], confusion[7][3], confusion[20][0] = 2, 5, 2
    heads, _, *rows = cells(confusion_table(results(confusion)))
    assert heads == ["true", "taken for", "images", "% of the class"]
    assert rows == [["c7", "c3", "5", "33.3"], ["c3", "c7", "2", "16.7"], ["c20", "c0", "2", "16.7"]]
    assert len(cells(confusion_table(results(confusion), count=2))) == 4


def test_predictions():
    guesses = [{"name": "ant", "probability": 0.75}, {"name": "bee", "probability": 0.25}]
    heads, _, row = cells(prediction_table([{"image": "a.png", "classes": guesses}]))
    assert (heads, row) == (["image", "best", "2."], ["a.png", "ant 75.0", "bee 25.0"])


@pytest.mark.parametrize(
    "record", [{"confusion": THREE, "text": "[\n 1,\n 2\n]", "numbers": [1, -2.5, 1e-30], "n": []}]
)
def test_rows_of_numbers_stand_on_a_line(tmp_path, record):
    write_record(record, str(tmp_path / "r.json"))
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert json.loads(text) == record
    assert "    [900, 100, 0],\n" in text
    assert "[1, -2.5, 1e-30]" in text
