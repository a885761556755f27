"""Exponential Adams: multistep, of any order, exact in the stiff part of the flow."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._adams_control import SAFETY, next_order_and_factor
from ._dense_output import ExponentialInterpolation
from ._low_rank import LowRank, learned, new_direction, no_directions
from ._moments import moments
from ._newton_form import NewtonForm, newton_form
from ._one_dtype import refuse_unless_one_dtype
from ._tolerances import AbstractTolerantSolver

#: Extrapolating through more values than this loses more to rounding than it gains.
HIGHEST_ORDER = 12
#: The most directions of J by default, and the most numbers that they take up together
#: (but for the first few): products with them should cost less than a gradient.
MOST_DIRECTIONS, FEW_DIRECTIONS, MOST_NUMBERS = 64, 8, 2**21
#: J learns where what it leaves changes by more than this during a step, h·‖ΔN‖/‖Δw‖:
#: Adams methods become unstable between 2 (order 1) and 0.2 (order 12).
STIFFNESS = 0.25
#: Rates below this per step are not worth a direction.
LEAST_RATE = 0.1
#: Where J has learned in so many steps on end, and steps have grown by so much since the
#: last time, many directions are stiff: then so many more are asked for at once.
STREAK, GROWN, QUESTIONS = 8, 2.0, 16
#: A difference of slopes below this many units of rounding says nothing about J.
NOISE = 10.0


class Past(NamedTuple):
    """What is kept from step to step, newest first.

    - `states`, `slopes`: w and f at the last `known` steps; zeros beyond.
    - `steps`: the lengths between them.
    - `inner_states`, `inner_slopes`: their coordinates in J's directions (of the states,
        up to a shift that all have in common).
    - `order`: that of the next step.
    - `streak`: in how many steps on end J has learned.
    - `asked_at`: the step size at which J asked last; `asked`: evaluations for that.
    """

    states: Float[Array, "points size"]
    slopes: Float[Array, "points size"]
    steps: Float[Array, " orders"]
    inner_states: Float[Array, "points room"]
    inner_slopes: Float[Array, "points room"]
    known: Int[Array, ""]
    order: Int[Array, ""]
    j: LowRank
    streak: Int[Array, ""]
    asked_at: Float[Array, ""]
    asked: Int[Array, ""]


class _Now(NamedTuple):
    """What a step is made of.

    - `gamma`: ∫₀¹ e^{(1−s)h·rate} p_j(s) ds for each rate of J and, last, for 0.
    - `inner`: N at past steps in J's directions, with N = f there for the latest.
    - `used`: the differences of values that the predictor takes.
    """

    h: Float[Array, ""]
    form: NewtonForm
    gamma: Float[Array, "degrees room+1"]
    inner: Float[Array, "points room"]
    used: Float[Array, "points points"]


class _Trial(NamedTuple):
    """The corrected end of a step.

    - `errors`: at the orders below, at and above the step's, in units of the tolerance.
    - `moved_inner`, `correction_inner`: prediction and correction in J's directions.
    """

    correction: Float[Array, " size"]
    errors: Float[Array, "3"]
    slope: Float[Array, " size"]
    slope_inner: Float[Array, " room"]
    moved_inner: Float[Array, " room"]
    correction_inner: Float[Array, " room"]


class ExponentialAdams(AbstractTolerantSolver):
    """Exponential Adams, of variable order and step, for smooth flows, stiff ones above
    all.

    Splits the field into w' = J w + N(w) with a constant symmetric J of low rank, and
    solves it exactly for the polynomial through past values of N, by φ-functions of J
    [Nørsett 1969; Hochbruck & Ostermann 2010, §2.5]: where J is 0 these are the Adams
    methods. A step predicts with Adams–Bashforth, evaluates, corrects with Adams–Moulton
    and evaluates again; order (1 to 12) and step size are chosen by the differences of
    orders [Shampine & Gordon 1975]. Adams methods alone become unstable at steps of about
    1/sharpness. The two slopes of each step tell when that is near, and in what direction:
    then J learns from them, by the symmetric secant update of Powell. So what is stiff
    moves into J, one direction at a time, at no cost in gradients. No Hessian is formed.
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

    Under vmap the steps and orders of each element are its own, and J of all of them is
    updated when any needs it. Derivatives in forward and reverse mode are those of the
    steps taken, at constant J. State: any PyTree of arrays of one floating-point dtype.

    **Arguments:**

    - `rtol`, `atol`: tolerances of the local error, element by element. Leave them out in
        `flow`.
    - `rank`: the most directions of J; 0 for Adams methods alone. Default: 64, less
        beyond 32,000 weights.
    - `most_order`: the highest order.

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

    def at(self, rtol, atol):
        return ExponentialAdams(rtol, atol, self.rank, self.most_order)

    def controller(self, *, dtmin=None, force_dtmin=False):
        # The next step is this one times `safety` over the error: `step` makes it so.
        return dfx.PIDController(
            rtol=0.0, atol=1.0, error_order=1.0, safety=SAFETY,
            factormin=0.0, factormax=jnp.inf, dtmin=dtmin, force_dtmin=force_dtmin,
        )  # fmt: skip

    def evaluations(
        self, accepted: Int[Array, ""], rejected: Int[Array, ""], last: Past
    ) -> Int[Array, ""]:
        """How often the field was evaluated in so many steps, with `last` after them."""
        return 1 + 2 * accepted + rejected + last.asked

    def transported(self, memory: Past, y, weights, slopes) -> Past:
        """What is remembered, after a rescaling of the state `y` as `OnOrbit` does it."""
        unravel = ravel_pytree(y)[1]

        def moved(by: Callable[[PyTree], PyTree], rows: Array) -> Array:
            return jax.vmap(lambda row: ravel_pytree(by(unravel(row)))[0])(rows)

        states, past_slopes = (
            moved(weights, memory.states),
            moved(slopes, memory.slopes),
        )
        return memory._replace(
            states=states,
            slopes=past_slopes,
            inner_states=memory.j.coordinates(states),
            inner_slopes=memory.j.coordinates(past_slopes),
        )

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
        points, room = self.most_order + 1, self._room(w.size)
        empty = jnp.zeros((points, w.size), w.dtype)
        inner = jnp.zeros((points, room), w.dtype)
        return Past(
            empty.at[0].set(w),
            empty.at[0].set(_field(terms, args, y0)(t0, w)),
            jnp.ones(self.most_order, w.dtype),
            inner,
            inner,
            jnp.asarray(1),
            jnp.asarray(1),
            no_directions(room, w.size, w.dtype),
            jnp.asarray(0),
            jnp.zeros((), w.dtype),
            jnp.asarray(0),
        )

    def step(self, terms, t0, t1, y0, args, solver_state: Past, made_jump):
        field = _field(terms, args, y0)
        w, unravel = ravel_pytree(y0)
        past = _unless_jumped(solver_state, made_jump, lambda: field(t0, w))
        now = _prepared(past, jnp.asarray(t1 - t0).astype(w.dtype))
        predicted, moved_inner = _predicted(past, now, w)
        slope = field(t1, predicted)
        trial = self._corrected(past, now, w, predicted, slope, moved_inner)
        corrected = predicted + trial.correction
        accepted = trial.errors[1] <= 1
        order, factor = next_order_and_factor(
            past.known, past.order, trial.errors, self.most_order
        )
        # What is rejected is not evaluated again, unless others of a batch are accepted.
        final_slope = lax.cond(
            eqxi.unvmap_any(accepted), lambda: field(t1, corrected), lambda: slope
        )
        after = _after(
            past,
            now,
            trial,
            corrected,
            final_slope,
            accepted,
            order,
            lambda w: field(t1, w),
        )
        error = jnp.broadcast_to(SAFETY / factor, w.shape)
        dense = _dense(past, now, trial, unravel)
        return unravel(corrected), unravel(error), dense, after, dfx.RESULTS.successful

    def _room(self, size: int) -> int:
        most = max(FEW_DIRECTIONS, MOST_NUMBERS // size)
        rank = min(most, MOST_DIRECTIONS) if self.rank is None else self.rank
        return min(rank, size)

    def _corrected(self, past, now, w, predicted, slope, moved_inner) -> _Trial:
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
        return _Trial(
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


def _prepared(past: Past, h: Array) -> _Now:
    points, j = past.slopes.shape[0], past.j
    number = jnp.arange(points - 1)
    steps = jnp.where(number < past.known - 1, past.steps / h, 1)
    form = newton_form(jnp.append(jnp.zeros(1, h.dtype), -jnp.cumsum(steps)))
    rates = jnp.append(h * j.rates, jnp.zeros(1, h.dtype))
    is_used = jnp.arange(points)[:, None] < past.order
    return _Now(
        h,
        form,
        form.powers @ moments(rates, points + 1),
        past.inner_slopes - j.rates * (past.inner_states - past.inner_states[0]),
        jnp.where(is_used, form.differences, 0),
    )


def _predicted(past: Past, now: _Now, w: Array) -> tuple[Array, Array]:
    """The state at the step's end, and how far it has moved in J's directions."""
    weights = now.h * now.used.T @ now.gamma[:-1]
    inner, rest = weights[:, :-1], weights[:, -1]
    moved_inner = jnp.sum(inner * now.inner, axis=0)
    along = moved_inner - rest @ past.inner_slopes
    return w + rest @ past.slopes + past.j.combined(along[None])[0], moved_inner


def _after(
    past: Past,
    now: _Now,
    trial: _Trial,
    state: Array,
    slope: Array,
    accepted: Bool[Array, ""],
    order: Int[Array, ""],
    field: Callable[[Array], Array],
) -> Past:
    moved_inner = trial.moved_inner + trial.correction_inner
    slope_inner = past.j.coordinates(slope[None])[0]
    inner_states = _newest(past.inner_states[0] + moved_inner, past.inner_states)
    inner_slopes = _newest(slope_inner, past.inner_slopes)
    after = Past(
        _newest(state, past.states),
        _newest(slope, past.slopes),
        _newest(now.h, past.steps),
        inner_states,
        inner_slopes,
        jnp.minimum(past.known + 1, past.slopes.shape[0]),
        order,
        past.j,
        past.streak,
        past.asked_at,
        past.asked,
    )
    if not past.j.rates.size:
        return after
    learns = _learns(past, now, trial, state, slope, slope_inner, accepted)
    streak = jnp.where(learns, past.streak + 1, 0)
    asks = learns & (streak >= STREAK) & (now.h > GROWN * past.asked_at)
    still = lax.stop_gradient(
        (past.j, trial.correction, slope - trial.slope, state, slope)
    )
    j, correction, change, *_ = still
    length = jnp.linalg.norm(correction)
    steps, changes = correction[None] / length, change[None] / length
    least = lax.stop_gradient(LEAST_RATE / now.h)

    seen = past.states, past.slopes, jnp.stack([state, slope])
    newest = jnp.stack([inner_states[0], inner_slopes[0]])
    inner = past.inner_states, past.inner_slopes, newest

    def lesson(steps: Array, changes: Array) -> tuple[LowRank, Array, Array]:
        new, inner_seen = learned(j, steps, changes, least, seen, inner)
        states, slopes, newest = inner_seen
        taught = new, _newest(newest[0], states), _newest(newest[1], slopes)
        return jax.tree.map(lambda a, b: jnp.where(learns, a, b), taught, as_it_is)

    as_it_is = past.j, inner_states, inner_slopes
    branches = [lambda: as_it_is, lambda: lesson(steps, changes)]
    if past.j.rates.size >= 3 * QUESTIONS:
        branches.append(lambda: lesson(*_asked(field, j, *still[3:], steps, changes)))
    else:
        asks = asks & False
    lessons = jnp.where(learns, 1, 0) + jnp.where(asks, 1, 0)
    j, inner_states, inner_slopes = lax.switch(eqxi.unvmap_max(lessons), branches)
    return after._replace(
        j=j,
        inner_states=inner_states,
        inner_slopes=inner_slopes,
        streak=jnp.where(asks, STREAK // 2, streak),
        asked_at=jnp.where(asks, now.h, past.asked_at),
        asked=past.asked + jnp.where(asks, QUESTIONS, 0),
    )


def _asked(field, j: LowRank, state, slope, steps, changes):
    """How the slope changes along more directions, each from the last one's answer.

    So that a tridiagonal matrix is found, as by Lanczos.
    """
    dtype = state.dtype
    size = jnp.linalg.norm(state)
    length = jnp.sqrt(jnp.finfo(dtype).eps).astype(dtype) * jnp.where(size > 0, size, 1)
    room = jnp.zeros((QUESTIONS, state.size), dtype)
    new = jnp.concatenate([new_direction(steps[0], j.directions)[None], room])
    changes = jnp.concatenate([changes, room])

    def ask(i, known):
        new, changes = known
        step = new_direction(changes[i], j.directions, new)
        change = (field(state + length * step) - slope) / length
        return new.at[i + 1].set(step), changes.at[i + 1].set(change)

    new, changes = lax.fori_loop(0, QUESTIONS, ask, (new, changes))
    return lax.stop_gradient((new.at[0].set(steps[0]), changes))


def _learns(
    past: Past,
    now: _Now,
    trial: _Trial,
    state: Array,
    slope: Array,
    slope_inner: Array,
    accepted: Bool[Array, ""],
) -> Bool[Array, ""]:
    """Whether J is to learn from the step's two slopes."""
    change = slope - trial.slope
    inner = slope_inner - trial.slope_inner
    unexplained = inner - past.j.rates * trial.correction_inner
    outside = jnp.maximum(jnp.sum(change**2) - jnp.sum(inner**2), 0)
    rest = jnp.sqrt(outside + jnp.sum(unexplained**2))
    length = jnp.linalg.norm(trial.correction)
    steepest = jnp.max(jnp.abs(past.j.rates)) + rest / length
    noise = steepest * jnp.linalg.norm(state) + jnp.linalg.norm(slope)
    is_clear = rest > NOISE * jnp.finfo(state.dtype).eps * noise
    learns = accepted & is_clear & (now.h * rest > STIFFNESS * length)
    return lax.stop_gradient(learns)


def _dense(past: Past, now: _Now, trial: _Trial, unravel) -> dict[str, PyTree]:
    """What `ExponentialInterpolation` needs of a step."""
    points, order = past.slopes.shape[0], past.order
    # Weights of past values and of the one at the predicted end, in Newton's basis.
    residual = jnp.append(-now.form.extrapolation[order - 1], jnp.ones_like(now.h))
    is_last = (jnp.arange(points + 1) == order).astype(residual.dtype)
    weights = jnp.pad(now.used.T, ((0, 1), (0, 1))) + residual[:, None] * is_last
    last_inner = trial.slope_inner - past.j.rates * trial.moved_inner
    return {
        "y0": unravel(past.states[0]),
        "slopes": jax.vmap(unravel)(jnp.append(past.slopes, trial.slope[None], axis=0)),
        "directions": jax.vmap(unravel)(past.j.directions),
        "rates": past.j.rates,
        "inner": jnp.append(now.inner, last_inner[None], axis=0),
        "plain": jnp.append(past.inner_slopes, trial.slope_inner[None], axis=0),
        "powers": weights @ now.form.powers,
    }


def _first(count: int) -> Bool[Array, "{count} 1"]:
    return jnp.arange(count)[:, None] == 0


def _newest(value: Array, values: Array) -> Array:
    return jnp.concatenate([value[None], values[:-1]])
