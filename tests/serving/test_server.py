"""`tokenformer serve` over a real socket, by the openai client and by hand; answers against `model.generate`."""

import http.client
import json
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import openai
import psutil
import pytest
import torch
from served import CONTEXT, running

from saved_model import LINES

HELLO = [{"role": "user", "content": "the quick fox"}]
HELLO_PROMPT = "User: the quick fox\nAssistant:"


def chat(served, messages, **options):
    return served.client.chat.completions.create(model=served.name, messages=messages, **{"temperature": 0, **options})


def post(served, body, path="/v1/completions", headers=None):
    """Status and JSON of a request made by hand."""
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=120)
    try:
        connection.request("POST", path, body, headers or {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def get(served, path):
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=120)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def wait_until_idle(served):
    """Ends when the server works on nothing; the longest request would keep it busy for half an hour."""
    deadline = time.monotonic() + 60
    while get(served, "/health")[1]["requests"]:
        assert time.monotonic() < deadline, "the server still generates"
        time.sleep(0.05)


# Answers


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("prompt", LINES)
def test_greedy_completion_is_that_of_generate(server, prompt, stream):
    answer = server.complete(prompt, max_tokens=20, stream=stream)
    text = "".join(event.choices[0].text for event in answer) if stream else answer.choices[0].text
    assert text == server.expected(prompt, 20)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_greedy_chat_is_that_of_generate(server, stream):
    """The model has no chat template; this is the documented one, written out."""
    messages = [{"role": "system", "content": "You are brief. "}, *HELLO, {"role": "assistant", "content": " jumps"}]
    messages.append({"role": "user", "content": [{"type": "text", "text": "over?"}]})
    prompt = "System: You are brief.\nUser: the quick fox\nAssistant: jumps\nUser: over?\nAssistant:"
    answer = chat(server, messages, max_tokens=20, stream=stream)
    if stream:
        events = list(answer)
        text = "".join(event.choices[0].delta.content or "" for event in events)
        assert events[0].choices[0].delta.role == "assistant"
    else:
        text = answer.choices[0].message.content
    assert text == server.expected(prompt, 20)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.7}, {"extra_body": {"top_k": 3}}], ids=["all", "top_p", "top_k"])
def test_seeded_sampling_is_that_of_generate(server, options):
    answer = server.complete("the", max_tokens=20, temperature=1.5, seed=7, **options)
    sampling = {"temperature": 1.5, "top_k": 0, **options, **options.get("extra_body", {})}
    sampling.pop("extra_body", None)
    torch.manual_seed(7)
    assert answer.choices[0].text == server.expected("the", 20, **sampling)


def test_sampling_differs_from_time_to_time(server):
    texts = {server.complete("the", max_tokens=20, temperature=1.5).choices[0].text for _ in range(3)}
    assert len(texts) == 3


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stop_strings_are_cut_from_the_text(server, stream):
    whole = server.expected(LINES[1], 20)
    stop = re.search(r"[^\ufffd]{2}", whole[1:])[0]  # not of bytes that are no characters: those come at the end
    answer = server.complete(LINES[1], max_tokens=20, stop=["not there", stop], stream=stream)
    events = list(answer) if stream else [answer]
    assert "".join(event.choices[0].text for event in events) == whole[: whole.index(stop)]
    assert events[-1].choices[0].finish_reason == "stop"
    assert events[-1].usage.completion_tokens < 20


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_usage_and_finish(server, stream):
    answer = server.complete("the quick", max_tokens=7, stream=stream)
    last = list(answer)[-1] if stream else answer
    prompt = len(server.tokenizer("the quick")["input_ids"])
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (prompt, 7, prompt + 7)
    assert last.choices[0].finish_reason == "length"
    assert last.model == server.name


def test_defaults(server):
    """Without max_tokens 16 tokens, as OpenAI has it; an empty prompt begins a text; null is not given."""
    body = {"model": None, "prompt": "", "temperature": 0, "stop": None, "logprobs": None}
    status, answer = post(server, json.dumps(body))
    assert status == 200
    assert answer["choices"][0]["text"] == server.expected("<|endoftext|>", 16)


