"""Exponential Adams: multistep, of any order, exact in the stiff part of the flow."""

import functools
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

from ._divided import Newton, newton_form
from ._low_rank import LowRank, learned, nothing
from ._phi import moments
from ._tolerances import AbstractTolerantSolver

#: Of the step size: the next one is aimed at this share of what the error allows.
SAFETY = 0.9
#: Steps grow if by this much at least, and by this much at most: at the beginning, where
#: orders and steps are still small, and later.
LEAST_GROWTH, EARLY_GROWTH, GROWTH = 1.2, 5.0, 2.0
EARLY_STEPS = 10
#: A rejected step shrinks to this at the least; if it was not finite, to the latter.
SHRINKAGE, COLLAPSE = 0.2, 0.1
#: J learns where what it leaves changes by more than this during a step, h·‖ΔN‖/‖Δw‖:
#: Adams methods of order 1 to 12 become unstable between 2 and 0.2.
STIFFNESS = 0.25
#: Rates below this per step are not worth a direction.
LEAST_RATE = 0.01
#: A difference of slopes below this many units of rounding says nothing.
NOISE = 10.0


class Past(NamedTuple):
    """What a multistep method keeps, newest first.

    - `states`, `slopes`: w and f, of `count` steps; zeros beyond.
    - `steps`: the lengths between them.
    - `inner_states`, `inner_slopes`: their coordinates in J's directions.
    """

    states: Float[Array, "points size"]
    slopes: Float[Array, "points size"]
    steps: Float[Array, " orders"]
    inner_states: Float[Array, "points room"]
    inner_slopes: Float[Array, "points room"]
    count: Int[Array, ""]
    order: Int[Array, ""]
    j: LowRank


class _Exponential(dfx.AbstractLocalInterpolation):
    """The solution of w' = J w + N(t) between two steps, for a polynomial N.

    - `slopes`: f at past steps and at the predicted end of this one.
    - `inner`, `plain`: N and f there, in J's directions.
    - `powers`: row i has the coefficients of the polynomial, in powers of the time in
        units of the step, that the i-th of them is weighted with.
    """

    t0: Any
    t1: Any
    y0: PyTree[Array]
    slopes: PyTree[Float[Array, "values ..."]]
    directions: PyTree[Float[Array, "room ..."]]
    rates: Float[Array, " room"]
    inner: Float[Array, "values room"]
    plain: Float[Array, "values room"]
    powers: Float[Array, "values degrees"]

    def evaluate(self, t0, t1=None, left=True):
        del left
        if t1 is not None:
            return jax.tree.map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        dtype = self.rates.dtype
        length = jnp.asarray(self.t1 - self.t0)
        share = ((t0 - self.t0) / jnp.where(length == 0, 1, length)).astype(dtype)
        length = length.astype(dtype)
        degrees = self.powers.shape[1]
        scaled = self.powers * share ** jnp.arange(1, degrees + 1).astype(dtype)
        rates = jnp.append(length * share * self.rates, jnp.zeros((), dtype))
        weights = length * scaled @ moments(rates, degrees)
        outer, inner = weights[:, -1], weights[:, :-1]
        along = jnp.sum(inner * self.inner, 0) - outer @ self.plain

        def at(start, slopes, directions):
            moved = jnp.tensordot(outer, slopes, 1)
            return start + moved + jnp.tensordot(along, directions, 1)

        return jax.tree.map(at, self.y0, self.slopes, self.directions)


