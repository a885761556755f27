"""Clarke's sub-differential by its definition, from gradients at random points around w.

It is the convex hull of the gradients in every neighbourhood of w, and a curve is
gradient flow where dw/dt is minus its least element. Nothing here knows of kinks.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import nnls

#: How far around w. Gradients there differ from those at w by about ten times that.
NEAR = 1e-9


def gradients_around(
    gradients: Callable[[np.ndarray], np.ndarray],
    w: np.ndarray,
    *,
    points: int = 2000,
    near: float = NEAR,
) -> np.ndarray:
    """∇L at `points` random points: `gradients` takes and returns rows."""
    random = np.random.default_rng(0).standard_normal((points, w.size))
    return np.asarray(gradients(w + near * random))


def least_element(gradients: np.ndarray) -> np.ndarray:
    """The point nearest to 0 in the convex hull of the rows.

    By non-negative least squares: its penalty on Σ a = 1 changes the length of the
    answer, not its direction.
    """
    size = np.abs(gradients).max()
    if size == 0:
        return np.zeros(gradients.shape[1])
    rows = np.unique(np.round(gradients / size, 9), axis=0)
    ones = np.ones(len(rows))
    right = np.append(np.zeros(rows.shape[1]), 1.0)
    share, _ = nnls(np.vstack([rows.T, ones]), right, maxiter=50_000)
    return size * (share @ rows) / share.sum()
