"""The page of an image in a real browser."""

import copy

import pytest
import torch
from browsing import open_report, percent

from image_samples import random_image, write_class_folders
from tiny_vision import CLASSES, tiny_classifier
from tokenformer.images import image_processor, open_image_set
from tokenformer.interpret import Off
from tokenformer.interpret.vision import explain_image

EVIL = [
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    "<b>bold</b>\u202edesrever",
]


@pytest.fixture(scope="module")
def payload(tmp_path_factory):
    folder = write_class_folders(tmp_path_factory.mktemp("images") / "samples", CLASSES, each=3)
    torch.manual_seed(0)
    images = open_image_set(str(folder))[0]
    options = {"ablations": 5, "images": images, "changes": [Off("1.ffn/base/0")], "name": "cat.png"}
    return explain_image(tiny_classifier(), image_processor(12), random_image(1, (20, 16)), **options)


@pytest.fixture
def opened(tab, payload, tmp_path):
    """The report of a payload in the browser."""

    return lambda changed=None: open_report(tab, changed or payload, tmp_path)


def bars(tab):
    """Texts beside the bars of the classes."""
    return tab.locator(".pictured .bartext").all_text_contents()


def heat(tab):
    """The numbers of the map."""
    return tab.evaluate("document.querySelector('.image .js-plotly-plot').data[0].z")


def rows_of(values, columns=3):
    return [values[i : i + columns] for i in range(0, len(values), columns)]


def row(tab, address):
    return tab.locator(f"tr[data-address='{address}']")


def test_report_shows_the_payload_and_asks_for_nothing(opened, payload):
    tab = opened()
    rows = tab.locator("tr[data-address]")
    addresses = [rows.nth(i).get_attribute("data-address") for i in range(5)]
    assert addresses == [entry["address"] for entry in payload["attribution"][:5]]
    assert heat(tab) == rows_of(payload["maps"][addresses[0]]["weights"])
    assert tab.locator(".image figure img").get_attribute("src") == payload["image"]["uri"]
    assert tab.locator(".image figure img").evaluate("(image) => image.naturalWidth") == 12
    assert f"{percent(payload['changes']['predictions'][0]['probability'])}" in bars(tab)  # as the command line asked
    for note in payload["notes"]:
        assert tab.get_by_text(note).is_visible()
    assert [url for url in tab.requests if not url.startswith("data:")] == tab.requests[:1]
    assert tab.errors == []
    assert tab.evaluate("refused") == []


def test_choosing_a_token_moves_map_and_card(opened, payload):
    tab = opened()
    address = payload["attribution"][1]["address"]
    row(tab, address).click()
    assert heat(tab) == rows_of(payload["maps"][address]["weights"])
    tab.get_by_label("Map of").select_option("contributions")
    assert heat(tab) == rows_of(payload["maps"][address]["contributions"])
    pictures = tab.locator("ul.pictures img")
    expected = payload["tokens"][address]["images"]
    assert [pictures.nth(i).get_attribute("src") for i in range(len(expected))] == [
        payload["images"][one["image"]]["uri"] for one in expected
    ]
    labels = tab.locator("ul.pictures b").all_text_contents()
    assert labels == [payload["images"][one["image"]]["label"] for one in expected]
    marked = [one["patch"] for one in expected if one["patch"] is not None]
    marks = tab.locator("ul.pictures .patch")
    assert marks.count() == len(marked)
    for i, patch in enumerate(marked):
        style = marks.nth(i).evaluate("(mark) => [parseFloat(mark.style.left), parseFloat(mark.style.top)]")
        assert style == pytest.approx([100 * (patch % 3) / 3, 100 * (patch // 3) / 3], abs=0.01)


def test_switching_a_token_off_shows_what_was_measured(opened, payload):
    tab = opened()
    address = payload["attribution"][2]["address"]
    row(tab, address).click()
    tab.click("#switch")
    after = payload["ablations"][address]["predictions"]
    assert percent(after[0]["probability"]) in bars(tab)
    target = payload["target"]
    now = next(one for one in after if one["id"] == target["id"])
    expected = f"“{target['piece']}” {percent(target['probability'])} → {percent(now['probability'])}"
    assert tab.locator("#effect").inner_text() == expected
    assert expected in tab.locator("#status").inner_text()
    tab.click("#switch")
    assert tab.locator("#effect").count() == 0
    assert bars(tab) == [percent(one["probability"]) for one in payload["predictions"]]
    unmeasured = next(e["address"] for e in payload["attribution"] if e["address"] not in payload["ablations"])
    row(tab, unmeasured).click()
    assert tab.locator("#switch").is_disabled()
    assert f"--change 'off {unmeasured}'" in tab.locator("#why").inner_text()


def test_strongest_of_a_layer(opened, payload):
    tab = opened()
    layer = "model.layers.1.ffn"
    tab.locator("select").filter(has_text="strongest in").select_option(layer)
    rows = tab.locator("tr[data-address]")
    assert [rows.nth(i).get_attribute("data-address") for i in range(rows.count())] == payload["strongest"][layer]
    last = payload["strongest"][layer][-1]
    row(tab, last).click()
    assert heat(tab) == rows_of(payload["maps"][last]["weights"])


def test_keyboard_alone(opened, payload):
    tab = opened()
    tab.locator("tr[data-address][tabindex='0']").focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    address = payload["attribution"][1]["address"]
    assert tab.evaluate("document.activeElement.tagName") == "H2"
    assert heat(tab) == rows_of(payload["maps"][address]["weights"])
    tab.keyboard.press("Tab")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "switch"
    tab.keyboard.press("Enter")
    assert tab.locator("#effect").is_visible()
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.activeElement.dataset.address") == address
    assert tab.locator(".image .js-plotly-plot").count() == 0


def test_text_of_the_payload_is_shown_and_not_run(opened, payload):
    bad = copy.deepcopy(payload)
    bad["image"]["name"] = bad["model"]["name"] = bad["source"]["name"] = EVIL[1]
    bad["target"]["piece"] = EVIL[2]
    for i, text in enumerate(EVIL):
        bad["predictions"][i]["piece"] = text
        bad["notes"].append(text)
        bad["images"][i] |= {"label": text, "name": text}
    bad["images"][0]["uri"] = "http://192.0.2.1/leak.png"
    bad["images"][1]["uri"] = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' onload='window.hacked=1'/>"
    for card in bad["tokens"].values():
        card["images"] = [{"image": i, "weight": 1.0, "patch": 0} for i in range(3)]
    tab = opened(bad)
    assert EVIL[1] in tab.locator(".pictured h2").first.inner_text()
    assert tab.locator("ul.pictures li").count() == 3
    assert tab.locator("ul.pictures img").count() == 1
    assert tab.evaluate("window.hacked") is None
    assert "\u202e" not in tab.locator("#main").inner_text()
    assert not [url for url in tab.requests if "192.0.2.1" in url]
    assert tab.errors == []


def test_mean_pooling_without_images_or_changes(opened):
    torch.manual_seed(1)
    model = tiny_classifier(pooling="mean")
    tab = opened(explain_image(model, image_processor(12), random_image(1), ablations=0))
    assert tab.get_by_text("at the class token").count() == 0
    assert tab.get_by_text("These need images").is_visible()
    assert tab.locator(".chips").count() == 0
    assert tab.errors == []
