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
#: A curvature below this, relative to ‖∇²L‖ at the start, has vanished: at an inflection
#: point all of them do, and are no measure of each other.
_VANISHED = 1e-10
#: An entry of the Hessian is more than rounding from so many times that on.
_IS_KNOWN = 10.0
#: Units of weights are changed where curvatures differ by more than the square of this.
_MIN_SPREAD, _RUIZ_STEPS = 1e4, 20
#: Columns of the Hessian that are computed at a time.
_CHUNK = 32


def dense_hessian(
    flat_loss: FlatLoss, weights: np.ndarray
) -> Float[np.ndarray, "size size"]:
    """∇²L."""
    return np.asarray(_derivatives(flat_loss, jnp.asarray(weights))[2])


def rounding_of_hessian(
    flat_loss: FlatLoss, weights: np.ndarray, hessian: Float[np.ndarray, "size size"]
) -> Float[np.ndarray, "size size"]:
    """How much ∇²L differs where all weights are off by a few roundings."""
    signs = np.where(np.arange(len(weights)) % 2, 1.0, -1.0)
    nudged = weights * (1 + 4 * float(np.finfo(float).eps) * signs)
    return np.abs(dense_hessian(flat_loss, nudged) - hessian)


def balanced_units(
    *hessians: Float[np.ndarray, "size size"],
    rounding: Float[np.ndarray, "size size"],
) -> Float[np.ndarray, " size"] | None:
    """Units of weights in which all rows of Hessians are about 1; `None` if they are.

    An eigenvalue is known up to the rounding of the largest: features of sizes 1e4 and
    1e-3 give curvatures of 1e8 and 1e-6, of which the second would be taken for zero.
    Ruiz's iteration on the sum of their absolute values; a row of zeros, or of nothing
    but `rounding`, keeps its unit.
    """
    total = sum(np.abs(hessian) for hessian in hessians)
    assert isinstance(total, np.ndarray)
    total = np.where(total > _IS_KNOWN * rounding, total, 0)
    scale, is_seen = np.ones(len(total)), np.any(total > 0, axis=1)
    if not (np.isfinite(total).all() and is_seen.any()):
        return None
    for _ in range(_RUIZ_STEPS):
        rows = np.max(scale[:, None] * total * scale, axis=1)
        scale /= np.sqrt(np.where(rows > 0, rows, 1))
    least, most = np.min(scale[is_seen]), np.max(scale[is_seen])
    if most < _MIN_SPREAD * least:
        return None
    return np.where(is_seen, scale / least, 1.0)


def make_dense_analyzer(
    flat_loss: FlatLoss, size: float, usual_norm: float = 0.0
) -> Analyzer:
    """`CriticalPoint`s of a loss from the eigenvalues of dense Hessians.

    `usual_norm`: ‖∇²L‖ where the flow began, as a measure of how much curvature is none.
    """

    def analyze(weights: np.ndarray) -> CriticalPoint:
        parts = _derivatives(flat_loss, jnp.asarray(weights))
        loss, gradient, hessian = map(np.asarray, parts)
        if not (np.isfinite(hessian).all() and np.isfinite(gradient).all()):
            raise FloatingPointError("The Hessian contains NaN or inf.")
        values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
        norm = float(np.max(np.abs(values)))
        zero = zero_curvature(gradient, norm, size, _ROUNDING)
        zero = max(zero, _VANISHED * usual_norm)
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
