"""The rules by which a method is chosen when nobody names one.

They stand in one list, in the order in which they are tried: the first that applies takes
the task. Their thresholds are in `_defaults.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import jax.numpy as jnp

from .._jax._tracing import is_concrete
from .._kinks import num_pairs
from .._problem._smoothness import kinks_of
from .._solvers import ExponentialAdams, Rodas5P
from ._averaged import Averaged
from ._base import AbstractMethod
from ._defaults import (
    MAX_ADAMS_STEPS,
    MAX_DENSE_WEIGHTS,
    MAX_EXPLICIT_STEPS,
    MAX_FOLLOWED_PAIRS,
    MIN_ADAMS_PRODUCTS,
    MIN_LOOSE_RTOL,
    MIN_UNTRIED_PRODUCTS,
)
from ._diffrax import Diffrax
from ._exact import cannot_observe
from ._filippov import Filippov, follows, obstacle
from ._task import Task
from ._vanishing import WHY, InLogarithms, starts_from_nothing


@dataclasses.dataclass(frozen=True)
class AutoOptions:
    """What `homoflow.Auto` was told."""

    atol: Any
    stepsize_controller: dfx.AbstractStepSizeController | None
    dt0: Any
    adjoint: dfx.AbstractAdjoint | None
    error_estimate: bool | None
    follow_kinks: bool

    def names_given(self) -> list[str]:
        """The options that are given and that Diffrax's solvers alone can honour."""
        names = "stepsize_controller", "dt0", "adjoint"
        return [name for name in names if getattr(self, name) is not None]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the rules look at: all of it is known before a run."""

    options: AutoOptions
    task: Task
    exact_failure: str | None
    stalled_at: float | None
    adams_stalled_at: float | None = None

    @functools.cached_property
    def kinks(self) -> tuple[str, ...]:
        return kinks_of(self.task.given)

    @functools.cached_property
    def against_exact(self) -> str | None:
        """Why kinks are not followed one by one; `None` if they are."""
        task, options = self.task, self.options.names_given()
        if self.exact_failure is not None:
            return self.exact_failure
        if not self.options.follow_kinks:
            return "it is not wanted"
        if options:
            return f"`{options[0]}` is for Diffrax's solvers"
        if not follows(task):
            if task.dynamics.is_gradient_flow:
                return "`weight_decay` is for Diffrax's solvers"
            return f"it does not know the {task.dynamics.name}"
        if task.project:
            return "`project=True` is for Diffrax's solvers"
        reason = obstacle(task.given) or cannot_observe(task)
        if reason is not None:
            return reason
        if num_pairs(task.given) > MAX_FOLLOWED_PAIRS:
            return (
                f"{num_pairs(task.given):,} pairs of a sample and a kink are more than "
                f"{MAX_FOLLOWED_PAIRS:,}"
            )
        return None

    @property
    def can_begin_again(self) -> bool:
        """Whether an explicit solver may be tried first, and left where it stalls."""
        task = self.task
        return self._may_leave and task.max_steps > num_trial_steps(task)

    @property
    def can_leave_adams(self) -> bool:
        """Whether exponential Adams may be left where it stalls."""
        task = self.task
        is_small = has_few_weights(task)
        return self._may_leave and is_small and task.max_steps > num_adams_steps(task)

    @property
    def _may_leave(self) -> bool:
        is_finite = self.task.grid is not None
        return self.may_take_adams and self.numbers_may_decide and is_finite

    @property
    def numbers_may_decide(self) -> bool:
        """Whether the flow is smooth, and all of it outside of jit, vmap and grad."""
        options = self.options
        is_known = self.task.is_untraced and is_concrete((options.atol, options.dt0))
        return is_known and not self.kinks

    @property
    def may_take_adams(self) -> bool:
        """Whether exponential Adams is made for what moves the weights."""
        goes_back = isinstance(self.options.adjoint, dfx.BacksolveAdjoint)
        has_controller = self.options.stepsize_controller is not None
        is_gradient = self.task.dynamics.is_gradient_flow
        return is_gradient and not (goes_back or has_controller)

    @property
    def products(self) -> int:
        """Samples times weights, a measure of a gradient's cost; 0 where not known."""
        problem = self.task.problem
        return (problem.num_samples or 0) * problem.num_weights

    def diffrax(self, solver: dfx.AbstractSolver) -> Diffrax:
        """A solver with the options that were given."""
        options = self.options
        return Diffrax(
            solver,
            options.atol,
            options.stepsize_controller,
            options.dt0,
            options.adjoint,
            options.error_estimate,
        )

    def averaged(self) -> Averaged:
        options = self.options
        return Averaged(
            options.atol, options.dt0, options.adjoint, options.error_estimate
        )


def num_trial_steps(task: Task) -> int:
    """Steps after which a smooth flow counts as stiff: one ends on each recorded time."""
    assert task.grid is not None
    return MAX_EXPLICIT_STEPS + task.grid.times().size


def num_adams_steps(task: Task) -> int:
    """Steps after which exponential Adams counts as held up, too."""
    assert task.grid is not None
    return MAX_ADAMS_STEPS + task.grid.times().size


def has_few_weights(task: Task) -> bool:
    """Whether a step with a dense Hessian costs little."""
    return task.problem.num_weights <= MAX_DENSE_WEIGHTS


