"""One small grown model with its index and its explanation, and one browser, for the tests of the page."""

import pytest
import torch
from browsing import ARGUMENTS, CHROMIUM

from saved_model import LINES, save_model


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Folder, model, tokenizer and index."""
    from tokenformer.interpret.building import build_index
    from tokenformer.models.loading import load_tokenizer

    place = tmp_path_factory.mktemp("explained")
    torch.manual_seed(0)
    segments = [{"name": "base", "qkv": 12, "output": 10, "ffn": 30}]
    model = save_model(place / "model", grown=True, segments=segments)
    tokenizer = load_tokenizer(place / "model")
    corpus = place / "corpus.txt"
    corpus.write_text("\n".join(LINES * 6), encoding="utf-8")
    index = build_index(
        model, tokenizer, [corpus], place / "index", model_folder=place / "model", contexts=3, progress=False
    )
    return place / "model", model, tokenizer, index


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by Playwright."""
    if CHROMIUM is None:
        pytest.skip("the page is tested in Debian's chromium, which is not installed here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """An empty tab of a laptop's size, which remembers requests, errors and refusals of the policy."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.requests, page.errors = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.add_init_script(
        "window.refused = []; document.addEventListener('securitypolicyviolation', (e) => refused.push(e.blockedURI));"
    )
    page.set_default_timeout(30_000)
    yield page
    page.close()
