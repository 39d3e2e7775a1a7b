"""One Pattention against what it stands beside: the published order of operations, a GELU MLP, the bare products.

Forward, and forward with backward to input, keys and values. All cases run in one process, interleaved. Outputs and
gradients are compared with a float64 evaluation before anything is timed.

Shapes: T inputs, D channels, N parameter tokens.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F

from tokenformer.benchmarks.report import new_record
from tokenformer.benchmarks.timing import Timing, interleave, paired_ratio
from tokenformer.errors import UserError
from tokenformer.hardware import set_threads
from tokenformer.ops import pattention, reference_pattention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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


@dataclass(frozen=True)
class Target:
    """A ratio of two cases in forward and backward, and the value it should stay on one side of."""

    numerator: str
    denominator: str
    dtypes: tuple[str, ...]
    at_most: float | None = None
    at_least: float | None = None

    def met(self, value: float) -> bool | None:
        """Whether `value` is good enough; None if there is no target."""
        if self.at_most is not None:
            return value <= self.at_most
        return value >= self.at_least if self.at_least is not None else None


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
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype '{dtype}': use {' or '.join(DTYPES)}")
    if not dtypes or len(set(dtypes)) != len(dtypes):
        raise UserError(f"dtypes must be one or more of {', '.join(DTYPES)}, each once, got '{','.join(dtypes)}'")
    threads = set_threads(threads)
    options = {**asdict(shape), "dtypes": list(dtypes), "repeats": repeats, "compiler": compiler}
    record = new_record("pattention", options, threads)

    prepared = {}
    for dtype in dtypes:
        cases, grad_output = make_cases(shape, DTYPES[dtype], compiler)
        progress(f"{dtype}: compiling")
        with _empty_compiler_cache():
            compile_seconds, failed = _warm_up(cases, grad_output)
        cases = {name: case for name, case in cases.items() if name not in failed}
        progress(f"{dtype}: checking against float64")
        errors = check(cases, grad_output, dtype)
        prepared[dtype] = cases, grad_output
        record.setdefault("checks", {})[dtype] = {
            "tolerance": dict(zip(("relative", "worst"), TOLERANCES[dtype], strict=True)),
            "errors": errors,
            "compile_seconds": compile_seconds,
            "failed_to_compile": failed,
        }

    timings: dict[str, dict[str, dict[str, Timing]]] = {}
    for dtype, (cases, grad_output) in prepared.items():
        for direction in PASSES:
            progress(f"{dtype}: timing {direction.replace('_', ' + ')}, {repeats} rounds")
            # Once more: the first calls after a compilation still allocate, and a check may have run in between.
            calls = {name: _call(case, direction, grad_output) for name, case in cases.items()}
            interleave(calls, 1)
            timings.setdefault(dtype, {})[direction] = interleave(calls, repeats)
    record["seconds"] = {
        dtype: {d: {name: t.as_dict() for name, t in rows.items()} for d, rows in directions.items()}
        for dtype, directions in timings.items()
    }
    whole = {dtype: directions["forward_backward"] for dtype, directions in timings.items()}
    record["ratios"] = ratios(whole, judge=shape == Shape())
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
    """Errors of each Pattention case, by result, against the reference in float64.

    `relative` is the root mean square of the error over that of the exact values; `worst` the largest error over the
    largest exact value, which shows a single wrong element.

    Raises:
        UserError: an error above the tolerance of the dtype.
    """
    names = ("forward", "output", "grad_x", "grad_key", "grad_value")
    checked = {name: case for name, case in cases.items() if case.checked}
    x, key, value = (tensor.detach().double().requires_grad_() for tensor in next(iter(checked.values())).inputs)
    output = reference_pattention(x, key, value, key.shape[0] ** 0.5)
    gradients = torch.autograd.grad(output, (x, key, value), grad_output.double())
    exact = (output.detach(), output.detach(), *gradients)
    relative_limit, worst_limit = TOLERANCES[dtype]

    errors: dict[str, dict[str, dict[str, float]]] = {}
    for case_name, case in checked.items():
        results = (*case.run("forward", grad_output), *case.run("forward_backward", grad_output))
        errors[case_name] = {}
        for name, result, truth in zip(names, results, exact, strict=True):
            difference = result.detach().double() - truth
            relative = (difference.norm() / truth.norm()).item()
            worst = (difference.abs().max() / truth.abs().max()).item()
            errors[case_name][name] = {"relative": relative, "worst": worst}
            if not (relative <= relative_limit and worst <= worst_limit):  # NaN fails
                raise UserError(
                    f"{case_name} in {dtype} is wrong: {name} differs from float64 by {relative:.1e} (at most "
                    f"{relative_limit:.0e} allowed), at worst {worst:.1e} (at most {worst_limit:.0e}): no speed is "
                    "reported for a wrong result; check the installed torch and compiler"
                )
    return errors


def ratios(timings: Mapping[str, Mapping[str, Timing]], *, judge: bool) -> list[dict[str, Any]]:
    """The ratios of `TARGETS`, medians over rounds, for `{dtype: {case: forward and backward}}`.

    `met` says whether the target is, and is None if there is none or `judge` is False.
    """
    rows = []
    for target in TARGETS:
        for dtype in target.dtypes:
            cases = timings.get(dtype, {})
            if target.numerator not in cases or target.denominator not in cases:
                continue
            value = paired_ratio(cases[target.numerator], cases[target.denominator])
            rows.append(
                {
                    "numerator": target.numerator,
                    "denominator": target.denominator,
                    "dtype": dtype,
                    "value": value,
                    "at_most": target.at_most,
                    "at_least": target.at_least,
                    "met": target.met(value) if judge else None,
                }
            )
    return rows


def _compiled(function: Function, compiler: str) -> Function:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=compiler)


def _warm_up(cases: Mapping[str, Case], grad_output: torch.Tensor) -> tuple[dict[str, float], dict[str, str]]:
    """Call everything once; seconds that compiled cases took, and the cases that would not compile with the reason."""
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, case in cases.items():
        start = time.perf_counter()
        try:
            for direction in PASSES:
                case.run(direction, grad_output)
        except Exception as error:
            # A missing or old C++ compiler, or a code generator at fault: the other cases are worth having.
            if not case.compiled:
                raise
            failed[name] = " ".join(str(error).split())[:200]
            continue
        if case.compiled:
            seconds[name] = time.perf_counter() - start
    return seconds, failed


@contextmanager
def _empty_compiler_cache() -> Iterator[None]:
    """Compile as on the first day, so that the seconds mean something."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    with TemporaryDirectory(prefix="tokenformer-bench-", ignore_cleanup_errors=True) as folder:
        os.environ[variable] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before


def _call(case: Case, direction: str, grad_output: torch.Tensor) -> Callable[[], object]:
    return lambda: case.run(direction, grad_output)
