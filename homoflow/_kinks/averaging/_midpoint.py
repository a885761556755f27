"""The midpoint rule with the slope of every kink averaged over the step."""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..._solvers import AbstractFlowSolver
from .._active_pairs import ActivePairs
from .._from_problem import as_system
from .._system import System
from ._time_fraction import TimeFraction, fraction_above

#: Fixed-point iterations for the time fractions of a step. Each costs a gradient. With 2
#: the fractions of sliding pairs lag behind, and in large networks with thousands of them
#: some pair leaves its kink that should not; with 8 the error is less than half of that
#: with 4, at the same step.
NUM_ITERATIONS = 4
#: Under-relaxation and momentum of these iterations, for pairs that slide. Such pairs are
#: coupled: full moves over-correct where hundreds slide on similar samples.
RELAXATION, MOMENTUM = 0.6, 0.2
#: Gradients ∇_w z per step: one for so many samples, and no fewer than the minimum.
SAMPLES_PER_ROW, MIN_ROWS = 2, 32
#: How many numbers those gradients may hold together.
MAX_ROW_ENTRIES = 2**24


class MidpointState(NamedTuple):
    """What is known from earlier steps, as tables over all pairs.

    - `above`: the fraction α, where the slope is low + α · (high − low).
    - `slides`: whether a pair slides along its kink.
    - `squared_norm`: ‖∇_w z‖² where it was needed so far, elsewhere 0.
    - `next_pair`: the pair whose `squared_norm` is computed next.
    """

    above: Float[Array, "samples kinks"]
    slides: Bool[Array, "samples kinks"]
    squared_norm: Float[Array, "samples kinks"]
    next_pair: Int[Array, ""]


class AveragedMidpoint(AbstractFlowSolver, dfx.AbstractAdaptiveSolver):
    """Explicit midpoint with the slope of every kink averaged over the step.

    A pre-activation that changes sign during a step has the mean slope of both sides,
    weighted by the time spent on each. One that both sides push towards its kink has the
    slope that brings it to 0 at the end of the step, as in Moreau's time stepping of
    contacts. So no step is rejected because of a kink, and no pair chatters. The time
    fractions are found by `NUM_ITERATIONS` fixed-point iterations, which start from those
    of the step before.

    The error is measured on all weights together, as ‖midpoint − Euler‖ relative to
    atol·√n + rtol·‖w‖: a single kink does not make the step small.

    The arguments of the vector field are `(given, system, …)`, and gradients are those
    of the `System`. Derivatives of the solution are taken at constant time fractions.
    """

    rtol: Float[Array, ""] | None = None
    atol: Float[Array, ""] | None = None

    scales_errors: ClassVar[bool] = True
    # Where a pair took another course in two solves alike, a third one tells.
    num_coarse_solves: ClassVar[int] = 2
    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = (
        dfx.ThirdOrderHermitePolynomialInterpolation
    )

    def order(self, terms):
        return 2

    @property
    def has_tolerances(self):
        return self.rtol is not None or self.atol is not None

    def with_tolerances(self, rtol, atol):
        return AveragedMidpoint(rtol, atol)

    def make_controller(self, rtol, atol, *, dtmin, force_dtmin):
        del rtol, atol
        return dfx.PIDController(
            rtol=0.0,
            atol=1.0,
            pcoeff=0.3,
            icoeff=0.4,
            dtmin=dtmin,
            force_dtmin=force_dtmin,
        )

    def problem_args(self, problem):
        return as_system(problem)

    def cost(self, *, num_accepted, num_rejected, num_steps, solver_state, args):
        del num_accepted, num_rejected, solver_state
        return {"gradient_evaluations": count_gradients(args[1], num_steps)}

    def init(self, terms, t0, t1, y0, args) -> MidpointState:
        system: System = args[1]
        zeros = jnp.zeros_like(system.low)
        return MidpointState(zeros, zeros > 0, zeros, jnp.zeros((), jnp.int32))

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def can_project(self, solver_state, y0):
        return True

    def step_with_projection(
        self, project, terms, t0, t1, y0, args, solver_state, made_jump
    ):
        # A rescaling changes no pre-activation's sign: fractions stay what they are.
        y1, error, dense, state, result = self.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        rescaling = project(y1)
        return rescaling.projected, error, dense, state, result, rescaling

    def step(self, terms, t0, t1, y0, args, solver_state: MidpointState, made_jump):
        system, state, h = args[1], solver_state, jnp.asarray(t1 - t0)
        assert self.rtol is not None
        assert self.atol is not None
        w, unravel = jax.flatten_util.ravel_pytree(y0)
        start = _evaluate(system, w, _fraction_at_start, (state.above, state.slides))
        improve = functools.partial(_improve, system, h, w, start)
        first = _Iterate(start, start.above, state.slides)
        now = improve(_fill(state.squared_norm), first)
        crosses = (2 * now.found.z - start.z > 0) != (start.z > 0)
        meets_kink = crosses | state.slides | now.slides
        squared_norm, next_pair = _update_norms(
            system, w, start, meets_kink, state.squared_norm, state.next_pair
        )
        norms = _fill(squared_norm)
        now = lax.fori_loop(1, NUM_ITERATIONS, lambda i, now: improve(norms, now), now)
        gradient = now.found.gradient
        w1 = w - h * gradient
        size = jnp.maximum(_rms(w), _rms(w1))
        error = h * (gradient - start.gradient)
        error = error / (self.atol + self.rtol * lax.stop_gradient(size))
        y1, k0 = unravel(w1), unravel(-h * start.gradient)
        # The parabola with the step's first slope and both of its ends.
        k1 = unravel(2 * (w1 - w) + h * start.gradient)
        dense = {"y0": y0, "y1": y1, "k0": k0, "k1": k1}
        state = MidpointState(now.found.above, now.slides, squared_norm, next_pair)
        return y1, unravel(error), dense, state, dfx.RESULTS.successful


