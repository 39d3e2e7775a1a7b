"""Continuous batching, over a real socket: the same answers from a batch that requests join and leave."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import uvicorn
from served import Served

from lively import save_lively_model
from saved_model import LINES, train_tokenizer
from tokenformer.serving.app import build_app
from tokenformer.serving.engine import Batched

TEMPLATE = (
    "{% for message in messages %}[{{ message['content'] }}]"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batched")
    engine = Batched(save_lively_model(folder, max_position_embeddings=4096), train_tokenizer())
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    """In a thread of this process. `expected` asks a copy: the batch changes the attention of its model."""
    copy = save_lively_model(tmp_path_factory.mktemp("copy"), max_position_embeddings=4096)
    copy.load_state_dict(engine.model.state_dict())
    tokenizer = train_tokenizer()
    tokenizer.chat_template = TEMPLATE
    app = build_app("tiny", engine.model, tokenizer, engine)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        yield Served("tiny", f"http://127.0.0.1:{listener.getsockname()[1]}/v1", copy)
        running.should_exit = True
        thread.join()


def active(engine):
    scheduler = engine._manager.batch_processor.scheduler
    return {*scheduler.active_requests, *scheduler.waiting_requests}


def test_sixteen_clients_get_their_own_answers(server):
    """Greedy ones are those of generate, whatever those beside them sample."""
    prompts = [f"{line} {n}" for n in range(4) for line in (*LINES, "fox")]

    def ask(job):
        n, prompt = job
        if n % 4 == 3:
            return server.complete(prompt, max_tokens=30, temperature=2).choices[0].text
        answer = server.complete(prompt, max_tokens=20, stream=n % 2 == 0)
        return "".join(event.choices[0].text for event in (answer if n % 2 == 0 else [answer]))

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, enumerate(prompts)))
    greedy = [n for n in range(16) if n % 4 != 3]
    assert [answers[n] for n in greedy] == [server.expected(prompts[n], 20) for n in greedy]
    assert len(set(answers)) == 16


def test_requests_share_the_steps(server, engine):
    """Two that never end in time generate at once; a third is answered meanwhile."""
    streams = [server.complete("the", max_tokens=4000, stream=True) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    assert server.complete("fox", max_tokens=20).choices[0].text == server.expected("fox", 20)
    assert len(engine.answers) == 2
    for stream in streams:
        next(iter(stream))
        stream.close()


def test_hanging_up_and_stop_strings_end_the_work(server, engine):
    stream = server.complete("the", max_tokens=4000, stream=True)
    next(iter(stream))
    stream.close()
    whole = server.expected(LINES[0], 30)
    stop = whole[5:8]
    assert server.complete(LINES[0], max_tokens=4000, stop=stop).choices[0].text == whole[: whole.index(stop)]
    deadline = threading.Event()
    for _ in range(600):
        if not active(engine) and not engine.answers:  # the second is forgotten a moment after the first stops
            break
        deadline.wait(0.1)
    assert not active(engine)
    assert not engine.answers


def test_prompts_with_a_common_beginning(server):
    """Blocks of the cache are shared between them."""
    common = "the quick brown fox " * 60
    for end in ("jumps", "over", "jumps"):
        assert server.complete(common + end, max_tokens=10).choices[0].text == server.expected(common + end, 10)


def test_sampling_settings_belong_to_one_request(server):
    """With a top_k of 1 the temperature does not matter; without, it does."""
    options = {"max_tokens": 20, "temperature": 5}
    expected = server.expected(LINES[1], 20)
    assert server.complete(LINES[1], extra_body={"top_k": 1}, **options).choices[0].text == expected
    assert server.complete(LINES[1], top_p=1e-6, **options).choices[0].text == expected
    assert server.complete(LINES[1], **options).choices[0].text != expected


def test_a_chat_template_of_the_tokenizer_is_used(server):
    def ask(role):
        messages = [{"role": role, "content": "the fox"}]
        return server.client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=9)

    assert ask("user").choices[0].message.content == server.expected("[the fox]", 9)
    with pytest.raises(openai.BadRequestError, match="no system prompt"):
        ask("system")


def test_seed_is_refused(server):
    with pytest.raises(openai.BadRequestError, match="leave out seed"):
        server.complete("the", seed=1, temperature=1)


def test_too_long(server):
    with pytest.raises(openai.BadRequestError, match="context of 4096 tokens"):
        server.complete("the", max_tokens=4096)


def test_dead_batch(server, engine, monkeypatch):
    monkeypatch.setattr(Batched, "trouble", "out of memory")
    with pytest.raises(openai.InternalServerError, match="the model has stopped") as refused:
        server.complete("the")
    assert refused.value.status_code == 503


def test_crowd(server, monkeypatch):
    monkeypatch.setattr("tokenformer.serving.engine.MOST_REQUESTS", 0)
    with pytest.raises(openai.InternalServerError, match="try again later"):
        server.complete("the")
