"""What the benchmark of Pattention measures, and that it refuses to time a wrong result."""

import pytest
import torch

from tokenformer import UserError
from tokenformer.benchmarks import pattention as bench
from tokenformer.benchmarks.pattention import TARGETS, Shape, check, make_cases, measure, ratios
from tokenformer.benchmarks.timing import Timing

SMALL = Shape(tokens=6, hidden_size=8, parameter_tokens=20)


def small_cases(dtype=torch.float32):
    return make_cases(SMALL, dtype, "eager")


def test_every_case_forms_three_gradients():
    cases, grad_output = small_cases()
    for case in cases.values():
        output, *gradients = case.run("forward_backward", grad_output)
        assert output.shape == grad_output.shape
        assert [g.shape for g in gradients] == [t.shape for t in case.inputs]
        (alone,) = case.run("forward", grad_output)
        assert not alone.requires_grad
        torch.testing.assert_close(alone, output.detach())


def test_pattentions_agree_and_mlp_is_an_mlp():
    cases, grad_output = small_cases(torch.float64)
    expected = cases["reference_eager"].run("forward_backward", grad_output)
    for name in ("fused_eager", "fused_compiled"):
        for result, truth in zip(cases[name].run("forward_backward", grad_output), expected, strict=True):
            torch.testing.assert_close(result, truth)
    x, first, second = cases["mlp_eager"].inputs
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 20, bias=False), torch.nn.GELU(), torch.nn.Linear(20, 8, bias=False))
    mlp.load_state_dict({"0.weight": first.detach(), "2.weight": second.detach()}, strict=True)
    for name in ("mlp_eager", "mlp_compiled"):
        torch.testing.assert_close(cases[name].run("forward", grad_output)[0], mlp.double()(x).detach())
    x, key, value = cases["products_eager"].inputs
    expected_product = torch.einsum("td,nd,ne->te", x, key, value).detach()
    torch.testing.assert_close(cases["products_eager"].run("forward", grad_output)[0], expected_product)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_accepts_what_is_right(dtype):
    cases, grad_output = small_cases(bench.DTYPES[dtype])
    errors = check(cases, grad_output, dtype)
    assert set(errors) == {"reference_eager", "fused_eager", "fused_compiled"}
    assert set(errors["fused_eager"]) == {"forward", "output", "grad_x", "grad_key", "grad_value"}
    if dtype == "float32":
        assert all(e["relative"] < 1e-6 for results in errors.values() for e in results.values())


def wrong(kind):
    def function(x, keys, values, scale, **options):
        from tokenformer.ops import pattention

        if kind == "scale":
            return pattention(x, keys, values, 1.1 * scale)
        output = pattention(x, keys, values, scale)
        if kind == "one element":
            return output + torch.zeros_like(output).index_put((torch.tensor(0), torch.tensor(0)), output.abs().max())
        if kind == "nan":
            return output * float("nan")
        if kind == "gradient of the norm":
            scores = (x @ keys.T).float()
            weights = torch.nn.functional.gelu(scores * (scale / scores.norm(dim=-1, keepdim=True).detach()))
            return weights.to(x.dtype) @ values
        return output

    return function


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["scale", "one element", "nan", "gradient of the norm"])
def test_wrong_results_are_not_timed(kind, dtype, monkeypatch):
    monkeypatch.setattr(bench, "pattention", wrong(kind))
    monkeypatch.setattr(bench, "interleave", lambda *args: pytest.fail("timed a wrong result"))
    with pytest.raises(UserError, match=f"fused_eager in {dtype} is wrong.*no speed is reported"):
        measure(SMALL, dtypes=(dtype,), threads=1, repeats=1, compiler="eager")


def test_record():
    messages = []
    record = measure(SMALL, threads=1, repeats=3, compiler="eager", progress=messages.append)
    assert torch.get_num_threads() == 1
    for dtype in ("float32", "bfloat16"):
        seconds = record["seconds"][dtype]
        assert list(seconds) == ["forward", "forward_backward"]
        for rows in seconds.values():
            assert len(rows) == 6
            for figures in rows.values():
                assert len(figures["rounds"]) == 3
                assert 0 < figures["min"] <= figures["first_quartile"] <= figures["median"] <= figures["third_quartile"]
        assert set(record["checks"][dtype]["compile_seconds"]) == {"fused_compiled", "mlp_compiled"}
    assert record["options"] == {
        "tokens": 6,
        "hidden_size": 8,
        "parameter_tokens": 20,
        "dtypes": ["float32", "bfloat16"],
        "repeats": 3,
        "compiler": "eager",
    }
    assert {ratio["met"] for ratio in record["ratios"]} == {None}  # the targets are for another shape
    assert any("timing" in message for message in messages)


def test_a_case_that_does_not_compile_is_left_out_and_named():
    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler\nwith details")

    torch._dynamo.reset()
    torch._dynamo.register_backend(no_compiler, name="absent_compiler")
    record = measure(SMALL, dtypes=("float32",), threads=1, repeats=1, compiler="absent_compiler")
    failed = record["checks"]["float32"]["failed_to_compile"]
    assert set(failed) == {"fused_compiled", "mlp_compiled"}
    assert all("no C++ compiler" in reason and "\n" not in reason for reason in failed.values())
    assert set(record["seconds"]["float32"]["forward"]) == {
        "reference_eager",
        "fused_eager",
        "mlp_eager",
        "products_eager",
    }
    assert record["ratios"] == []


def test_ratios_and_targets():
    def timings(fused, mlp, reference):
        names = {"fused_compiled": fused, "mlp_compiled": mlp, "reference_eager": reference, "products_eager": 1.0}
        return {name: Timing((seconds,)) for name, seconds in names.items()}

    rows = ratios({"float32": timings(1.06, 1.0, 1.5), "bfloat16": timings(1.05, 1.0, 2.1)}, TARGETS, judge=True)
    found = {(row["numerator"], row["denominator"], row["dtype"]): (row["value"], row["met"]) for row in rows}
    assert found["fused_compiled", "mlp_compiled", "float32"] == (1.06, False)
    assert found["fused_compiled", "mlp_compiled", "bfloat16"] == (1.05, True)
    assert found["reference_eager", "fused_compiled", "bfloat16"] == (2.1 / 1.05, True)
    assert found["reference_eager", "fused_compiled", "float32"][1] is None
    slow = ratios({"bfloat16": timings(1.0, 1.0, 1.8)}, TARGETS, judge=True)
    assert [row["met"] for row in slow if row["numerator"] == "reference_eager"] == [False]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"dtypes": ("float8",)}, "unknown dtype 'float8': use float32 or bfloat16"),
        ({"dtypes": ()}, "one or more"),
        ({"dtypes": ("float32", "float32")}, "each once"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(UserError, match=words):
        measure(SMALL, **options)


@pytest.mark.parametrize("size", ["tokens", "hidden_size", "parameter_tokens"])
def test_bad_shape(size):
    with pytest.raises(UserError, match=f"{size} must be at least 1, got 0"):
        Shape(**{size: 0})


@pytest.mark.slow  # three graphs through the C++ compiler
def test_compiled_case_is_right():
    cases, grad_output = make_cases(SMALL, torch.float32, "inductor")
    errors = check({"fused_compiled": cases["fused_compiled"]}, grad_output, "float32")
    assert max(error["relative"] for error in errors["fused_compiled"].values()) < 1e-6