def test_a_stream_ends_as_openai_ends_it(server):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=120)
    body = json.dumps({"prompt": "the", "max_tokens": 2, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    events = answer.read().decode().split("\n\n")
    connection.close()
    assert answer.getheader("Content-Type").startswith("text/event-stream")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2])


def test_models(server):
    (model,) = server.client.models.list()
    assert model.id == server.name
    assert model.max_model_len == CONTEXT
    assert server.client.models.retrieve(server.name).id == server.name
    assert get(server, "/health") == (200, {"status": "ok", "requests": 0})


# Many clients


def test_sixteen_clients_get_their_own_answers(server):
    """All ask the same with a seed of their own, so that whatever they shared would show."""

    def ask(seed):
        answer = server.complete("the", max_tokens=20, temperature=1, seed=seed, stream=seed % 2 == 0)
        return "".join(event.choices[0].text for event in (answer if seed % 2 == 0 else [answer]))

    def expected(seed):
        torch.manual_seed(seed)
        return server.expected("the", 20, temperature=1.0, top_k=0)

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, range(16)))
    assert answers == [expected(seed) for seed in range(16)]
    assert len(set(answers)) == 16


def test_client_that_hangs_up_in_mid_stream(server):
    """What it asked for is no longer generated, so that the next one need not wait for it."""
    stream = server.complete("the", max_tokens=CONTEXT - 10, stream=True)
    waiting = server.complete("fox", max_tokens=CONTEXT - 10, stream=True)  # behind it, and gone before its turn
    for _, event in zip(range(3), stream, strict=False):
        assert event.choices[0].finish_reason is None
    stream.close()
    waiting.close()
    assert server.complete("the quick", max_tokens=20).choices[0].text == server.expected("the quick", 20)
    wait_until_idle(server)


def test_client_that_hangs_up_without_a_stream(server):
    body = json.dumps({"prompt": "the", "max_tokens": CONTEXT - 10})
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=120) as gone:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
        gone.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{body}".encode())
        while not get(server, "/health")[1]["requests"]:
            time.sleep(0.05)
    wait_until_idle(server)


def test_threads_and_memory_do_not_grow_with_requests(server):
    process = psutil.Process(server.process.pid)

    def ask(n):
        if n % 4 == 0:
            list(server.complete("the", max_tokens=2, stream=True))
        elif n % 4 == 1:
            stream = server.complete("the", max_tokens=CONTEXT - 10, stream=True)
            next(iter(stream))
            stream.close()
        else:
            chat(server, HELLO, max_tokens=2)

    for n in range(20):
        ask(n)
    threads, memory = process.num_threads(), process.memory_info().rss
    for n in range(100):
        ask(n)
    wait_until_idle(server)
    assert process.num_threads() <= threads + 1
    assert process.memory_info().rss < memory + 20e6


# Bad requests


BAD = {
    "not JSON": (b"{", "the body is not JSON"),
    "no text": (b"\xff\xfe\xfd", "body"),
    "deeply nested": (b"[" * 100_000, "body"),
    "a list": (b"[1]", "must be a JSON object"),
    "no prompt": ({}, "prompt: Field required"),
    "prompt of another type": ({"prompt": 5}, "prompt: Input should be a valid string"),
    "prompt of several": ({"prompt": ["a", "b"]}, "prompt: Input should be a valid string"),
    "half a character": (b'{"prompt": "\\ud800"}', "prompt: Value error, is not Unicode text"),
    "half a character in a name": (b'{"prompt": "a", "\\ud800": 1}', ""),
    "temperature below 0": ({"prompt": "a", "temperature": -1}, "temperature: "),
    "temperature that is no number": (b'{"prompt": "a", "temperature": NaN}', "temperature: "),
    "temperature as text": ({"prompt": "a", "temperature": "0"}, "temperature: "),
    "top_p of 0": ({"prompt": "a", "top_p": 0}, "top_p: "),
    "no tokens": ({"prompt": "a", "max_tokens": 0}, "max_tokens: "),
    "tokens by halves": ({"prompt": "a", "max_tokens": 1.5}, "max_tokens: "),
    "too many tokens": ({"prompt": "a", "max_tokens": CONTEXT}, f"set max_tokens to {CONTEXT - 1}"),
    "tokens beyond all bounds": ({"prompt": "a", "max_tokens": 10**30}, "max_tokens: "),
    "several answers": ({"prompt": "a", "n": 2}, "n: "),
    "a penalty": ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty: "),
    "empty stop": ({"prompt": "a", "stop": ""}, "stop"),
    "a field that does not exist": ({"prompt": "a", "max_length": 5}, "max_length: not supported"),
    "a field that is not supported": ({"prompt": "a", "logprobs": 3}, "logprobs: not supported"),
}


