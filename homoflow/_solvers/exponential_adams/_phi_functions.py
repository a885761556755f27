"""φ-functions: what exponential integrators weigh polynomials with."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

#: Below this |z| the recurrence is run from the highest degree down, above it up: each
#: way loses digits on the other side.
_SWITCH = 6.0
#: Of the series of the highest degree, enough for |z| ≤ 6.
_TERMS = 28


def phi_functions(
    z: Float[Array, "*rates"], count: int
) -> Float[Array, "count *rates"]:
    """m!·φ_{m+1}(z) = ∫₀¹ e^{(1−s)z} sᵐ ds for m = 0, …, count − 1, to rounding.

    These moments μ_m of the exponential obey μ_{m+1} = ((m + 1)·μ_m − 1)/z [Hochbruck &
    Ostermann 2010, eq. 2.10]. For real z all are positive.
    """
    is_small = jnp.abs(z) < _SWITCH
    near = jnp.where(is_small, z, 0)
    # What grows beyond any tolerance in one step must not overflow.
    far = jnp.minimum(jnp.where(is_small, -_SWITCH, z), _largest_exponent(z.dtype))
    top = count - 1
    series = jnp.ones_like(near)
    for j in range(_TERMS, 0, -1):
        series = 1 + near * series / (top + 1 + j)
    down = [series / count]
    up = [jnp.expm1(far) / far]
    for m in range(top):
        down.append((1 + near * down[-1]) / (top - m))
        up.append(((m + 1) * up[-1] - 1) / far)
    pairs = zip(reversed(down), up, strict=True)
    return jnp.stack([jnp.where(is_small, small, large) for small, large in pairs])


def _largest_exponent(dtype: jnp.dtype) -> float:
    return 0.5 * math.log(float(jnp.finfo(dtype).max))
