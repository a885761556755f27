"""From the end of a flow to the stationary point next to it."""

import numpy as np

from ._critical_point import Analyzer, CriticalPoint

_MAX_STEPS = 40
#: What a step leaves of ‖∇L‖ where that is rounding.
_MIN_GAIN = 0.5


def polish(
    analyze: Analyzer, start: CriticalPoint, reach: float, scale: np.ndarray
) -> CriticalPoint:
    """Newton's method from `start` until ∇L is rounding, at most `reach` away from it.

    `scale`: the units of weights, to measure how far that is.

    Its steps are the least ones: no part of them lies along directions of zero
    curvature. Such are the tangents Tw of symmetries, which at a balance law are also
    the law's gradient: so laws change to second order in the distance only. A saddle is
    as good as a minimum: what the point is has to be seen there.
    """
    best = start
    for _ in range(_MAX_STEPS):
        there = best.weights + best.step
        if np.linalg.norm(scale * (there - start.weights)) > reach:
            break
        point = analyze(there)
        gained = point.grad_norm / best.grad_norm if best.grad_norm > 0 else 1.0
        if gained < 1:
            best = point
        if gained > _MIN_GAIN:
            break
    return best
