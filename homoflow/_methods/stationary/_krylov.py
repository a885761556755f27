"""Critical points by Hessian-vector products, for many weights."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..._jax._compilation import fast_compile_jit
from ..._jax._lanczos import Eigenpair, largest_eigenvalue
from ..._jax._precision import full_matmul_precision
from ._critical_point import Analyzer, CriticalPoint, zero_curvature
from ._flat_loss import FlatLoss

#: Residuals of the extreme eigenpairs, relative to ‖∇²L‖, and the curvature that they
#: resolve: an eigenvalue's error is of second order in its residual.
_LARGEST_RESIDUAL, _LOWEST_RESIDUAL, _RESOLVED = 1e-2, 1e-4, 1e-6
#: Of the conjugate gradients.
_STEP_RESIDUAL, _MAX_PRODUCTS = 1e-4, 1000


def make_krylov_analyzer(flat_loss: FlatLoss, size: float) -> Analyzer:
    """`CriticalPoint`s of a loss with the ends of the spectrum, by Lanczos iterations.

    Eigenvalues are not counted, and that none lies below the lowest is not proved.
    """

    def analyze(weights: np.ndarray) -> CriticalPoint:
        flat = jnp.asarray(weights)
        loss, gradient, largest, downward = _ends(flat_loss, flat)
        gradient, vector = np.asarray(gradient), np.asarray(downward.vector)
        lowest = -float(downward.value)
        norm = max(abs(lowest), abs(float(largest.value)))
        if not (np.isfinite(gradient).all() and np.isfinite(norm)):
            raise FloatingPointError(
                "The ends of the Hessian's spectrum are not known."
            )
        zero = zero_curvature(gradient, norm, size, _RESOLVED)
        step = _newton_step(flat_loss, flat, jnp.asarray(zero))
        slope = abs(float(vector @ gradient))
        return CriticalPoint(
            weights, float(loss), gradient, size,
            lowest=lowest,
            largest=float(largest.value),
            norm=norm,
            zero=zero,
            step=np.asarray(step),
            unstable=slope / abs(lowest) if lowest < -zero else 0.0,
            values=np.array([lowest]),
            vectors=vector[:, None],
        )  # fmt: skip

    return analyze


@fast_compile_jit
@full_matmul_precision()
def _ends(
    flat_loss: FlatLoss, flat: Float[Array, " size"]
) -> tuple[Float[Array, ""], Float[Array, " size"], Eigenpair, Eigenpair]:
    """L, ∇L, the largest eigenvalue of ∇²L, and of −∇²L."""
    gradient, product = jax.linearize(flat_loss.gradient, flat)
    size, dtype = flat.size, flat.dtype
    largest = largest_eigenvalue(product, size, dtype, _LARGEST_RESIDUAL)
    downward = largest_eigenvalue(lambda v: -product(v), size, dtype, _LOWEST_RESIDUAL)
    return flat_loss.value(flat), gradient, largest, downward


@fast_compile_jit
@full_matmul_precision()
def _newton_step(
    flat_loss: FlatLoss, flat: Float[Array, " size"], zero: Float[Array, ""]
) -> Float[Array, " size"]:
    """The least s with ∇²L·s = −∇L, by conjugate gradients from 0.

    They stay in the range of the Hessian, and end where its curvature is zero or less.
    """
    gradient, product = jax.linearize(flat_loss.gradient, flat)
    enough = _STEP_RESIDUAL**2 * (gradient @ gradient)

    def should_continue(state):
        _, residual, _, is_curved, products = state
        unsolved = residual @ residual > enough
        return unsolved & is_curved & (products < _MAX_PRODUCTS)

    def improve(state):
        step, residual, direction, _, products = state
        image = product(direction)
        curvature = direction @ image
        is_curved = curvature > zero * (direction @ direction)
        before = residual @ residual
        length = jnp.where(is_curved, before / curvature, 0)
        residual = residual - length * image
        direction_next = residual + (residual @ residual) / before * direction
        return (
            step + length * direction,
            residual,
            direction_next,
            is_curved,
            products + 1,
        )

    start = (jnp.zeros_like(flat), -gradient, -gradient, jnp.asarray(True), 0)
    return jax.lax.while_loop(should_continue, improve, start)[0]
