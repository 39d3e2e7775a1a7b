"""The page: what was found in a model, as one HTML file that needs no network, or as files for `tokenformer explore`.

Everything that comes from models and corpora travels as JSON in a `<script type="application/json">`, which no browser
runs, and is turned into text nodes by the scripts in `web/`. A Content-Security-Policy in the file allows the scripts
that are embedded, by their hashes, and nothing else: no other script, no request. Styles are allowed inline, because
plotly writes a style sheet of its own.
"""

import base64
import hashlib
import json
import math
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from tokenformer.errors import UserError, require_extra
from tokenformer.folders import write_atomically

FORMAT = 1
STYLE = "page.css"
CHARTS = "plotly.min.js"
# In the order they run: the first one shows the errors of the others.
SCRIPTS = (
    "guard.js",
    CHARTS,
    "elements.js",
    "charts.js",
    "view.js",
    "card.js",
    "language.js",
    "vision.js",
    "live.js",
    "lineage.js",
    "start.js",
)
_TITLES = {"language": "What a text uses", "lineage": "Before and after growing", "vision": "What an image uses"}
# Neither can end the element early, start a comment in it, or break a line of the script.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def write_page(payload: dict[str, Any], path: str | Path) -> None:
    """Write a self-contained report of about 5 MB, most of it plotly.

    Args:
        payload: of `explain_text`, `explain_image` or `compare_lineage`.
        path: of the HTML file, replaced in one step.

    Raises:
        UserError: plotly is missing, or the file cannot be written.
    """
    path = Path(path)
    page = report(payload)
    if not path.parent.is_dir():
        raise UserError(f"there is no folder '{path.parent}' for {path.name}: make it first")
    write_atomically(path, page)


def report(payload: dict[str, Any]) -> str:
    """The HTML of `write_page`."""
    scripts = {name: web_file(name) for name in SCRIPTS}
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts.values()
    )
    policy = content_policy(f"script-src {hashes}")
    return _page(
        payload,
        policy=f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        styles=f"<style>{web_file(STYLE)}</style>",
        scripts="\n".join(f"<script>{script}</script>" for script in scripts.values()),
    )


def served_page(payload: dict[str, Any]) -> str:
    """The HTML of `tokenformer explore`, which asks for its scripts at `/web/`; its policy is a header."""
    scripts = "\n".join(f'<script src="/web/{name}"></script>' for name in SCRIPTS)
    return _page(payload, policy="", styles=f'<link rel="stylesheet" href="/web/{STYLE}">', scripts=scripts)


def content_policy(scripts: str, connections: str = "connect-src 'none'", styles: str = "'unsafe-inline'") -> str:
    """A Content-Security-Policy that allows what is named, pictures in the page itself, and nothing else."""
    return (
        f"default-src 'none'; {scripts}; style-src {styles}; img-src data:; {connections}; base-uri 'none'; "
        "form-action 'none'"
    )


def web_file(name: str) -> str:
    """The text of a script or style of the page.

    Raises:
        UserError: plotly is not installed.
    """
    if name == CHARTS:
        require_extra("explain", "plotly")
        from plotly.offline import get_plotlyjs

        text: str = get_plotlyjs()
        return text
    return (files("tokenformer.interpret") / "web" / name).read_text(encoding="utf-8")


def embedded(payload: dict[str, Any]) -> str:
    """A payload as JSON without a sign of markup, as it may stand in a script element; what is not finite is null."""
    text = json.dumps(_finite(payload), allow_nan=False, separators=(",", ":"))  # ASCII, so no U+2028 either
    for sign, escape in _ESCAPES.items():
        text = text.replace(sign, escape)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(payload: dict[str, Any], **parts: str) -> str:
    template = Template(web_file("page.html"))
    return template.substitute(title=_TITLES[payload["kind"]], payload=embedded(payload), **parts)
