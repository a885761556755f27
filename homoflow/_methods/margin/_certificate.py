"""The conditions of Karush, Kuhn and Tucker for a maximal margin, at one direction."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..._jax._tracing import is_concrete_call
from ..._kinks import kinked_function
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
from ._piece import Kinks, Piece, has_pieces, kinks_at, piece_at

#: The Jacobian of the margins has at most so many numbers, a Hessian so many rows.
_MAX_NUMBERS, MAX_DENSE = 20_000_000, 1_000
#: Eigenvalues below this share of the largest one are rounding.
_ROUNDING = 1e-12
#: How much dearer it is that a part of a multiplier exceeds it than an error of the sum.
#: What is left of an excess is cut off, and counts as an error.
_PARTS = 1e2


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


class Combination(NamedTuple):
    """Σ λ_i g_i with g_i from Clarke's subdifferential of the margin m_i.

    - `multipliers`: λ ≥ 0 of each margin.
    - `forces`: the coefficient of ∇z of each kink that is held; each is a sum of parts
        between 0 and λ_i times a jump.
    - `total`: the sum.
    """

    multipliers: np.ndarray
    forces: np.ndarray
    total: np.ndarray


def certificate_at(problem: Problem, *, moved: float = 0.0) -> MarginCertificate:
    """The certificate of a problem's weights, rescaled to a smallest margin of 1.

    `moved`: what to say of how far they were moved before. Raises `ValueError` where no
    margin can be scaled to 1, or where Clarke's subdifferential is not known.
    """
    w = flat_weights(problem)
    piece = piece_at(problem, w) if has_pieces(problem) else None
    at, w, degree = rescaled(problem, w, piece)
    kinks = None if piece is None else kinks_at(problem, w, piece)
    if piece is not None:
        _refuse_stacked(problem, piece)
    sum_ = combine(w, at, piece, kinks)
    size = float(np.linalg.norm(w))
    shape = jax.eval_shape(lambda v: sample_margins(problem, v), problem.weights).shape
    gap, held = 0.0, None
    if piece is not None and kinks is not None:
        gap = float(np.max(np.abs(kinks.distances[piece.held]), initial=0))
        held = jnp.asarray(piece.held)
    multipliers = sum_.multipliers
    return MarginCertificate(
        model=with_flat_weights(problem, w).model,
        degree=degree,
        margin=float(size**-degree),
        margins=jnp.asarray(at.values.reshape(shape)),
        multipliers=jnp.asarray(multipliers.reshape(shape)),
        stationarity=float(np.linalg.norm(w - sum_.total)) / size,
        complementarity=float(np.max(multipliers * np.abs(at.values - 1))) / size**2,
        curvature=_curvature(problem, w, at, sum_, piece, kinks),
        moved=moved,
        on_kinks=held,
        kink_distance=gap,
    )


def rescaled(
    problem: Problem, w: np.ndarray, piece: Piece | None = None
) -> tuple[Margins, np.ndarray, float]:
    """Margins at weights of which the smallest one is 1, these, and the degree L.

    m(cw) = cᴸ m(w) and ∇m(cw) = cᴸ⁻¹ ∇m(w). Raises `ValueError` where no margin can be
    scaled to 1.
    """
    at = margins_at(problem, w, piece)
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


def combine(
    w: np.ndarray, at: Margins, piece: Piece | None, kinks: Kinks | None
) -> Combination:
    """The combination that makes ‖w − Σ λ_i g_i‖² + Σ λ_i² (m_i − 1)²/‖w‖² least."""
    columns, owners, pairs = _parts(w.size, piece, kinks)
    multipliers, parts = _least_squares(w, at, columns, owners)
    total = at.slopes.T @ multipliers + columns.T @ parts
    forces = np.zeros(0)
    if piece is not None and kinks is not None:
        jumps = kinks.jumps.reshape(-1, kinks.jumps.shape[-1])
        forces = np.zeros(len(kinks.held_slopes))
        place = np.cumsum(piece.held.ravel()) - 1
        of_pair = piece.held.shape[1]
        for owner, pair, part in zip(owners, pairs, parts, strict=True):
            forces[place[pair]] += part * jumps[owner, pair % of_pair]
    return Combination(multipliers, forces, total)


def _parts(
    num_weights: int, piece: Piece | None, kinks: Kinks | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By how much each margin's slope jumps at the kinks that its sample is on.

    In rows, with the margin and the pair of each; of no jump there is none.
    """
    none = np.zeros(0, int)
    if piece is None or kinks is None or not piece.held.any():
        return np.zeros((0, num_weights)), none, none
    outputs = kinks.jumps.shape[1]
    samples, of_sample = np.nonzero(piece.held)
    rows, owners, pairs = [], [], []
    for i, k, slope in zip(samples, of_sample, kinks.held_slopes, strict=True):
        for c in range(outputs):
            rows.append(kinks.jumps[i, c, k] * slope)
            owners.append(i * outputs + c)
            pairs.append(i * piece.held.shape[1] + k)
    rows = np.array(rows)
    jumps = np.linalg.norm(rows, axis=1) > 0
    return rows[jumps], np.array(owners)[jumps], np.array(pairs)[jumps]