@pytest.mark.parametrize(("body", "words"), BAD.values(), ids=BAD)
def test_bad_completion(server, body, words):
    status, answer = post(server, body if isinstance(body, bytes) else json.dumps(body))
    assert status == 400
    assert words in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "messages: Field required"),
        ({"messages": []}, "messages: "),
        ({"messages": "hello"}, "messages: "),
        ({"messages": ["hello"]}, "messages.0: "),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [{"content": "hello"}]}, "messages.0.role: Field required"),
        ({"messages": [{"role": "wizard", "content": "hello"}]}, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages.0.content"),
        ({"messages": HELLO, "tools": []}, "tools: not supported"),
        ({"messages": HELLO, "max_completion_tokens": CONTEXT}, "set max_completion_tokens to"),
    ],
    ids=lambda value: "" if isinstance(value, str) else json.dumps(value)[:40],
)
def test_bad_chat(server, body, words):
    status, answer = post(server, json.dumps(body), "/v1/chat/completions")
    assert status == 400
    assert words in answer["error"]["message"]


def test_another_model_is_refused(server):
    with pytest.raises(openai.NotFoundError, match="'gpt2' is not served here") as refused:
        server.client.completions.create(model="gpt2", prompt="a")
    assert refused.value.body["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt2")


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/responses", "/v1/audio/transcriptions"])
def test_routes_of_transformers_that_load_or_unload_models_are_absent(server, path):
    assert post(server, b'{"model": "gpt2"}', path)[0] == 404


def test_a_body_must_say_that_it_is_json(server):
    status, answer = post(server, b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert (status, "Content-Type: application/json" in answer["error"]["message"]) == (400, True)


@pytest.mark.parametrize("size", [1_100_000, 50_000_000])
def test_huge_body(server, size):
    status, answer = post(server, json.dumps({"prompt": "a" * size}))
    assert (status, answer["error"]["message"]) == (413, "the body is larger than 1048576 bytes")


def test_huge_body_without_a_length(server):
    chunks = (b"a" * 65536 for _ in range(100))
    assert post(server, chunks)[0] == 413


def test_the_server_lives_on_after_all_that(server):
    for body in [body for body, _ in BAD.values()]:
        post(server, body if isinstance(body, bytes) else json.dumps(body))
    assert server.complete("the", max_tokens=5).choices[0].text == server.expected("the", 5)


# The end


@pytest.mark.slow
def test_sigterm_lets_requests_finish_in_a_bounded_time(endless):
    with running(*endless, "--grace", "10") as served:
        first = served.complete("the", max_tokens=300, stream=True)
        text = next(iter(first)).choices[0].text
        waiting = ThreadPoolExecutor(2)
        second = waiting.submit(served.complete, "fox", max_tokens=20)
        while get(served, "/health")[1]["requests"] < 2:
            time.sleep(0.01)
        never = served.complete("the", max_tokens=CONTEXT - 10, stream=True)
        served.process.send_signal(signal.SIGTERM)
        text += "".join(event.choices[0].text for event in first)
        assert text == served.expected("the", 300)
        assert second.result().choices[0].text == served.expected("fox", 20)
        with pytest.raises(openai.APIConnectionError):
            served.complete("the")
        assert served.process.wait(timeout=60) == 0
        with pytest.raises(openai.APIError):
            list(never)
        waiting.shutdown()
