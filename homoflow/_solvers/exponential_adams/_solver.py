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
from jaxtyping import Array, Bool, PyTree

from .._base import AbstractFlowSolver
from .._checks import refuse_unless_one_dtype
from ._divided_differences import newton_form
from ._history import End, Now, Past, Trial
from ._interpolation import ExponentialInterpolation
from ._jacobian_update import (
    QUESTIONS,
    STIFFNESS,
    has_room,
    most_directions,
    rows_for,
    stiffness_left,
    taught,
)
from ._low_rank import no_directions
from ._order_control import SAFETY, next_order_and_factor
from ._phi_functions import moments

#: Extrapolating through more values than this loses more to rounding than it gains.
HIGHEST_ORDER = 12
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
    what direction: then J learns from them, by the symmetric secant update of Powell. So
    what is stiff moves into J, one direction at a time, at no cost in gradients. No Hessian
    is formed.
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

    Under vmap the steps, orders and lessons of each element are its own: on a CPU those
    that learn are gone through one by one, on other devices all are computed. Derivatives
    in forward and reverse mode are those of the steps taken, at constant J. State: any
    PyTree of arrays of one floating-point dtype.

    **Arguments:**

    - `rtol`, `atol`: tolerances of the local error, element by element. Leave them out in
        `flow`.
    - `rank`: the most directions of J; 0 for Adams methods alone. Default: 64, less
        beyond 32,000 weights.
    - `most_order`: the highest order.
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
    most_order: int = eqx.field(default=HIGHEST_ORDER, static=True)
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
        if not 1 <= self.most_order <= HIGHEST_ORDER:
            raise ValueError(
                f"`most_order` must be between 1 and {HIGHEST_ORDER}; got "
                f"{self.most_order}."
            )

    def order(self, terms):
        return self.most_order

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
            rtol=0.0, atol=1.0, error_order=1.0, safety=SAFETY,
            factormin=0.0, factormax=jnp.inf, dtmin=dtmin, force_dtmin=force_dtmin,
        )  # fmt: skip

    def cost(self, *, num_accepted, num_rejected, num_steps, solver_state, args):
        del num_steps, args
        # `BacksolveAdjoint` keeps no state.
        if solver_state is None:
            return {}
        gradients = 1 + 2 * num_accepted + num_rejected
        num_asked = solver_state.asked
        if self.curvature is None:
            return {"gradient_evaluations": gradients + QUESTIONS * num_asked}
        return {"gradient_evaluations": gradients, "jacobian_evaluations": num_asked}

    def num_remembered(self, size):
        return 2 * (self.most_order + 1) * size

    def can_project(self, solver_state, y0):
        return True

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args) -> Past:
        refuse_unless_one_dtype("ExponentialAdams", y0)
        if self.rtol is None or self.atol is None:
            raise ValueError(
                "ExponentialAdams weighs its errors itself: give it the tolerances, "
                "`ExponentialAdams(rtol, atol)`."
            )
        w = ravel_pytree(y0)[0]
        points, rows = self.most_order + 1, rows_for(self._rank(w.size))
        empty = jnp.zeros((points, w.size), w.dtype)
        inner = jnp.zeros((points, rows), w.dtype)
        return Past(
            empty.at[0].set(w),
            empty.at[0].set(_field(terms, args, y0)(t0, w)),
            jnp.ones(self.most_order, w.dtype),
            inner,
            inner,
            jnp.asarray(1),
            jnp.asarray(1),
            no_directions(rows, w.size, w.dtype),
            jnp.asarray(0),
            jnp.zeros((), w.dtype),
            jnp.asarray(0),
        )

    def step(self, terms, t0, t1, y0, args, solver_state: Past, made_jump):
        return self._step(terms, t0, t1, y0, args, solver_state, made_jump)[:-1]

    def step_with_projection(
        self, project, terms, t0, t1, y0, args, solver_state: Past, made_jump
    ):
        y1, error, dense, state, result, rescaling = self._step(
            terms, t0, t1, y0, args, solver_state, made_jump, project
        )
        assert rescaling is not None
        return y1, error, dense, state, result, rescaling

    def _step(
        self, terms, t0, t1, y0, args, solver_state: Past, made_jump, project=None
    ):
        """The parts of a step, and the rescaling that moved its end, if any."""
        field = _field(terms, args, y0)
        w, unravel = ravel_pytree(y0)
        past = _unless_jumped(solver_state, made_jump, lambda: field(t0, w))
        h = jnp.asarray(t1 - t0).astype(w.dtype)
        # Of a batch, what is at its end still makes steps, of length 0, that do not count:
        # nothing is to be learned from them, and their derivatives, times 0, must not be
        # infinite.
        is_over = h == 0
        now = _prepared(past, jnp.where(is_over, past.steps[0], h))
        predicted, moved_inner = _predicted(past, now, w)
        slope = field(t1, predicted)
        trial = self._corrected(past, now, w, predicted, slope, moved_inner)
        corrected = predicted + trial.correction
        accepted = (trial.errors[1] <= 1) & ~is_over
        # What is rejected is not evaluated again, unless others of a batch are accepted.
        final_slope = lax.cond(
            eqxi.unvmap_any(accepted), lambda: field(t1, corrected), lambda: slope
        )
        end = End(corrected, final_slope)
        after = past.after(now.h, trial, end)
        stiffness = stiffness_left(past, after, end, trial)
        order, factor = next_order_and_factor(
            past.known, past.order, trial.errors, stiffness, self.most_order
        )
        after = after._replace(order=order)
        learns = accepted & (stiffness > STIFFNESS)
        rank = self._rank(w.size)
        curvature = self._curvature(rank, t1, y0, args)
        after = taught(
            past, after, end, trial, learns, rank, lambda w: field(t1, w), curvature
        )
        y1, error = unravel(corrected), jnp.broadcast_to(SAFETY / factor, w.shape)
        rescaling = None if project is None else project(y1)
        after = _remembered(after, end, rescaling, unravel)
        y1 = y1 if rescaling is None else rescaling.restored
        dense = _dense(past, now, trial, unravel)
        return y1, unravel(error), dense, after, dfx.RESULTS.successful, rescaling

    def _rank(self, size: int) -> int:
        return min(most_directions(size) if self.rank is None else self.rank, size)

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

    def _corrected(self, past, now, w, predicted, slope, moved_inner) -> Trial:
        """By the formula of one order more than the predictor's."""
        assert self.rtol is not None
        assert self.atol is not None
        order, j, h = past.order, past.j, now.h
        # Residuals of extrapolations through so many values, and what multiplies them:
        # in the correction, and in the errors at three orders.
        values = order + jnp.asarray([0, -1, 0, 1], order.dtype)
        values = jnp.clip(values, 1, past.slopes.shape[0])
        through = now.form.extrapolation[values - 1]
        gamma = now.gamma[values]
        gamma = h * jnp.where(_first(4), gamma, gamma - now.gamma[values - 1])
        gamma_inner, gamma_rest = gamma[:, :-1], gamma[:, -1:]
        slope_inner = j.coordinates(slope[None])[0]
        residual_inner = slope_inner - j.rates * moved_inner - through @ now.inner
        plain = slope_inner - through @ past.inner_slopes
        combined = gamma_rest * (slope - through @ past.slopes) + j.combined(
            gamma_inner * residual_inner - gamma_rest * plain
        )
        correction, differences = combined[0], combined[1:]
        size = jnp.maximum(jnp.abs(w), jnp.abs(predicted + correction))
        scaled = differences / (self.atol + self.rtol * size)
        errors = jnp.sqrt(jnp.mean(scaled**2, axis=1))
        is_possible = jnp.stack(
            [order > 1, order > 0, order < jnp.minimum(past.known, self.most_order)]
        )
        errors = jnp.where(is_possible & ~jnp.isnan(errors), errors, jnp.inf)
        return Trial(
            correction,
            lax.stop_gradient(errors),
            slope,
            slope_inner,
            moved_inner,
            gamma_inner[0] * residual_inner[0],
        )


