"""Clarke's sub-differential by its definition, from gradients at points around w.

It is the convex hull of the gradients in every neighbourhood of w, and a curve is
gradient flow where dw/dt is minus its least element: that holds for almost every time on
every solution of the inclusion, unique or not [Davis, Drusvyatskiy, Kakade & Lee 2020,
section 5]. Nothing here knows of kinks.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import nnls

Gradients = Callable[[np.ndarray], np.ndarray]

#: How far around w. Gradients there differ from those at w by about ten times that.
NEAR = 1e-9
#: Points a round that are aimed, and how far they are off their aim, in logarithms.
_AIMED, _OFF = 1000, (-4.0, 0.0)
#: Rounds at most, and in a row without a change of more than this part.
_ROUNDS, _PATIENCE, _CHANGE = 60, 8, 1e-9


def gradients_around(
    gradients: Gradients, w: np.ndarray, *, points: int = 2000, near: float = NEAR
) -> np.ndarray:
    """∇L at `points` random points: `gradients` takes and returns rows.

    The least element of these is too long where a cell of the gradient is too narrow to
    be hit.
    """
    random = np.random.default_rng(0).standard_normal((points, w.size))
    return np.asarray(gradients(w + near * random))


def least_element(gradients: np.ndarray) -> np.ndarray:
    """The point nearest to 0 in the convex hull of the rows."""
    return _least(gradients)[0]


def least_around(
    gradients: Gradients, w: np.ndarray, *, near: float = NEAR
) -> np.ndarray:
    """The least element of the gradients around w, those of narrow cells included.

    A gradient that shortens the least element found so far is to be looked for where L
    falls: against it. Points around that direction are added to those that it is made of,
    until a few rounds have not shortened it.
    """
    random = np.random.default_rng(1)
    least, corners = _least(gradients_around(gradients, w, near=near))
    stayed = 0
    for _ in range(_ROUNDS):
        length = np.linalg.norm(least)
        if length == 0 or stayed == _PATIENCE:
            break
        aim = -np.sqrt(w.size) * least / length
        off = 10 ** random.uniform(*_OFF, (_AIMED, 1))
        points = aim + off * random.standard_normal((_AIMED, w.size))
        found = np.asarray(gradients(w + near * points))
        least, corners = _least(np.concatenate([corners, found]))
        size = np.abs(corners).max(initial=0)
        stayed = stayed + 1 if length - np.linalg.norm(least) <= _CHANGE * size else 0
    return least


def _least(gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least element, and the rows that it is made of.

    By non-negative least squares: its penalty on Σ a = 1 changes the length of the
    answer, not its direction.
    """
    size = np.abs(gradients).max()
    if size == 0:
        return np.zeros(gradients.shape[1]), gradients[:1]
    rows = np.unique(np.round(gradients / size, 9), axis=0)
    ones = np.ones(len(rows))
    right = np.append(np.zeros(rows.shape[1]), 1.0)
    share, _ = nnls(np.vstack([rows.T, ones]), right, maxiter=50_000)
    return size * (share @ rows) / share.sum(), size * rows[share > 0]