class Rule(NamedTuple):
    """A method, and when to take it: `applies` gives the reason, or `None`."""

    code: str
    applies: Callable[[Facts], str | None]
    make: Callable[[Facts], AbstractMethod]


def _exact(facts: Facts) -> str | None:
    if not facts.kinks or facts.against_exact is not None:
        return None
    return f"{num_pairs(facts.task.given):,} pairs of a sample and a kink: each is followed"


def _averaged(facts: Facts) -> str | None:
    if not facts.kinks or facts.options.stepsize_controller is not None:
        return None
    return f"not the exact flow: {facts.against_exact}"


def _controlled(facts: Facts) -> str | None:
    if not facts.kinks:
        return None
    return (
        f"the gradient jumps at {', '.join(facts.kinks)}: Heun's method compares the two "
        "ends of a step and averages over kinks; the result is approximate (not the "
        f"exact flow: {facts.against_exact})"
    )


def _steady_state(facts: Facts) -> str | None:
    has_controller = facts.options.stepsize_controller is not None
    if facts.task.grid is not None or has_controller or not has_few_weights(facts.task):
        return None
    return (
        "smooth problem of few weights, to its end: steps with a dense Hessian pass "
        "plateaus and follow slow directions"
    )


def _vanishing_start(facts: Facts) -> str | None:
    options, task = facts.options, facts.task
    has_options = options.names_given() or options.atol is not None
    if task.grid is None or has_options or not facts.numbers_may_decide:
        return None
    if not starts_from_nothing(task):
        return None
    return WHY


def _stays_stiff(facts: Facts) -> str | None:
    has_controller = facts.options.stepsize_controller is not None
    goes_back = isinstance(facts.options.adjoint, dfx.BacksolveAdjoint)
    is_small = facts.task.problem.num_weights <= MAX_DENSE_WEIGHTS
    is_stiff = facts.task.dynamics.stays_stiff and not facts.kinks
    if not (is_stiff and is_small) or has_controller or goes_back:
        return None
    return (
        "fast directions never die out, and weights are few: steps with a dense Jacobian "
        "are bounded by accuracy alone"
    )


def _stiff(facts: Facts) -> str | None:
    if facts.stalled_at is None or not facts.may_take_adams:
        return None
    return (
        f"smooth and stiff: an explicit solver was left at t = {facts.stalled_at:.3g}, as "
        f"some {MAX_EXPLICIT_STEPS:,} of its steps would not do"
    )


def _few_weights_restart(facts: Facts) -> str | None:
    if facts.adams_stalled_at is None:
        return None
    return (
        f"few weights, and {MAX_ADAMS_STEPS:,} steps of exponential Adams came to t = "
        f"{facts.adams_stalled_at:.3g} only: steps with a dense Hessian"
    )


def _many_products(facts: Facts) -> str | None:
    least = MIN_UNTRIED_PRODUCTS if facts.can_begin_again else MIN_ADAMS_PRODUCTS
    is_many = facts.products >= least
    if not is_many or not facts.may_take_adams or facts.task.grid is None:
        return None
    return (
        f"smooth, with {facts.products:,} products of samples and weights: it takes the "
        "fewest gradients, also where the flow is stiff"
    )


def _float32(facts: Facts) -> str | None:
    is_float32 = facts.task.problem.dtype == jnp.float32
    return "smooth problem in float32" if is_float32 else None


def _loose(facts: Facts) -> str | None:
    rtol = facts.task.rtol
    if rtol is None or not is_concrete(rtol) or jnp.ndim(rtol) != 0:
        return None
    is_loose = float(rtol) >= MIN_LOOSE_RTOL
    return f"smooth problem, rtol ≥ {MIN_LOOSE_RTOL:g}" if is_loose else None


def _always(facts: Facts) -> str:
    del facts
    return "smooth problem in float64"


RULES = (
    Rule(
        "nonsmooth_exact",
        _exact,
        lambda facts: Filippov(atol=facts.options.atol),
    ),
    Rule("nonsmooth_averaged", _averaged, Facts.averaged),
    Rule("nonsmooth_controller", _controlled, lambda facts: facts.diffrax(dfx.Heun())),
    Rule(
        "few_weights_steady_state",
        _steady_state,
        lambda facts: facts.diffrax(Rodas5P()),
    ),
    Rule(
        "vanishing_start",
        _vanishing_start,
        lambda facts: InLogarithms(facts.options.error_estimate),
    ),
    Rule(
        "few_weights_stiff",
        _stays_stiff,
        lambda facts: facts.diffrax(Rodas5P()),
    ),
    Rule(
        "few_weights_restart",
        _few_weights_restart,
        lambda facts: facts.diffrax(Rodas5P()),
    ),
    Rule("stiff_restart", _stiff, lambda facts: facts.diffrax(ExponentialAdams())),
    Rule(
        "many_products",
        _many_products,
        lambda facts: facts.diffrax(ExponentialAdams()),
    ),
    Rule("smooth_float32", _float32, lambda facts: facts.diffrax(dfx.Tsit5())),
    Rule("loose_tolerance", _loose, lambda facts: facts.diffrax(dfx.Tsit5())),
    Rule("smooth_float64", _always, lambda facts: facts.diffrax(dfx.Dopri8())),
)
