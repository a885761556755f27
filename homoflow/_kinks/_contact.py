"""Which pairs are at their kink at a point, and which of them nothing reaches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._system import System

#: |z| up to this times the largest |z| counts as 0.
_ON_KINK = 1e-10
#: A derivative up to this times the largest one counts as 0.
_NO_DERIVATIVE = 1e-9
#: How far sliding units are lifted to see which way the units above them would wake.
#: Small enough not to shift events by more than rounding does.
LIFT = 1e-11


class Contact(NamedTuple):
    """The pairs `at_kink`; sides and base slopes in which dormant pairs are placed."""

    at_kink: Bool[Array, "samples kinks"]
    side: Int[Array, "samples kinks"]
    base: Int[Array, "samples kinks"]


def find_contact(
    system: System,
    w: Float[Array, " weights"],
    side: Int[Array, "samples kinks"],
    base: Int[Array, "samples kinks"],
    trigger: Bool[Array, "samples kinks"],
    largest: Float[Array, ""],
) -> Contact:
    """Sort out the pairs with z = 0.

    A pair is dormant if z = 0 with zero derivative: no unit below it is on for its
    sample. It has no constraint to keep. Its slope is irrelevant until a kink below
    opens, and is then set by a one-sided derivative: by the sign that z takes when the
    kinks below are lifted a little.
    """
    slopes = system.slope(base)
    z = system.preactivations(w, slopes, jnp.zeros_like(slopes))
    near = (jnp.abs(z) <= _ON_KINK * largest) | (side == 0) | trigger
    dormant = near & ~_is_reached(system, w, slopes, near)
    at_kink = near & ~dormant

    def place(base, side):
        def one_layer(_, carry):
            base, side = carry
            lift = LIFT * at_kink.astype(w.dtype)
            z = system.preactivations(w, system.slope(base), lift)
            seen = dormant & (jnp.abs(z) > 1e-3 * LIFT)
            side = jnp.where(seen, jnp.sign(z).astype(side.dtype), side)
            side = jnp.where(dormant & (side == 0), -1, side)
            return jnp.where(dormant, side, base), side

        return lax.fori_loop(0, system.function.depth, one_layer, (base, side))

    base, side = lax.cond(
        jnp.any(dormant), place, lambda base, side: (base, side), base, side
    )
    return Contact(at_kink, side, base)


def _is_reached(system: System, w: Array, slopes: Array, near: Array) -> Array:
    """Whether z changes with w while all pairs near their kinks are at the flat side.

    Along one generic direction: a derivative that vanishes along it vanishes.
    """
    flat = jnp.where(
        jnp.abs(system.low) <= jnp.abs(system.high), system.low, system.high
    )
    direction = np.random.default_rng(0).standard_normal(w.size)
    _, change = jax.jvp(
        lambda w: system.preactivations(
            w, jnp.where(near, flat, slopes), jnp.zeros_like(slopes)
        ),
        (w,),
        (jnp.asarray(direction, w.dtype),),
    )
    change = jnp.abs(change)
    return change > _NO_DERIVATIVE * jnp.max(change)
