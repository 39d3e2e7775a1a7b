"""What was found in a model, in short, for a terminal."""

from typing import Any

_SHOWN = 12


def summary(payload: dict[str, Any]) -> str:
    """A few lines on a payload: predictions, what changes do, the tokens that matter most, and what this does not show.

    Args:
        payload: of `explain_text`, `explain_image` or `compare_lineage`.
    """
    parts = {"language": _language}.get(payload["kind"], _other)(payload)
    notes = [f"  {note}" for note in payload.get("notes", [])]
    return "\n".join([*parts, "", "What these figures do not show:", *notes]) + "\n"


def _language(payload: dict[str, Any]) -> list[str]:
    pieces, focus, target = payload["text"]["pieces"], payload["position"], payload["target"]
    lines = [f"Behind token {focus} {pieces[focus]!r} the model expects:"]
    lines += _predictions(payload["positions"][focus]["predictions"])
    if payload["loss"] is not None:
        lines.append(f"Loss of the text: {payload['loss']:.4f} nats per token")
    if (changed := payload["changes"]) is not None:
        lines += ["", f"With {', '.join(changed['changes'])}:", *_predictions(changed["predictions"])]
        if changed["loss"] is not None:
            lines.append(f"Loss of the text: {changed['loss']:.4f} nats per token")
    lines += ["", f"What moves the logit of {target['piece']!r} most:"]
    rows = [["parameter token", "direct", "gradient", "measured", "promotes, or is near to"]]
    for entry in payload["attribution"][:_SHOWN]:
        card = payload["tokens"].get(entry["address"], {})
        words = [repr(word) for word, _ in (card.get("promotes") or card.get("nearest") or [])[:4]]
        numbers = [entry[name] for name in ("direct", "gradient", "measured")]
        rows.append([entry["address"], *("-" if x is None else f"{x:+.4f}" for x in numbers), " ".join(words)])
    return lines + _aligned(rows)


def _other(payload: dict[str, Any]) -> list[str]:
    return [f"{payload['kind']}: give --out report.html for the page, or --json FILE"]


def _predictions(predictions: list[dict[str, Any]]) -> list[str]:
    return [f"  {one['probability']:6.1%}  {one['piece']!r}" for one in predictions[:5]]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join(["", row[0].ljust(widths[0]), *numbers, row[-1]]).rstrip())
    return lines
