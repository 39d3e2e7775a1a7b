"""What `tokenformer serve` says, in one line, when it cannot start."""

import socket

import pytest

from saved_model import save_model
from tokenformer.cli import main
from tokenformer.serving.server import listen


def refused(capsys, *argv):
    assert main(["serve", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokenformer serve: error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def folder(tmp_path, capsys):
    save_model(tmp_path)
    capsys.readouterr()  # the progress of saving
    return tmp_path


def test_port_in_use(capsys, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(capsys, folder, "--port", port)
    assert f"cannot listen on 127.0.0.1:{port} (" in error
    assert "choose another --port" in error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--port", "70000"], "port must be between 0 and 65535, got 70000"),
        (["--port", "-1"], "port must be between 0 and 65535, got -1"),
        (["--port", "http"], "expected int"),
        (["--host", "no such host"], "host 'no such host' is no address of this machine"),
        (["--host", "192.0.2.1", "--port", "0"], "cannot listen on 192.0.2.1:0"),
        (["--grace", "-1"], "grace must be at least 0, got -1"),
        (["--port", "0", "--threads", "0"], "threads must be at least 1, got 0"),
        (["--port", "0", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["--port", "0", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["--prot", "0"], "did you mean '--port'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(capsys, folder, argv, words):
    assert words in refused(capsys, folder, *argv)


def test_port_of_a_server_that_is_still_loading(capsys, folder):
    with listen("127.0.0.1", 0) as loading:
        assert "cannot listen on" in refused(capsys, folder, "--port", loading.getsockname()[1])


def test_missing_model(capsys, tmp_path):
    assert "there is no folder" in refused(capsys, tmp_path / "absent", "--port", "0")


def test_missing_tokenizer(capsys, folder):
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer" in refused(capsys, folder, "--port", "0")


def test_missing_extra(capsys, folder, monkeypatch):
    monkeypatch.setattr("tokenformer.errors.find_spec", lambda name: None)
    assert "this needs fastapi, which is not installed: pip install 'tokenformer[serve]'" in refused(capsys, folder)


def test_the_port_is_free_again_after_a_refusal(capsys, folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    refused(capsys, folder / "absent", "--port", port)
    with socket.create_server(("127.0.0.1", port)):
        pass
