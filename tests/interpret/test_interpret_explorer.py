"""The requests of `explore`: what they answer, and whom."""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from browsing import serving

from saved_model import LINES
from tokenformer.interpret.effects import change_effect
from tokenformer.interpret.explorer import build_app
from tokenformer.interpret.intervention import Off, Scale

JSON = {"Content-Type": "application/json"}
TOKEN = "model.layers.1.ffn/base/3"


@pytest.fixture(scope="module")
def address(small):
    _, model, tokenizer, index = small
    with serving(build_app(model, tokenizer, index)) as url:
        yield url


def request(address, method, path, body=None, headers=JSON):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        connection.request(method, path, body if isinstance(body, str | None) else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def post(address, path, body, **options):
    answer, text = request(address, "POST", path, body, **options)
    return answer.status, json.loads(text)


def test_change_is_that_of_the_library(address, small):
    _, model, tokenizer, _ = small
    body = {"text": LINES[0], "position": 4, "changes": [f"off {TOKEN}", "scale 0.ffn/base 0.5"]}
    status, found = post(address, "/api/change", body)
    assert status == 200
    expected = change_effect(
        model, tokenizer, [Off(TOKEN), Scale("model.layers.0.ffn/base", 0.5)], LINES[0], position=4
    )
    assert found["loss_after"] == pytest.approx(expected["loss_after"], rel=1e-5)
    assert [one["id"] for one in found["after"]] == [one["id"] for one in expected["after"]]


def test_requests_at_the_same_time_do_not_see_each_others_changes(address):
    body = {"text": LINES[0], "position": 4, "changes": [f"off {TOKEN}"]}
    others = {"text": LINES[0], "position": 4, "changes": ["scale 1.ffn/base -3"]}
    alone = post(address, "/api/change", body)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda b: post(address, "/api/change", b), [body, others] * 4))
    assert all(answer == alone for answer in found[::2])
    assert found[1] != alone


def test_list_of_tokens(address, small):
    index = small[3]
    mean = index.statistics("model.layers.0.ffn", "base")["mean"]
    query = "layer=0.ffn&segment=base&sort=mean&offset=2&limit=3"
    answer, text = request(address, "GET", f"/api/tokens?{query}")
    found = json.loads(text)
    assert answer.status == 200
    assert found["total"] == len(mean)
    expected = [f"model.layers.0.ffn/base/{i}" for i in mean.argsort(descending=True)[2:5].tolist()]
    assert [token["address"] for token in found["tokens"]] == expected


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/api/explain", {"text": ""}, "the text is empty"),
        ("/api/explain", {"text": "fox " * 500}, "tokens"),
        ("/api/explain", {"text": "fox", "position": 99}, "position 99 is outside of the text"),
        ("/api/explain", {"text": "fox", "position": True}, "position: expected a whole number"),
        ("/api/explain", {"text": 3}, "text: expected a text"),
        ("/api/explain", {}, "text: expected a text"),
        ("/api/explain", [], "must be a JSON object"),
        ("/api/explain", "{", "the body is not JSON"),
        ("/api/explain", {"text": "x" * (1 << 20)}, "larger than"),
        ("/api/token", {"address": "9.ffn/base/0"}, "9.ffn"),
        ("/api/token", {"address": "1.ffn/base/9999"}, "9999"),
        ("/api/change", {"text": "fox", "position": 0, "changes": ["burn 1.ffn/base/0"]}, "is no change"),
        ("/api/change", {"text": "fox", "position": 0, "changes": [1]}, "changes: expected texts"),
        ("/api/change", {"text": "fox", "position": 0, "changes": ["scale 1.ffn/base/0 nan"]}, "finite"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests(address, path, body, words):
    status, found = post(address, path, body)
    assert status == 400
    assert list(found) == ["error"]
    assert words in found["error"]
    assert "\n" not in found["error"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("layer=0.ffn", "segment"),
        ("layer=0.ffn&segment=base&sort=size", "none of max"),
        ("layer=0.ffn&segment=other", "other"),
        ("layer=0.ffn&segment=base&offset=-1", "must be numbers"),
    ],
)
def test_bad_lists(address, query, words):
    answer, text = request(address, "GET", f"/api/tokens?{query}")
    assert answer.status == 400
    assert words in json.loads(text)["error"]


def test_only_json_and_only_by_its_own_name(address):
    """A page elsewhere can send forms and plain text here, and can have its own name point here."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        status, found = post(address, "/api/explain", {"text": "fox"}, headers={"Content-Type": kind})
        assert (status, "must be JSON" in found["error"]) == (400, True)
    answer, text = request(address, "GET", "/", headers={"Host": "evil.example"})
    assert answer.status == 400
    assert b"payload" not in text
    port = urlsplit(address).port
    assert request(address, "GET", "/", headers={"Host": f"localhost:{port}"})[0].status == 200


def test_headers_and_unknown_paths(address):
    answer, text = request(address, "GET", "/")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert b"<script>" not in text
    for path in ("/web/../page.py", "/web/page.html", "/docs", "/openapi.json"):
        assert request(address, "GET", path)[0].status == 404
