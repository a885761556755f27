"""Which pairs are at their kink at a point, and which of them ∂z/∂w = 0 disconnects."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._system import System
from ._state import ContinuationHint, PairTables

#: |z| up to this times the largest |z| counts as 0.
_MAX_ZERO = 1e-10
#: A derivative up to this times the largest one counts as 0.
_MAX_ZERO_DERIVATIVE = 1e-9
#: How far sliding units are raised, to see to which side they would push the units above.
#: Small enough to shift events by no more than rounding does.
LIFT = 1e-11
#: How much more units are raised that leave their kinks: those that slide on are at 0.
_LEAVING_FACTOR = 100.0
#: In how many further proportions sliding units are raised, and the least factor.
_NUM_PROPORTIONS, _MIN_PROPORTION = 4, 1e-2


class ActiveSet(NamedTuple):
    """The pairs with z = 0: `active` ones, and disconnected ones with their sides.

    Of the tables, `constrained` and `choice` are still those from before. `max_abs_z` is
    the largest |z| of all pairs.
    """

    active: Bool[Array, "samples kinks"]
    tables: PairTables
    max_abs_z: Float[Array, ""]


def classify_pairs(
    system: System,
    w: Float[Array, " weights"],
    tables: PairTables,
    trigger: Bool[Array, "samples kinks"],
    max_abs_z: Float[Array, ""],
    hint: ContinuationHint,
) -> ActiveSet:
    """Classify every (sample, kink) pair whose pre-activation z is zero.

    - *Active*: z = 0 and ∂z/∂w ≠ 0. The pair crosses its kink, slides along it or leaves
        it; the caller decides which.
    - *Disconnected*: z = 0 and ∂z/∂w = 0, because every unit below it is off for this
        sample. It imposes no constraint, and its slope does not enter the gradient until
        a unit below turns on.

    A disconnected pair still needs a side for the moment when a unit below turns on. The
    active units below are raised by a tiny offset (`LIFT`), and the sign of the resulting
    z is taken. If different proportions of these offsets give different signs, the side
    depends on the order in which those units turn on. The pair then keeps its side and is
    reported as *ambiguous*.

    `tables` are those with which the step arrived; `trigger` marks the pair that ended
    it. At a retry `hint` holds the velocity that was found before. Units that turn on
    along it connect the pairs above them, which are then active, and start on the sides
    to which it takes them.
    """
    side, base = tables.side, tables.base
    known = (side == 0) | trigger | (hint.is_retry & tables.at_zero)
    turns_on = hint.is_retry & tables.leaves_kink
    at_zero, is_connected, z = _find_zeros(system, w, base, known, turns_on, max_abs_z)
    base, side, follows_hint = lax.cond(
        hint.is_retry,
        lambda: _follow_velocity(system, w, tables, hint.velocity),
        lambda: (base, side, jnp.zeros_like(at_zero)),
    )
    disconnected = at_zero & ~is_connected
    active = at_zero & is_connected
    # Pairs that slid and are now disconnected: on the side on which their group is on.
    side = jnp.where(disconnected & (side == 0), -base, side)
    undecided = disconnected & ~follows_hint
    may_open = active & (side >= 0)
    offsets = LIFT * jnp.where(side > 0, _LEAVING_FACTOR, 1) * may_open.astype(w.dtype)
    sliding = LIFT * (active & (side == 0) & ~trigger).astype(w.dtype)
    base, side, ambiguous = lax.cond(
        jnp.any(undecided),
        lambda base, side: _push_disconnected(
            system, w, base, side, undecided, offsets, sliding
        ),
        lambda base, side: (base, side, jnp.zeros_like(disconnected)),
        base,
        side,
    )
    tables = tables._replace(
        side=side,
        base=base,
        at_zero=active | disconnected,
        disconnected=disconnected,
        ambiguous=ambiguous,
    )
    return ActiveSet(active, tables, jnp.max(jnp.abs(z)))


def _push_disconnected(
    system: System,
    w: Array,
    base: Array,
    side: Array,
    undecided: Bool[Array, "samples kinks"],
    offsets: Float[Array, "samples kinks"],
    sliding_offsets: Float[Array, "samples kinks"],
) -> tuple[Array, Array, Array]:
    """Base sides, sides and ambiguity of disconnected pairs, from raised units below.

    Layer by layer; in the last pass only the units that slide on are raised.
    """
    depth = system.function.depth
    random, pairwise = (jnp.asarray(p, w.dtype) for p in _proportions(system.num_kinks))

    def push_layer(number, carry):
        base, side, _ = carry
        is_last = number == depth
        raised = jnp.where(is_last, sliding_offsets, offsets)
        z = jax.vmap(
            lambda part: system.preactivations(w, system.slope(base), raised * part)
        )(jnp.where(is_last, pairwise, random))
        is_pushed = undecided & (jnp.abs(z) > 1e-3 * _MIN_PROPORTION * LIFT)
        sign = jnp.where(is_pushed, jnp.sign(z), 0).astype(side.dtype)
        ambiguous = jnp.any(sign > 0, 0) & jnp.any(sign < 0, 0)
        may_stay = is_last | jnp.any((sign == side) & is_pushed, 0)
        side = jnp.where(is_pushed[0] & ~may_stay, sign[0], side)
        return jnp.where(undecided, side, base), side, ambiguous

    start = base, side, jnp.zeros_like(undecided)
    return lax.fori_loop(0, depth + 1, push_layer, start)


def _follow_velocity(
    system: System, w: Array, tables: PairTables, velocity: Array
) -> tuple[Array, Array, Array]:
    """Base sides and sides of disconnected pairs along a velocity, and which it moves."""
    offsets = jnp.zeros_like(system.low)

    def push_layer(_, carry):
        base, side, _ = carry
        slopes = system.slope(base)
        _, rate = jax.jvp(
            lambda w: system.preactivations(w, slopes, offsets), (w,), (velocity,)
        )
        least = _MAX_ZERO_DERIVATIVE * jnp.max(jnp.abs(rate))
        moves = tables.disconnected & (jnp.abs(rate) > least)
        side = jnp.where(moves, jnp.sign(rate).astype(side.dtype), side)
        return jnp.where(moves, side, base), side, moves

    start = tables.base, tables.side, jnp.zeros_like(tables.disconnected)
    return lax.fori_loop(0, system.function.depth, push_layer, start)


def _proportions(kinks: int) -> tuple[np.ndarray, np.ndarray]:
    """Proportions in which units are raised, one set in a row.

    First equal ones and some random ones. Then sets in which any two kinks differ, once
    in either order: they follow the bits of the kinks' numbers.
    """
    bits = np.arange(kinks) >> np.arange(max(kinks - 1, 1).bit_length())[:, None] & 1
    pairwise = _MIN_PROPORTION ** np.concatenate([bits, 1 - bits])
    exponents = np.random.default_rng(1).random((_NUM_PROPORTIONS, kinks))
    random = np.concatenate([np.ones((1, kinks)), _MIN_PROPORTION**exponents])
    count = max(len(random), len(pairwise))
    return np.resize(random, (count, kinks)), np.resize(pairwise, (count, kinks))


def _find_zeros(
    system: System,
    w: Array,
    base: Int[Array, "samples kinks"],
    known: Bool[Array, "samples kinks"],
    turns_on: Bool[Array, "samples kinks"],
    max_abs_z: Float[Array, ""],
) -> tuple[
    Bool[Array, "samples kinks"],
    Bool[Array, "samples kinks"],
    Float[Array, "samples kinks"],
]:
    """The pairs with z = 0, those with ∂z/∂w ≠ 0 while these are off, and all z.

    A pair is off at the flatter one of its slopes. The pairs that turn on stay as they
    are. ∂z/∂w is taken along one random direction: a derivative that vanishes along it
    vanishes. Whether a unit with z = 0 is off changes no z above it, so both are found
    together, in one pass unless more pairs have z = 0 than are `known` to.
    """
    slopes, offsets = system.slope(base), jnp.zeros_like(system.low)
    off_slopes = jnp.where(
        jnp.abs(system.low) <= jnp.abs(system.high), system.low, system.high
    )
    random = np.random.default_rng(0).standard_normal(w.size)
    direction = jnp.asarray(random, w.dtype)

    def add_zeros(carry):
        at_zero = carry[0]

        def evaluate(w):
            is_off = at_zero & ~turns_on
            return system.preactivations(
                w, jnp.where(is_off, off_slopes, slopes), offsets
            )

        z, change = jax.jvp(evaluate, (w,), (direction,))
        found = at_zero | (jnp.abs(z) <= _MAX_ZERO * max_abs_z)
        return found, jnp.abs(change), z, jnp.any(found != at_zero)

    start = known, offsets, offsets, jnp.asarray(True)
    at_zero, change, z, _ = lax.while_loop(lambda carry: carry[3], add_zeros, start)
    return at_zero, change > _MAX_ZERO_DERIVATIVE * jnp.max(change), z
