"""A small model that was really trained, made sparse: from calibration to generate, eval and back."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from saved_model import LINES, edit_config, save_model, train_tokenizer
from tiny import tiny_ids, tiny_model
from tokenformer import TokenFormerForCausalLM, UserError, grow
from tokenformer.cli import main
from tokenformer.elastic import prefix, shrink
from tokenformer.models.loading import load_model
from tokenformer.sparse import sparse_layers
from tokenformer.sparsity import densify, sparsify
from tokenformer.sparsity.budgets import Curve, equal_error
from tokenformer.sparsity.fitting import Regression, recall
from tokenformer.sparsity.grouping import group_sizes, group_tokens
from tokenformer.tuning import add_adapter, load_adapter, save_adapter

SEGMENTS = [{"name": "base", "qkv": 48, "output": 48, "ffn": 128}]
OPTIONS = {"dense_above": math.inf, "rank": 4, "router_rank": 4}


def text_rows(count):
    """Rows (count, 24) of a text with a pattern: each next token follows from the two before it, mostly."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randint(31, (31, 31), generator=generator)
    rows = torch.randint(31, (count, 24), generator=generator)
    for t in range(2, 24):
        follows = torch.rand(count, generator=generator) < 0.95
        rows[:, t] = torch.where(follows, table[rows[:, t - 1], rows[:, t - 2] % 3], rows[:, t])
    return rows


