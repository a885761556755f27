"""Methods that call the gradient from Python, by way of NumPy, as their users do."""

import time
from importlib import import_module

import numpy as np

from .methods import TOLERANCES, Limit, Method, Outcome, Solve
from .problems import Problem


class _Field:
    """dw/dt = −∇L(w) on NumPy arrays, counting its calls."""

    def __init__(self, problem: Problem, limit: Limit):
        self.gradient = problem.gradient
        self.limit = limit
        self.calls = 0
        self.started = time.process_time()

    def __call__(self, t: float, w: np.ndarray) -> np.ndarray:
        self.calls += 1
        return -np.asarray(self.gradient(w))

    def is_spent(self) -> bool:
        seconds = time.process_time() - self.started
        return self.calls >= self.limit.gradients or seconds > self.limit.seconds


def scipy(name: str) -> Method:
    def start(problem: Problem, limit: Limit) -> Solve:
        import scipy.integrate

        def solve(tolerance: float) -> Outcome:
            field = _Field(problem, limit)
            solver = getattr(scipy.integrate, name)(
                field, 0.0, problem.w0, problem.t1,
                rtol=tolerance, atol=tolerance * problem.scale,
            )  # fmt: skip
            while solver.status == "running" and not field.is_spent():
                solver.step()
            return Outcome(solver.y, solver.status == "finished", field.calls)

        _Field(problem, limit)(0.0, problem.w0)
        return solve

    return Method(f"SciPy {name}", "adaptive", "scipy", TOLERANCES, start)


class _SpentError(Exception):
    pass


def torchdiffeq(name: str) -> Method:
    def start(problem: Problem, limit: Limit) -> Solve:
        torch, tde = (import_module(module) for module in ("torch", "torchdiffeq"))
        torch.set_num_threads(1)

        def solve(tolerance: float, t1: float = problem.t1) -> Outcome:
            field = _Field(problem, limit)

            def rate(t, w):
                if field.is_spent():
                    raise _SpentError
                return torch.from_numpy(field(0.0, w.numpy()))

            ts = torch.tensor([0.0, t1], dtype=torch.float64)
            w0 = torch.tensor(problem.w0)
            try:
                with torch.no_grad():
                    ws = tde.odeint(
                        rate, w0, ts, method=name,
                        rtol=tolerance, atol=tolerance * problem.scale,
                    )  # fmt: skip
            except (
                _SpentError,
                AssertionError,
            ):  # It asserts that steps stay positive.
                return Outcome(problem.w0, False, field.calls)
            return Outcome(ws[-1].numpy(), True, field.calls)

        solve(1e-2, 1e-3 * problem.t1)
        return solve

    return Method(f"torchdiffeq {name}", "adaptive", "torchdiffeq", TOLERANCES, start)


def cvode(name: str) -> Method:
    """`name` is of the multistep family. Krylov: a dense Jacobian costs n gradients."""

    def start(problem: Problem, limit: Limit) -> Solve:
        CVODE = import_module("sksundae.cvode").CVODE

        def solve(tolerance: float) -> Outcome:
            field = _Field(problem, limit)

            def rate(t, w, out):
                out[:] = field(t, w)

            solver = CVODE(
                rate, method=name, linsolver="gmres",
                rtol=tolerance, atol=tolerance * problem.scale,
            )  # fmt: skip
            state = solver.init_step(0.0, problem.w0)
            while state.success and state.t < problem.t1 and not field.is_spent():
                state = solver.step(problem.t1, method="onestep", tstop=problem.t1)
            finished = bool(state.success and state.t >= problem.t1)
            return Outcome(np.asarray(state.y), finished, field.calls)

        _Field(problem, limit)(0.0, problem.w0)
        return solve

    return Method(f"CVODE {name}", "adaptive", "sksundae", TOLERANCES, start)
