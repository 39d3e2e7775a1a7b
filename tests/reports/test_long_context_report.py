"""Tables and picture of the long-context benchmark, from a record made by hand."""

import pytest
from matplotlib.figure import Figure

from tokenformer.reports.long_context import draw, tables

LENGTHS = (128, 512)
# FLOPs of parameters and, at T = 128, of attention, in millions; microseconds per token; both per model
MODELS = {
    "tokenformer_x1": (256, 10.0, 1.0, 20.0),
    "tokenformer_x4": (256, 40.0, 1.0, 60.0),
    "gpt_neox_x1": (256, 10.0, 1.0, 25.0),
    "gpt_neox_x4": (512, 48.0, 2.0, 80.0),
}


@pytest.fixture
def record():
    def flops(parameters, attention, length):
        return {"training": {"parameters": int(1e6 * parameters), "attention": int(1e6 * attention) * length // 128}}

    def seconds(microseconds, length):
        whole = 4096e-6 * microseconds * length / 128
        return {"median": whole, "first_quartile": 0.5 * whole, "third_quartile": 2 * whole}

    return {
        "options": {"lengths": list(LENGTHS), "tokens": 4096, "dtypes": ["float32"]},
        "models": {
            name: {"hidden_size": width, "parameters_without_embeddings": 2_360_000 * int(name[-1])}
            for name, (width, *_) in MODELS.items()
        },
        "flops_per_token": {
            name: {str(length): flops(parameters, attention, length) for length in LENGTHS}
            for name, (_, parameters, attention, _) in MODELS.items()
        },
        "seconds": {
            "float32": {
                str(length): {name: seconds(time, length) for name, (*_, time) in MODELS.items()} for length in LENGTHS
            }
        },
        "ratios": [
            {
                "numerator": f"tokenformer_x{growth}",
                "denominator": f"gpt_neox_x{growth}",
                "dtype": "float32",
                "length": length,
                "value": growth / 8 + length / 1e4,
            }
            for length in LENGTHS
            for growth in (1, 4)
        ],
    }


def cells(text, beginning):
    """The cells of each row that begins so."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row[1:] for row in rows if row[0].startswith(beginning)]


def test_tables(record):
    text = tables(record)
    # 48 + 2 = 50 and 48 + 4 * 2 = 56; then microseconds, half and twice as much at the quartiles
    assert cells(text, "GPTNeoX grown x4: 9.44 M, 512 channels") == [
        ["50.0 (2.0)", "56.0 (8.0)"],
        ["80 (40-160)", "320 (160-640)"],
    ]
    assert cells(text, "TokenFormer before growing: 2.36 M, 256 channels")[0] == ["11.0 (1.0)", "14.0 (4.0)"]
    assert cells(text, "grown x4: FLOPs") == [[f"{41 / 50:.3f}", f"{44 / 56:.3f}"]]
    assert cells(text, "grown x4: time, float32") == [["0.513", "0.551"]]
    assert cells(text, "before growing: time, float32") == [["0.138", "0.176"]]


def test_every_table_is_markdown(record):
    for block in tables(record).split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            assert {line.count("|") for line in lines} == {1 + 1 + len(LENGTHS)}
            assert set(lines[1]) == {"|", "-"}


def test_picture_shows_the_figures(record, tmp_path, monkeypatch):
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **options: (figures.append(self), savefig(self, path, **options))
    )
    draw(record, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    counted, measured = figures[0].axes
    for axes, expected in (
        (counted, [[11, 14], [41, 44], [11, 14], [50, 56]]),
        (measured, [[20, 80], [60, 240], [25, 100], [80, 320]]),
    ):
        lines = axes.get_lines()
        assert [list(line.get_xdata()) for line in lines] == [list(LENGTHS)] * 4
        assert [list(line.get_ydata()) for line in lines] == [pytest.approx(row) for row in expected]
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 4
