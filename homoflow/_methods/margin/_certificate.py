"""The conditions of Karush, Kuhn and Tucker for a maximal margin, at one direction."""

import jax
import jax.numpy as jnp
import numpy as np

from ..._jax._tracing import is_concrete_call
from ..._problem._log_risk import against_log_risk, sample_margins
from ..._problem._problem import Problem
from ..._results._margin_certificate import NEGLIGIBLE, MarginCertificate
from ._margins import (
    Margins,
    flat_weights,
    lagrangian_hessian,
    margins_at,
    with_flat_weights,
)

#: The Jacobian of the margins has at most so many numbers, a Hessian so many rows.
_MAX_NUMBERS, MAX_DENSE = 20_000_000, 1_000
#: Eigenvalues below this share of the largest one are rounding.
_ROUNDING = 1e-12


def why_no_certificate(problem: Problem) -> str | None:
    """Why no margin of a problem can be certified; `None` if one can be."""
    reason = against_log_risk(problem)
    if reason is not None:
        return reason
    if not is_concrete_call(problem):
        return "it is computed on the host, outside of jit, vmap and grad"
    if problem.dtype != jnp.float64:
        return f"the weights are {problem.dtype.name}, and it needs float64"
    shapes = jax.eval_shape(lambda w: sample_margins(problem, w), problem.weights)
    numbers = shapes.size * problem.num_weights
    if numbers > _MAX_NUMBERS:
        return (
            f"the margins have {numbers:,} derivatives, more than {_MAX_NUMBERS:,}: take "
            "fewer samples, those of the smallest margins"
        )
    return None


def certificate_at(problem: Problem, *, moved: float = 0.0) -> MarginCertificate:
    """The certificate of a problem's weights, rescaled to a smallest margin of 1.

    `moved`: what to say of how far they were moved before.
    """
    w = flat_weights(problem)
    at, w, degree = rescaled(problem, w)
    multipliers = find_multipliers(w, at.slopes, at.values - 1)
    size = float(np.linalg.norm(w))
    residual = float(np.linalg.norm(w - at.slopes.T @ multipliers)) / size
    shape = jax.eval_shape(lambda v: sample_margins(problem, v), problem.weights).shape
    return MarginCertificate(
        model=with_flat_weights(problem, w).model,
        degree=degree,
        margin=float(size**-degree),
        margins=jnp.asarray(at.values.reshape(shape)),
        multipliers=jnp.asarray(multipliers.reshape(shape)),
        stationarity=residual,
        complementarity=float(np.max(multipliers * np.abs(at.values - 1))) / size**2,
        curvature=_curvature(problem, w, multipliers, at.slopes),
        moved=moved,
    )


def rescaled(problem: Problem, w: np.ndarray) -> tuple[Margins, np.ndarray, float]:
    """Margins at weights of which the smallest one is 1, these, and the degree L.

    m(cw) = cᴸ m(w) and ∇m(cw) = cᴸ⁻¹ ∇m(w). Raises `ValueError` where no margin can be
    scaled to 1.
    """
    at = margins_at(problem, w)
    smallest = float(at.values.min())
    if not smallest > 0:
        raise ValueError(
            f"The smallest margin is {smallest:.3g}: the model does not separate the data, "
            "so that its direction is no candidate. Follow the flow further."
        )
    degree = at.degree(w)
    c = smallest ** (-1 / degree)
    values = at.values / smallest
    return (
        Margins(values, degree * values, c ** (degree - 1) * at.slopes),
        c * w,
        degree,
    )


def find_multipliers(
    w: np.ndarray, slopes: np.ndarray, excess: np.ndarray
) -> np.ndarray:
    """λ ≥ 0 that make ‖w − Σ λ_i ∇m_i‖² + Σ λ_i² (m_i − 1)²/‖w‖² least."""
    # SciPy comes with JAX; only here are its optimizers worth their import.
    from scipy.optimize import nnls

    # In units in which ‖w‖ = 1, the second block is max λ_i (m_i − 1)/‖w‖².
    size = float(np.linalg.norm(w))
    rows = np.vstack([slopes.T / size, np.diag(excess) / size**2])
    target = np.concatenate([w / size, np.zeros_like(excess)])
    columns = np.linalg.norm(rows, axis=0)
    columns[columns == 0] = 1
    scaled, _ = nnls(rows / columns, target)
    return scaled / columns


def _curvature(
    problem: Problem, w: np.ndarray, multipliers: np.ndarray, slopes: np.ndarray
) -> float:
    """The smallest eigenvalue of the Lagrangian's Hessian where support margins stay."""
    if w.size > MAX_DENSE:
        return float("nan")
    hessian = lagrangian_hessian(problem, w, multipliers)
    held = slopes[multipliers > NEGLIGIBLE * multipliers.max()]
    values, directions = np.linalg.eigh(held.T @ held)
    free = directions[:, values <= _ROUNDING * values.max()]
    if not free.size:
        return float("inf")
    return float(np.linalg.eigvalsh(free.T @ hessian @ free)[0])
