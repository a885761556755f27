"""Exponential Adams: multistep, of any order, exact in the stiff part of the flow."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from .._base import AbstractFlowSolver
from .._checks import require_single_dtype
from ._history import Attempt, History, StepEnd
from ._interpolation import ExponentialInterpolation
from ._jacobian_update import (
    MIN_STIFFNESS,
    NUM_PROBES,
    UpdateSource,
    default_rank,
    has_room,
    num_rows,
    remaining_stiffness,
    update_jacobian,
)
from ._low_rank import no_directions
from ._order_control import SAFETY, next_order_and_factor
from ._predictor import dense_info, predict, step_coefficients

#: Extrapolating through more values than this loses more to rounding than it gains.
MAX_ORDER = 12
#: It interpolates as accurately as it steps, and its steps have errors of a few times the
#: tolerance.
DEFAULT_RTOL = {"float64": 1e-11, "float32": 3e-6}


class ExponentialAdams(AbstractFlowSolver, dfx.AbstractAdaptiveSolver):
    """Exponential Adams, of variable order and step, for smooth flows, stiff ones above
    all.

    Splits the field into w' = J w + N(w) with a constant symmetric J of low rank, and
    solves it exactly for the polynomial through past values of N, by φ-functions of J
    [Nørsett 1969; Hochbruck & Ostermann 2010, §2.5]: where J is 0 these are the Adams
    methods. A step predicts with Adams–Bashforth, evaluates, corrects with Adams–Moulton
    and evaluates again; order (1 to 12) and step size are chosen by the differences of
    orders [Shampine & Gordon 1975], and the order comes down where J leaves much
    stiffness: high orders become unstable first. Adams methods alone become unstable at
    steps of about 1/sharpness. The two slopes of each step tell when that is near, and in
    what direction: then J is updated from them, by the symmetric secant update of Powell.
    So what is stiff moves into J, one direction at a time, at no cost in gradients. No
    Hessian is formed.
    Where the field has few residuals, J can come from them (`curvature`), all at once.
    Past values of N are kept as those of w and f, and computed anew when J changes: J has
    an effect on stability, none on the order.

    It takes 2 evaluations of the field a step, 1 a rejected step. Between steps it
    interpolates with its own polynomials: as accurate as the steps. Its estimate of the
    error is in units of the tolerance, so it is given the tolerances itself; in `flow`
    that is done by `rtol` and `atol`. In `diffrax.diffeqsolve` take
    `solver = hf.ExponentialAdams(rtol, atol)` and
    `stepsize_controller=solver.controller()`; no other controller knows what to make of
    its estimates. The field may depend on time; where its Jacobian is not symmetric J
    helps less.

    Under vmap the steps, orders and updates of each element are its own: on a CPU those
    whose J is updated are gone through one by one, on other devices all are computed.
    Derivatives in forward and reverse mode are those of the steps taken, at constant J.
    State: any PyTree of arrays of one floating-point dtype.

    **Arguments:**

    - `rtol`, `atol`: tolerances of the local error, element by element. Leave them out in
        `flow`.
    - `rank`: the most directions of J; 0 for Adams methods alone. Default: 64, less
        beyond 32,000 weights.
    - `max_order`: the highest order.
    - `curvature`: a function of t, state and `args` that returns the rows of a matrix G,
        a PyTree like the state with an axis in front, with −GᵀG near the field's Jacobian:
        Gauss–Newton's approximation, for a sum of squares. Taken where it has less than
        about 80 rows, each time that steps have doubled and are held up again; `flow`
        finds it by itself.

    **Raises:** `ValueError` where the state's dtype is not one floating-point dtype, or
    without tolerances.

    ```python
    model = hf.MLP((3, 8, 1), activation=jnp.tanh, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    flow = hf.flow(model, (x, x[:, :1]), t1=50.0, solver=hf.ExponentialAdams())
    ```
    """

    rtol: Any = None
    atol: Any = None
    rank: int | None = eqx.field(default=None, static=True)
    max_order: int = eqx.field(default=MAX_ORDER, static=True)
    curvature: Callable[[Any, PyTree, Any], PyTree] | None = eqx.field(
        default=None, static=True
    )

    scales_errors: ClassVar[bool] = True
    uses_memory: ClassVar[bool] = True
    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = ExponentialInterpolation

    def __check_init__(self):
        if self.rank is not None and self.rank < 0:
            raise ValueError(f"`rank` must be at least 0; got {self.rank}.")
        if not 1 <= self.max_order <= MAX_ORDER:
            raise ValueError(
                f"`max_order` must be between 1 and {MAX_ORDER}; got {self.max_order}."
            )

    def order(self, terms):
        return self.max_order

    @property
    def lands_on_times(self) -> bool:
        return False  # Its interpolation has the order of the steps.

    @property
    def runs_in_turn(self) -> bool:
        return True

    @property
    def has_tolerances(self):
        return self.rtol is not None or self.atol is not None

    def default_rtol(self, dtype_name):
        return DEFAULT_RTOL[dtype_name]

    def with_tolerances(self, rtol, atol):
        return dataclasses.replace(self, rtol=rtol, atol=atol)

    def with_curvature(self, curvature) -> "ExponentialAdams":
        """The same solver with a `curvature`, unless it has one."""
        if self.curvature is not None:
            return self
        return dataclasses.replace(self, curvature=curvature)

    def make_controller(self, rtol, atol, *, dtmin, force_dtmin):
        del rtol, atol
        return self.controller(dtmin=dtmin, force_dtmin=force_dtmin)

    def controller(self, *, dtmin=None, force_dtmin=False) -> dfx.PIDController:
        """The step size controller that reads its error estimates."""
        # The next step is this one times `safety` over the error: `step` makes it so.
        return dfx.PIDController(
            rtol=0.0,
            atol=1.0,
            error_order=1.0,
            safety=SAFETY,
            factormin=0.0,
            factormax=jnp.inf,
            dtmin=dtmin,
            force_dtmin=force_dtmin,
        )

    def cost(self, *, num_accepted, num_rejected, num_steps, solver_state, args):
        del num_steps, args
        # `BacksolveAdjoint` keeps no state.
        if solver_state is None:
            return {}
        gradients = 1 + 2 * num_accepted + num_rejected
        num_probings = solver_state.num_probings
        if self.curvature is None:
            return {"gradient_evaluations": gradients + NUM_PROBES * num_probings}
        return {
            "gradient_evaluations": gradients,
            "jacobian_evaluations": num_probings,
        }

    def num_remembered(self, size):
        return 2 * (self.max_order + 1) * size

    def can_project(self, solver_state, y0):
        return True

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args) -> History:
        require_single_dtype("ExponentialAdams", y0)
        if self.rtol is None or self.atol is None:
            raise ValueError(
                "ExponentialAdams weighs its errors itself: give it the tolerances, "
                "`ExponentialAdams(rtol, atol)`."
            )
        w = ravel_pytree(y0)[0]
        points, rows = self.max_order + 1, num_rows(self._rank(w.size))
        vectors = jnp.zeros((points, w.size), w.dtype)
        coordinates = jnp.zeros((points, rows), w.dtype)
        return History(
            states=vectors.at[0].set(w),
            slopes=vectors.at[0].set(_field(terms, args, y0)(t0, w)),
            step_sizes=jnp.ones(self.max_order, w.dtype),
            state_coordinates=coordinates,
            slope_coordinates=coordinates,
            num_known=jnp.asarray(1),
            order=jnp.asarray(1),
            jacobian=no_directions(rows, w.size, w.dtype),
            update_streak=jnp.asarray(0),
            probe_step_size=jnp.zeros((), w.dtype),
            num_probings=jnp.asarray(0),
        )

    def step(self, terms, t0, t1, y0, args, solver_state: History, made_jump):
        return self._step(terms, t0, t1, y0, args, solver_state, made_jump)[:-1]

    def step_with_projection(
        self, project, terms, t0, t1, y0, args, solver_state: History, made_jump
    ):
        y1, error, dense, state, result, rescaling = self._step(
            terms, t0, t1, y0, args, solver_state, made_jump, project
        )
        assert rescaling is not None
        return y1, error, dense, state, result, rescaling

    def _step(
        self, terms, t0, t1, y0, args, solver_state: History, made_jump, project=None
    ):
        """The parts of a step, and the rescaling that moved its end, if any."""
        field = _field(terms, args, y0)
        w, unravel = ravel_pytree(y0)
        before = _restart_after_jump(solver_state, made_jump, lambda: field(t0, w))
        h = jnp.asarray(t1 - t0).astype(w.dtype)
        # Of a batch, what is at its end still makes steps, of length 0, that do not count:
        # nothing is to be learned from them, and their derivatives, times 0, must not be
        # infinite.
        is_over = h == 0
        coefficients = step_coefficients(
            before, jnp.where(is_over, before.step_sizes[0], h)
        )
        predicted, prediction = predict(before, coefficients, w)
        slope = field(t1, predicted)
        attempt = self._correct(before, coefficients, w, predicted, slope, prediction)
        corrected = predicted + attempt.correction
        is_accepted = (attempt.errors[1] <= 1) & ~is_over
        # What is rejected is not evaluated again, unless others of a batch are accepted.
        final_slope = lax.cond(
            eqxi.unvmap_any(is_accepted), lambda: field(t1, corrected), lambda: slope
        )
        end = StepEnd(corrected, final_slope)
        after = before.advance(coefficients.h, attempt, end)
        stiffness = remaining_stiffness(before, after, end, attempt)
        order, factor = next_order_and_factor(
            before.num_known, before.order, attempt.errors, stiffness, self.max_order
        )
        after = after._replace(order=order)
        should_update = is_accepted & (stiffness > MIN_STIFFNESS)
        rank = self._rank(w.size)
        curvature = self._curvature(rank, t1, y0, args)
        source = UpdateSource(rank, lambda w: field(t1, w), curvature)
        after = update_jacobian(before, after, end, attempt, should_update, source)
        y1, error = unravel(corrected), jnp.broadcast_to(SAFETY / factor, w.shape)
        rescaling = None if project is None else project(y1)
        after = _with_end(after, end, rescaling, unravel)
        y1 = y1 if rescaling is None else rescaling.projected
        dense = dense_info(before, coefficients, attempt, unravel)
        return y1, unravel(error), dense, after, dfx.RESULTS.successful, rescaling

    def _rank(self, size: int) -> int:
        return min(default_rank(size) if self.rank is None else self.rank, size)

    def _curvature(self, rank: int, t, y0, args):
        """Of a flat state, as a matrix; `None` if J has no room for it."""
        if self.curvature is None or rank == 0:
            return None
        unravel = ravel_pytree(y0)[1]

        def rows(w: Array) -> Array:
            assert self.curvature is not None
            tree = self.curvature(t, unravel(w), args)
            return jax.vmap(lambda row: ravel_pytree(row)[0])(tree)

        count, size = jax.eval_shape(rows, ravel_pytree(y0)[0]).shape
        return rows if has_room(rank, count, size) else None

    def _correct(
        self, before: History, coefficients, w, predicted, slope, prediction
    ) -> Attempt:
        """By the formula of one order more than the predictor's."""
        assert self.rtol is not None
        assert self.atol is not None
        order, j, h = before.order, before.jacobian, coefficients.h
        # Residuals of extrapolations through so many values, and what multiplies them:
        # in the correction, and in the errors at three orders.
        num_values = order + jnp.asarray([0, -1, 0, 1], order.dtype)
        num_values = jnp.clip(num_values, 1, before.slopes.shape[0])
        extrapolation = coefficients.form.extrapolation[num_values - 1]
        phi = coefficients.phi[num_values]
        is_correction = jnp.arange(4)[:, None] == 0
        phi = h * jnp.where(is_correction, phi, phi - coefficients.phi[num_values - 1])
        phi_stiff, phi_nonstiff = phi[:, :-1], phi[:, -1:]
        slope_coordinates = j.coordinates(slope[None])[0]
        residual = slope_coordinates - j.rates * prediction
        residual = residual - extrapolation @ coefficients.nonlinear_coordinates
        nonstiff = slope_coordinates - extrapolation @ before.slope_coordinates
        combined = phi_nonstiff * (slope - extrapolation @ before.slopes) + j.combine(
            phi_stiff * residual - phi_nonstiff * nonstiff
        )
        correction, differences = combined[0], combined[1:]
        size = jnp.maximum(jnp.abs(w), jnp.abs(predicted + correction))
        scaled = differences / (self.atol + self.rtol * size)
        errors = jnp.sqrt(jnp.mean(scaled**2, axis=1))
        can_rise = order < jnp.minimum(before.num_known, self.max_order)
        is_possible = jnp.stack([order > 1, order > 0, can_rise])
        errors = jnp.where(is_possible & ~jnp.isnan(errors), errors, jnp.inf)
        return Attempt(
            correction=correction,
            errors=lax.stop_gradient(errors),
            slope=slope,
            slope_coordinates=slope_coordinates,
            prediction_coordinates=prediction,
            correction_coordinates=phi_stiff[0] * residual[0],
        )


