"""A self-contained HTML page: text, tables and figures in one file that needs no network."""

import base64
from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.answer { font-size: 1.1rem; border-left: 4px solid #1f77b4; padding: .3rem 1rem; background: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { white-space: normal; } th:first-child, td:first-child { text-align: left; }
tr.best td { font-weight: 600; }
pre { background: var(--soft); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; } figure img { width: 100%; display: block; }
figcaption, .note { font-size: .9rem; opacity: .8; }
figcaption { padding: .4rem .8rem .8rem; color: #222; opacity: 1; }
"""


class Page:
    """A page, written from top to bottom. Everything passed in is plain text and is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """A section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        """A paragraph; `kind` is `answer` or `note`."""
        self._parts.append(f'<p class="{escape(kind)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>")

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        best: int | None = None,
        bold: Collection[tuple[int, int]] = (),
    ) -> None:
        """A table; row `best` and the cells `bold`, as (row, column), are set in bold."""
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
        body = ""
        for i, row in enumerate(rows):
            texts = [f"<b>{escape(cell)}</b>" if (i, j) in bold else escape(cell) for j, cell in enumerate(row)]
            cells = "".join(f"<td>{text}</td>" for text in texts)
            body += f'<tr class="best">{cells}</tr>' if i == best else f"<tr>{cells}</tr>"
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        self._parts.append(f'<div class="scroll">{table}</div>')

    def figure(self, png: Path, caption: str) -> None:
        """A picture, embedded."""
        data = base64.b64encode(png.read_bytes()).decode()
        self._parts.append(
            f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def code(self, text: str) -> None:
        """Text as it is, in a fixed-width box."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def html(self) -> str:
        """The whole page."""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body>\n</html>\n"
        )
