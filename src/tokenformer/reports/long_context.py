"""Tables and the picture of `tokenformer bench long-context`, from its record."""

from pathlib import Path
from typing import Any

_NAMES = {"tokenformer": "TokenFormer", "gpt_neox": "GPTNeoX"}
_COLOURS = {"tokenformer": "#1f77b4", "gpt_neox": "#d62728"}
_STYLES = (":", "--", "-")


def tables(record: dict[str, Any]) -> str:
    """The figures as Markdown: sizes and FLOPs, then for each dtype the times, then how the two kinds compare."""
    blocks = [("Training FLOPs per token, in millions (in brackets: token-token attention)", _flops(record))]
    for dtype in record["options"]["dtypes"]:
        title = f"{dtype}: microseconds per token of a training step, median (quartiles)"
        blocks += [(title, _times(record, dtype))]
    blocks += [("TokenFormer / GPTNeoX of as many parameters", _ratios(record))]
    return "\n".join(f"{title}\n\n{table}\n" for title, table in blocks)


def draw(record: dict[str, Any], path: Path) -> None:
    """FLOPs per token over the length of the sequences, and beside it the measured time, a panel for each dtype."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    options = record["options"]
    lengths, dtypes = options["lengths"], options["dtypes"]
    figure = Figure(figsize=(5.2 * (1 + len(dtypes)), 4.6), dpi=110, layout="constrained")
    counted, *measured = figure.subplots(1, 1 + len(dtypes))
    for name in record["models"]:
        line = _line(record, name)
        counted.plot(lengths, [_training(record, name, length) / 1e6 for length in lengths], **line)
        for axes, dtype in zip(measured, dtypes, strict=True):
            low, median, high = zip(*(_microseconds(record, dtype, length, name) for length in lengths), strict=True)
            axes.plot(lengths, median, **line)
            axes.fill_between(lengths, low, high, color=line["color"], alpha=0.15, linewidth=0)
    counted.set(ylabel="million FLOPs per token", title="Training FLOPs (Table 3)")
    figure.legend(handles=counted.get_lines(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    for axes, dtype in zip(measured, dtypes, strict=True):
        axes.set(ylabel="microseconds per token", title=f"Training step, measured, {dtype}")
    for axes in (counted, *measured):
        axes.set(xlabel="positions in a sequence", xscale="log", ylim=(0, None))
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.savefig(path)


def _line(record: dict[str, Any], name: str) -> dict[str, Any]:
    """Colour by kind, style by growth; the name says the size."""
    kind = name.rsplit("_", 1)[0]
    place = [other for other in record["models"] if other.startswith(kind)].index(name)
    return {"color": _COLOURS[kind], "linestyle": _STYLES[place], "linewidth": 1.8, "label": _label(record, name)}


def _label(record: dict[str, Any], name: str) -> str:
    kind, growth = name.rsplit("_x", 1)
    model = record["models"][name]
    size = f"{model['parameters_without_embeddings'] / 1e6:.2f} M"
    step = "before growing" if growth == "1" else f"grown x{growth}"
    return f"{_NAMES[kind]} {step}: {size}, {model['hidden_size']} channels"


def _training(record: dict[str, Any], name: str, length: int) -> int:
    return sum(record["flops_per_token"][name][str(length)]["training"].values())


def _microseconds(record: dict[str, Any], dtype: str, length: int, name: str) -> tuple[float, float, float]:
    """First quartile, median and third quartile, for each token of a step."""
    seconds = record["seconds"][dtype][str(length)][name]
    each = 1e6 / record["options"]["tokens"]
    return each * seconds["first_quartile"], each * seconds["median"], each * seconds["third_quartile"]


def _flops(record: dict[str, Any]) -> str:
    lengths = record["options"]["lengths"]
    rows = []
    for name in record["models"]:
        parts = [record["flops_per_token"][name][str(length)]["training"] for length in lengths]
        cells = [f"{sum(part.values()) / 1e6:.1f} ({part['attention'] / 1e6:.1f})" for part in parts]
        rows.append([_label(record, name), *cells])
    return _markdown(["model", *(f"T = {length}" for length in lengths)], rows)


def _times(record: dict[str, Any], dtype: str) -> str:
    lengths = record["options"]["lengths"]
    rows = []
    for name in record["models"]:
        cells = []
        for length in lengths:
            low, median, high = _microseconds(record, dtype, length, name)
            cells.append(f"{median:.0f} ({low:.0f}-{high:.0f})")
        rows.append([_label(record, name), *cells])
    return _markdown(["model", *(f"T = {length}" for length in lengths)], rows)


def _ratios(record: dict[str, Any]) -> str:
    lengths = record["options"]["lengths"]
    rows = []
    for name in record["models"]:
        kind, growth = name.rsplit("_x", 1)
        if kind != "tokenformer":
            continue
        step = "before growing" if growth == "1" else f"grown x{growth}"
        other = f"gpt_neox_x{growth}"
        shares = [_training(record, name, length) / _training(record, other, length) for length in lengths]
        rows.append([f"{step}: FLOPs", *(f"{share:.3f}" for share in shares)])
        for dtype in record["options"]["dtypes"]:
            found = {
                row["length"]: row["value"]
                for row in record["ratios"]
                if row["dtype"] == dtype and row["numerator"] == name and row["denominator"] == other
            }
            rows.append([f"{step}: time, {dtype}", *(f"{found[length]:.3f}" for length in lengths)])
    return _markdown(["", *(f"T = {length}" for length in lengths)], rows)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table that reads as well in a terminal as on a page."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |" for row in (header, *rows)]
    rule = f"|{'|'.join('-' * (w + 2) for w in widths)}|"
    return "\n".join([lines[0], rule, *lines[1:]])
