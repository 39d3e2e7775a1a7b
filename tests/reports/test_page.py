"""Pages stand alone and show text as text."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

from tokenformer.reports.page import Page

HOSTILE = "<script>alert('x')</script> & \"quoted\" </pre>"


class Reader(HTMLParser):
    """Collects the text and the tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_everything_passed_in_is_shown_as_it_is(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG not really")
    page = Page(f"title {HOSTILE}")
    page.heading(f"heading {HOSTILE}")
    page.text(f"text {HOSTILE}")
    page.code(f"code {HOSTILE}")
    page.table([f"head {HOSTILE}"], [[f"cell {HOSTILE}"], ["second"]], best=1)
    page.figure(picture, f"caption {HOSTILE}")
    reader = Reader()
    reader.feed(page.html())
    for part in ("title", "heading", "text", "code", "head", "cell", "caption"):
        assert f"{part} {HOSTILE}" in reader.text
    assert "script" not in [tag for tag, _ in reader.tags]
    assert [attributes for tag, attributes in reader.tags if tag == "tr"] == [{}, {}, {"class": "best"}]
    (image,) = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert image["alt"] == f"caption {HOSTILE}"
    assert base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,")) == picture.read_bytes()


def test_nothing_is_fetched(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    page = Page("t")
    page.figure(picture, "c")
    assert not re.findall(r"(?:https?:)?//|@import|url\(|<link|<script", page.html())
