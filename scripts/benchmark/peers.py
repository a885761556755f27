"""Methods that call the gradient from Python, by way of NumPy, as their users do."""

import math
import time
from importlib import import_module

import numpy as np

from .compiled import Method, Outcome, Solve
from .problems import Problem

#: Dense Jacobians and their factors: beyond this many weights, hopeless.
_MOST_DENSE = 2_000


class _SpentError(Exception):
    pass


class _Field:
    """dw/dt = −∇L(w) and its Jacobian −∇²L(w) on NumPy arrays, counting the calls."""

    def __init__(self, problem: Problem, seconds: float):
        self.problem = problem
        self.calls = 0
        self.until = time.process_time() + seconds

    def __call__(self, t: float, w: np.ndarray) -> np.ndarray:
        self.calls += 1
        return -np.asarray(self.problem.gradient(w))

    def jacobian(self, t: float, w: np.ndarray) -> np.ndarray:
        return -np.asarray(self.problem.hessian(w))

    def is_spent(self) -> bool:
        return time.process_time() > self.until


def _each_seed(problem: Problem, solve_one, field: _Field) -> Outcome:
    """The judged seeds, one after the other."""
    ends = []
    for w0 in problem.starts[: problem.judged]:
        end, finished = solve_one(w0)
        ends.append(end)
        if not finished:
            return Outcome(problem.starts[: problem.judged], False, field.calls)
    return Outcome(np.stack(ends), True, field.calls / problem.judged)


def scipy(name: str) -> Method:
    """The implicit methods get the exact Jacobian."""
    is_implicit = name in ("LSODA", "BDF", "Radau")

    def start(problem: Problem, seconds: float) -> Solve:
        import scipy.integrate

        def solve(tolerance: float) -> Outcome:
            field = _Field(problem, seconds)
            options = {"jac": field.jacobian} if is_implicit else {}

            def one(w0: np.ndarray) -> tuple[np.ndarray, bool]:
                solver = getattr(scipy.integrate, name)(
                    field, 0.0, w0, problem.t1,
                    rtol=tolerance, atol=tolerance * problem.scale, **options,
                )  # fmt: skip
                while solver.status == "running" and not field.is_spent():
                    solver.step()
                return solver.y, solver.status == "finished"

            return _each_seed(problem, one, field)

        _warm_up(problem, with_jacobian=is_implicit)
        return solve

    most = _MOST_DENSE if is_implicit else math.inf
    return Method(f"SciPy {name}", "peer", "scipy", start, most_weights=most)


def cvode(linear_solver: str) -> Method:
    """BDF; "dense" with the exact Jacobian, "gmres" with difference quotients."""
    is_dense = linear_solver == "dense"

    def start(problem: Problem, seconds: float) -> Solve:
        CVODE = import_module("sksundae.cvode").CVODE

        def solve(tolerance: float) -> Outcome:
            field = _Field(problem, seconds)

            def rate(t, w, out):
                out[:] = field(t, w)

            def jacobian(t, w, rate, out):
                out[:, :] = field.jacobian(t, w)

            options = {"jacfn": jacobian} if is_dense else {}

            def one(w0: np.ndarray) -> tuple[np.ndarray, bool]:
                solver = CVODE(
                    rate, method="BDF", linsolver=linear_solver,
                    rtol=tolerance, atol=tolerance * problem.scale, **options,
                )  # fmt: skip
                state, t1 = solver.init_step(0.0, w0), problem.t1
                while state.success and state.t < t1 and not field.is_spent():
                    state = solver.step(t1, method="onestep", tstop=t1)
                return np.array(state.y), bool(state.success and state.t >= t1)

            return _each_seed(problem, one, field)

        _warm_up(problem, with_jacobian=is_dense)
        return solve

    most = _MOST_DENSE if is_dense else math.inf
    name = f"CVODE {linear_solver}"
    return Method(name, "peer", "sksundae", start, most_weights=most)


def torchdiffeq(name: str) -> Method:
    def start(problem: Problem, seconds: float) -> Solve:
        torch, package = (import_module(m) for m in ("torch", "torchdiffeq"))
        torch.set_num_threads(1)

        def solve(tolerance: float, t1: float = problem.t1) -> Outcome:
            field = _Field(problem, seconds)

            def rate(t, w):
                if field.is_spent():
                    raise _SpentError
                return torch.from_numpy(field(0.0, w.numpy()))

            def one(w0: np.ndarray) -> tuple[np.ndarray, bool]:
                try:
                    with torch.no_grad():
                        ends = package.odeint(
                            rate, torch.tensor(w0),
                            torch.tensor([0.0, t1], dtype=torch.float64), method=name,
                            rtol=tolerance, atol=tolerance * problem.scale,
                        )  # fmt: skip
                except (_SpentError, AssertionError):
                    # It asserts that steps stay positive.
                    return w0, False
                return ends[-1].numpy(), True

            return _each_seed(problem, one, field)

        solve(1e-2, 1e-3 * problem.t1)
        return solve

    return Method(f"torchdiffeq {name}", "peer", "torchdiffeq", start)


def torchode(name: str) -> Method:
    """All seeds at once, each with its own steps."""

    def start(problem: Problem, seconds: float) -> Solve:
        torch, package = (import_module(m) for m in ("torch", "torchode"))
        torch.set_num_threads(1)
        zeros = torch.zeros(problem.seeds, dtype=torch.float64)

        def solve(tolerance: float, t1: float = problem.t1) -> Outcome:
            until, calls = time.process_time() + seconds, 0

            def rate(t, ws):
                nonlocal calls
                if time.process_time() > until:
                    raise _SpentError
                calls += 1
                return torch.from_numpy(-np.asarray(problem.gradients(ws.numpy())))

            term = package.ODETerm(rate)
            adjoint = package.AutoDiffAdjoint(
                getattr(package, name)(term=term),
                package.IntegralController(
                    atol=tolerance * problem.scale, rtol=tolerance, term=term
                ),
            )
            posed = package.InitialValueProblem(
                y0=torch.tensor(problem.starts), t_start=zeros, t_end=zeros + t1
            )
            try:
                with torch.no_grad():
                    solution = adjoint.solve(posed)
            except _SpentError:
                return Outcome(problem.starts, False, calls)
            finished = bool((solution.status == 0).all())
            return Outcome(solution.ys[:, -1].numpy(), finished, calls)

        solve(1e-2, 1e-3 * problem.t1)
        return solve

    return Method(f"torchode {name}", "peer", "torchode", start)


def _warm_up(problem: Problem, *, with_jacobian: bool) -> None:
    np.asarray(problem.gradient(problem.w0))
    if with_jacobian:
        np.asarray(problem.hessian(problem.w0))
