"""Which method follows a flow when nobody says, and why.

The rules stand in one list, in the order in which they are tried: the first that applies
takes the task. Their thresholds are in `_defaults.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, final

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float

from .._dynamics._base import AbstractDynamics, AbstractStochasticDynamics
from .._dynamics._gradient_flow import GradientFlow
from .._jax._tracing import is_concrete
from .._laws import Laws
from .._observe._recorder import Recorder
from .._observe._time_grid import make_time_grid
from .._problem._problem import Problem
from .._problem._smoothness import kinks_of
from .._results._reason import REQUESTED, Reason
from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from .._solvers import ExponentialAdams, Rodas5P, as_flow_solver
from ._averaged import Averaged
from ._base import AbstractMethod
from ._defaults import (
    MAX_DENSE_WEIGHTS,
    MAX_EXACT_RTOL,
    MAX_EXPLICIT_STEPS,
    MAX_FOLLOWED_PAIRS,
    MIN_ADAMS_PRODUCTS,
    MIN_LOOSE_RTOL,
)
from ._diffrax import Diffrax, check_options, run_diffrax
from ._filippov import Filippov, num_pairs, obstacle
from ._projection_choice import choose_projection
from ._sample_reduction import reduce_samples
from ._task import Task

Number = float | int | Float[ArrayLike, ""]


class Selection(NamedTuple):
    """A method for a task, and why."""

    method: AbstractMethod
    reason: Reason


@final
class Auto(AbstractMethod):
    """The default `solver` of `homoflow.flow`: it takes the method that fits the problem.

    The rules, of which the first that applies takes the flow (`stats["solver_reason"]` has
    its code, and the numbers that decided):

    - `nonsmooth_exact`: kinks that can be followed, an `rtol` of 1e-5 or less, and at most
        20,000 pairs of a sample and a kink: `homoflow.Filippov`.
    - `nonsmooth_many_pairs`, `nonsmooth_averaged`: other kinks: `homoflow.Averaged`.
    - `nonsmooth_controller`: kinks, and a step size control of your own: Heun's method.
    - `few_weights_steady_state`: `t1=inf` and at most 500 weights: `homoflow.Rodas5P`.
    - `stiff_restart`: an explicit solver took 1,000 steps and was not at the end:
        `homoflow.ExponentialAdams`, from the start. (Not inside of jit or vmap, where no
        number decides.)
    - `many_products`: 30,000 products of samples and weights: `homoflow.ExponentialAdams`,
        which takes the fewest gradients.
    - `smooth_float32`, `loose_tolerance` (an `rtol` of 1e-5 or more): `diffrax.Tsit5`.
    - `smooth_float64`: `diffrax.Dopri8`.

    **Arguments:** as for `homoflow.Diffrax`, for the solver that is taken; `atol`,
    `stepsize_controller`, `dt0` and `adjoint` rule out the exact flow, which does not know
    them. So does `follow_kinks=False`.

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    problem = hf.make_problem(model, (x, x[:, :1]))
    method, reason = hf.Auto().select(problem, 1.0, rtol=1e-6)
    print(reason.code)  # nonsmooth_exact
    ```
    """

    atol: Number | None = None
    stepsize_controller: dfx.AbstractStepSizeController | None = None
    dt0: Number | None = None
    adjoint: dfx.AbstractAdjoint | None = None
    error_estimate: bool | None = eqx.field(static=True, default=None)
    follow_kinks: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_options(self.stepsize_controller, self.adjoint)

    def select(
        self,
        problem: Problem,
        t1: Number,
        *,
        dynamics: AbstractDynamics = GradientFlow(),  # noqa: B008
        rtol: Number | None = None,
        project: bool | None = None,
    ) -> Selection:
        """The method that a flow of this problem would take, and the reason.

        Nothing is solved. `homoflow.flow` may go on to another method where the first
        stalls or fails; `stats["solver_reason"]` says so.
        """
        is_steady = is_concrete(t1) and bool(jnp.isposinf(jnp.asarray(t1)))
        grid = None if is_steady else make_time_grid(0, t1, None, problem.dtype)
        recorder = Recorder.create(Laws(()), {}, {})
        task = Task(problem, problem, dynamics, recorder, grid)
        task = dataclasses.replace(task, rtol=rtol, project=project)
        return self.select_for(reduce_samples(task))

    def select_for(
        self,
        task: Task,
        *,
        exact_failure: str | None = None,
        stalled_at: float | None = None,
    ) -> Selection:
        """The method for a task, perhaps after another one has failed."""
        _refuse_noise(task)
        facts = _Facts(self, task, exact_failure, stalled_at)
        for rule in RULES:
            why = rule.applies(facts)
            if why is not None:
                method = rule.make(facts)
                if isinstance(method, Averaged):
                    how = method.why(task)
                    return Selection(method, Reason(how.code, f"{how.text} ({why})"))
                return Selection(method, Reason(rule.code, why))
        raise AssertionError("the last rule applies to every task")

    def run(self, task: Task, reason: Reason = REQUESTED) -> Trajectory:
        del reason  # The rule's own says more.
        task = reduce_samples(task)
        selection = self.select_for(task)
        if isinstance(selection.method, Filippov):
            trajectory = selection.method.run(task, selection.reason)
            failure = _exact_failure(trajectory)
            if failure is None:
                return trajectory
            selection = self.select_for(task, exact_failure=failure)
        if not isinstance(selection.method, Diffrax):
            return selection.method.run(task, selection.reason)
        return self._run_smooth(task, selection)

    def _run_smooth(self, task: Task, selection: Selection) -> Trajectory:
        """By a solver for smooth flows, and by one for stiff flows if that stalls.

        The second begins at the start again: what the first did is lost, and counted.
        """
        if not self._may_restart(task, selection):
            return self._run_diffrax(task, selection)
        short = dataclasses.replace(task, max_steps=MAX_EXPLICIT_STEPS)
        first = self._run_diffrax(short, selection)
        if first.result != RESULTS.max_steps_reached:
            return first
        stalled_at = float(first.stats["time_reached"])
        then = self._run_diffrax(task, self.select_for(task, stalled_at=stalled_at))
        count = "gradient_evaluations"
        both = then.stats.with_numbers(
            **{count: then.stats[count] + first.stats[count]}
        )
        return dataclasses.replace(then, stats=both)

    def _run_diffrax(self, task: Task, selection: Selection) -> Trajectory:
        method, reason = selection
        assert isinstance(method, Diffrax)
        plan = choose_projection(
            task,
            is_default_solver=self.stepsize_controller is None,
            adjoint=self.adjoint,
        )
        return run_diffrax(task, method, plan, reason)

    def _may_restart(self, task: Task, selection: Selection) -> bool:
        method = selection.method
        assert isinstance(method, Diffrax)
        return (
            as_flow_solver(method.solver).is_explicit
            and self.stepsize_controller is None
            and not isinstance(self.adjoint, dfx.BacksolveAdjoint)
            and task.dynamics.is_gradient_flow
            and not kinks_of(task.problem)
            and task.max_steps > MAX_EXPLICIT_STEPS
            and task.is_untraced
            and is_concrete((self.atol, self.dt0))
        )

    def given_options(self) -> list[str]:
        """The names of the options of Diffrax's solvers that are given."""
        names = "atol", "stepsize_controller", "dt0", "adjoint"
        return [name for name in names if getattr(self, name) is not None]


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What the rules look at: all of it is known before a run."""

    options: Auto
    task: Task
    exact_failure: str | None
    stalled_at: float | None

    @functools.cached_property
    def kinks(self) -> tuple[str, ...]:
        return kinks_of(self.task.problem)

    @functools.cached_property
    def against_exact(self) -> str | None:
        """Why kinks are not followed one by one; `None` if they are."""
        task, options = self.task, self.options.given_options()
        rtol = task.rtol
        if self.exact_failure is not None:
            return self.exact_failure
        if not self.options.follow_kinks:
            return "it is not wanted"
        if options:
            return f"`{options[0]}` is for Diffrax's solvers"
        if not task.dynamics.conserves_laws:
            if task.dynamics.is_gradient_flow:
                return "`weight_decay` is for Diffrax's solvers"
            return f"it does not know the {task.dynamics.name}"
        if task.project:
            return "`project=True` is for Diffrax's solvers"
        if not is_concrete(rtol):
            return "rtol is not known before the run"
        if rtol is None or jnp.ndim(rtol) != 0 or not 0 < float(rtol) <= MAX_EXACT_RTOL:
            return f"it is considered at rtol ≤ {MAX_EXACT_RTOL:g}"
        reason = obstacle(task.given)
        if reason is not None:
            return reason
        if num_pairs(task.given) > MAX_FOLLOWED_PAIRS:
            return (
                f"{num_pairs(task.given):,} pairs of a sample and a kink are more than "
                f"{MAX_FOLLOWED_PAIRS:,}"
            )
        return None

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


class Rule(NamedTuple):
    """A method, and when to take it: `applies` gives the reason, or `None`."""

    code: str
    applies: Callable[[_Facts], str | None]
    make: Callable[[_Facts], AbstractMethod]


def _exact(facts: _Facts) -> str | None:
    if not facts.kinks or facts.against_exact is not None:
        return None
    return (
        f"rtol ≤ {MAX_EXACT_RTOL:g} and {num_pairs(facts.task.given):,} pairs of a sample "
        "and a kink: each is followed"
    )


def _averaged(facts: _Facts) -> str | None:
    if not facts.kinks or facts.options.stepsize_controller is not None:
        return None
    return f"not the exact flow: {facts.against_exact}"


def _controlled(facts: _Facts) -> str | None:
    if not facts.kinks:
        return None
    return (
        f"the gradient jumps at {', '.join(facts.kinks)}: Heun's method compares the two "
        "ends of a step and averages over kinks; the result is approximate (not the "
        f"exact flow: {facts.against_exact})"
    )


def _steady_state(facts: _Facts) -> str | None:
    has_controller = facts.options.stepsize_controller is not None
    is_small = facts.task.problem.num_weights <= MAX_DENSE_WEIGHTS
    if facts.task.grid is not None or has_controller or not is_small:
        return None
    return (
        "smooth problem of few weights, to its end: steps with a dense Hessian pass "
        "plateaus and follow slow directions"
    )


def _stiff(facts: _Facts) -> str | None:
    if facts.stalled_at is None or not facts.may_take_adams:
        return None
    return (
        f"smooth and stiff: {MAX_EXPLICIT_STEPS:,} explicit steps came to t = "
        f"{facts.stalled_at:.3g} only"
    )


def _many_products(facts: _Facts) -> str | None:
    is_many = facts.products >= MIN_ADAMS_PRODUCTS
    if not is_many or not facts.may_take_adams or facts.task.grid is None:
        return None
    return (
        f"smooth, with {facts.products:,} products of samples and weights: it takes the "
        "fewest gradients, also where the flow is stiff"
    )


def _float32(facts: _Facts) -> str | None:
    is_float32 = facts.task.problem.dtype == jnp.float32
    return "smooth problem in float32" if is_float32 else None


def _loose(facts: _Facts) -> str | None:
    rtol = facts.task.rtol
    if rtol is None or not is_concrete(rtol) or jnp.ndim(rtol) != 0:
        return None
    is_loose = float(rtol) >= MIN_LOOSE_RTOL
    return f"smooth problem, rtol ≥ {MIN_LOOSE_RTOL:g}" if is_loose else None


def _always(facts: _Facts) -> str:
    del facts
    return "smooth problem in float64"


RULES = (
    Rule("nonsmooth_exact", _exact, lambda facts: Filippov()),
    Rule("nonsmooth_averaged", _averaged, _Facts.averaged),
    Rule("nonsmooth_controller", _controlled, lambda facts: facts.diffrax(dfx.Heun())),
    Rule(
        "few_weights_steady_state",
        _steady_state,
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


def as_method(solver: Any, options: dict[str, Any]) -> AbstractMethod:
    """The method that `solver` and the options of Diffrax's solvers describe.

    `options` holds `atol`, `stepsize_controller`, `dt0` and `adjoint`, `None` where not
    given.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(solver, type):
        raise TypeError(
            f"`solver` is the class {solver.__name__}: pass an instance, "
            f"`{solver.__name__}()`."
        )
    if solver is None:
        return Auto(**given)
    if isinstance(solver, dfx.AbstractSolver):
        return Diffrax(solver, **given)
    if not isinstance(solver, AbstractMethod):
        raise TypeError(
            "`solver` must be one of Diffrax's solvers or of homoflow's methods "
            "(`homoflow.Filippov()`, `homoflow.Averaged()`, `homoflow.Diffrax(…)`); got "
            f"{solver!r}."
        )
    if not given:
        return solver
    name, others = next(iter(given)), type(solver).__name__
    if isinstance(solver, Filippov):
        raise ValueError(
            f"`{name}` is for Diffrax's solvers: `homoflow.Filippov` takes `rtol` and "
            "`max_steps` only."
        )
    fields = {field.name for field in dataclasses.fields(solver)}
    if name not in fields:
        raise ValueError(
            f"`{name}` is an option that `homoflow.{others}` does not have."
        )
    if getattr(solver, name) is not None:
        raise ValueError(f"`{name}` is given to `flow` and to `homoflow.{others}`.")
    return dataclasses.replace(solver, **given)


def adapt_method(method: AbstractMethod, task: Task) -> AbstractMethod:
    """The method itself; for a smooth model the default in place of `Averaged`."""
    if not isinstance(method, Averaged) or kinks_of(task.problem):
        return method
    return Auto(
        method.atol,
        dt0=method.dt0,
        adjoint=method.adjoint,
        error_estimate=method.error_estimate,
        follow_kinks=False,
    )


def _exact_failure(trajectory: Trajectory) -> str | None:
    """Why an exact flow that nobody asked for gave up, or `None` if it did not.

    Inside jit and vmap that is not known: there the result says it.
    """
    given_up = (
        RESULTS.kink_slots_exceeded,
        RESULTS.kink_mode_unsettled,
        RESULTS.stuck_on_kinks,
    )
    result = trajectory.result
    if not is_concrete(result) or not any(result == member for member in given_up):
        return None
    reached = float(trajectory.stats["time_reached"])
    reason = str(RESULTS[result]).split(". ")[0].split(":")[0]
    return f"at t = {reached:.4g}, {reason}"


def _refuse_noise(task: Task) -> None:
    if isinstance(task.dynamics, AbstractStochasticDynamics):
        raise ValueError(
            f"The {task.dynamics.name} is a stochastic equation: pass one of Diffrax's "
            "solvers for these as `solver`, such as `diffrax.EulerHeun()`, and a constant "
            "step as `dt0`."
        )