def count_gradients(system: System, steps: Int[Array, ""]) -> Int[Array, ""]:
    """Gradients over all samples in so many steps; one of a single sample is 1/samples."""
    rows = -(-num_rows_per_step(system) * steps // system.num_samples)
    return (1 + NUM_ITERATIONS) * steps + rows


def num_rows_per_step(system: System) -> int:
    """For how many pairs ‖∇_w z‖² is computed in a step."""
    in_factors = {p.leaf for p in system.function.products}
    leaves = jax.tree.leaves(system.layout.template)
    explicit = sum(leaf.size for i, leaf in enumerate(leaves) if i not in in_factors)
    entries = sum(math.prod(p.shape) for p in system.function.factored)
    entries += sum(c.patch_size for c in system.function.convolutions)
    entries += system.num_kinks + explicit
    wanted = max(system.num_samples // SAMPLES_PER_ROW, MIN_ROWS)
    return max(1, min(wanted, system.low.size, MAX_ROW_ENTRIES // entries))


class _Evaluation(NamedTuple):
    """∇L, z, the fractions α and ∂L/∂a; and the inputs of products and convolutions."""

    gradient: Float[Array, " weights"]
    z: Float[Array, "samples kinks"]
    above: Float[Array, "samples kinks"]
    dloss_da: Float[Array, "samples kinks"]
    inputs: list[Array]


class _Iterate(NamedTuple):
    """What was found at the latest fractions, the fractions before, and who slides."""

    found: _Evaluation
    above_before: Float[Array, "samples kinks"]
    slides: Bool[Array, "samples kinks"]


def _improve(
    system: System,
    h: Array,
    w: Array,
    start: _Evaluation,
    squared_norm: Array,
    last: _Iterate,
) -> _Iterate:
    """The middle of the step once more, with better fractions."""
    found = last.found
    pull = found.dloss_da * (system.high - system.low) * squared_norm
    tables = (start.z, found.above, last.above_before, pull, last.slides)
    middle = w - h / 2 * found.gradient
    now = _evaluate(system, middle, functools.partial(_relaxed_fraction, h), tables)
    fraction = _fraction(h, now.z, start.z, found.above, pull)
    return _Iterate(now, found.above, fraction.slides)


def _evaluate(
    system: System,
    w: Array,
    choose_fraction: Callable[..., Array],
    tables: PyTree[Array],
) -> _Evaluation:
    """∇L, where `choose_fraction(z, *tables)` gives α in [0, 1] for every kink."""

    def risk(w, offsets):
        weights = system.layout.unravel(w)

        def evaluate_sample(offsets, low, high, tables, x, y):
            fractions = []

            def choose_slope(z, first_kink):
                part = slice(first_kink, first_kink + z.size)
                entries = jax.tree.map(lambda a: a[part].reshape(z.shape), tables)
                above = lax.stop_gradient(choose_fraction(z, *entries))
                fractions.append(above.ravel())
                low_, high_ = (a[part].reshape(z.shape) for a in (low, high))
                return low_ + above * (high_ - low_)

            prediction, z, inputs = system.function.evaluate(
                weights, choose_slope, offsets, system.constants, x
            )
            found = z, jnp.concatenate(fractions), inputs
            return system.loss_of_sample(prediction, y), found

        losses, found = jax.vmap(evaluate_sample)(
            offsets, system.low, system.high, tables, system.x, system.y
        )
        return (jnp.mean(losses) if system.is_mean else jnp.sum(losses)), found

    offsets = jnp.zeros_like(system.low)
    (gradient, dloss_da), (z, above, inputs) = jax.grad(risk, (0, 1), has_aux=True)(
        w, offsets
    )
    return _Evaluation(gradient, z, above, lax.stop_gradient(dloss_da), inputs)


def _fraction_at_start(z, above, slides):
    return jnp.where(slides, above, (z > 0).astype(z.dtype))


def _fraction(h, z_middle, z, assumed, pull) -> TimeFraction:
    return fraction_above(z, (z_middle - z) * 2 / h, assumed, pull, h)


def _relaxed_fraction(h, z_middle, z, assumed, before, pull, slides):
    above, sliding = _fraction(h, z_middle, z, assumed, pull)
    # A pair that has just begun to slide has nothing to over-correct.
    relaxed = (
        assumed + RELAXATION * (above - assumed) + MOMENTUM * (assumed - before)
    ).clip(0, 1)
    return jnp.where(sliding & slides, relaxed, above)


def _update_norms(
    system: System,
    w: Array,
    found: _Evaluation,
    meets_kink: Array,
    squared_norm: Array,
    first: Array,
) -> tuple[Array, Array]:
    """Compute ‖∇_w z‖² for more of the pairs that meet their kinks.

    Half of the budget is for pairs that have none yet, half for all pairs in turn.
    Returned are the table and the pair whose turn is next.
    """
    budget = num_rows_per_step(system)
    missing = _next_pairs(meets_kink & (squared_norm == 0), first, budget - budget // 2)
    in_turn = _next_pairs(meets_kink, first, budget // 2)
    index = jnp.concatenate([missing, in_turn])
    pairs = ActivePairs.empty((system.num_samples, system.num_kinks), budget)
    pairs = pairs._replace(flat_index=jnp.minimum(index, squared_norm.size - 1))
    slopes = system.low + found.above * (system.high - system.low)
    norms = system.rows(w, slopes, pairs, found.inputs).squared_norms()
    flat = squared_norm.ravel().at[index].set(lax.stop_gradient(norms), mode="drop")
    last = jnp.where(in_turn < squared_norm.size, in_turn, -1)
    ahead = (last - first) % squared_norm.size
    advance = jnp.max(jnp.where(in_turn < squared_norm.size, ahead, -1), initial=-1) + 1
    return flat.reshape(squared_norm.shape), (first + advance) % squared_norm.size


def _fill(squared_norm: Float[Array, "samples kinks"]) -> Array:
    """For pairs whose norm is not known, the mean of their kink's over samples."""
    known = squared_norm > 0
    count = jnp.maximum(jnp.sum(known, 0, dtype=squared_norm.dtype), 1)
    return jnp.where(known, squared_norm, jnp.sum(squared_norm, 0) / count)


def _next_pairs(mask: Array, first: Array, count: int) -> Array:
    """The first pairs of the mask from `first` on, padded with indices out of bounds."""
    size = mask.size
    rolled = jnp.roll(mask.ravel(), -first)
    (ahead,) = jnp.nonzero(rolled, size=count, fill_value=size)
    ahead = ahead.astype(first.dtype)
    return jnp.where(ahead < size, (ahead + first) % size, size)


def _rms(w) -> Array:
    return jnp.sqrt(jnp.mean(w**2))
