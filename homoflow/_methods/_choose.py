"""Which method follows a flow: the one that a user names, or the default."""

import dataclasses
from typing import Any, NamedTuple, final

import diffrax as dfx
import equinox as eqx
from jaxtyping import ArrayLike, Float

from .._dynamics._base import AbstractDynamics, AbstractStochasticDynamics
from .._dynamics._gradient_flow import GradientFlow
from .._jax._arguments import check_flag, check_number, refuse_class
from .._jax._enumerations import names_of
from .._jax._tracing import is_concrete
from .._laws import Laws
from .._observe._recorder import Recorder
from .._observe._time_grid import make_time_grid
from .._problem._problem import Problem
from .._problem._smoothness import kinks_of
from .._results._reason import REQUESTED, Reason
from .._results._status import RESULTS
from .._results._trajectory import Trajectory, with_gradients_of
from .._solvers import ExponentialAdams, as_flow_solver
from ._averaged import Averaged
from ._base import AbstractMethod
from ._diffrax import (
    Diffrax,
    check_options,
    check_values,
    run_diffrax,
    with_error_estimate_of,
)
from ._exact import MAX_ACTIVE_BY_DEFAULT
from ._filippov import Filippov
from ._projection_choice import choose_projection
from ._rules import RULES, AutoOptions, Facts, num_adams_steps, num_trial_steps
from ._sample_reduction import reduce_samples
from ._task import Task, is_infinite

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

    - `nonsmooth_exact`: kinks that can be followed, at most 20,000 pairs of a sample and a
        kink: `homoflow.Filippov`.
    - `nonsmooth_many_pairs`, `nonsmooth_averaged`: other kinks: `homoflow.Averaged`.
    - `nonsmooth_controller`: kinks, and a step size control of your own: Heun's method.
    - `few_weights_steady_state`: `t1=inf` and at most 500 weights: `homoflow.Rodas5P`.
    - `vanishing_start`: all weights start below 1e-16, each acts by its square alone, as in
        diagonal linear networks, and nothing is observed besides: the equation of
        `homoflow.early_flow`.
    - `few_weights_stiff`: an equation that stays stiff, such as that of
        `homoflow.late_flow`, and at most 500 weights: `homoflow.Rodas5P`.
    - `stiff_restart`: some 1,000 steps of an explicit solver do not lead to the end, or
        will not, as is seen after a hundred: `homoflow.ExponentialAdams`, from the start.
        (Not inside of jit or vmap, where no number decides.)
    - `few_weights_restart`: at most 500 weights, and it took 10,000 steps and was not at
        the end: `homoflow.Rodas5P`, from the start.
    - `many_products`: 300,000 products of samples and weights (inside of jit and vmap,
        where nothing can be tried first, 30,000): `homoflow.ExponentialAdams`, which takes
        the fewest gradients, and ten seconds or more to compile.
    - `smooth_float32`, `loose_tolerance` (an `rtol` of 1e-5 or more): `diffrax.Tsit5`.
    - `smooth_float64`: `diffrax.Dopri8`.

    **Arguments:** as for `homoflow.Diffrax`, for the solver that is taken;
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
        check_values(self.atol, self.dt0, self.error_estimate)
        check_flag("follow_kinks", self.follow_kinks)

    @property
    def has_options(self) -> bool:
        """Whether anything was said of how to solve."""
        given = (getattr(self, field.name) for field in dataclasses.fields(self))
        return not self.follow_kinks or any(
            value is not None for value in given if value is not self.follow_kinks
        )

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
        check_number("t1", t1)
        is_steady = is_infinite(t1)
        grid = None if is_steady else make_time_grid(0, t1, None, problem.dtype)
        recorder = Recorder.create(Laws(()), {}, {})
        task = Task(problem, problem, dynamics, recorder, grid)
        task = dataclasses.replace(task, rtol=rtol, project=project)
        return self.select_for(reduce_samples(task))

    def select_for(self, task: Task) -> Selection:
        """The method for a task that was not tried yet."""
        return self._select(self._facts(task))

    def _select(self, facts: Facts) -> Selection:
        """The method that the first rule which applies makes."""
        task = facts.task
        _refuse_noise(task)
        for rule in RULES:
            why = rule.applies(facts)
            if why is not None:
                method = rule.make(facts)
                if isinstance(method, Averaged):
                    how = method.why(task)
                    return Selection(method, Reason(how.code, f"{how.text} ({why})"))
                return Selection(method, Reason(rule.code, why))
        raise AssertionError("the last rule applies to every task")

    def _facts(
        self,
        task: Task,
        exact_failure: str | None = None,
        stalled_at: float | None = None,
        adams_stalled_at: float | None = None,
    ) -> Facts:
        options = AutoOptions(
            *(getattr(self, field.name) for field in dataclasses.fields(AutoOptions))
        )
        return Facts(options, task, exact_failure, stalled_at, adams_stalled_at)

    def run(self, task: Task, reason: Reason = REQUESTED) -> Trajectory:
        del reason  # The rule's own says more.
        task = with_error_estimate_of(reduce_samples(task), self.error_estimate)
        selection = self.select_for(task)
        if isinstance(selection.method, Filippov):
            room = MAX_ACTIVE_BY_DEFAULT
            trajectory = selection.method.run_in_room(task, selection.reason, room)
            failure = _exact_failure(trajectory)
            if failure is None:
                return trajectory
            selection = self._select(self._facts(task, exact_failure=failure))
        if not isinstance(selection.method, Diffrax):
            return selection.method.run(task, selection.reason)
        return self._run_smooth(task, selection)

    def _run_smooth(self, task: Task, selection: Selection) -> Trajectory:
        """By a solver for smooth flows, and where that stalls by one for stiff flows.

        Each begins at the start again: what was done before is lost, and counted.
        """
        facts, stalled_at = self._facts(task), None
        assert isinstance(selection.method, Diffrax)
        is_explicit = as_flow_solver(selection.method.solver).is_explicit
        runs: list[Trajectory] = []
        if is_explicit and facts.can_begin_again:
            stalled_at = self._stalls(task, selection, num_trial_steps(task), runs)
            if stalled_at is None:
                return runs[-1]
            selection = self._select(self._facts(task, stalled_at=stalled_at))
        assert isinstance(selection.method, Diffrax)
        is_adams = isinstance(selection.method.solver, ExponentialAdams)
        if is_adams and facts.can_leave_adams:
            held_at = self._stalls(task, selection, num_adams_steps(task), runs)
            if held_at is None:
                return with_gradients_of(runs)
            facts = self._facts(task, stalled_at=stalled_at, adams_stalled_at=held_at)
            selection = self._select(facts)
        runs.append(self._run_diffrax(task, selection))
        return with_gradients_of(runs)

    def _stalls(
        self, task: Task, selection: Selection, steps: int, runs: list[Trajectory]
    ) -> float | None:
        """Where so many steps end that are not enough; the run is added to `runs`."""
        assert isinstance(selection.method, Diffrax)
        is_explicit = as_flow_solver(selection.method.solver).is_explicit
        short = dataclasses.replace(task, max_steps=steps, is_trial=is_explicit)
        runs.append(self._run_diffrax(short, selection))
        if str(names_of(runs[-1].result, RESULTS)) != "max_steps_reached":
            return None
        return float(runs[-1].stats["time_reached"])

    def _run_diffrax(self, task: Task, selection: Selection) -> Trajectory:
        method, reason = selection
        assert isinstance(method, Diffrax)
        plan = choose_projection(
            task,
            is_default_solver=self.stepsize_controller is None,
            adjoint=self.adjoint,
        )
        # A program that restores laws after steps takes twice as long to compile.
        watches = (
            as_flow_solver(method.solver).is_explicit
            and self.stepsize_controller is None
            and self._facts(task).numbers_may_decide
        )
        return run_diffrax(task, method, plan, reason, restores_if_needed=watches)


