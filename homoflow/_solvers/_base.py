"""What a flow asks of its solver, beside what Diffrax asks."""

from collections.abc import Callable
from typing import Any, ClassVar, final

import diffrax as dfx
import equinox as eqx
import jax
from jaxtyping import Array, Float, Int, PyTree

from .._problem._problem import Problem
from .._rescaling import Rescaling

Project = Callable[[PyTree], Rescaling]


class AbstractFlowSolver(eqx.Module):
    """What `flow` asks of a solver, beside what Diffrax asks: a mix-in for solvers.

    Every question has an answer that fits a one-step method. A solver overrides those for
    which it knows a better one, such as `cost`:

    ```python
    class Counted(hf.AbstractFlowSolver, diffrax.Midpoint):
        def cost(self, *, num_steps, **_):
            return {"gradient_evaluations": 2 * num_steps}
    ```

    - `scales_errors`: whether the error estimate is in units of the tolerance, because
        the solver needs the tolerances itself. A multistep method chooses its order by
        them.
    - `uses_memory`: whether `cost` reads the solver's state at the end of the solve.
    - `num_coarse_solves`: how many coarser solves an error estimate compares with.
    """

    scales_errors: ClassVar[bool] = False
    uses_memory: ClassVar[bool] = False
    num_coarse_solves: ClassVar[int] = 1

    @property
    def stepper(self) -> dfx.AbstractSolver:
        """The Diffrax solver that makes the steps."""
        assert isinstance(self, dfx.AbstractSolver)
        return self

    @property
    def is_explicit(self) -> bool:
        """Whether stability bounds its steps, so that a stiff flow stalls it."""
        return issubclass(type(self.stepper), dfx.AbstractERK)

    @property
    def lands_on_times(self) -> bool:
        """Whether steps end on the times that are recorded.

        Where what is interpolated between steps is of much lower order than the steps, as
        with Dopri8, or with cubic interpolation and an order above 3, it is not as
        accurate as the tolerance says.
        """
        order = self.stepper.order(None)  # pyright: ignore[reportArgumentType]
        interpolation = getattr(self.stepper, "interpolation_cls", None)
        interpolation = getattr(interpolation, "__self__", interpolation)
        is_cubic = interpolation is dfx.ThirdOrderHermitePolynomialInterpolation
        return order is not None and (order > 5 or (is_cubic and order > 3))

    @property
    def runs_in_turn(self) -> bool:
        """Whether a CPU makes the runs of a batch one after the other.

        For steps with loops or branches, such as Newton's iteration: under `vmap` each run
        would take all the branches, and wait for the slowest.
        """
        return isinstance(self.stepper, dfx.AbstractImplicitSolver)

    @property
    def has_tolerances(self) -> bool:
        """Whether tolerances were given to the solver itself."""
        return False

    def default_rtol(self, dtype_name: str) -> float | None:
        """The tolerance for smooth problems if none is given; `None` for `flow`'s own."""
        del dtype_name
        return None

    def with_tolerances(
        self, rtol: Float[Array, ""], atol: Float[Array, ""]
    ) -> dfx.AbstractSolver:
        """The solver that steps at these tolerances."""
        del rtol, atol
        return self.stepper

    def make_controller(
        self,
        rtol: Float[Array, ""],
        atol: Float[Array, ""],
        *,
        dtmin: Float[Array, ""] | None,
        force_dtmin: bool,
    ) -> dfx.AbstractStepSizeController:
        """The step size controller that reads the solver's error estimates."""
        return dfx.PIDController(
            rtol=rtol, atol=atol, dtmin=dtmin, force_dtmin=force_dtmin
        )

    def with_curvature(
        self, curvature: Callable[[Any, PyTree, Any], PyTree]
    ) -> dfx.AbstractSolver:
        """The solver that may use the rows of a G with −GᵀG near the field's Jacobian."""
        del curvature
        return self.stepper

    def problem_args(self, problem: Problem) -> PyTree:
        """What the solver needs of the problem: it finds this in `args[1]` of a step."""
        del problem

    def cost(
        self,
        *,
        num_accepted: Int[Array, ""],
        num_rejected: Int[Array, ""],
        num_steps: Int[Array, ""],
        solver_state: PyTree,
        args: PyTree,
    ) -> dict[str, Array]:
        """What a solve has cost: `gradient_evaluations`, `jacobian_evaluations`.

        A figure that is not known is left out. `solver_state` is that at the end if the
        solver `uses_memory` and the adjoint keeps it, else `None`.
        """
        del num_accepted, num_rejected, solver_state, args
        evaluations = _evaluations(self.stepper, num_steps)
        return {} if evaluations is None else {"gradient_evaluations": evaluations}

    def num_remembered(self, size: int) -> int:
        """How many numbers of past steps a projection of `size` weights must move along.

        A single slope does not count.
        """
        del size
        return 0

    def can_project(self, solver_state: PyTree, y0: PyTree) -> bool:
        """Whether `step_with_projection` knows what to do with the solver's state."""
        return solver_state is None or _is_last_slope(self.stepper, solver_state, y0)

    def step_with_projection(
        self,
        project: Project,
        terms: PyTree[dfx.AbstractTerm],
        t0: Any,
        t1: Any,
        y0: PyTree,
        args: PyTree,
        solver_state: PyTree,
        made_jump: Any,
    ) -> tuple[PyTree, PyTree, dict[str, PyTree], PyTree, dfx.RESULTS, Rescaling]:
        """A step whose end is moved by the rescaling `project(y1)`, and that rescaling.

        The slope that a first-same-as-last method keeps goes along by g⁻ᵀ, at no
        evaluation.
        """
        y1, error, dense, solver_state, result = self.stepper.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        rescaling = project(y1)
        if solver_state is not None:
            is_first, slope = solver_state
            solver_state = is_first, rescaling.apply_to_gradient(slope)
        return rescaling.projected, error, dense, solver_state, result, rescaling


