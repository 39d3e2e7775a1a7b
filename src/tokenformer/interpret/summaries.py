"""What was found in a model, in short, for a terminal."""

from typing import Any

_SHOWN = 12


def summary(payload: dict[str, Any]) -> str:
    """A few lines on a payload: predictions, what changes do, the tokens that matter most, and what this does not show.

    Args:
        payload: of `explain_text`, `explain_image` or `compare_lineage`.
    """
    parts = {"language": _language, "vision": _vision, "lineage": _lineage}[payload["kind"]](payload)
    notes = [f"  {note}" for note in payload.get("notes", [])]
    return "\n".join([*parts, "", "What these figures do not show:", *notes]) + "\n"


def _language(payload: dict[str, Any]) -> list[str]:
    pieces, focus = payload["text"]["pieces"], payload["position"]
    lines = [f"Behind token {focus} {pieces[focus]!r} the model expects:"]
    lines += _predictions(payload["positions"][focus]["predictions"])
    if payload["loss"] is not None:
        lines.append(f"Loss of the text: {payload['loss']:.4f} nats per token")
    if (changed := payload["changes"]) is not None:
        lines += ["", f"With {', '.join(changed['changes'])}:", *_predictions(changed["predictions"])]
        if changed["loss"] is not None:
            lines.append(f"Loss of the text: {changed['loss']:.4f} nats per token")
    return [*lines, "", *_strongest(payload, "promotes, or is near to")]


def _vision(payload: dict[str, Any]) -> list[str]:
    lines = [f"The model takes {payload['image']['name']} for:", *_predictions(payload["predictions"])]
    if (changed := payload["changes"]) is not None:
        lines += ["", f"With {', '.join(changed['changes'])}:", *_predictions(changed["predictions"])]
    lines += ["", *_strongest(payload, "promotes")]
    if payload["source"] is not None:
        lines += [
            "",
            f"Images of {payload['source']['name']} with the highest weights ({payload['source']['images']} read):",
        ]
        for entry in payload["attribution"][:_SHOWN]:
            best = [payload["images"][one["image"]] for one in payload["tokens"][entry["address"]]["images"]]
            lines.append(f"  {entry['address']}  {', '.join(dict.fromkeys(image['label'] for image in best))}")
    return lines


def _lineage(payload: dict[str, Any]) -> list[str]:
    before, after, overlaps = payload["before"], payload["after"], payload["overlaps"]
    rows = [["", "parameters", "loss", ""]]
    rows += [
        [name, f"{model['parameters']:,}", f"{model['loss']:.4f}", f"{model['name']}: {' + '.join(model['segments'])}"]
        for name, model in (("before", before), ("after", after))
    ]
    lines = [*_aligned(rows), "", "Loss by type of token, in nats:"]
    rows = [["type", "tokens", "before", "after", "difference", ""]]
    for row in payload["loss"]:
        figures = [f"{row['before']:.4f}", f"{row['after']:.4f}", f"{row['after'] - row['before']:+.4f}"]
        rows.append([row["type"], f"{row['tokens']:,}", *figures, ""])
    lines += [*_aligned(rows), "", "Share of the output that comes from new segments, by kind of layer:"]
    for kind in dict.fromkeys(layer["kind"] for layer in payload["layers"]):
        new = [
            sum(segment["share"] for segment in layer["segments"] if segment["new"])
            for layer in payload["layers"]
            if layer["kind"] == kind
        ]
        lines.append(f"  {kind}  {sum(new) / len(new):.1%}")
    kept = f"Of the {overlaps['contexts']} contexts of highest weight an old token kept {overlaps['mean']:.1%}"
    return [*lines, "", f"{kept}; two random choices would share {overlaps['chance']:.1%}."]


def _strongest(payload: dict[str, Any], holds: str) -> list[str]:
    """The tokens that move the target's logit most, as a table."""
    rows = [["parameter token", "direct", "gradient", "measured", holds]]
    for entry in payload["attribution"][:_SHOWN]:
        card = payload["tokens"].get(entry["address"], {})
        words = [repr(word) for word, _ in (card.get("promotes") or card.get("nearest") or [])[:4]]
        numbers = [entry[name] for name in ("direct", "gradient", "measured")]
        rows.append([entry["address"], *("-" if x is None else f"{x:+.4f}" for x in numbers), " ".join(words)])
    return [f"What moves the logit of {payload['target']['piece']!r} most:", *_aligned(rows)]


def _predictions(predictions: list[dict[str, Any]]) -> list[str]:
    return [f"  {one['probability']:6.1%}  {one['piece']!r}" for one in predictions[:5]]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join(["", row[0].ljust(widths[0]), *numbers, row[-1]]).rstrip())
    return lines