def as_method(
    solver: Any, atol: Any, stepsize_controller: Any, dt0: Any, adjoint: Any
) -> AbstractMethod:
    """The method that `solver` and the options of Diffrax's solvers describe."""
    options = {
        "atol": atol,
        "stepsize_controller": stepsize_controller,
        "dt0": dt0,
        "adjoint": adjoint,
    }
    given = {name: value for name, value in options.items() if value is not None}
    refuse_class("solver", solver)
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
    fields = {field.name for field in dataclasses.fields(solver)}
    for name in given:
        _check_option(solver, name, fields)
    return dataclasses.replace(solver, **given) if given else solver


def _check_option(solver: AbstractMethod, name: str, fields: set[str]) -> None:
    """`ValueError` unless a method has an option, and was not given it before."""
    method = type(solver).__name__
    if isinstance(solver, Filippov) and name not in fields:
        raise ValueError(
            f"`{name}` is for Diffrax's solvers: `homoflow.Filippov` takes `rtol`, "
            "`atol` and `max_steps` only."
        )
    if name not in fields:
        raise ValueError(
            f"`{name}` is an option that `homoflow.{method}` does not have."
        )
    if getattr(solver, name) is not None:
        raise ValueError(f"`{name}` is given to `flow` and to `homoflow.{method}`.")


def adapt_method(method: AbstractMethod, task: Task) -> AbstractMethod:
    """The method itself; for a smooth model the default in place of `Averaged`."""
    if not isinstance(method, Averaged) or kinks_of(task.given):
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
        "kink_slots_exceeded",
        "kink_mode_unsettled",
        "stuck_on_kinks",
    )
    result = trajectory.result
    if not is_concrete(result) or str(names_of(result, RESULTS)) not in given_up:
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