@pytest.fixture(scope="module")
def trained():
    """A model of two layers after 150 steps on the pattern, and rows that it has not seen."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = tiny_model(segments=SEGMENTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = text_rows(700)
    for step in range(150):
        batch = rows[(step * 32) % 512 :][:32]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False), rows[512:576], rows[640:]


def copy_of(model):
    made = TokenFormerForCausalLM(model.config.__class__.from_dict(model.config.to_dict())).eval()
    made.load_state_dict(model.state_dict())
    return made


@torch.no_grad()
def loss(model, rows):
    return model(rows, labels=rows).loss.item()


def test_chosen_tokens_and_remainder_lose_less_than_half_of_what_random_tokens_alone_lose(trained):
    model, calibration, held_out = trained
    dense = loss(model, held_out)
    assert dense < 2.8  # of ln 31 = 3.43: it has learned something to lose
    sparse = copy_of(model)
    report = sparsify(sparse, calibration, keep=0.25, **OPTIONS)
    kept = sum(layer["active"] * layer["group_size"] for layer in report["layers"].values())
    assert kept / (2 * (4 * 48 + 128)) == pytest.approx(report["computed"])
    assert report["computed"] <= 0.25
    lost = loss(sparse, held_out) - dense
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in sparse_layers(sparse).values():
            for parameter in (layer.down, layer.bias):
                parameter.zero_()
            layer.router_up.normal_()
    assert loss(sparse, held_out) - dense > 2 * lost


def test_more_tokens_are_better(trained):
    model, calibration, _ = trained
    errors = []
    for keep in (0.15, 0.5):
        report = sparsify(copy_of(model), calibration, keep=keep, **OPTIONS)
        errors.append(max(layer["error"] for layer in report["layers"].values()))
        assert all(0.5 < layer["recall"] <= 1 + 1e-6 for layer in report["layers"].values())
    assert errors[1] < errors[0]


def test_densify_gives_the_model_back(trained):
    model, calibration, held_out = trained
    sparse = copy_of(model)
    sparsify(sparse, calibration, **OPTIONS)
    with torch.no_grad():
        assert not torch.allclose(sparse(held_out).logits, model(held_out).logits, atol=1e-3)
        densify(sparse)
        torch.testing.assert_close(sparse(held_out).logits, model(held_out).logits, rtol=0, atol=2e-4)
    assert sparse.config.sparsity is None
    with pytest.raises(UserError, match="dense already"):
        densify(sparse)


@pytest.mark.parametrize(
    "options", [{"grouping": "keys"}, {"grouping": "random"}, {"router": "centroid"}, {"budgets": "uniform"}], ids=str
)
def test_other_groupings_routers_and_budgets(trained, options):
    model, calibration, held_out = trained
    sparse = copy_of(model)
    report = sparsify(sparse, calibration, **OPTIONS, **options)
    assert report["computed"] <= 0.26
    assert math.isfinite(loss(sparse, held_out))


def test_the_report_measures_what_the_layers_do(trained):
    """The errors of the report, against the outputs of dense and sparse layer on the same inputs."""
    model, calibration, _ = trained
    sparse = copy_of(model)
    report = sparsify(sparse, calibration, **OPTIONS)
    seen = {}
    layer, dense = sparse.model.layers[0].attention.query, model.model.layers[0].attention.query
    layer.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    with torch.no_grad():
        sparse(calibration)
        exact, found = (f(seen["x"]).flatten(0, 1) for f in (dense, layer))
    share = (found - exact).square().sum() / (exact - exact.mean(0)).square().sum()
    assert report["layers"]["layers.0.attention.query"]["error"] == pytest.approx(share.item(), rel=1e-3)


def test_a_sparse_model_generates_one_by_one_what_it_computes_at_once(trained):
    model, calibration, held_out = trained
    sparse = copy_of(model).double()
    sparsify(sparse, calibration, **OPTIONS)
    with torch.no_grad():
        whole = sparse(held_out[:1]).logits
        cache = None
        for t in range(held_out.shape[1]):
            step = sparse(held_out[:1, t : t + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            torch.testing.assert_close(step.logits[:, 0], whole[:, t], rtol=0, atol=1e-8)


@pytest.fixture
def folders(tmp_path):
    save_model(tmp_path / "dense", segments=SEGMENTS)
    (tmp_path / "book.txt").write_text("\n".join(LINES * 60), encoding="utf-8")
    return tmp_path


def command(folder, *options):
    return [
        "sparsify",
        str(folder / "dense"),
        str(folder / "sparse"),
        "--calibration",
        str(folder / "book.txt"),
        *options,
    ]


def test_the_command_writes_a_folder_that_loads_generates_and_evaluates(folders, capsys):
    assert main(command(folders, "--dense-above", "9", "--keep", "0.3")) == 0
    assert "of the parameter tokens" in capsys.readouterr().out
    config = json.loads((folders / "sparse" / "config.json").read_text(encoding="utf-8"))
    assert len(config["sparsity"]) == 2 * 5
    ours, auto = load_model(folders / "sparse"), AutoModelForCausalLM.from_pretrained(folders / "sparse")
    assert len(sparse_layers(auto)) == 10
    ids = tiny_ids()
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, auto(ids).logits)
    assert main(["generate", str(folders / "sparse"), "--prompt", "the", "--max-new-tokens", "3"]) == 0
    assert main(["eval", str(folders / "sparse"), "--perplexity", str(folders / "book.txt")]) == 0


def test_info_counts_what_an_input_computes_and_reads(folders, capsys):
    assert main(command(folders, "--dense-above", "9", "--keep", "0.3")) == 0
    sparse = load_model(folders / "sparse")
    layers = sparse_layers(sparse).values()
    capsys.readouterr()
    assert main(["info", str(folders / "sparse"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    tokens = 2 * (4 * 48 + 128)
    assert report["sparsity"]["computed"] == sum(layer.active * layer.group_size for layer in layers) / tokens
    assert report["parameters"]["parameter_tokens"] == 2 * 32 * tokens
    assert report["parameters"]["total"] == sum(p.numel() for p in sparse.parameters())
    read = sum(sum(layer.elements_read().values()) for layer in layers)
    assert report["sparsity"]["read"] == pytest.approx(read / (2 * 32 * tokens))
    # Beside the layers: the output embedding, a row of the input embedding, weight and bias of the norm; of 4 bytes.
    assert report["decode_bytes_per_token"]["empty_cache"] == 4 * (read + 320 * 32 + 3 * 32)
    assert main(["info", str(folders / "sparse")]) == 0
    assert "of the parameter tokens and reads" in capsys.readouterr().out
    assert main(["info", str(folders / "dense"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--keep", "0"], "keep must lie between 0 and 1"),
        (["--keep", "1.5"], "keep must lie between 0 and 1"),
        (["--keep", "a"], "keep: expected float"),
        (["--group-size", "0"], "group_size must be at least 1"),
        (["--rank", "33"], "rank must lie between 0 and the 32 channels"),
        (["--router-rank", "0"], "router_rank must lie between 1"),
        (["--tokens", "0"], "tokens must be at least 1"),
        (["--dense-above", "0.01"], "no layer would read less"),
        (["--dense-above", "-1"], "dense_above must be above 0"),
        (["--router", "best"], "router"),
        (["--calibration", "no-such-file"], "cannot read no-such-file"),
    ],
)
def test_bad_options_say_so_in_one_line_and_write_nothing(folders, capsys, options, words):
    assert main([*command(folders), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(folders.glob("sparse*"))


def test_bad_models_and_texts_write_nothing(folders, capsys):
    (folders / "short.txt").write_text("too short", encoding="utf-8")
    (folders / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    for file, words in (("short.txt", "give more text"), ("binary.txt", "not UTF-8")):
        assert main([*command(folders)[:-1], str(folders / file)]) == 2
        assert words in capsys.readouterr().err
    edit_config(folders / "dense", normalization="softmax")
    assert main(command(folders)) == 2
    assert "only l2_gelu can be sparse" in capsys.readouterr().err
    assert not list(folders.glob("sparse*"))


def test_a_sparse_model_refuses_what_would_change_its_tokens(trained):
    model, calibration, _ = trained
    sparse = copy_of(model)
    sparsify(sparse, calibration, **OPTIONS)
    before = sparse.state_dict()
    for act in (
        lambda: grow(sparse, ffn=256),
        sparse.merge_segments,
        lambda: sparsify(sparse, calibration, **OPTIONS),
        lambda: add_adapter(sparse, "new", ffn=4),
        lambda: shrink(sparse, ffn=64),
        lambda: prefix(sparse, ffn=64).__enter__(),
    ):
        with pytest.raises(UserError, match=r"the model is sparse and cannot .*: make it dense first") as raised:
            act()
        assert "\n" not in str(raised.value)
    assert sparse.state_dict().keys() == before.keys()


def test_adapters_and_smaller_sizes_of_a_sparse_folder_are_refused_in_one_line(folders, capsys):
    dense = load_model(folders / "dense")
    add_adapter(dense, "new", ffn=4)
    save_adapter(dense, "new", folders / "adapter")
    # Layers that stay dense change nothing about that.
    assert main(command(folders, "--dense-above", "0.45", "--rank", "2", "--router-rank", "2")) == 0
    sparse = load_model(folders / "sparse")
    assert 0 < len(sparse_layers(sparse)) < 10
    with pytest.raises(UserError, match="sparse and cannot be tuned"):
        load_adapter(sparse, folders / "adapter")
    capsys.readouterr()
    for words in (
        ["shrink", str(folders / "sparse"), str(folders / "small"), "--ffn", "64"],
        ["generate", str(folders / "sparse"), "--prompt", "the", "--adapter", str(folders / "adapter")],
        ["grow", str(folders / "sparse"), str(folders / "small"), "--ffn", "256"],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "the model is sparse and cannot be" in error
        assert error.strip().count("\n") == 0
    assert not (folders / "small").exists()


def test_a_damaged_description_is_one_line(folders, capsys):
    assert main(command(folders, "--dense-above", "9")) == 0
    edit_config(folders / "sparse", sparsity={"layers.9.ffn": {"num_tokens": 1}})
    assert main(["generate", str(folders / "sparse"), "--prompt", "the"]) == 2
    assert "sparsity of layers.9.ffn" in capsys.readouterr().err


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_groups_are_an_order_of_all_tokens(size, groups, seed):
    features = torch.randn(size * groups, 5, generator=torch.Generator().manual_seed(seed))
    assert sorted(group_tokens(features, size).tolist()) == list(range(size * groups))


def test_tokens_that_are_alike_come_into_one_group():
    centres = torch.eye(6)
    truth = torch.arange(6).repeat(4)
    features = centres[truth] + 0.01 * torch.randn(24, 6)
    groups = truth[group_tokens(features, 4)].view(6, 4)
    # Whole clusters, but for those that two first centres fell into.
    assert (groups == groups[:, :1]).all(1).sum() >= 3


def test_group_sizes_divide():
    assert [group_sizes(n, 8) for n in (64, 10, 2140, 7, 13)] == [8, 5, 5, 7, 1]


def test_regression_of_full_rank_is_least_squares_and_of_low_rank_the_best_of_that_rank():
    x, y = torch.randn(300, 6, dtype=torch.float64), torch.randn(300, 4, dtype=torch.float64)
    y = y + 3 * x[:, :4].cumsum(1)
    regression = Regression(x, ridge=1e-12)
    augmented = np.concatenate([x.numpy(), np.ones((300, 1))], 1)
    solution = np.linalg.lstsq(augmented, y.numpy(), rcond=None)[0]
    weight, bias = regression.fit(y)
    np.testing.assert_allclose(weight.T.numpy(), solution[:-1], atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), solution[-1], atol=1e-8)
    fitted = augmented @ solution
    for rank in (1, 2, 4):
        down, up, bias = regression.fit_low_rank(y, rank)
        error = ((x @ down.T @ up.T + bias).numpy() - y.numpy()) ** 2
        # Least squares of rank r loses the smallest singular values of the centred fit, and nothing else.
        singular = np.linalg.svd(fitted - fitted.mean(0), compute_uv=False)
        assert error.sum() == pytest.approx(((fitted - y.numpy()) ** 2).sum() + (singular[rank:] ** 2).sum(), rel=1e-8)


def test_recall_is_one_for_the_best_choice():
    energies = torch.tensor([[3.0, 1, 2], [0, 1, 4]])
    assert recall(energies, torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)) == pytest.approx(1)
    assert recall(energies, torch.tensor([[0, 1, 0], [0, 0, 1]], dtype=torch.bool)) == pytest.approx(
        (1 + 16) / (9 + 16)
    )


def test_budgets_give_equal_errors_within_what_is_allowed():
    easy = Curve((1, 2, 4, 8), (0.10, 0.05, 0.02, 0.0), 4, 32)
    hard = Curve((1, 2, 4, 8), (0.80, 0.40, 0.10, 0.0), 4, 32)
    counts = equal_error({"easy": easy, "hard": hard}, 0.5, {"easy": 1, "hard": 1})
    assert counts["easy"] < counts["hard"]
    assert 4 * sum(counts.values()) <= 32
    assert easy.needed(0.05) == 2
    assert easy.needed(0.01) == 6  # half way from 4 to 8, and never too few
    assert hard.needed(2.0) == 1


def test_rows_of_the_tokenizer(folders):
    from tokenformer.sparsity.calibration import read_rows

    rows = read_rows(folders / "book.txt", folders / "dense", vocab_size=320, longest=16, num_tokens=160)
    ids = train_tokenizer()("\n".join(LINES * 60), add_special_tokens=False)["input_ids"]
    assert rows.tolist() == [ids[i * 16 : i * 16 + 16] for i in range(10)]


def test_statistics_of_a_layer_whose_weights_are_known():
    """Keys along the axes: the scores are the coordinates of the input, which the layer norm makes known."""
    from tokenformer.sparsity import activation_statistics

    model = tiny_model(activation="relu", segments=[{"name": "base", "qkv": 32, "output": 32, "ffn": 32}])
    base = model.model.layers[0].attention.query.segments["base"]
    with torch.no_grad():
        base.key.copy_(torch.eye(32))
        base.value.copy_(torch.eye(32))
    ids = tiny_ids(2, 9)
    found = activation_statistics(model, ids)["model.layers.0.attention.query"]
    x = model.model.embed_tokens(ids).detach().numpy().reshape(-1, 32)
    x = x - x.mean(1, keepdims=True)
    assert found["positive"] == pytest.approx((x > 0).mean())
    assert found["zero"] == pytest.approx((x <= 0).mean())
    squares = -np.sort(-(np.maximum(x, 0) ** 2), axis=1)
    assert found["energy"]["0.25"] == pytest.approx((squares[:, :8].sum(1) / squares.sum(1)).mean(), rel=1e-4)


def test_a_layer_that_says_nothing_has_no_shares() -> None:
    """ReLU can leave a layer without any weight: a share of nothing is no number, and NaN is no JSON."""
    from tokenformer.sparsity import activation_statistics

    model = tiny_model(activation="relu")
    layer = model.model.layers[0].ffn
    with torch.no_grad():
        layer.segments["base"].value.zero_()
    found = activation_statistics(model, tiny_ids(2, 8))
    assert found["model.layers.0.ffn"]["energy"] is None
    assert found["model.layers.0.ffn"]["varying"] is None
    assert 0 < found["model.layers.1.ffn"]["energy"]["0.5"] <= 1
    json.dumps(found, allow_nan=False)