def _field(terms, args, y0) -> Callable[[Any, Array], Array]:
    """The right-hand side on a flat state, in the direction of integration."""
    unravel = ravel_pytree(y0)[1]

    def field(t, w):
        unit = terms.contr(t, t + 1)
        slope = terms.vf_prod(t, unravel(w), args, unit)
        return ravel_pytree(slope)[0].astype(w.dtype)

    return field


def _unless_jumped(past: Past, made_jump, slope: Callable[[], Array]) -> Past:
    """Nothing of the past counts after a jump of the field, but J."""
    if made_jump is False:
        return past
    new = lax.cond(eqxi.unvmap_any(made_jump), slope, lambda: past.slopes[0])
    slopes = past.slopes.at[0].set(jnp.where(made_jump, new, past.slopes[0]))
    one = jnp.ones_like(past.known)
    return past._replace(
        slopes=slopes,
        inner_slopes=past.j.coordinates(slopes),
        known=jnp.where(made_jump, one, past.known),
        order=jnp.where(made_jump, one, past.order),
    )


def _remembered(after: Past, end: End, rescaling, unravel) -> Past:
    """What is known after a step, with its end; of rescaled weights if they are."""
    if rescaling is None:
        states, slopes = after.seen(end)
        return after._replace(states=states, slopes=slopes)

    def moved(by: Callable[[PyTree], PyTree], rows: Array) -> Array:
        return jax.vmap(lambda row: ravel_pytree(by(unravel(row)))[0])(rows)

    def rescaled():
        states, slopes = after.seen(end)
        states, slopes = (
            moved(rescaling.weights, states),
            moved(rescaling.slopes, slopes),
        )
        return states, slopes, after.j.coordinates(states), after.j.coordinates(slopes)

    # A long memory is a lot to go through: where nothing is rescaled it is moved on, once.
    states, slopes, inner_states, inner_slopes = lax.cond(
        eqxi.unvmap_all(rescaling.is_one),
        lambda: (*after.seen(end), after.inner_states, after.inner_slopes),
        rescaled,
    )
    return after._replace(
        states=states,
        slopes=slopes,
        inner_states=inner_states,
        inner_slopes=inner_slopes,
    )


