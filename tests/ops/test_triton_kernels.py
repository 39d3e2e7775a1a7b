"""Triton's kernels against the float64 statement: on a GPU where there is one, else by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import statement
from tokenformer import Pattention, UserError, ops

GPU = torch.cuda.is_available()
if not GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is first imported
pytest.importorskip("triton", reason="Triton is not installed: torch for CUDA brings it along, torch for CPU does not")
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton was imported before its interpreter could be chosen", allow_module_level=True)

DEVICE = "cuda" if GPU else "cpu"
TAU = 1.7

# leading shape, channels in, channels out, tokens of each segment
SHAPES = {
    "one-token": ((3,), 5, 2, (1,)),
    "no-batch": ((), 5, 3, (4,)),
    "odd-sizes": ((3,), 7, 5, (13,)),
    "two-segments": ((2, 3), 6, 4, (4, 3)),
    "three-segments": ((4,), 5, 5, (2, 1, 5)),
    "no-rows": ((0,), 4, 3, (2, 3)),
    "several-blocks": ((2,), 3, 3, (4099,)),
}
shapes = pytest.mark.parametrize(
    ("leading", "channels", "out", "tokens"), [pytest.param(*shape, id=name) for name, shape in SHAPES.items()]
)


def _draw(leading, channels, out, tokens, dtype):
    x = torch.randn(*leading, channels, dtype=torch.float64)
    keys = [torch.randn(n, channels, dtype=torch.float64) / channels**0.5 for n in tokens]
    values = [torch.randn(n, out, dtype=torch.float64) / n**0.5 for n in tokens]
    rounded = [tensor.to(DEVICE, dtype) for tensor in (x, *keys, *values, torch.tensor(TAU, dtype=torch.float64))]
    rounded[-1] = torch.tensor(TAU, device=DEVICE)  # tau stays in float32
    return [leaf.requires_grad_() for leaf in rounded], [
        leaf.detach().cpu().double().requires_grad_() for leaf in rounded
    ]


def _value_and_gradients(function, leaves, upstream):
    count = (len(leaves) - 2) // 2
    output = function(leaves[0], leaves[1 : 1 + count], leaves[1 + count : -1], leaves[-1])
    return output, torch.autograd.grad(output, leaves, upstream.to(output))


def _compare(computed, expected, dtype) -> None:
    (output, gradients), (wanted, wanted_gradients) = computed, expected
    assert output.dtype == dtype
    for actual, exact in zip([output, *gradients], [wanted, *wanted_gradients], strict=True):
        assert statement.error(actual.cpu(), exact) < statement.TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@shapes
def test_output_and_gradients_are_those_of_the_equation(leading, channels, out, tokens, dtype) -> None:
    leaves, exact = _draw(leading, channels, out, tokens, dtype)
    upstream = torch.randn(*leading, out).to(dtype).double()
    computed = _value_and_gradients(
        lambda x, k, v, tau: ops.pattention(x, k, v, tau, eps=0.0, backend="triton"), leaves, upstream
    )
    expected = _value_and_gradients(lambda x, k, v, tau: statement.pattention(x, k, v, tau), exact, upstream)
    _compare(computed, expected, dtype)


def test_part_of_a_larger_set() -> None:
    leaves, exact = _draw((5,), 6, 4, (7, 9), torch.float32)
    upstream = torch.randn(5, 4).double()

    def part(x, keys, values, tau, **options):
        # A total that depends on the inputs has gradients to pass on too.
        total = sum((x @ key.T).square().sum(-1, keepdim=True) for key in keys)
        return ops.pattention(x, keys[:1], values[:1], tau, eps=0.0, total=total, **options) + 0 * values[1].sum()

    computed = _value_and_gradients(lambda *leaves: part(*leaves, backend="triton"), leaves, upstream)

    def equation(x, keys, values, tau):
        return statement.weights(x, keys, tau, "l2_gelu")[..., :7] @ values[0] + 0 * values[1].sum()

    _compare(computed, _value_and_gradients(equation, exact, upstream), torch.float32)


def test_hidden_tokens_and_rows_of_zeros() -> None:
    (x, key, value, _), _ = _draw((5,), 6, 4, (11,), torch.float32)
    with torch.no_grad():
        x[1] = 0
    visible = torch.rand(5, 11, device=DEVICE) > 0.4
    visible[2] = False
    outcomes = []
    for backend, cast in (("triton", torch.float32), ("reference", torch.float64)):
        output = ops.pattention(x.to(cast), key.to(cast), value.to(cast), 3.0, visible=visible, backend=backend)
        outcomes.append([output, *torch.autograd.grad(output.square().sum(), (x, key, value))])
    for actual, exact in zip(*outcomes, strict=True):
        assert statement.error(actual.cpu(), exact.cpu()) < 1e-5
    assert outcomes[0][0][1].eq(0).all()
    assert outcomes[0][0][2].eq(0).all()


def test_a_layer_that_is_told_to_use_them() -> None:
    layer = Pattention(6, 4, 5, device=DEVICE)
    layer.add_segment("more", 3)
    x = torch.randn(7, 6, device=DEVICE)
    expected = layer.double()(x.double())
    layer.float().backend = "triton"
    assert statement.error(layer(x).cpu(), expected.cpu()) < 1e-5


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from tokenformer.ops import triton_kernels

names = {
    "_forward_kernel": "scores weights scale total",
    "_backward_kernel": "gradient scores to_scores scale total to_total",
}
for kernel, pointers in names.items():
    for given in (False, True):
        half = ("scores", "weights", "gradient", "to_scores")
        types = {name: "*bf16" if name in half else "*fp32" for name in pointers.split()}
        types |= {"num_tokens": "i32", "eps": "fp32", "GIVEN": "constexpr", "BLOCK": "constexpr"}
        source = ASTSource(getattr(triton_kernels, kernel), types, constexprs={"GIVEN": given, "BLOCK": 1024})
        print(kernel, len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in sizes] == ["_forward_kernel"] * 2 + ["_backward_kernel"] * 2
    assert all(int(size) > 0 for _, size in sizes)


def test_what_the_kernels_do_not_compute_is_refused() -> None:
    (x, key, value, _), _ = _draw((2,), 3, 3, (4,), torch.float32)
    for options in ({"normalization": "softmax"}, {"activation": "relu"}):
        with pytest.raises(ValueError, match="l2_gelu with gelu alone: use backend='fused'"):
            ops.pattention(x, key, value, 1.0, backend="triton", **options)
    with pytest.raises(ValueError, match="backend='fused' for float64"):
        ops.pattention(x.double(), key.double(), value.double(), 1.0, backend="triton")


def test_without_triton_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_HAS_TRITON", False)
    with pytest.raises(UserError, match=r"needs Triton.*use backend='fused'"):
        ops.pattention(torch.ones(1, 2), torch.ones(3, 2), torch.ones(3, 2), 1.0, backend="triton")
