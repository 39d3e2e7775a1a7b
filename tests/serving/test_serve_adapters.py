"""Adapters under `tokenformer serve`: a request chooses one by naming it as its model; answers against generate."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from served import running

from lively import save_lively_model
from saved_model import save_model
from tokenformer import ParameterTokens
from tokenformer.cli import main
from tokenformer.models.loading import load_model
from tokenformer.tuning import add_adapter, save_adapter, set_adapter

PROMPT, TOKENS = "the fox", 12


def _save_adapter(model, name, folder, seed) -> None:
    add_adapter(model, name, qkv=2, ffn=6)
    torch.manual_seed(seed)
    for path, module in model.named_modules():
        if isinstance(module, ParameterTokens) and path.endswith(f".{name}"):
            torch.nn.init.normal_(module.key, std=0.5)
            torch.nn.init.normal_(module.value, std=3)
    save_adapter(model, name, folder)


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """A server with the adapters law and poems (saved as verse), and the same model with both in this process."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    save_lively_model(folder / "model")
    model = load_model(folder / "model")
    _save_adapter(model, "law", folder / "law", 1)
    _save_adapter(model, "verse", folder / "verse", 2)
    options = ["--adapters", str(folder / "law"), f"poems={folder / 'verse'}"]
    with running(folder / "model", model, *options) as served:
        yield served


def _expected(serving, adapter: str | None, prompt: str = PROMPT) -> str:
    set_adapter(serving.model, adapter)
    return serving.expected(prompt, TOKENS)


def _complete(serving, name: str) -> openai.types.Completion:
    return serving.client.completions.create(model=name, prompt=PROMPT, max_tokens=TOKENS, temperature=0)


def test_models_are_listed_with_their_adapters(serving) -> None:
    models = list(serving.client.models.list())
    assert [model.id for model in models] == [serving.name, "law", "poems"]
    assert [getattr(model, "parent", None) for model in models] == [None, serving.name, serving.name]
    assert serving.client.models.retrieve("law").id == "law"


def test_each_request_gets_its_adapter_also_among_others(serving) -> None:
    wanted = {serving.name: _expected(serving, None), "law": _expected(serving, "law")}
    wanted["poems"] = _expected(serving, "verse")
    assert len(set(wanted.values())) == 3
    names = [serving.name, "law", "poems", "law", serving.name, "poems"]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda name: _complete(serving, name), names))
    assert [answer.choices[0].text for answer in answers] == [wanted[name] for name in names]
    assert [answer.model for answer in answers] == names


def test_an_unknown_adapter_is_refused_with_the_names_there_are(serving) -> None:
    with pytest.raises(openai.NotFoundError, match=r"'lwa' is not served here: there are .*'law', 'poems'"):
        _complete(serving, "lwa")


def test_chat_chooses_an_adapter(serving, capsys, monkeypatch) -> None:
    options = [serving.url, "--greedy", "--max-tokens", str(TOKENS)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\n"))
    assert main(["chat", *options, "--adapter", "law"]) == 0
    wanted = _expected(serving, "law", "User: the fox\nAssistant:")
    assert capsys.readouterr().out == wanted.partition("\nUser:")[0].lstrip() + "\n"
    assert main(["chat", *options, "--adapter", "lwa"]) == 2
    assert "has no adapter 'lwa': it has law, poems" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (["law"], ["--continuous-batching"], "leave out continuous_batching"),
        (["law", "law"], [], "the model has an adapter 'law' already"),
        (["missing"], [], "holds no adapter"),
        (["base=law"], [], "the model has a segment 'base' already"),
        (["other"], [], "was made for another model"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused(given, options, message, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    model = load_model("model")
    add_adapter(model, "law", ffn=1)
    save_adapter(model, "law", "law")
    model.model.norm.weight.data += 1
    save_adapter(model, "law", "other")
    capsys.readouterr()
    assert main(["serve", "model", "--port", "0", "--threads", "1", "--adapters", *given, *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
