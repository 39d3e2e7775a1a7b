"""`tokenformer chat` against a server; answers against those of the openai client and of `model.generate`."""

import io
import os
import re
import select
import socket
import subprocess
import sys

import pytest

from saved_model import save_model
from tokenformer.cli import main


def run(capsys, monkeypatch, text, *argv):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = main(["chat", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def expected(server, *lines, tokens=8):
    """The answer to the last of `lines`, which are what user and model say in turn."""
    said = "".join(f"{'Assistant' if n % 2 else 'User'}: {line.strip()}\n" for n, line in enumerate(lines))
    return server.expected(f"{said}Assistant:", tokens).partition("\nUser:")[0].lstrip()


def test_a_conversation(server, capsys, monkeypatch):
    code, out, err = run(
        capsys, monkeypatch, "the fox\n\njumps over\n/clear\njumps over\n/exit\nnever\n",
        server.url, "--greedy", "--max-tokens", "8",
    )  # fmt: skip
    first = expected(server, "the fox")
    second = expected(server, "the fox", first, "jumps over")
    anew = expected(server, "jumps over")
    assert (code, err) == (0, "")
    assert out == f"{first}\n{second}\n{anew}\n"
    assert second != anew


def test_address_without_v1_and_a_last_line_without_an_end(server, capsys, monkeypatch):
    address = server.url.removesuffix("/v1")
    assert run(capsys, monkeypatch, "the fox", f"{address}/", "--greedy", "--max-tokens", "8") == (
        0,
        expected(server, "the fox") + "\n",
        "",
    )


def test_system_prompt(server, capsys, monkeypatch):
    _, out, _ = run(capsys, monkeypatch, "fox\n", server.url, "--greedy", "--max-tokens", "8", "--system", "Be brief.")
    assert out == server.expected("System: Be brief.\nUser: fox\nAssistant:", 8).lstrip() + "\n"


def test_seed(server, capsys, monkeypatch):
    def text(seed):
        options = ["--seed", seed, "--max-tokens", "20", "--temperature", "1.5"]
        return run(capsys, monkeypatch, "the\n", server.url, *options)[1]

    assert text("1") == text("1") != text("2")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_in_a_terminal(server):
    """Greets, prompts, goes on after a refusal, and ends with the end of the input."""
    import pty

    inside, outside = pty.openpty()
    command = [sys.executable, "-m", "tokenformer", "chat", server.url, "--greedy", "--max-tokens", "999990"]
    process = subprocess.Popen(command, stdin=outside, stdout=outside, stderr=outside)
    os.close(outside)
    shown = ""

    def read_prompt():
        nonlocal shown
        start = len(shown)
        while not shown.endswith("> ", start):
            assert select.select([inside], [], [], 120)[0], shown
            shown = (shown + os.read(inside, 4096).decode()).replace("\x1b[?2004h", "").replace("\x1b[?2004l", "")

    try:
        read_prompt()
        os.write(inside, b"the fox\n")
        read_prompt()
        os.write(inside, b"\x04")  # the end of the input, as Ctrl-D
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(inside)
    assert f"Talking to {server.name}" in shown
    assert "the server refused: the prompt (" in shown
    assert "/clear begins anew" in shown


def test_refusal(server, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "the fox\n", server.url, "--max-tokens", "999990")
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"tokenformer chat: error: the server refused: the prompt .* exceed the .* context of .*\n", err
    )


def test_no_server(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code, out, err = run(capsys, monkeypatch, "hello\n", f"http://127.0.0.1:{port}")
    assert (code, out) == (2, "")
    assert "start one with `tokenformer serve MODEL`" in err
    assert err.count("\n") == 1


def test_server_of_something_else(server, capsys, monkeypatch):
    address = server.url.removesuffix("/v1") + "/elsewhere"
    code, _, err = run(capsys, monkeypatch, "hello\n", address)
    assert code == 2
    assert "is no server with OpenAI's API" in err


def test_a_folder_is_no_address(capsys, monkeypatch, tmp_path):
    save_model(tmp_path)
    capsys.readouterr()
    code, _, err = run(capsys, monkeypatch, "hello\n", str(tmp_path))
    assert code == 2
    assert f"start it with `tokenformer serve {tmp_path}`" in err
    assert "it begins with http://" in run(capsys, monkeypatch, "hello\n", "localhost")[2]


def test_missing_extra(capsys, monkeypatch):
    monkeypatch.setattr("tokenformer.errors.find_spec", lambda name: None)
    code, _, err = run(capsys, monkeypatch, "hello\n")
    assert code == 2
    assert "pip install 'tokenformer[serve]'" in err
