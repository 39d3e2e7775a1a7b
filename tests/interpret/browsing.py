"""A browser for the pages, and the application of `explore` in a thread."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from tokenformer.interpret.page import write_page
from tokenformer.serving.server import listen

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def open_report(tab, payload, folder: Path):
    """The report of a payload in a tab, drawn."""
    write_page(payload, folder / "report.html")
    tab.goto((folder / "report.html").as_uri())
    tab.wait_for_selector("#main .js-plotly-plot")
    return tab


def percent(probability: float) -> str:
    """A share as the page writes it."""
    return "<0.1 %" if 0 < probability < 0.0005 else f"{100 * probability:.1f} %"


@contextmanager
def serving(app) -> Iterator[str]:
    """The address where an application is served."""
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive(), "the server ended"
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