def _prepared(past: Past, h: Array) -> Now:
    points, j = past.slopes.shape[0], past.j
    number = jnp.arange(points - 1)
    steps = jnp.where(number < past.known - 1, past.steps / h, 1)
    form = newton_form(jnp.append(jnp.zeros(1, h.dtype), -jnp.cumsum(steps)))
    rates = jnp.append(h * j.rates, jnp.zeros(1, h.dtype))
    is_used = jnp.arange(points)[:, None] < past.order
    return Now(
        h,
        form,
        form.powers @ moments(rates, points + 1),
        past.inner_slopes - j.rates * (past.inner_states - past.inner_states[0]),
        jnp.where(is_used, form.differences, 0),
    )


def _predicted(past: Past, now: Now, w: Array) -> tuple[Array, Array]:
    """The state at the step's end, and how far it has moved in J's directions."""
    weights = now.h * now.used.T @ now.gamma[:-1]
    inner, rest = weights[:, :-1], weights[:, -1]
    moved_inner = jnp.sum(inner * now.inner, axis=0)
    along = moved_inner - rest @ past.inner_slopes
    return w + rest @ past.slopes + past.j.combined(along[None])[0], moved_inner


def _dense(past: Past, now: Now, trial: Trial, unravel) -> dict[str, PyTree]:
    """What `ExponentialInterpolation` needs of a step."""
    points, order = past.slopes.shape[0], past.order
    # Weights of past values and of the one at the predicted end, in Newton's basis.
    residual = jnp.append(-now.form.extrapolation[order - 1], jnp.ones_like(now.h))
    is_last = (jnp.arange(points + 1) == order).astype(residual.dtype)
    weights = jnp.pad(now.used.T, ((0, 1), (0, 1))) + residual[:, None] * is_last
    last_inner = trial.slope_inner - past.j.rates * trial.moved_inner
    return {
        "y0": unravel(past.states[0]),
        "slopes": past.slopes,
        "last_slope": trial.slope,
        "basis": past.j.basis,
        "vectors": past.j.vectors,
        "rates": past.j.rates,
        "inner": jnp.append(now.inner, last_inner[None], axis=0),
        "plain": jnp.append(past.inner_slopes, trial.slope_inner[None], axis=0),
        "powers": weights @ now.form.powers,
    }


def _first(count: int) -> Bool[Array, "{count} 1"]:
    return jnp.arange(count)[:, None] == 0
