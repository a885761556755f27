"""The exact flow of networks with kinks, as a method."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float

from .._jax._arguments import check_number
from .._jax._progress import as_meter
from .._jaxpr import nonsmooth_primitives
from .._kinks import kinked_function
from .._observe._recorder import Recorder
from .._observe._time_grid import TimeGrid
from .._problem._checks import check_count, check_tolerance
from .._problem._losses import AbstractLoss, Risk
from .._problem._problem import Problem
from .._problem._smoothness import kinks_of
from .._results._reason import REQUESTED, Reason
from .._results._trajectory import Trajectory, with_facts
from ._base import AbstractMethod
from ._defaults import EXACT_RTOL
from ._diffrax import make_facts
from ._exact import (
    MAX_ACTIVE,
    ExactCall,
    ExactOptions,
    cannot_observe,
    solve_exactly,
)
from ._float64 import solve_in_float64, why_not_in_float64
from ._projection_choice import ProjectionPlan
from ._task import Task


@final
class Filippov(AbstractMethod):
    """The exact flow of a network with kinks, as `solver` of `homoflow.flow`.

    For ReLU-like networks gradient flow is the differential inclusion ẇ ∈ −∂L(w) with
    Clarke's sub-differential [Du, Hu & Lee 2018, eq. 5]. This solver follows Filippov's
    solution of it [Filippov 1988]: between events the flow is analytic and is
    integrated by the classical Runge–Kutta method; where a pre-activation reaches 0 the
    pair (sample, unit) crosses its kink, or slides along it with a multiplier; it
    leaves when its slope reaches an end of its interval. Cost is set by the number of
    events, hardly by the tolerance.

    **Arguments:**

    - `max_active`: how many pairs may be at their kinks at one time. A run that needs more
        ends with a result that says so. Time and memory grow with its square. By
        default 32, or 64 from 2,000 pairs on; a run that needs more is done again with
        four times as many, up to 960 (by default in `flow`, up to 256: it averages where
        more are needed). Under jit and vmap, where that cannot be done, it is 64, or 120.
        Where more than 127 pairs are at their kinks LAPACK takes several threads, which
        on busy cores wait for each other for many times as long as they work: set
        `OPENBLAS_NUM_THREADS=1` there, before Python starts.
    - `atol`: how much the weights may err in a step, in the mean over all, beside `rtol`
        times their norm. Default: 0.
    - `events`: how many events to keep for `trajectory.events` (none: no list is made).
        Further ones are counted as dropped. `stats` say how many of each sort there are.

    It computes in float64: also the flow of float32 weights, which is then rounded, so
    that its error is float32's rounding. With JAX's float64 switched off that works
    outside of jit and vmap only. It needs a loss over samples (mean or sum), and a model
    whose kinks it finds, in any Equinox module, dense, convolutional, residual or with
    shared weights:

    - maximum and minimum of two values, or over axes (maxout), and max-pooling, with
        one kink less than there are values; but not over windows that have more than
        one value in common;
    - |z|, relu, leaky relu, relu6, clip, hard tanh, and other continuous
        piecewise-linear functions made by maximum, minimum or by `jnp.where(z > c,
        ...)`: a kink for each knot. `eqx.nn.PReLU`, its slopes fixed or trained;
    - elu with any α, selu. (elu with α = 1 and celu have no kink, only a second
        derivative that jumps.)

    Anything else that is not smooth is refused by name: jumps (sign, round, argmax, a
    discontinuous `where`: they have no such flow), sorting, kinks inside loops or inside
    branches that data choose, and functions with a derivative rule of their own. An error
    estimate is made where `estimate_error=True` asks for a second solve. Laws are not
    projected: they are as accurate as the flow, which keeps them by itself.

    Observables see −dw/dt in place of the gradient: the least element of the
    sub-differential, which `grad_norms` are the norms of.

    **Derivatives.** `jax.jvp` and `jax.jacfwd` work, with respect to weights (also ones
    that are not trained), data, arrays of the loss, `t1` and `ts`, of the final model
    and of everything recorded, under jit and vmap. They are those of the solution along
    the events that it meets, whose times move [saltation matrices: Kong et al. 2023].
    Where the solution itself has no derivative they are NaN: at a start on a kink that
    the direction leaves; where different pairs meet their kinks at one time and the
    direction parts them; where a direction separates kinks that coincide (one of two
    equal inputs moves). They grow without bound where the flow grazes a kink. `stats`
    have none; those of the times in `events` are NaN. Reverse mode (`jax.grad`) and
    second derivatives are refused.

    **Raises:** `ValueError` if `max_active` is not a positive integer, or
    `events` a negative number or not an integer; in reverse mode `NotImplementedError`.

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    flow = hf.flow(model, (x, x[:, :1]), 5.0, solver=hf.Filippov(max_active=32, events=500))
    print(flow.stats["crossings"], flow.stats["largest_sliding_set"])
    print(flow.events)
    ```
    """

    max_active: int | None = eqx.field(static=True, default=None)
    events: int = eqx.field(static=True, default=0)
    atol: float | int | Float[ArrayLike, ""] | None = None

    def __check_init__(self):
        if self.atol is not None:
            check_number("atol", self.atol)
        if self.max_active is not None:
            check_count("max_active", self.max_active)
        check_count("events", self.events, least=0)

    def run(self, task: Task, reason: Reason = REQUESTED) -> Trajectory:
        return self.run_in_room(task, reason, MAX_ACTIVE)

    def run_in_room(self, task: Task, reason: Reason, most_active: int) -> Trajectory:
        """The same, in room for at most so many pairs at their kinks at one time."""
        problem = task.given
        self._refuse_options(task)
        grid = task.grid
        assert grid is not None
        reason_against = obstacle(problem) or cannot_observe(task)
        if reason_against is not None:
            raise ValueError(
                f"`homoflow.Filippov` cannot follow this flow: {reason_against}."
            )
        check_tolerance("rtol", task.rtol, problem.dtype)
        check_tolerance("atol", self.atol, problem.dtype)

        def solve(problem: Problem, recorder: Recorder, grid: TimeGrid) -> Trajectory:
            rtol = EXACT_RTOL if task.rtol is None else task.rtol
            options = ExactOptions(
                self.max_active,
                self.events,
                task.save_models,
                as_meter(task.progress),
            )
            atol = 0 if self.atol is None else self.atol
            call = ExactCall(
                problem,
                task.dynamics,
                recorder,
                rtol=jnp.asarray(rtol, problem.dtype),
                atol=jnp.asarray(atol, problem.dtype),
                max_steps=jnp.asarray(task.max_steps),
                grid=grid,
            )
            return solve_exactly(call, options, task, most_active)

        plan = ProjectionPlan((), "the exact flow keeps its laws by itself")
        facts = make_facts(task, "Filippov", reason, kinks_of(problem), plan)
        if problem.dtype == jnp.float64:
            return with_facts(solve(problem, task.recorder, grid), facts)
        facts = (*facts, ("computed_in", "float64, and rounded at the end"))
        rounded = solve_in_float64(solve, problem, task.recorder, grid)
        return with_facts(rounded, facts)

    def _refuse_options(self, task: Task) -> None:
        if not follows(task):
            is_decaying = task.dynamics.is_gradient_flow
            what = "`weight_decay`" if is_decaying else f"the {task.dynamics.name}"
            raise ValueError(
                f"{what} is for Diffrax's solvers: `homoflow.Filippov` follows the "
                "gradient flow alone. `solver=homoflow.Averaged()` averages over kinks."
            )
        if task.project:
            raise ValueError(
                "`project=True` is not possible here: the exact flow "
                "(`homoflow.Filippov`) keeps its laws as accurately as it is solved, and "
                "is not projected. Leave `project` out, lower `rtol`, or take "
                "`solver=homoflow.Averaged()`."
            )


def follows(task: Task) -> bool:
    """Whether the exact flow knows the dynamics of a task."""
    dynamics = task.dynamics
    is_plain = dynamics.is_gradient_flow and dynamics.conserves_laws
    return is_plain or dynamics.descent(task.given) is not None


def obstacle(problem: Problem) -> str | None:
    """Why the exact flow of a problem cannot be had, or `None` if it can."""
    if problem.dtype not in (jnp.float32, jnp.float64):
        return (
            f"the weights are {problem.dtype}, and it takes float64, or float32 whose "
            "flow it follows in float64"
        )
    objective = problem.objective
    if not isinstance(objective, Risk):
        return (
            "it follows the kinks of every sample, which a custom `objective` does not "
            "show; give a `loss` over samples"
        )
    function = kinked_function(problem)
    named = (*function.unsupported, *_loss_kinks(problem, objective))
    if named:
        return (
            f"it has {', '.join(named)}, and the kinks that can be followed are those "
            "of maximum and minimum, |z|, continuous piecewise-linear activations and "
            "max-pooling without overlap, outside of loops. `homoflow.Averaged()` "
            "averages over kinks of any kind"
        )
    if function.count == 0:
        return "the model has no kinks; leave `solver` out"
    return why_not_in_float64(problem) if problem.dtype == jnp.float32 else None


def _loss_kinks(problem: Problem, objective: Risk) -> tuple[str, ...]:
    if isinstance(objective.loss, AbstractLoss):
        return ()  # Those have continuous gradients.
    x, y = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), problem.data
    )
    prediction = eqx.filter_eval_shape(problem.model, x)
    return nonsmooth_primitives(objective.loss, prediction, y)
