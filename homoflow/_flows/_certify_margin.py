"""`certify_margin`: whether a direction is one that late gradient flow converges to."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .._jax._compilation import fast_compile_jit
from .._jax._precision import full_matmul_precision
from .._jax._tracing import is_concrete_call
from .._problem._log_risk import against_log_risk, sample_margins
from .._problem._losses import LogisticLoss, LossLike
from .._problem._problem import Problem, make_problem
from .._problem._trainable import Trainable
from .._results._margin_certificate import NEGLIGIBLE, MarginCertificate

#: The largest deviation from Euler's identity, relative to its terms.
_MAX_DEVIATION = 1e-6
#: The Jacobian of the margins has at most so many numbers, a Hessian so many rows.
_MAX_NUMBERS, _MAX_DENSE = 20_000_000, 1_000
#: Eigenvalues below this share of the largest one are rounding.
_ROUNDING = 1e-12


def certify_margin(
    model: PyTree,
    data: PyTree,
    *,
    loss: LossLike = LogisticLoss(),  # noqa: B008
    trainable: Trainable = None,
) -> MarginCertificate:
    """How well the direction of the weights fulfils the conditions of a maximal margin.

    With a loss of exponential type on separable data, gradient flow of a homogeneous
    network converges in direction to a Karush–Kuhn–Tucker point of

        min ½‖w‖²  subject to  m_i(w) ≥ 1 for all samples i

    [Lyu & Li 2020; Ji & Telgarsky 2020], m_i the margin: y·f, or f_y − f_c for each other
    class c. The weights are rescaled until the smallest margin is 1. The multipliers are
    those λ ≥ 0 that make ‖w − Σ λ_i ∇m_i‖² + Σ λ_i² (m_i − 1)² least (non-negative least
    squares). At kinks ∇m_i is what JAX takes for it.

    **Arguments:** as for `homoflow.late_flow`. `model` is its end, say.

    **Returns:** a `homoflow.MarginCertificate`; `is_kkt()` compares its residuals with a
    tolerance. At a finite time they fall like 1/log t at best.

    **Raises:** `ValueError` for bad input, another loss, data that the model does not
    separate, margins that are not homogeneous (biases above the first layer, tanh), and
    more than 20 million derivatives.

    ```python
    model = hf.MLP((3, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    data = (x, jnp.sign(x[:, :1]))
    run = hf.late_flow(model, data, log_t1=1e8)
    certificate = hf.certify_margin(run.model, data)
    certificate.is_kkt(1e-6)  # True
    ```
    """
    problem = make_problem(model, data, loss=loss, trainable=trainable)
    _check(problem)
    at = _margins_at(problem)
    margins, along, slopes = map(np.asarray, at)
    smallest = float(margins.min())
    if not smallest > 0:
        raise ValueError(
            f"The smallest margin is {smallest:.3g}: the model does not separate the data, "
            "so that its direction is no candidate. Follow the flow further."
        )
    w = np.asarray(ravel_pytree(problem.weights)[0])
    degree = _degree(margins.ravel(), along.ravel(), slopes, w)
    # m(cw) = cᴸ m(w), ∇m(cw) = cᴸ⁻¹ ∇m(w).
    c = smallest ** (-1 / degree)
    w, margins = c * w, margins / smallest
    slopes = c ** (degree - 1) * slopes
    excess = margins.ravel() - 1
    multipliers = _multipliers(w, slopes, excess)
    size = float(np.linalg.norm(w))
    residual = float(np.linalg.norm(w - slopes.T @ multipliers)) / size
    rescaled = _with_weights(problem, w)
    return MarginCertificate(
        model=rescaled.model,
        degree=degree,
        margin=float(size**-degree),
        margins=jnp.asarray(margins),
        multipliers=jnp.asarray(multipliers.reshape(margins.shape)),
        stationarity=residual,
        complementarity=float(np.max(multipliers * excess)) / size**2,
        curvature=_curvature(rescaled, multipliers, slopes),
    )


def _check(problem: Problem) -> None:
    reason = against_log_risk(problem)
    if reason is None and not is_concrete_call(problem):
        reason = "it is computed on the host, outside of jit, vmap and grad"
    if reason is None and problem.dtype != jnp.float64:
        reason = f"the weights are {problem.dtype.name}, and it needs float64"
    if reason is not None:
        raise ValueError(f"No margin can be certified here: {reason}.")
    shapes = jax.eval_shape(lambda w: sample_margins(problem, w), problem.weights)
    numbers = shapes.size * problem.num_weights
    if numbers > _MAX_NUMBERS:
        raise ValueError(
            f"The margins have {numbers:,} derivatives, more than {_MAX_NUMBERS:,}: take "
            "fewer samples, those of the smallest margins."
        )


class _Margins(NamedTuple):
    """Margins, their change along the weights, and their gradients in rows."""

    margins: Float[Array, "m outputs"]
    along: Float[Array, "m outputs"]
    slopes: Float[Array, "margins weights"]


@fast_compile_jit
@full_matmul_precision()
def _margins_at(problem: Problem) -> _Margins:
    flat, unravel = ravel_pytree(problem.weights)

    def margins_of(v):
        return sample_margins(problem, unravel(v))

    margins, along = jax.jvp(margins_of, (flat,), (flat,))
    slopes = jax.jacrev(lambda v: margins_of(v).ravel())(flat)
    return _Margins(margins, along, slopes)


def _degree(
    margins: np.ndarray, along: np.ndarray, slopes: np.ndarray, w: np.ndarray
) -> float:
    """L of Euler's identity ⟨∇m, w⟩ = L·m; `ValueError` where there is none."""
    degree = float(margins @ along / (margins @ margins))
    scale = np.linalg.norm(slopes, axis=1) * np.linalg.norm(w)
    deviation = float(np.max(np.abs(along - degree * margins) / scale))
    if not (deviation <= _MAX_DEVIATION and degree > 0):
        raise ValueError(
            "The margins are not homogeneous in the trained weights: ⟨∇m, w⟩ = L·m "
            f"fails by {deviation:.1e} of its size at L = {degree:.3g}. The theory of "
            "maximal margins is for networks without biases above the first layer and "
            "with homogeneous activations."
        )
    return degree