class ExponentialAdams(AbstractTolerantSolver):
    """doc"""

    rtol: Any = None
    atol: Any = None
    rank: int = eqx.field(default=64, static=True)
    most_order: int = eqx.field(default=12, static=True)

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = _Exponential

    def order(self, terms):
        return self.most_order

    def at(self, rtol, atol):
        return ExponentialAdams(rtol, atol, self.rank, self.most_order)

    def controller(self, *, dtmin=None, force_dtmin=False):
        return dfx.PIDController(
            rtol=0.0, atol=1.0, error_order=1.0, safety=SAFETY,
            factormin=1e-3, factormax=10.0, dtmin=dtmin, force_dtmin=force_dtmin,
        )  # fmt: skip

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args) -> Past:
        w, slope = ravel_pytree(y0)[0], _field(terms, args, y0)(t0, ravel_pytree(y0)[0])
        points, room = self.most_order + 1, min(self.rank, w.size)
        empty = jnp.zeros((points, w.size), w.dtype)
        inner = jnp.zeros((points, room), w.dtype)
        return Past(
            empty.at[0].set(w),
            empty.at[0].set(slope),
            jnp.ones(self.most_order, w.dtype),
            inner,
            inner,
            jnp.asarray(1),
            jnp.asarray(1),
            nothing(room, w.size, w.dtype),
        )

    def step(self, terms, t0, t1, y0, args, solver_state: Past, made_jump):
        del made_jump
        past, field = solver_state, _field(terms, args, y0)
        w, unravel = ravel_pytree(y0)
        h = jnp.asarray(t1 - t0).astype(w.dtype)
        points, order, j = past.slopes.shape[0], past.order, past.j
        room = j.rates.size
        form = newton_form(_times_back(past, h))
        rates = jnp.append(h * j.rates, jnp.zeros((), w.dtype))
        # Of p_0, …: exponential ones for J's directions, and of Adams for all others.
        gamma = form.powers @ moments(rates, points + 1)

        inner = past.inner_slopes - j.rates * (past.inner_states - past.inner_states[0])
        index = jnp.arange(points)
        used = jnp.where((index < order)[:, None], form.differences, 0)
        weights = h * used.T @ gamma[:-1]
        moved_inner = jnp.sum(weights[:, :-1] * inner, 0)
        plain = weights[:, -1] @ past.slopes
        difference = moved_inner - weights[:, -1] @ past.inner_slopes
        predicted = w + plain + j.combined(difference[None])[0]
        slope = field(t1, predicted)
        slope_inner = j.coordinates(slope[None])[0]

        # Residuals of extrapolations through order − 1, order, order + 1 values, and what
        # they are multiplied with: for the correction and the errors at these orders.
        orders = order + jnp.asarray([0, -1, 0, 1], order.dtype)
        at = jnp.clip(orders, 1, points)
        through = form.extrapolation[at - 1]
        growth = gamma[at] - gamma[at - 1]
        growth = h * growth.at[0].set(gamma[order])
        residual_inner = slope_inner - j.rates * moved_inner - through @ inner
        residual_plain = slope_inner - through @ past.inner_slopes
        full = growth[:, -1:] * (slope - through @ past.slopes)
        difference = growth[:, :-1] * residual_inner - growth[:, -1:] * residual_plain
        full = full + j.combined(difference)
        correction, errors = full[0], full[1:]
        corrected = predicted + correction
        assert self.rtol is not None
        assert self.atol is not None
        scale = self.atol + self.rtol * jnp.maximum(jnp.abs(w), jnp.abs(corrected))
        errors = jnp.sqrt(jnp.mean((errors / scale) ** 2, 1))
        errors = lax.stop_gradient(errors)
        possible = jnp.stack([order > 1, order > 0, (order < past.count) & (order < self.most_order)])
        errors = jnp.where(possible, errors, jnp.inf)
        accepted = errors[1] <= 1

        new_slope = lax.cond(
            eqxi.unvmap_any(accepted),
            lambda: field(t1, corrected), lambda: slope)
        new_slope_inner = j.coordinates(new_slope[None])[0]
        correction_inner = growth[0, :-1] * residual_inner[0]
        next_order, factor = _next(past, errors, accepted, self.most_order)
        end_inner = past.inner_states[0] + moved_inner + correction_inner
        after = Past(
            _newest(corrected, past.states),
            _newest(new_slope, past.slopes),
            _newest(h, past.steps),
            _newest(end_inner, past.inner_states),
            _newest(new_slope_inner, past.inner_slopes),
            jnp.minimum(past.count + 1, points),
            next_order,
            j,
        )
        change = new_slope - slope
        change_inner = new_slope_inner - slope_inner
        rest_inner = change_inner - j.rates * correction_inner
        rest = jnp.sqrt(jnp.maximum(jnp.sum(change**2) - jnp.sum(change_inner**2), 0) + jnp.sum(rest_inner**2))
        length = jnp.linalg.norm(correction)
        eps = jnp.finfo(w.dtype).eps
        steepest = jnp.maximum(jnp.max(jnp.abs(j.rates), initial=0), rest / length)
        noise = NOISE * eps * (steepest * jnp.linalg.norm(w) + jnp.linalg.norm(slope))
        learns = accepted & (h * rest > STIFFNESS * length) & (rest > noise)
        learns = lax.stop_gradient(learns)
        after = lax.cond(eqxi.unvmap_any(learns), lambda: _learn(after, learns, correction, change, LEAST_RATE / h), lambda: after)

        y1 = unravel(corrected)
        error = SAFETY / factor
        y_error = unravel(jnp.broadcast_to(error, w.shape))
        poly = jnp.pad(used.T, ((0, 1), (0, 1)))
        minus = jnp.append(-form.extrapolation[order - 1], jnp.ones((), w.dtype))
        poly = poly + minus[:, None] * (jnp.arange(points + 1) == order).astype(w.dtype)
        dense = dict(
            y0=y0,
            slopes=jax.vmap(unravel)(jnp.concatenate([past.slopes, slope[None]])),
            directions=jax.vmap(unravel)(j.directions),
            rates=j.rates,
            inner=jnp.concatenate([inner, (slope_inner - j.rates * moved_inner)[None]]),
            plain=jnp.concatenate([past.inner_slopes, slope_inner[None]]),
            powers=poly @ form.powers,
        )
        return y1, y_error, dense, after, dfx.RESULTS.successful


