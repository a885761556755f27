"""Which solver integrates a flow, with what tolerance, and why."""

import dataclasses
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._jax._structural_cache import known_by_structure
from .._jax._tracing import is_concrete
from .._jaxpr import nonsmooth_primitives
from .._kinks import KinkShare, kinked_function
from .._laws import Law
from .._problem._checks import as_scalar, check_tolerance, checked_step
from .._problem._losses import AbstractLoss, Risk
from .._problem._problem import Problem, without_laws
from .._solvers import AbstractTolerantSolver, ExponentialAdams, Rodas5P

#: Relative tolerances used when none is given. Between its steps a solver interpolates,
#: less accurately than it steps: with 1e-10 what is recorded is good to about 1e-8.
SMOOTH_RTOL = {"float64": 1e-10, "float32": 1e-5}
KINKED_RTOL = 1e-4
#: Exponential Adams interpolates as accurately as it steps, and its steps have errors of a
#: few times the tolerance.
ADAMS_RTOL = {"float64": 1e-11, "float32": 3e-6}
#: From so many products of samples and weights on, a gradient takes longer than the rest
#: of an exponential Adams step (about 25 µs on a core): then the fewest gradients win.
MANY_PRODUCTS = 30_000
#: From this tolerance on, order 5 needs fewer gradients than order 8.
LOOSE_RTOL = 1e-5
#: An explicit solver that has taken so many steps and is not there yet is held up by
#: stability more often than not, and then exponential Adams is a multiple faster; it takes
#: seconds to compile, so that it is not what begins.
MOST_EXPLICIT_STEPS = 1000
#: How much coarser the second solve of an error estimate is. Twice the step is no more: an
#: explicit method has to stay stable.
COARSER_RTOL = 4.0
COARSER_STEP = 2.0
#: Beyond this many pairs of a sample and a kink, where thousands may slide at a time,
#: each gets its share of a step. Below, Heun's method compiles in a fraction of the time,
#: and a tight tolerance gets the exact flow.
MANY_PAIRS = 20_000


class Method(eqx.Module):
    """A solver and its step size control.

    - `controller`: the user's, or `None` for a PID controller at `rtol`, `atol`.
    - `most_steps`: if not `None`, steps are at least t1/`most_steps`, so that
        chattering on kinks is averaged over instead of resolved without end.
    - `kept`: laws that are restored by projection.
    """

    solver: dfx.AbstractSolver
    controller: dfx.AbstractStepSizeController | None
    rtol: Array | None
    atol: Array | None
    dt0: Array | None
    most_steps: Array | None
    facts: tuple[tuple[str, str], ...] = eqx.field(static=True)
    kept: tuple[Law, ...] = ()

    @property
    def is_averaging(self) -> bool:
        return self.most_steps is not None

    @property
    def may_be_held_up(self) -> bool:
        """Whether it is an explicit method for smooth flows, with steps of its choice."""
        is_explicit = isinstance(self.solver, dfx.Tsit5 | dfx.Dopri8)
        return is_explicit and self.controller is None and not self.is_averaging

    def told(self, facts: tuple[tuple[str, str], ...]) -> "Method":
        """The same method, with more facts for `stats`."""
        return dataclasses.replace(self, facts=(*self.facts, *facts))

    def keeping(self, laws: tuple[Law, ...]) -> "Method":
        """The same method, with these laws restored."""
        return dataclasses.replace(self, kept=laws)

    def without_facts(self) -> "Method":
        """The same method, that compiles to the same program whatever it was chosen for."""
        return dataclasses.replace(self, facts=())

    def coarser(self) -> "Method | None":
        """The same method at a coarser tolerance or step, to estimate its error with.

        `None` with a user's own adaptive controller, which cannot be known.
        """
        if isinstance(self.controller, dfx.ConstantStepSize):
            assert self.dt0 is not None
            return dataclasses.replace(self, dt0=self.dt0 * COARSER_STEP)
        if self.controller is not None:
            return None
        assert self.rtol is not None
        atol = None if self.atol is None else self.atol * COARSER_RTOL
        most = None if self.most_steps is None else self.most_steps / COARSER_RTOL
        return dataclasses.replace(
            self, rtol=self.rtol * COARSER_RTOL, atol=atol, most_steps=most
        )


