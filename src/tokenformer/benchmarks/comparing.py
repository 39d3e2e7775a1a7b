"""Two records of one benchmark side by side: which cases became slower or faster, beyond what the rounds vary by."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenformer.benchmarks.timing import Timing
from tokenformer.errors import UserError

THRESHOLD = 0.05
# What may differ between two records that are compared: it changes how sure a figure is, not what it is of.
_FREE = ("repeats", "cases")
_MEMORY = "peak memory"  # stands where others have a pass
_SIZES = ("layers", "hidden_size", "vocabulary", "parameters")

Verdict = Literal["slower", "faster", "more", "less", "same"]
_Key = tuple[str, str, str]  # dtype, pass, case


@dataclass(frozen=True)
class Row:
    """One case in both records.

    Attributes:
        dtype: of its products.
        direction: the pass that was timed; `peak memory` for bytes.
        case: its name.
        unit: `s` or `B`.
        old: median then.
        new: median now.
        verdict: slower or faster (of bytes: more or less) if the medians differ by more than the threshold and the
            middle halves of the rounds do not overlap, else the same.
    """

    dtype: str
    direction: str
    case: str
    unit: Literal["s", "B"]
    old: float
    new: float
    verdict: Verdict

    @property
    def ratio(self) -> float:
        """New over old: above 1 is worse."""
        return self.new / self.old


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        rows: cases of both records, in the order of the new one.
        missing: cases that only one of them has, as `dtype, pass, case`, by `old` and `new`.
        warnings: lines on what else differs (hardware, threads, versions), so that the figures may not mean much.
    """

    rows: list[Row]
    missing: dict[str, list[str]]
    warnings: list[str] = field(default_factory=list)

    @property
    def changed(self) -> list[Row]:
        """The rows that are not the same, the worst first."""
        return sorted((row for row in self.rows if row.verdict != "same"), key=lambda row: -row.ratio)


def read(file: str) -> dict[str, Any]:
    """A record that `--json` wrote.

    Raises:
        UserError: there is none in that file.
    """
    try:
        record = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the record '{file}': {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"'{file}' is no JSON: give a record that `tokenformer bench ... --json` wrote") from error
    needed = {"benchmark", "options", "threads", "hardware", "versions"}
    if not isinstance(record, dict) or not needed <= record.keys():
        raise UserError(f"'{file}' is no record: give a file that `tokenformer bench ... --json` wrote")
    return record


def check_same(old: Mapping[str, Any], benchmark: str, options: Mapping[str, Any]) -> None:
    """Refuse a record of something else, before anything is measured.

    Args:
        old: the record.
        benchmark: what it is to be compared with.
        options: of that; one that is None is filled in later, and is not looked at.

    Raises:
        UserError: naming the first difference.
    """
    if old["benchmark"] != benchmark:
        raise UserError(f"the old record is of '{old['benchmark']}', not of '{benchmark}': give one of the same")
    for name, value in options.items():
        mine = list(value) if isinstance(value, tuple) else value
        if name not in old["options"] or name in _FREE or mine is None:
            continue
        if _unordered(mine) != _unordered(old["options"][name]):
            raise UserError(
                f"the old record has {name} {_words(old['options'][name])}, this one {_words(mine)}: figures of "
                "different options cannot be compared"
            )


def compare(old: Mapping[str, Any], new: Mapping[str, Any], *, threshold: float = THRESHOLD) -> Comparison:
    """Compare the medians of all cases of two records.

    Args:
        old: what to compare with.
        new: of the same benchmark and options.
        threshold: share by which a median must differ to count.

    Raises:
        UserError: the records are of different things, or the threshold is negative.
    """
    if not threshold >= 0:
        raise UserError(f"threshold must not be negative, got {threshold:g}")
    check_same(old, new["benchmark"], new["options"])
    for name, model in new.get("models", {}).items():
        before = old.get("models", {}).get(name, model)
        if different := [size for size in _SIZES if model.get(size) != before.get(size)]:
            size = different[0]
            raise UserError(
                f"the old record has a {name} of {size.replace('_', ' ')} {before.get(size)}, this one {model[size]}: "
                "figures of different models cannot be compared"
            )
    before, after = dict(_figures(old)), dict(_figures(new))
    rows = [
        Row(*key, _unit(key), before[key]["median"], figures["median"], _verdict(key, before[key], figures, threshold))
        for key, figures in after.items()
        if key in before
    ]
    missing = {
        "old": [", ".join(key) for key in after if key not in before],
        "new": [", ".join(key) for key in before if key not in after],
    }
    return Comparison(rows, missing, list(_warnings(old, new)))


def _unordered(value: Any) -> Any:
    """Lists of options are sets: the order in which dtypes or lengths were given changes nothing."""
    return sorted(value, key=str) if isinstance(value, list) else value


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _figures(record: Mapping[str, Any]) -> Iterator[tuple[_Key, Mapping[str, Any]]]:
    """Median and quartiles by dtype, pass and case, of any benchmark."""
    for dtype, passes in record.get("seconds", {}).items():
        for direction, cases in passes.items():
            for case, figures in cases.items():
                yield (dtype, direction, case), figures
    for dtype, cases in record.get("peak_memory", {}).items():
        for case, parts in cases.items():
            yield (dtype, _MEMORY, case), _constant(parts["total"])
    if record["benchmark"] == "images":
        yield from _images_figures(record)


def _images_figures(record: Mapping[str, Any]) -> Iterator[tuple[_Key, Mapping[str, Any]]]:
    """Seconds of an image read, by number of workers, and of the model's step."""
    for workers, row in record["loader"].items():
        case = f"{workers}_workers"
        # With one batch to a pass there is no time of the first.
        rates = row["images_per_second"][row["first_pass"] is not None :]
        if row["first_pass"]:
            yield ("none", "first pass", case), _constant(1 / row["first_pass"])
        if rates:
            yield ("none", "later passes", case), Timing(tuple(1 / rate for rate in rates)).as_dict()
    for case, figures in record.get("model", {}).get("seconds", {}).items():
        yield (record["model"]["precision"], "step", case), figures


def _constant(value: float) -> dict[str, float]:
    return {"median": value, "first_quartile": value, "third_quartile": value}


def _unit(key: _Key) -> Literal["s", "B"]:
    return "B" if key[1] == _MEMORY else "s"


def _verdict(key: _Key, old: Mapping[str, Any], new: Mapping[str, Any], threshold: float) -> Verdict:
    memory = _unit(key) == "B"
    if new["median"] > old["median"] * (1 + threshold) and new["first_quartile"] > old["third_quartile"]:
        return "more" if memory else "slower"
    if new["median"] * (1 + threshold) < old["median"] and new["third_quartile"] < old["first_quartile"]:
        return "less" if memory else "faster"
    return "same"


def _warnings(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    pairs = {
        "processors": (old["hardware"].get("cpu"), new["hardware"].get("cpu")),
        "cores": (old["hardware"].get("cores"), new["hardware"].get("cores")),
        "instruction sets": tuple(" ".join(r["hardware"].get("flags", [])) for r in (old, new)),
        "devices": (old.get("device"), new.get("device")),
        "threads": (old["threads"], new["threads"]),
        "torch versions": (old["versions"].get("torch"), new["versions"].get("torch")),
    }
    for what, (before, after) in pairs.items():
        if before != after:
            yield f"{what} differ: {before or 'not recorded'} then, {after or 'not recorded'} now"