def _field(terms, args, y0) -> Callable[[Any, Array], Array]:
    """The right-hand side on a flat state, in the direction of integration."""
    unravel = ravel_pytree(y0)[1]

    def field(t, w):
        unit = terms.contr(t, t + 1)
        slope = terms.vf_prod(t, unravel(w), args, unit)
        return ravel_pytree(slope)[0].astype(w.dtype)

    return field


def _restart_after_jump(
    history: History, made_jump, slope: Callable[[], Array]
) -> History:
    """After a jump of the field nothing of the past counts, but J."""
    if made_jump is False:
        return history
    old = history.slopes[0]
    new = lax.cond(eqxi.unvmap_any(made_jump), slope, lambda: old)
    slopes = history.slopes.at[0].set(jnp.where(made_jump, new, old))
    one = jnp.ones_like(history.num_known)
    return history._replace(
        slopes=slopes,
        slope_coordinates=history.jacobian.coordinates(slopes),
        num_known=jnp.where(made_jump, one, history.num_known),
        order=jnp.where(made_jump, one, history.order),
    )


def _with_end(after: History, end: StepEnd, rescaling, unravel) -> History:
    """The history with the step's end in it; all of it rescaled if weights are."""
    if rescaling is None:
        states, slopes = after.states_and_slopes(end)
        return after._replace(states=states, slopes=slopes)

    def rescale_rows(rescale: Callable[[PyTree], PyTree], rows: Array) -> Array:
        return jax.vmap(lambda row: ravel_pytree(rescale(unravel(row)))[0])(rows)

    def rescale_history():
        states, slopes = after.states_and_slopes(end)
        states = rescale_rows(rescaling.apply_to_weights, states)
        slopes = rescale_rows(rescaling.apply_to_gradient, slopes)
        j = after.jacobian
        return states, slopes, j.coordinates(states), j.coordinates(slopes)

    def leave_history():
        coordinates = after.state_coordinates, after.slope_coordinates
        return *after.states_and_slopes(end), *coordinates

    # A long history is a lot to go through: where nothing is rescaled it is copied once.
    states, slopes, state_coordinates, slope_coordinates = lax.cond(
        eqxi.unvmap_all(rescaling.is_identity), leave_history, rescale_history
    )
    return after._replace(
        states=states,
        slopes=slopes,
        state_coordinates=state_coordinates,
        slope_coordinates=slope_coordinates,
    )