def _multipliers(w: np.ndarray, slopes: np.ndarray, excess: np.ndarray) -> np.ndarray:
    # SciPy comes with JAX; only here are its optimizers worth their import.
    from scipy.optimize import nnls

    # In units in which ‖w‖ = 1, the second block is max λ_i (m_i − 1)/‖w‖².
    size = float(np.linalg.norm(w))
    rows = np.vstack([slopes.T / size, np.diag(excess) / size**2])
    target = np.concatenate([w / size, np.zeros_like(excess)])
    columns = np.linalg.norm(rows, axis=0)
    scaled, _ = nnls(rows / columns, target)
    return scaled / columns


def _with_weights(problem: Problem, w: np.ndarray) -> Problem:
    unravel = ravel_pytree(problem.weights)[1]
    return eqx.tree_at(lambda p: p.weights, problem, unravel(jnp.asarray(w)))


def _curvature(problem: Problem, multipliers: np.ndarray, slopes: np.ndarray) -> float:
    """The smallest eigenvalue of the Lagrangian's Hessian where support margins stay."""
    if problem.num_weights > _MAX_DENSE:
        return float("nan")
    hessian = np.asarray(_lagrangian_hessian(problem, jnp.asarray(multipliers)))
    held = slopes[multipliers > NEGLIGIBLE * multipliers.max()]
    values, directions = np.linalg.eigh(held.T @ held)
    free = directions[:, values <= _ROUNDING * values.max()]
    if not free.size:
        return float("inf")
    return float(np.linalg.eigvalsh(free.T @ hessian @ free)[0])


@fast_compile_jit
@full_matmul_precision()
def _lagrangian_hessian(
    problem: Problem, multipliers: Float[Array, " margins"]
) -> Float[Array, "weights weights"]:
    flat, unravel = ravel_pytree(problem.weights)

    def lagrangian(v):
        margins = sample_margins(problem, unravel(v)).ravel()
        return 0.5 * jnp.sum(v**2) - jnp.sum(multipliers * margins)

    return jax.hessian(lagrangian)(flat)
