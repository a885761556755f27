"""A step that gives each kink its share: the averaged flow of large networks."""

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

from ..._solvers import AbstractTolerantSolver
from .._active_pairs import Slots
from .._system import System
from ._time_fraction import share_above

#: How often the shares of a step are improved. Each time costs a gradient. With 2 the
#: shares of sliding pairs lag behind, and large networks with thousands of them part at
#: some kink; with 8 the error is less than half of that with 4, at the same step.
ITERATIONS = 4
#: How far the slopes of sliding pairs move towards what would hold each at its kink by
#: itself, and how much of their last move they repeat. They are coupled: full moves
#: over-correct where hundreds of pairs slide on similar samples.
RELAXATION, MOMENTUM = 0.6, 0.2
#: Gradients of pre-activations per step, as a share of the samples, and at least.
ROWS_SHARE, ROWS_LEAST = 2, 32
#: The most numbers that those gradients may take up together.
ROWS_MOST_NUMBERS = 2**24


class Memory(NamedTuple):
    """What is kept from step to step about the pairs of a sample and a kink.

    - `above`: the place of the slope between low and high, for sliding pairs.
    - `slides`: which are held at their kink.
    - `square`: ‖∇_w z‖² where it was needed so far, elsewhere 0.
    - `start`: which pair is first in line for its `square`.
    """

    above: Float[Array, "samples kinks"]
    slides: Bool[Array, "samples kinks"]
    square: Float[Array, "samples kinks"]
    start: Int[Array, ""]


class KinkShare(AbstractTolerantSolver):
    """Explicit midpoint with the slope of every kink averaged over the step.

    A pre-activation that changes sign during a step has for slope the mean of both
    sides, weighted by their share of the step; one that both sides push towards its kink
    has the slope that brings it to 0 at the step's end, as in Moreau's time stepping of
    contacts. So no step is rejected for a kink and none chatters. The shares are found
    by evaluating `ITERATIONS` times, starting from those of the step before.

    The error is measured on all weights together: ‖midpoint − Euler‖ relative to
    atol·√n + rtol·‖w‖, so that a single kink does not make the step small.

    It takes `(given, system)` for the field's arguments, and finds its gradients with
    the `System`. Derivatives are those at constant shares, as with every solver that
    does not know of kinks.
    """

    rtol: Float[Array, ""] | None = None
    atol: Float[Array, ""] | None = None

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = (
        dfx.ThirdOrderHermitePolynomialInterpolation
    )

    def order(self, terms):
        return 2

    def at(self, rtol, atol):
        return KinkShare(rtol, atol)

    def controller(self, *, dtmin=None, force_dtmin=False):
        return dfx.PIDController(
            rtol=0.0, atol=1.0, pcoeff=0.3, icoeff=0.4,
            dtmin=dtmin, force_dtmin=force_dtmin,
        )  # fmt: skip

    def init(self, terms, t0, t1, y0, args) -> Memory:
        system: System = args[1]
        nothing = jnp.zeros_like(system.low)
        return Memory(nothing, nothing > 0, nothing, jnp.zeros((), jnp.int32))

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def restored_step(self, restoring, terms, *arguments):
        """A step whose end is moved by a rescaling, and that: shares stay what they are."""
        y1, *rest = self.step(terms, *arguments)
        rescaling = restoring(y1)
        return rescaling.projected, *rest, rescaling

    def step(self, terms, t0, t1, y0, args, solver_state: Memory, made_jump):
        system, memory, h = args[1], solver_state, jnp.asarray(t1 - t0)
        assert self.rtol is not None
        assert self.atol is not None
        w, unravel = jax.flatten_util.ravel_pytree(y0)
        start = _gradient(system, w, _side_or_slope, (memory.above, memory.slides))
        first = _Iterate(start, start.above, memory.slides)
        improved = functools.partial(_improved, system, h, w, start)
        now = improved(_filled(memory.square), first)
        turned = (2 * now.seen.z - start.z > 0) != (start.z > 0)
        meets = turned | memory.slides | now.slides
        square, line = _with_squares(
            system, w, start, meets, memory.square, memory.start
        )
        filled = _filled(square)
        now = lax.fori_loop(1, ITERATIONS, lambda i, now: improved(filled, now), now)
        gradient = now.seen.gradient
        w1 = w - h * gradient
        size = jnp.maximum(_rms(w), _rms(w1))
        error = h * (gradient - start.gradient)
        error = error / (self.atol + self.rtol * lax.stop_gradient(size))
        y1, k0 = unravel(w1), unravel(-h * start.gradient)
        # The parabola with the step's first slope and both of its ends.
        k1 = unravel(2 * (w1 - w) + h * start.gradient)
        dense = {"y0": y0, "y1": y1, "k0": k0, "k1": k1}
        memory = Memory(now.seen.above, now.slides, square, line)
        return y1, unravel(error), dense, memory, dfx.RESULTS.successful