def _least_squares(
    w: np.ndarray, at: Margins, columns: np.ndarray, owners: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers λ ≥ 0, and for each row of `columns` a part between 0 and its owner's λ.

    An inequality is an equation with a slack that is not negative.
    """
    # SciPy comes with JAX; only here are its optimizers worth their import.
    from scipy.optimize import nnls

    # In units in which ‖w‖ = 1, the second block is max λ_i (m_i − 1)/‖w‖².
    size, count, more = float(np.linalg.norm(w)), len(at.values), len(owners)
    lengths = np.linalg.norm(at.slopes, axis=1)
    lengths[lengths == 0] = 1
    owned = np.zeros((more, count))
    owned[np.arange(more), owners] = _PARTS / size
    dear = np.eye(more) * _PARTS / size
    rows = np.block(
        [
            [at.slopes.T / lengths / size, columns.T / lengths[owners] / size,
             np.zeros((w.size, more))],
            [np.diag((at.values - 1) / lengths) / size**2, np.zeros((count, 2 * more))],
            [owned, -dear, -dear],
        ]
    )  # fmt: skip
    target = np.concatenate([w / size, np.zeros(count + more)])
    scaled, _ = nnls(rows, target)
    multipliers = scaled[:count] / lengths
    parts = scaled[count : count + more] / lengths[owners]
    return multipliers, np.minimum(parts, multipliers[owners])


def _refuse_stacked(problem: Problem, piece: Piece) -> None:
    """`ValueError` where a kink lies above another one that the same sample is on."""
    if kinked_function(problem).depth > 1 and np.any(piece.held.sum(1) > 1):
        raise ValueError(
            "A sample is on several kinks at once, of a network with kinks above kinks: "
            "Clarke's subdifferential there is not made."
        )


def _curvature(
    problem: Problem,
    w: np.ndarray,
    at: Margins,
    sum_: Combination,
    piece: Piece | None,
    kinks: Kinks | None,
) -> float:
    """The smallest eigenvalue of the Lagrangian's Hessian where support margins stay."""
    if w.size > MAX_DENSE:
        return float("nan")
    multipliers = sum_.multipliers
    hessian = lagrangian_hessian(problem, w, multipliers, piece, sum_.forces)
    held = at.slopes[multipliers > NEGLIGIBLE * multipliers.max()]
    if kinks is not None:
        held = np.vstack([held, kinks.held_slopes[sum_.forces != 0]])
    values, directions = np.linalg.eigh(held.T @ held)
    free = directions[:, values <= _ROUNDING * values.max()]
    if not free.size:
        return float("inf")
    return float(np.linalg.eigvalsh(free.T @ hessian @ free)[0])
