"""Critical points with all eigenvalues of their Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..._jax._compilation import fast_compile_jit
from ..._jax._precision import full_matmul_precision
from ._critical_point import Analyzer, CriticalPoint, zero_curvature
from ._flat_loss import FlatLoss

#: Beyond this a Hessian and its eigenvalues take too long.
MAX_WEIGHTS = 2000
#: Eigenvalues below this, relative to the largest, are zero to rounding.
_ROUNDING = 1e-12
#: Columns of the Hessian that are computed at a time.
_CHUNK = 32


def make_dense_analyzer(flat_loss: FlatLoss, size: float) -> Analyzer:
    """`CriticalPoint`s of a loss from the eigenvalues of dense Hessians."""

    def analyze(weights: np.ndarray) -> CriticalPoint:
        parts = _derivatives(flat_loss, jnp.asarray(weights))
        loss, gradient, hessian = map(np.asarray, parts)
        if not (np.isfinite(hessian).all() and np.isfinite(gradient).all()):
            raise FloatingPointError("The Hessian contains NaN or inf.")
        values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
        norm = float(np.max(np.abs(values)))
        zero = zero_curvature(gradient, norm, size, _ROUNDING)
        step = np.zeros_like(values)
        seen = np.abs(values) > zero
        step[seen] = -(vectors.T @ gradient)[seen] / values[seen]
        return CriticalPoint(
            weights, float(loss), gradient, size,
            lowest=float(values[0]),
            largest=float(values[-1]),
            norm=norm,
            zero=zero,
            step=vectors @ step,
            unstable=float(np.linalg.norm(step[values < 0])),
            values=values,
            vectors=vectors,
        )  # fmt: skip

    return analyze


@fast_compile_jit
@full_matmul_precision()
def _derivatives(
    flat_loss: FlatLoss, flat: Float[Array, " size"]
) -> tuple[Float[Array, ""], Float[Array, " size"], Float[Array, "size size"]]:
    """L, ∇L and ∇²L."""
    loss = flat_loss.value(flat)
    gradient, product = jax.linearize(flat_loss.gradient, flat)
    identity = jnp.eye(flat.size, dtype=flat.dtype)
    hessian = jax.lax.map(product, identity, batch_size=min(_CHUNK, flat.size))
    return loss, gradient, hessian