@final
class _DiffraxSolver(AbstractFlowSolver):
    """The answers for a solver of Diffrax, or a user's that answers nothing itself."""

    solver: dfx.AbstractSolver

    @property
    def stepper(self) -> dfx.AbstractSolver:
        return self.solver


def as_flow_solver(solver: dfx.AbstractSolver) -> AbstractFlowSolver:
    """The solver itself if it answers what `flow` asks, else the usual answers for it."""
    return solver if isinstance(solver, AbstractFlowSolver) else _DiffraxSolver(solver)


#: Solvers without a tableau that evaluate the field once in a step.
_ONE_EVALUATION = frozenset({dfx.Euler})


def _evaluations(
    solver: dfx.AbstractSolver, num_steps: Int[Array, ""]
) -> Int[Array, ""] | None:
    """How often an explicit one-step solver evaluated the field; `None` for others.

    A first-same-as-last solver evaluates once more each time its very first step is
    rejected, which Diffrax does not report.
    """
    # By exact type: Diffrax's wrappers of solvers evaluate more often.
    if type(solver) in _ONE_EVALUATION:
        return num_steps
    if not issubclass(type(solver), dfx.AbstractERK):
        return None
    tableau = solver.tableau  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(tableau, dfx.MultiButcherTableau):
        return None
    per_step = tableau.num_stages - int(tableau.fsal)
    return per_step * num_steps + int(tableau.fsal)


def _is_last_slope(
    solver: dfx.AbstractSolver, solver_state: PyTree, y0: PyTree
) -> bool:
    """Whether a solver's state is no more than a Runge–Kutta method's last slope."""
    if not isinstance(solver, dfx.AbstractRungeKutta):
        return False
    _, slope = solver_state
    return jax.tree.structure(slope) == jax.tree.structure(y0)