def choose_method(
    problem: Problem,
    *,
    rtol: Any,
    atol: Any,
    solver: dfx.AbstractSolver | None,
    controller: dfx.AbstractStepSizeController | None,
    dt0: Any,
    max_steps: int,
    may_share_kinks: bool = False,
    may_take_adams: bool = False,
    held_up_at: float | None = None,
    note: str | None = None,
) -> Method:
    """The method for a problem: what the user asked for, defaults for the rest.

    `may_share_kinks`: whether what moves is nothing but the gradient flow, by an adjoint
    that goes through a solver's steps; `may_take_adams`: whether it is that, with weight
    decay perhaps. `held_up_at`: the time to which an explicit solver came in
    `MOST_EXPLICIT_STEPS`. `note` is added to why the default was taken.
    Everything is decided from static facts (the model's operations, dtypes, what was
    given) and from whether `rtol` is known to be loose: otherwise a new value of a
    tolerance never recompiles.
    """
    dtype = problem.dtype
    if dtype.name not in SMOOTH_RTOL:
        raise ValueError(
            f"The weights are {dtype.name}: the flow needs float32 or float64. Half "
            "precision cannot carry an adaptive solver's error estimates."
        )
    if controller is not None and (rtol is not None or atol is not None):
        raise ValueError(
            "`rtol` and `atol` belong to homoflow's own step size controller: give them "
            "to your `stepsize_controller` instead."
        )
    if isinstance(solver, AbstractTolerantSolver):
        _refuse_other_tolerances(solver, controller)
    for name, value in (("rtol", rtol), ("atol", atol)):
        check_tolerance(name, value, dtype)
    dt0 = checked_step(dt0, dtype)
    kinks = kinks_of(problem)
    averaging = solver is None and controller is None and bool(kinks)
    if averaging and may_share_kinks and _shares_pay(problem):
        solver = KinkShare()
        why = (
            f"the gradient jumps at {', '.join(kinks)}, for more than {MANY_PAIRS:,} "
            "pairs of a sample and a kink: the slope of each is averaged over the step; "
            "the result is approximate"
        )
    elif (
        solver is None
        and controller is None
        and may_take_adams
        and (for_adams := _why_adams(problem, kinks, held_up_at))
    ):
        solver, why = ExponentialAdams(), for_adams
    elif solver is None:
        solver, why = _default_solver(kinks, dtype, rtol)
    else:
        why = "asked for"
    if note is not None:
        why = f"{why} ({note})"
    if controller is None and not isinstance(solver, dfx.AbstractAdaptiveSolver):
        if dt0 is None:
            raise ValueError(
                f"{type(solver).__name__} has no error estimate to choose its steps by: "
                "pass `dt0`, the constant step size."
            )
        if rtol is not None or atol is not None:
            raise ValueError(
                f"{type(solver).__name__} takes constant steps: `rtol` and `atol` have no "
                "meaning for it."
            )
        controller = dfx.ConstantStepSize()
    if controller is None and rtol is None:
        rtol = _default_rtol(solver, kinks, dtype)
    facts = (
        ("solver", type(solver).__name__),
        ("why", why),
        ("kinks", ", ".join(kinks) or "none found"),
    )
    return Method(
        solver,
        controller,
        as_scalar(rtol, dtype),
        as_scalar(atol, dtype),
        dt0,
        # Every step at the floor, and as many rejected ones, still reach the end.
        as_scalar(max_steps / 2, dtype) if averaging else None,
        facts,
    )


def _refuse_other_tolerances(
    solver: AbstractTolerantSolver, controller: dfx.AbstractStepSizeController | None
) -> None:
    name = type(solver).__name__
    if controller is not None:
        raise ValueError(
            f"{name} estimates its errors in units of the tolerance, for its own step "
            "size controller: leave `stepsize_controller` out and give `rtol`."
        )
    if solver.rtol is not None or solver.atol is not None:
        raise ValueError(
            f"Give `rtol` and `atol` to `flow`, not to {name}: its default `atol` depends "
            "on the weights."
        )


