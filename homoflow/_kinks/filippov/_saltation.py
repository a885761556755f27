"""How the flow in a fixed mode, and at an event, changes with what it depends on.

Along a family of problems and starts with one parameter p, ξ(t) = ∂w/∂p at fixed t.
Inside a mode ξ̇ = dv, the derivative of v = −P∇L with p and along ξ. At an event at
time τ the flow changes from velocity v⁻ to v⁺, and ξ⁺ = ξ⁻ + (v⁻ − v⁺) dτ/dp
[Kong, Payne, Zhu & Johnson 2023, arXiv:2306.06862: the saltation matrix].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._active_pairs import Slots
from .._system import System
from ._sliding_field import evaluate, gram_solver, group, velocity

#: Conditions of pairs that coincide must agree to this much, relative to their sizes.
_AGREES = 1e-6
#: Below this part of the velocity a jump of it is rounding.
_NO_JUMP = 1e-11


class Family(NamedTuple):
    """A system and its derivative with respect to the parameter.

    - `moving`, `change`: its floating-point arrays, and their derivatives.
    - `fixed`: the rest of it.
    """

    moving: PyTree
    change: PyTree
    fixed: PyTree

    @property
    def system(self) -> System:
        return eqx.combine(self.moving, self.fixed)

    def derivative(
        self, fn: Callable[[System, Array], Any], w: Array, xi: Array
    ) -> tuple[Any, Any]:
        """fn(system, w), and its derivative where dw/dp = ξ."""

        def of(moving, w):
            return fn(eqx.combine(moving, self.fixed), w)

        return jax.jvp(of, (self.moving, w), (self.change, xi))


class Variation(NamedTuple):
    """The field at w in a mode, and its derivative along the family.

    - `xi`: the given one, moved so that the sliding pairs stay on their kinks.
    - `multiplier`, `d_multiplier`: of the sliding groups, from their base slopes.
    - `exists`: false where pairs that coincide would part.
    """

    velocity: Float[Array, " weights"]
    xi: Float[Array, " weights"]
    d_velocity: Float[Array, " weights"]
    d_loss: Float[Array, ""]
    multiplier: Float[Array, " slots"]
    d_multiplier: Float[Array, " slots"]
    exists: Bool[Array, ""]


def vary(
    family: Family, w: Array, xi: Array, base: Int[Array, "samples kinks"], slots: Slots
) -> Variation:
    """The field of the mode in which the pairs in the slots slide.

    u = −v is the gradient of Φ = L + Σ_k μ_k z_k, with multipliers μ such that Ju = 0.
    So du = (∇Φ)' at fixed μ, which is one product with a Hessian, + Jᵀdμ, and dμ is
    found from J du + (dJ) u = 0.
    """
    system = family.system
    point = evaluate(system, w, base, slots)
    groups = group(point, slots.used)
    leads = slots.used & groups.leads
    solve, _ = gram_solver(point, leads)
    lam = -solve(point.rates[:, None])[:, 0]
    mu = slots.scattered(jnp.zeros_like(system.low), lam * point.scale, slots.used)
    still = jnp.zeros_like(system.low)

    def preactivations(system, w):
        return system.preactivations(w, system.slope(base), still)

    def potential(w, system):
        loss, z = system.loss(w, system.slope(base))
        return loss + jnp.vdot(mu, z)

    def slip(values):
        """What normal motion cancels `values`, the rates of the scaled z."""
        share = solve(values[:, None])[:, 0]
        return share, system.against(point.rows, share * point.scale)

    _, dz = family.derivative(preactivations, w, xi)
    off = slots.gathered(dz) * point.scale
    share, normal = slip(off)
    rest = jnp.where(slots.used, off - point.gram @ share, 0)
    xi = xi - normal
    scale = jnp.linalg.norm(xi) + jnp.max(jnp.abs(off), initial=0)
    v = velocity(system, point, lam)

    def both(system, w):
        gradient = jax.value_and_grad(potential)(w, system)
        rates = jax.jvp(lambda w: preactivations(system, w), (w,), (-v,))[1]
        return gradient, rates

    _, ((d_loss, du), bend) = family.derivative(both, w, xi)
    d_lam, normal = slip(
        system.along(point.rows, du) * point.scale + slots.gathered(bend) * point.scale
    )
    return Variation(
        velocity=v,
        xi=xi,
        d_velocity=normal - du,
        d_loss=d_loss,
        multiplier=lam,
        d_multiplier=-d_lam,
        exists=jnp.max(jnp.abs(rest), initial=0) <= _AGREES * scale,
    )


def event_time_change(
    family: Family,
    w: Array,
    xi: Array,
    v: Array,
    base: Int[Array, "samples kinks"],
    lift: Float[Array, "samples kinks"],
    meets: Bool[Array, "samples kinks"],
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """dτ/dp of the event at which the pairs in `meets` reach their kinks.

    From dz + ż dτ = 0, with z as it was before the event. It does not exist if these
    pairs reach their kinks at one time here, but not along the family.
    """

    def preactivations(system, w):
        return system.preactivations(w, system.slope(base), lift)

    _, dz = family.derivative(preactivations, w, xi)
    _, rate = jax.jvp(lambda w: preactivations(family.system, w), (w,), (v,))
    first = jnp.argmax(jnp.where(meets, jnp.abs(rate), -1))
    slope = rate.ravel()[first]
    change = jnp.where(slope != 0, -dz.ravel()[first], 0) / jnp.where(
        slope != 0, slope, 1
    )
    moved = rate * change
    size = jnp.abs(dz) + jnp.abs(moved)
    bound = _AGREES * (size + 1e-4 * jnp.max(size))
    return change, ~jnp.any(meets & (jnp.abs(dz + moved) > bound))


def is_jump(before: Array, after: Array) -> Bool[Array, ""]:
    """Whether two velocities differ by more than rounding."""
    size = jnp.linalg.norm(before) + jnp.linalg.norm(after)
    return jnp.linalg.norm(before - after) > _NO_JUMP * size
