"""One Pattention against what it stands beside: the published order of operations, a GELU MLP, the bare products.

Forward, and forward with backward to input, keys and values. All cases run in one process, interleaved. Outputs and
gradients are compared with a float64 evaluation before anything is timed.

Shapes: T inputs, D channels, N parameter tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tokenformer.benchmarks import checking
from tokenformer.benchmarks.conditions import DTYPES, check_options, warm_up
from tokenformer.benchmarks.report import as_seconds, new_record
from tokenformer.benchmarks.targets import Target, ratios
from tokenformer.benchmarks.timing import Timing, interleave
from tokenformer.errors import UserError
from tokenformer.hardware import set_threads
from tokenformer.ops import pattention, reference_pattention

PASSES = ("forward", "forward_backward")
# Largest errors of outputs and gradients, relative to the root mean square and to the largest element. A bfloat16 keeps
# 8 bits, so each of the few roundings between input and gradient costs up to 4e-3 of an element.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 5e-2)}

Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What is measured.

    Attributes:
        tokens: T, inputs.
        hidden_size: D, channels of inputs and outputs.
        parameter_tokens: N; also the hidden channels of the MLP.
    """

    tokens: int = 2048
    hidden_size: int = 768
    parameter_tokens: int = 3072

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Attributes:
        function: of input and two weights.
        inputs: that it is given; all three require gradients.
        checked: whether it is a Pattention, to be compared with the float64 evaluation.
        compiled: whether torch.compile is involved.
    """

    function: Function
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    checked: bool
    compiled: bool

    def run(self, direction: str, grad_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The output, and for `forward_backward` the gradients of the three inputs."""
        if direction == "forward":
            with torch.no_grad():
                return (self.function(*self.inputs),)
        output = self.function(*self.inputs)
        return (output, *torch.autograd.grad(output, self.inputs, grad_output))


# The targets are for the default shape; the ratios are reported for any.
TARGETS = (
    Target("fused_compiled", "mlp_compiled", ("float32", "bfloat16"), at_most=1.05),
    Target("reference_eager", "fused_compiled", ("bfloat16",), at_least=1.9),
    Target("reference_eager", "fused_compiled", ("float32",)),
    Target("fused_compiled", "products_eager", ("float32", "bfloat16")),
)