def evaluations(system: System, steps: Int[Array, ""]) -> Int[Array, ""]:
    """Gradients over all samples in so many steps; of a single one count as 1/samples."""
    rows = -(-rows_per_step(system) * steps // system.samples)
    return (1 + ITERATIONS) * steps + rows


def rows_per_step(system: System) -> int:
    """For how many pairs ‖∇_w z‖² is found in a step."""
    factored = {p.leaf for p in system.function.products}
    leaves = jax.tree.leaves(system.template)
    rest = sum(leaf.size for i, leaf in enumerate(leaves) if i not in factored)
    wide = sum(math.prod(p.shape) for p in system.function.factored)
    wide += sum(c.patch_size for c in system.function.convolutions)
    wide += system.kinks + rest
    room = max(system.samples // ROWS_SHARE, ROWS_LEAST)
    return max(1, min(room, system.low.size, ROWS_MOST_NUMBERS // wide))


class _Seen(NamedTuple):
    """The gradient, z, places of slopes, ∂L/∂a, and what the function is factored with."""

    gradient: Float[Array, " weights"]
    z: Float[Array, "samples kinks"]
    above: Float[Array, "samples kinks"]
    upward: Float[Array, "samples kinks"]
    images: list[Array]


class _Iterate(NamedTuple):
    """What was seen with the shares so far, the places before them, and who slides."""

    seen: _Seen
    before: Float[Array, "samples kinks"]
    slides: Bool[Array, "samples kinks"]


def _improved(
    system: System, h: Array, w: Array, start: _Seen, square: Array, last: _Iterate
) -> _Iterate:
    """The middle of the step once more, with better shares."""
    seen = last.seen
    pull = seen.upward * (system.high - system.low) * square
    tables = (start.z, seen.above, last.before, pull, last.slides)
    middle = w - h / 2 * seen.gradient
    now = _gradient(system, middle, functools.partial(_relaxed_share, h), tables)
    share = _share(h, now.z, start.z, seen.above, pull)
    return _Iterate(now, seen.above, share.slides)


def _gradient(system: System, w: Array, rule, tables: PyTree[Array]) -> _Seen:
    """∇L with the slope of each kink given by `rule(z, *tables)`, its place in [0, 1]."""

    def risk(w, lift):
        weights = system.unravel(w)

        def of_sample(lift, low, high, tables, x, y):
            places = []

            def slope(z, start):
                part = slice(start, start + z.size)
                mine = jax.tree.map(lambda a: a[part].reshape(z.shape), tables)
                place = lax.stop_gradient(rule(z, *mine))
                places.append(place.ravel())
                low_, high_ = (a[part].reshape(z.shape) for a in (low, high))
                return low_ + place * (high_ - low_)

            prediction, z, images = system.function.evaluate(
                weights, slope, lift, system.others, x
            )
            seen = z, jnp.concatenate(places), images
            return system.loss_of_sample(prediction, y), seen

        losses, seen = jax.vmap(of_sample)(
            lift, system.low, system.high, tables, system.x, system.y
        )
        return (jnp.mean(losses) if system.is_mean else jnp.sum(losses)), seen

    lift = jnp.zeros_like(system.low)
    (gradient, upward), (z, above, images) = jax.grad(risk, (0, 1), has_aux=True)(
        w, lift
    )
    return _Seen(gradient, z, above, lax.stop_gradient(upward), images)


def _side_or_slope(z, above, slides):
    return jnp.where(slides, above, (z > 0).astype(z.dtype))


def _share(h, middle, z, assumed, pull):
    return share_above(z, (middle - z) * 2 / h, assumed, pull, h)


def _relaxed_share(h, middle, z, assumed, before, pull, slides):
    above, sliding = _share(h, middle, z, assumed, pull)
    # A pair that has just begun to slide has nothing to over-correct.
    moved = (
        assumed + RELAXATION * (above - assumed) + MOMENTUM * (assumed - before)
    ).clip(0, 1)
    return jnp.where(sliding & slides, moved, above)


def _with_squares(
    system: System, w: Array, seen: _Seen, meets: Array, square: Array, first: Array
) -> tuple[Array, Array]:
    """`square` with ‖∇_w z‖² of more of the pairs that meet their kinks.

    Half of the room is for those without, half for all in turn.
    """
    room = rows_per_step(system)
    news = _first_in_line(meets & (square == 0), first, room - room // 2)
    turn = _first_in_line(meets, first, room // 2)
    pair = jnp.concatenate([news, turn])
    slots = Slots.none((system.samples, system.kinks), room)._replace(
        pair=jnp.minimum(pair, square.size - 1)
    )
    slopes = system.low + seen.above * (system.high - system.low)
    found = system.rows(w, slopes, slots, seen.images).squares()
    flat = square.ravel().at[pair].set(lax.stop_gradient(found), mode="drop")
    last = jnp.where(turn < square.size, turn, -1)
    ahead = (last - first) % square.size
    reached = jnp.max(jnp.where(turn < square.size, ahead, -1), initial=-1) + 1
    return flat.reshape(square.shape), (first + reached) % square.size


def _filled(square: Float[Array, "samples kinks"]) -> Float[Array, "samples kinks"]:
    """For pairs whose square is not known, the mean of their kink's over samples."""
    known = square > 0
    mean = jnp.sum(square, 0) / jnp.maximum(jnp.sum(known, 0, dtype=square.dtype), 1)
    return jnp.where(known, square, mean)


def _first_in_line(chosen: Array, first: Array, room: int) -> Array:
    """The numbers of the first chosen pairs from `first` on, then out of bounds ones."""
    size = chosen.size
    line = jnp.roll(chosen.ravel(), -first)
    (ahead,) = jnp.nonzero(line, size=room, fill_value=size)
    ahead = ahead.astype(first.dtype)
    return jnp.where(ahead < size, (ahead + first) % size, size)


def _rms(w) -> Array:
    return jnp.sqrt(jnp.mean(w**2))
