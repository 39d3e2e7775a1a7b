"""Records as tables in a terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tokenformer.benchmarks.comparing import Comparison, Row

# Width of what stands before a ratio: a dtype, or a pass.
_WHERE = 15
_LABELS = {
    "reference_eager": "reference (published order), eager",
    "fused_eager": "fused, eager",
    "fused_compiled": "fused, compiled",
    "mlp_eager": "GELU MLP, eager",
    "mlp_compiled": "GELU MLP, compiled",
    "products_eager": "the two products alone",
    "products": "its matrix products alone",
    "tokenformer_eager": "TokenFormer, eager",
    "tokenformer_compiled": "TokenFormer, compiled",
    "gpt_neox_eager": "GPTNeoX, eager",
    "gpt_neox_compiled": "GPTNeoX, compiled",
    "dense_eager": "all tokens, eager",
    "dense_compiled": "all tokens, compiled",
    "sparse_eager": "sparse, eager",
    "sparse_compiled": "sparse, compiled",
    "tokenformer_fused_loss_eager": "TokenFormer, fused loss, eager",
    "tokenformer_fused_loss_compiled": "TokenFormer, fused loss, compiled",
    "tokenformer_recompute_eager": "TokenFormer, recomputing, eager",
    "tokenformer_recompute_compiled": "TokenFormer, recomputing, compiled",
    "plain": "nothing captured",
    "capture_top": "the strongest weights captured",
    "capture_weights": "all weights captured",
    "index": "read into an index",
    "capture_outputs": "outputs of segments captured",
    "loader": "the loader",
    "numpy": "NumPy from a flat file",
    "step": "the training step",
    "library": "this library",
    "write": "plain file, written",
    "write_synced": "plain file, written and synced",
    "read": "plain file, read",
    "python": "python -c pass",
    "import_torch": 'python -c "import torch"',
    "import": 'python -c "import tokenformer"',
    "help": "tokenformer --help",
    "info": "tokenformer info, of a tiny model",
    "explain": "tokenformer explain --text",
}


def label(case: str) -> str:
    """What a case is called in a table."""
    return _LABELS.get(case, case.replace("_", " "))


def machine(record: dict[str, Any]) -> str:
    """On what a record was made, in a few words."""
    hardware = record["hardware"]
    device = f"{record['device']} beside " if record.get("device", "cpu") != "cpu" else ""
    return (
        f"{record['threads']} threads on {device}{hardware['cpu']} ({' '.join(hardware['flags'])}), "
        f"torch {record['versions']['torch']}"
    )


def show_pattention(record: dict[str, Any], console: Console) -> None:
    """One layer: milliseconds by pass."""
    options = record["options"]
    console.print(
        f"Pattention, {options['tokens']} inputs of {options['hidden_size']} channels, {options['parameter_tokens']} "
        f"parameter tokens; {machine(record)}"
    )
    for dtype in options["dtypes"]:
        console.print(_table(record, dtype))
        _failures(record, dtype, console)
    _ratios(record["ratios"], console)
    console.print("Ratios: forward + backward, median over rounds.")


def show_models(record: dict[str, Any], console: Console) -> None:
    """Whole models: tokens a second, and what the benchmark has beside them."""
    options = record["options"]
    sizes = ", ".join(f"{name} {options[name]}" for name in ("batch", "length", "prompt", "tokens") if name in options)
    console.print(f"{record['benchmark']}: {sizes}; {machine(record)}")
    for model in record["models"].values():
        console.print(
            f"{model['class']}: {model['layers']} layers of {model['hidden_size']} channels, "
            f"{model['parameters_without_embeddings'] / 1e6:.1f} M parameters without embeddings"
        )
    for dtype in options["dtypes"]:
        console.print(_models_table(record, dtype))
        _failures(record, dtype, console)
        if "memory" in record:
            speeds = record["memory"][dtype]["bytes_per_second"]
            console.print(
                f"memory: copy {speeds['copy'] / 1e9:.1f} GB/s (read + write), read {speeds['read'] / 1e9:.1f}"
            )
    _ratios(record["ratios"], console)
    _ratios(record.get("memory_ratios", []), console, "memory: ")
    console.print("Ratios of times, median over rounds.")


def _failures(record: dict[str, Any], dtype: str, console: Console) -> None:
    for case, reason in record["checks"][dtype]["failed_to_compile"].items():
        console.print(f"{label(case)}: does not compile here ({reason})", markup=False)


def _ratios(ratios: list[dict[str, Any]], console: Console, title: str = "") -> None:
    for ratio in ratios:
        sign, limit = ("<=", ratio["at_most"]) if ratio["at_most"] is not None else (">=", ratio["at_least"])
        mark = "" if ratio["met"] is None else f"  target {sign} {limit}: {_met(ratio['met'])}"
        names = f"{title}{label(ratio['numerator'])} / {label(ratio['denominator'])}"
        where = ratio.get("pass", ratio["dtype"])
        console.print(f"{where:<{_WHERE}} {names:<62} {ratio['value']:6.3f}{mark}")


def _met(met: bool) -> str:
    return "met" if met else "[bold]MISSED[/]"


def _models_table(record: dict[str, Any], dtype: str) -> Table:
    table = Table(title=f"{dtype}, tokens per second", box=box.SIMPLE, title_justify="left")
    table.add_column("case")
    passes = record["tokens_per_second"][dtype]
    for name in passes:
        table.add_column(name, justify="right", style="bold")
        table.add_column("quartiles", justify="right")
    memory = record.get("memory", {}).get(dtype)
    if memory:
        table.add_column("of copy", justify="right")
        table.add_column("of read", justify="right")
    peaks, mfu = record.get("peak_memory", {}).get(dtype), record.get("mfu", {}).get(dtype)
    if peaks:
        table.add_column("peak memory", justify="right", style="bold")
        table.add_column("of that in the step", justify="right")
    if mfu:
        table.add_column("MFU", justify="right")
    for case in next(iter(passes.values())):
        cells = []
        for name, cases in passes.items():
            seconds = record["seconds"][dtype][name][case]
            tokens = cases[case] * seconds["median"]
            low, high = tokens / seconds["third_quartile"], tokens / seconds["first_quartile"]
            cells += [f"{cases[case]:.1f}", f"{low:.1f}-{high:.1f}"]
        if memory:
            cells += [f"{100 * memory['fraction'][case][name]:.0f} %" for name in ("copy", "read")]
        if peaks and case in peaks:
            cells += [f"{peaks[case][part] / 2**20:,.0f} MiB" for part in ("total", "step")]
        if mfu and case in mfu:
            cells.append(f"{100 * mfu[case]:.1f} %")
        table.add_row(label(case), *cells)
    return table


def _table(record: dict[str, Any], dtype: str) -> Table:
    table = Table(title=f"{dtype}, milliseconds", box=box.SIMPLE, title_justify="left")
    table.add_column("case")
    for direction in ("forward", "forward + backward"):
        table.add_column(direction, justify="right", style="bold")
        table.add_column("min", justify="right")
        table.add_column("quartiles", justify="right")
    seconds = record["seconds"][dtype]
    for case in seconds["forward"]:
        cells = []
        for direction in seconds.values():
            figures = direction[case]
            low, high = figures["first_quartile"], figures["third_quartile"]
            cells += [
                f"{1e3 * figures['median']:.2f}",
                f"{1e3 * figures['min']:.2f}",
                f"{1e3 * low:.2f}-{1e3 * high:.2f}",
            ]
        table.add_row(label(case), *cells)
    return table


def show_data(record: dict[str, Any], console: Console) -> None:
    """The loader: milliseconds of a batch and of the step that needs it."""
    options = record["options"]
    console.print(f"data: {options['rows']} rows; {machine(record)}")
    for dtype, passes in record["seconds"].items():
        for name, cases in passes.items():
            batch, length = options[f"{name}_batch"], options[f"{name}_length"]
            size = record["models"][name]["parameters_without_embeddings"] / 1e6
            title = (
                f"{name}: {size:.1f} M parameters without embeddings, batches of {batch} x {length}, step in {dtype}"
            )
            console.print(title)
            console.print(_plain_table(cases, "rows/s", record["rows_per_second"][name]))
    _ratios(record["ratios"], console)


def show_checkpoint(record: dict[str, Any], console: Console) -> None:
    """Saving and loading: milliseconds and megabytes a second."""
    console.print(f"checkpoint: {machine(record)}")
    for name, cases in record["seconds"]["float32"].items():
        size = record["bytes"][name.split()[0]] / 1e6
        console.print(f"{name}, {size:,.0f} MB")
        console.print(_plain_table(cases, "MB/s", record["megabytes_per_second"][name]))
    _ratios(record["ratios"], console)
    console.print("Reading is from the page cache.")


def show_startup(record: dict[str, Any], console: Console) -> None:
    """Processes: milliseconds from start to end."""
    console.print(f"startup: {machine(record)}")
    console.print(_plain_table(record["seconds"]["none"]["start"]))
    for limit in record["limits"]:
        target = f"target <= {limit['at_most']} s: {_met(limit['met'])}"
        console.print(f"{label(limit['case']):<32} {limit['seconds']:6.3f} s  {target}")


def show_comparison(comparison: Comparison, console: Console) -> None:
    """What changed since an old record."""
    for warning in comparison.warnings:
        console.print(f"warning: {warning}", markup=False)
    changed = comparison.changed
    if changed:
        table = Table(title="changed since the old record", box=box.SIMPLE, title_justify="left")
        for column in ("", "dtype", "pass", "case"):
            table.add_column(column)
        for column in ("old", "new", "new / old"):
            table.add_column(column, justify="right")
        for row in changed:
            old, new = (_quantity(value, row) for value in (row.old, row.new))
            table.add_row(row.verdict, row.dtype, row.direction, label(row.case), old, new, f"{row.ratio:.3f}")
        console.print(table)
    unchanged = len(comparison.rows) - len(changed)
    console.print(f"{unchanged} of {len(comparison.rows)} cases are as before.")
    for which, cases in comparison.missing.items():
        for case in cases:
            console.print(f"not in the {which} record: {case}", markup=False)


def _quantity(value: float, row: Row) -> str:
    return f"{value / 2**20:,.0f} MiB" if row.unit == "B" else f"{1e3 * value:,.2f} ms"


def _plain_table(cases: dict[str, Any], rate: str | None = None, rates: dict[str, float] | None = None) -> Table:
    """Milliseconds of some cases, and what they make a second."""
    table = Table(box=box.SIMPLE)
    table.add_column("case")
    table.add_column("milliseconds", justify="right", style="bold")
    table.add_column("quartiles", justify="right")
    if rate is not None:
        table.add_column(rate, justify="right", style="bold")
    for case, figures in cases.items():
        low, high = 1e3 * figures["first_quartile"], 1e3 * figures["third_quartile"]
        cells = [f"{1e3 * figures['median']:,.2f}", f"{low:,.2f}-{high:,.2f}"]
        table.add_row(label(case), *cells, *([f"{rates[case]:,.0f}"] if rates else []))
    return table