def _field(terms, args, y0):
    unravel = ravel_pytree(y0)[1]

    def field(t, w):
        control = terms.contr(t, t + 1)
        return ravel_pytree(terms.vf_prod(t, unravel(w), args, control))[0].astype(w.dtype)

    return field


def _times_back(past: Past, h):
    number = jnp.arange(past.steps.size)
    steps = jnp.where(number < past.count - 1, past.steps / h, 1)
    return jnp.append(jnp.zeros(1, h.dtype), -jnp.cumsum(steps))


def _newest(value, values):
    return jnp.concatenate([jnp.asarray(value)[None], values[:-1]])


def _next(past, errors, accepted, most):
    order, dtype = past.order, errors.dtype
    orders = (order + jnp.asarray([0, 1, 2], order.dtype)).astype(dtype)
    tiny = jnp.maximum(errors, 1e-10)
    factors = SAFETY * tiny ** (-1 / orders)
    lower, same, higher = factors
    down = (lower > same) & (errors[0] <= errors[1])
    is_young = (past.count == order) & (order < most)
    up = ~down & jnp.where(is_young, ~(errors[0] <= errors[1]), higher > same)
    new = order + jnp.where(down, -1, jnp.where(up, 1, 0)).astype(order.dtype)
    best = jnp.where(down, lower, jnp.where(up & ~is_young, higher, same))
    most_growth = jnp.where(past.count <= EARLY_STEPS, EARLY_GROWTH, GROWTH)
    grown = jnp.where(best > LEAST_GROWTH, jnp.minimum(best, most_growth), 1)
    shrunk = jnp.maximum(same, SHRINKAGE)
    shrunk = jnp.where(jnp.isfinite(errors[1]), shrunk, COLLAPSE)
    return new, jnp.where(accepted, grown, shrunk).astype(dtype)


def _learn(past: Past, learns, step, change, least):
    frozen = lax.stop_gradient((past.j, step, change, least))
    j = learned(*frozen)
    j = jax.tree.map(lambda new, old: jnp.where(learns, new, old), j, past.j)
    return past._replace(j=j, inner_states=j.coordinates(past.states), inner_slopes=j.coordinates(past.slopes))