def measure(
    shape: Shape | None = None,
    *,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    threads: int | None = None,
    repeats: int = 20,
    compiler: str = "inductor",
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Check, then time all cases.

    Args:
        shape: sizes; those of the ffn of a 150M model on 2048 inputs if not given.
        dtypes: of inputs and weights: `float32`, `bfloat16`.
        threads: of torch; one per physical core if not given.
        repeats: rounds.
        compiler: backend of torch.compile.
        progress: called with a line on what is being done.

    Returns:
        The record (see benchmarks/README.md): times in seconds by dtype, pass and case; errors; ratios.

    Raises:
        UserError: an option out of range, or a result that is wrong; then nothing was timed.
    """
    shape = shape or Shape()
    check_options(dtypes, repeats=repeats)
    threads = set_threads(threads)
    options = {**asdict(shape), "dtypes": list(dtypes), "repeats": repeats, "compiler": compiler}
    record = new_record("pattention", options, threads)

    prepared = {}
    for dtype in dtypes:
        cases, grad_output = make_cases(shape, DTYPES[dtype], compiler)
        progress(f"{dtype}: compiling")
        calls = {name: _both(case, grad_output) for name, case in cases.items()}
        compile_seconds, failed = warm_up(calls, [name for name, case in cases.items() if case.compiled])
        cases = {name: case for name, case in cases.items() if name not in failed}
        progress(f"{dtype}: checking against float64")
        errors = check(cases, grad_output, dtype)
        prepared[dtype] = cases, grad_output
        record.setdefault("checks", {})[dtype] = checking.summary(TOLERANCES[dtype], errors, compile_seconds, failed)

    timings: dict[str, dict[str, dict[str, Timing]]] = {}
    for dtype, (cases, grad_output) in prepared.items():
        for direction in PASSES:
            progress(f"{dtype}: timing {direction.replace('_', ' + ')}, {repeats} rounds")
            # Once more: the first calls after a compilation still allocate, and a check may have run in between.
            calls = {name: _call(case, direction, grad_output) for name, case in cases.items()}
            interleave(calls, 1)
            timings.setdefault(dtype, {})[direction] = interleave(calls, repeats)
    record["seconds"] = as_seconds(timings)
    whole = {dtype: directions["forward_backward"] for dtype, directions in timings.items()}
    record["ratios"] = ratios(whole, TARGETS, judge=shape == Shape())
    return record


def make_cases(shape: Shape, dtype: torch.dtype, compiler: str) -> tuple[dict[str, Case], torch.Tensor]:
    """The cases of one dtype, on the same input and weights, and the gradient of the output (T, D)."""
    generator = torch.Generator().manual_seed(0)
    t, d, n = shape.tokens, shape.hidden_size, shape.parameter_tokens

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * std).to(dtype)

    # As at the start of training: inputs come from a layer norm, weights are small.
    x, key, value = (normal(t, d, 1.0), normal(n, d, 0.02), normal(n, d, 0.02))
    grad_output = normal(t, d, 1.0)
    second = value.T.contiguous()  # (D, N), as nn.Linear holds it
    for tensor in (x, key, value, second):
        tensor.requires_grad_()
    scale = torch.tensor(n**0.5)

    def reference(x: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return reference_pattention(x, key, value, scale)

    def fused(x: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return pattention(x, key, value, scale, backend="fused")

    def mlp(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(F.linear(x, first)), second)

    def products(x: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return (x @ key.T) @ value

    torch.compiler.reset()
    tokens, linear = (x, key, value), (x, key, second)
    cases = {
        "reference_eager": Case(reference, tokens, checked=True, compiled=False),
        "fused_eager": Case(fused, tokens, checked=True, compiled=False),
        "fused_compiled": Case(_compiled(fused, compiler), tokens, checked=True, compiled=True),
        "mlp_eager": Case(mlp, linear, checked=False, compiled=False),
        "mlp_compiled": Case(_compiled(mlp, compiler), linear, checked=False, compiled=True),
        "products_eager": Case(products, tokens, checked=False, compiled=False),
    }
    return cases, grad_output


def check(cases: Mapping[str, Case], grad_output: torch.Tensor, dtype: str) -> dict[str, dict[str, dict[str, float]]]:
    """Errors of each Pattention case, by result, against the reference in float64 (see `checking.errors`).

    Raises:
        UserError: an error above the tolerance of the dtype.
    """
    names = ("forward", "output", "grad_x", "grad_key", "grad_value")
    checked = {name: case for name, case in cases.items() if case.checked}
    x, key, value = (tensor.detach().double().requires_grad_() for tensor in next(iter(checked.values())).inputs)
    output = reference_pattention(x, key, value, key.shape[0] ** 0.5)
    gradients = torch.autograd.grad(output, (x, key, value), grad_output.double())
    exact = (output.detach(), output.detach(), *gradients)

    found: dict[str, dict[str, dict[str, float]]] = {}
    for case_name, case in checked.items():
        results = (*case.run("forward", grad_output), *case.run("forward_backward", grad_output))
        found[case_name] = {}
        for name, result, truth in zip(names, results, exact, strict=True):
            found[case_name][name] = checking.check(result, truth, TOLERANCES[dtype], f"{case_name} in {dtype}", name)
    return found


def _compiled(function: Function, compiler: str) -> Function:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=compiler)


def _call(case: Case, direction: str, grad_output: torch.Tensor) -> Callable[[], object]:
    return lambda: case.run(direction, grad_output)


def _both(case: Case, grad_output: torch.Tensor) -> Callable[[], object]:
    return lambda: [case.run(direction, grad_output) for direction in PASSES]