@known_by_structure(of=without_laws)
def kinks_of(problem: Problem) -> tuple[str, ...]:
    """Names of the kinked operations between the weights and what is minimized.

    With one of homoflow's losses only the model is looked at: those losses have a
    continuous gradient, though formulas such as a stable log Σ exp do not show it.
    """
    arrays, rest = eqx.partition((problem.frozen, problem.data), eqx.is_array)

    def minimized(weights: PyTree, arrays: PyTree):
        frozen, data = eqx.combine(arrays, rest)
        model = eqx.combine(weights, frozen)
        objective = problem.objective
        if isinstance(objective, Risk) and isinstance(objective.loss, AbstractLoss):
            return eqx.filter_vmap(model)(data[0])
        return objective(model, data)

    return nonsmooth_primitives(minimized, problem.weights, arrays)


def _why_adams(
    problem: Problem, kinks: tuple[str, ...], held_up_at: float | None
) -> str | None:
    """What speaks for exponential Adams; `None` if nothing does."""
    if kinks:
        return None
    if held_up_at is not None:
        return (
            f"smooth and stiff: {MOST_EXPLICIT_STEPS:,} explicit steps came to t = "
            f"{held_up_at:.3g} only"
        )
    products = _products(problem)
    if products < MANY_PRODUCTS:
        return None
    return (
        f"smooth, with {products:,} products of samples and weights: it takes the "
        "fewest gradients, also where the flow is stiff"
    )


def _products(problem: Problem) -> int:
    """Samples times weights, a measure of a gradient's cost; 0 where it is not known."""
    if not isinstance(problem.objective, Risk):
        return 0
    samples = jax.tree.leaves(problem.data)[0].shape[0]
    return samples * sum(w.size for w in jax.tree.leaves(problem.weights))


def _shares_pay(problem: Problem) -> bool:
    """Whether there are many kinks and all that is not smooth are kinks laid open."""
    objective = problem.objective
    if not (isinstance(objective, Risk) and isinstance(objective.loss, AbstractLoss)):
        return False
    function = kinked_function(problem)
    samples = jax.tree.leaves(problem.data)[0].shape[0]
    return function.count * samples > MANY_PAIRS and not function.unsupported


def gradient_evaluations(solver: dfx.AbstractSolver, steps: Array) -> Array | None:
    """How often a one-step solver, explicit or ours, evaluated the field in `steps`.

    `None` for other solvers, which do not say. A first-same-as-last solver evaluates
    once more each time its very first step is rejected, which Diffrax does not report.
    """
    if isinstance(solver, dfx.Euler):
        return steps
    if isinstance(solver, Rodas5P):
        return solver.evaluations_per_step * steps
    if not isinstance(solver, dfx.AbstractERK):
        return None
    tableau = solver.tableau
    if isinstance(tableau, dfx.MultiButcherTableau):
        return None
    per_step = tableau.num_stages - int(tableau.fsal)
    return per_step * steps + int(tableau.fsal)


def _default_solver(
    kinks: tuple[str, ...], dtype: jnp.dtype, rtol: Any
) -> tuple[dfx.AbstractSolver, str]:
    if kinks:
        return dfx.Heun(), (
            f"the gradient jumps at {', '.join(kinks)}: Heun's method compares the two "
            "ends of a step and averages over kinks; the result is approximate"
        )
    if dtype == jnp.float32:
        return dfx.Tsit5(), "smooth problem in float32"
    if rtol is not None and is_concrete(rtol) and float(rtol) >= LOOSE_RTOL:
        return dfx.Tsit5(), f"smooth problem, rtol ≥ {LOOSE_RTOL:g}"
    return dfx.Dopri8(), "smooth problem in float64"


def _default_rtol(
    solver: dfx.AbstractSolver, kinks: tuple[str, ...], dtype: jnp.dtype
) -> float:
    if kinks:
        return KINKED_RTOL
    is_adams = isinstance(solver, ExponentialAdams)
    return (ADAMS_RTOL if is_adams else SMOOTH_RTOL)[dtype.name]
