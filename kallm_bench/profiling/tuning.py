"""Which plan is fastest for each product of a layer with a function on every edge: all are measured at one size."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kallm_bench.errors import DeviceError, SpecError
from kallm_bench.kan.bases import make_basis
from kallm_bench.kan.bases.bspline import BSpline
from kallm_bench.kan.bases.rbf import GaussianRBF
from kallm_bench.kan.bases.three_term import ThreeTerm
from kallm_bench.kan.kernels import layer, plans
from kallm_bench.kan.kernels.bells import ORDERS
from kallm_bench.profiling.problems import KernelProblem
from kallm_bench.profiling.replays import make_timer, sample_in_turn

CLOSE = 0.01
"""A plan must be faster than the one before it in PLANS by more than this share: a nearer race is decided by noise."""

INPUT_SETS = 4
"""Taken in turn, so that no input is still in the cache from the call before."""

LIMIT = "limit"
"""The name under which the library's product alone is timed, on features that lie ready."""


def tune(problem: plans.Problem, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, dict[str, float]]:
    """Measures every plan at this size and remembers the fastest of each operation.

    Polynomials are measured as cheby2, B-splines as cubic ones.

    Returns:
        Operation -> plan -> median seconds, and with LIMIT; without the plans that cannot be here, or whose result is
        not that of the library.

    Raises:
        DeviceError: no GPU, or a dtype that only the library multiplies.
    """
    if device.type != "cuda":
        raise DeviceError("plans are measured on an NVIDIA GPU; this device is the CPU")
    if dtype == torch.float32:
        raise DeviceError("in float32 the library multiplies alone, so there is nothing to tune; take --dtype bfloat16")
    measured = {}
    for operation, (step_of, limit) in _steps(problem, device, dtype).items():
        timers = {LIMIT: make_timer(limit, device)}
        for name, plan in plans.PLANS[operation].items():
            if not plans.can(plan, problem.degrees, plans.kinds_for(problem.kind)):
                continue
            try:
                if not _agree(step_of(name, 0), step_of("library-16", 0)):
                    continue
                timers[name] = make_timer(functools.partial(step_of, name), device)
            except SpecError:  # not on this GPU, or not at this size
                continue
            except Exception as error:  # too much shared memory, too many registers: Triton has many names for it
                if "resource" not in str(error).lower():
                    raise
        samples = sample_in_turn(timers, repeats)
        measured[operation] = {name: statistics.median(each) for name, each in samples.items()}
        gpu = torch.cuda.get_device_name(device)
        plans.remember(gpu, operation, problem, fastest(measured[operation]), measured[operation])
    return measured


def _agree(result: Tensor, expected: Tensor) -> bool:
    """Whether two ways to the same result differ by rounding alone."""
    miss = (result.double() - expected.double()).norm() / expected.double().norm()
    return bool(miss <= 4 * torch.finfo(result.dtype).eps)


def sizes_of(problems: Iterable[KernelProblem]) -> list[plans.Problem]:
    """The sizes among these that have several plans, each once: layers of polynomials, B-splines and Gaussians.

    Raises:
        DeviceError: there are none.
    """
    sizes: dict[plans.Problem, None] = {}
    for problem in problems:
        basis = make_basis(problem.basis)
        if problem.out_features is None or not isinstance(basis, ThreeTerm | BSpline | GaussianRBF):
            continue
        if isinstance(basis, BSpline) and basis.order not in ORDERS:
            continue
        kind, functions = ("polynomial", basis.size - 1) if isinstance(basis, ThreeTerm) else (basis.name, basis.size)
        sizes[plans.Problem(problem.tokens, problem.in_features, problem.out_features, functions, kind)] = None
    if not sizes:
        raise DeviceError(
            "nothing to tune: only layers of polynomials, of splines of order 2 or 3 and of Gaussians have several "
            "plans, such as --basis cheby2"
        )
    return list(sizes)


def fastest(seconds: dict[str, float]) -> str:
    """The first plan that no other beats by more than CLOSE."""
    times = {name: each for name, each in seconds.items() if name != LIMIT}
    best = min(times.values())
    return next(name for name, each in times.items() if each <= best * (1 + CLOSE))


def _family(problem: plans.Problem) -> tuple[str, list[float], str]:
    """Functions of the problem's kind; the norm before Gaussians is no part of the product."""
    if problem.kind == "rbf":
        return "rbf", [float(problem.degrees)], "none"
    if problem.kind == "bspline":
        return "bspline", [float(problem.degrees - 3), 3.0], "tanh"
    basis = make_basis("cheby2", degree=problem.degrees)
    assert isinstance(basis, ThreeTerm)
    numbers = [basis.first, *(number for n in range(problem.degrees) for number in basis.step(n))]
    return "polynomial", numbers, basis.squash


Steps = tuple[Callable[[str, int], Tensor], Callable[[int], Tensor]]
"""A product by the plan of a name, and the limit for it; both take the number of the call."""


def _steps(problem: plans.Problem, device: torch.device, dtype: torch.dtype) -> dict[str, Steps]:
    family = _family(problem)

    def drawn(*size: int) -> list[Tensor]:
        return [torch.randn(size, device=device).to(dtype) for _ in range(INPUT_SETS)]

    xs, dys = drawn(problem.rows, problem.inputs), drawn(problem.rows, problem.outputs)
    c, bias = drawn(problem.outputs, problem.degrees, problem.inputs)[0], drawn(problem.outputs)[0]
    ready, weights = drawn(problem.rows, problem.degrees * problem.inputs), c.flatten(1)

    def forward(plan: str, number: int) -> Tensor:
        y: Tensor = layer.edge_functions(xs[number % INPUT_SETS], c, bias, *family, plan)
        return y

    def input_gradient(plan: str, number: int) -> Tensor:
        at = number % INPUT_SETS
        dx: Tensor = layer.input_gradient(dys[at], xs[at], c, *family, plan)
        return dx

    def coefficient_gradient(plan: str, number: int) -> Tensor:
        at = number % INPUT_SETS
        dc: Tensor = layer.coefficient_gradient(dys[at], xs[at], *family, plan)
        return dc

    return {
        "forward": (forward, lambda number: ready[number % INPUT_SETS] @ weights.T),
        "input_gradient": (input_gradient, lambda number: dys[number % INPUT_SETS] @ weights),
        "coefficient_gradient": (
            coefficient_gradient,
            lambda number: dys[number % INPUT_SETS].T @ ready[number % INPUT_SETS],
        ),
    }
