"""The benchmark of sparse decoding: tokens in one memory, refused results, and what the record says."""

import pytest
import torch

from tiny import tiny_config
from tokenformer import UserError
from tokenformer.benchmarks import sparse
from tokenformer.cli import main
from tokenformer.sparse import SparsePattention, sparse_layers

# 8 groups of 2 in query, key, value and output layers, which do not pay; 64 in the feed-forward, of which 16.
CONFIG = tiny_config(segments=[{"name": "base", "qkv": 16, "output": 16, "ffn": 128}])
SIZES = {"keep": 0.25, "group_size": 2, "rank": 4, "router_rank": 4}
SMALL = {"prompt": 5, "tokens": 3, "threads": 1, "repeats": 2, "compiler": "eager"}
CASES = ["dense_eager", "dense_compiled", "sparse_eager", "sparse_compiled"]


@pytest.fixture
def uncompiled(monkeypatch):
    """For tests that compare nothing compiled: it takes seconds."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_both_models_are_one_but_for_what_the_sparse_layers_add():
    models = sparse.build(CONFIG, torch.bfloat16, SIZES)
    layers = sparse_layers(models["sparse"])
    assert list(layers) == ["model.layers.0.ffn", "model.layers.1.ffn"]
    for name, layer in layers.items():
        dense = models["dense"].get_submodule(name).segments["base"]
        assert layer.key is dense.key
        assert layer.value is dense.value
        assert (layer.active, layer.num_groups, layer.factor.dtype) == (16, 64, torch.bfloat16)
    assert models["sparse"].lm_head.weight is models["dense"].lm_head.weight


@pytest.mark.usefixtures("uncompiled")
def test_record():
    record = sparse.measure(CONFIG, dtypes=("float32", "bfloat16"), **SIZES, **SMALL)
    assert record["benchmark"] == "sparse"
    assert record["options"].items() >= {**SIZES, "prompt": 5, "tokens": 3, "repeats": 2}.items()
    # Of 2 layers of 4 * 16 + 128 tokens, the sparse ones compute 32 of 128.
    assert record["sparsity"]["computed"] == pytest.approx((4 * 16 + 32) / (4 * 16 + 128))
    # Of each 32 x 32 triangle 9/16; a router of 4 channels for 64 groups; a remainder of 4.
    ffn = 32 * 64 + 576 + (4 * 32 + 64 * 5) + (4 * 64 + 32)
    assert record["sparsity"]["read"] == pytest.approx((4 * 16 * 64 + ffn) / ((4 * 16 + 128) * 64))
    for dtype in ("float32", "bfloat16"):
        rows = record["seconds"][dtype]["decode"]
        assert list(rows) == CASES
        assert all(len(figures["rounds"]) == 2 for figures in rows.values())
        checks = record["checks"][dtype]
        limit = checks["tolerance"]["relative"]
        assert set(checks["errors"]) == {"ffn"}
        assert all(0 < error["relative"] < limit for error in checks["errors"]["ffn"].values())
    # The target is for the 1.5B model.
    assert {ratio["met"] for ratio in record["ratios"]} == {None}


@pytest.mark.usefixtures("uncompiled")
def test_wrong_results_are_not_timed(monkeypatch):
    original = SparsePattention._one_row
    monkeypatch.setattr(SparsePattention, "_one_row", lambda *args: 1.1 * original(*args))
    monkeypatch.setattr(sparse, "interleave", lambda *args: pytest.fail("timed a wrong result"))
    with pytest.raises(UserError, match=r"one_row.*no speed is reported"):
        sparse.measure(CONFIG, dtypes=("float32",), **SIZES, **SMALL)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0}, "keep must lie between 0 and 1"),
        ({"tokens": 1}, "tokens must be at least 2"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"dtypes": ("float16",)}, "unknown dtype 'float16'"),
        ({"keep": 0.9}, "no layer would read less"),
    ],
    ids=str,
)
def test_bad_options(options, words):
    with pytest.raises(UserError, match=words):
        sparse.measure(CONFIG, **{"dtypes": ("float32",), **SIZES, **SMALL, **options})


def test_an_unknown_preset_is_one_line(capsys):
    assert main(["bench", "sparse", "--preset", "2B"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
