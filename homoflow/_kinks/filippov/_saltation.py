"""How the flow changes with a parameter, inside a mode and at an event.

Let problem and start depend on one parameter p, and let ξ(t) = ∂w/∂p at fixed t. Inside
a mode ξ̇ is the derivative of the velocity v = −P∇L with p, where w changes by ξ. At an
event at time τ the velocity jumps from v⁻ to v⁺, and ξ⁺ = ξ⁻ + (v⁻ − v⁺) dτ/dp. (This is
the saltation matrix [Kong, Payne, Zhu & Johnson 2023, arXiv:2306.06862].)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._active_pairs import ActivePairs
from .._system import System
from ._sliding_field import (
    factorize_gram,
    group_parallel_rows,
    linearize,
    sliding_velocity,
)

#: Pairs whose kinks coincide must move alike to this much, relative to their motions.
_MAX_DISAGREEMENT = 1e-6
#: A jump below this part of the velocity is rounding.
_MIN_JUMP = 1e-11


class ParameterFamily(NamedTuple):
    """A system that depends on a parameter, and its derivative.

    - `arrays`, `tangents`: its floating-point arrays, and their derivatives.
    - `static`: the rest of it.
    """

    arrays: PyTree
    tangents: PyTree
    static: PyTree

    @property
    def system(self) -> System:
        return eqx.combine(self.arrays, self.static)

    def derivative(
        self, fn: Callable[[System, Array], Any], w: Array, xi: Array
    ) -> tuple[Any, Any]:
        """fn(system, w), and its derivative where dw/dp = ξ."""

        def evaluate(arrays, w):
            return fn(eqx.combine(arrays, self.static), w)

        return jax.jvp(evaluate, (self.arrays, w), (self.tangents, xi))


class Variation(NamedTuple):
    """The field at w in a mode, and its derivative along the family.

    - `xi`: the given one, projected so that the sliding pairs stay on their kinks.
    - `multiplier`, `d_multiplier`: of the sliding groups, from their base slopes.
    - `exists`: false where kinks that coincide would part.
    """

    velocity: Float[Array, " weights"]
    xi: Float[Array, " weights"]
    d_velocity: Float[Array, " weights"]
    d_loss: Float[Array, ""]
    multiplier: Float[Array, " slots"]
    d_multiplier: Float[Array, " slots"]
    exists: Bool[Array, ""]


def differentiate_field(
    family: ParameterFamily,
    w: Array,
    xi: Array,
    base: Int[Array, "samples kinks"],
    pairs: ActivePairs,
) -> Variation:
    """The field of the mode in which the active pairs slide, and its derivative.

    u = −v is the gradient of Φ = L + Σ_k μ_k z_k, with multipliers μ such that Ju = 0.
    So du = d(∇Φ) + Jᵀdμ, where d(∇Φ) is taken at fixed μ and is one product with a
    Hessian. The constraint gives dμ from J du + (dJ) u = 0.
    """
    system, zeros = family.system, jnp.zeros_like(family.system.low)
    at = linearize(system, w, base, pairs)
    groups = group_parallel_rows(at, pairs.is_used)
    solve, _ = factorize_gram(at.gram, pairs.is_used & groups.is_leader)
    lam = -solve(at.row_dot_gradient[:, None])[:, 0]
    mu = pairs.scatter(zeros, lam * at.scale, pairs.is_used)

    def preactivations(system, w):
        return system.preactivations(w, system.slope(base), zeros)

    def potential(w, system):
        loss, z = system.loss(w, system.slope(base))
        return loss + jnp.vdot(mu, z)

    def cancel(rates):
        """The motion normal to the constraints that cancels `rates` of the scaled z."""
        multiplier = solve(rates[:, None])[:, 0]
        return multiplier, system.layout.vjp(at.rows, multiplier * at.scale)

    _, dz = family.derivative(preactivations, w, xi)
    off = pairs.gather(dz) * at.scale
    multiplier, normal = cancel(off)
    remainder = jnp.where(pairs.is_used, off - at.gram @ multiplier, 0)
    xi = xi - normal
    size = jnp.linalg.norm(xi) + jnp.max(jnp.abs(off), initial=0)
    v = sliding_velocity(system, at, lam)

    def gradient_and_rates(system, w):
        gradient = jax.value_and_grad(potential)(w, system)
        rates = jax.jvp(lambda w: preactivations(system, w), (w,), (-v,))[1]
        return gradient, rates

    _, ((d_loss, du), d_rates) = family.derivative(gradient_and_rates, w, xi)
    d_lam, normal = cancel(
        system.layout.jvp(at.rows, du) * at.scale + pairs.gather(d_rates) * at.scale
    )
    return Variation(
        velocity=v,
        xi=xi,
        d_velocity=normal - du,
        d_loss=d_loss,
        multiplier=lam,
        d_multiplier=-d_lam,
        exists=jnp.max(jnp.abs(remainder), initial=0) <= _MAX_DISAGREEMENT * size,
    )


def differentiate_event_time(
    family: ParameterFamily,
    w: Array,
    xi: Array,
    v: Array,
    base: Int[Array, "samples kinks"],
    offsets: Float[Array, "samples kinks"],
    meets: Bool[Array, "samples kinks"],
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """dτ/dp of the event at which the pairs in `meets` reach their kinks.

    From dz + ż dτ = 0, with z as it was before the event. Returned too is whether it
    exists: it does not if these pairs reach their kinks at one time here, but not along
    the family.
    """

    def preactivations(system, w):
        return system.preactivations(w, system.slope(base), offsets)

    _, dz = family.derivative(preactivations, w, xi)
    _, rate = jax.jvp(lambda w: preactivations(family.system, w), (w,), (v,))
    first = jnp.argmax(jnp.where(meets, jnp.abs(rate), -1))
    slope = rate.ravel()[first]
    change = jnp.where(slope != 0, -dz.ravel()[first], 0) / jnp.where(
        slope != 0, slope, 1
    )
    moved = rate * change
    size = jnp.abs(dz) + jnp.abs(moved)
    bound = _MAX_DISAGREEMENT * (size + 1e-4 * jnp.max(size))
    return change, ~jnp.any(meets & (jnp.abs(dz + moved) > bound))


def has_jump(before: Array, after: Array) -> Bool[Array, ""]:
    """Whether two velocities differ by more than rounding."""
    size = jnp.linalg.norm(before) + jnp.linalg.norm(after)
    return jnp.linalg.norm(before - after) > _MIN_JUMP * size
