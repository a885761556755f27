"""What is known of the loss at one point: gradient, curvature, the way to rest."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

#: Off a stationary point flat directions have curvatures of about ‖∇L‖/‖w‖ of both signs
#: (along the orbit of a symmetry T, ∇²L·Tw = −Tᵀ∇L). Up to this many times that is zero.
_TILT_FACTOR = 100.0
#: ‖∇L‖ that is rounding, relative to ‖∇²L‖·‖w‖.
STATIONARY = 64 * float(np.finfo(float).eps)
#: A step from one stationary point to another, relative to ‖w‖.
_NEXT = 1e-5


class CriticalPoint(NamedTuple):
    """A point, and what there is around it.

    - `size`: the length that weights are measured by.
    - `lowest`, `largest`: extreme eigenvalues of the Hessian, `norm` the largest absolute.
    - `zero`: eigenvalues of at most this absolute value count as zero.
    - `step`: the least one to where a quadratic model without its zero directions is
        stationary; `unstable` is the length of its part along negative curvature.
    - `values`, `vectors`: the eigenvalues that are known (all, if `is_whole`) in
        increasing order, and their vectors as columns.
    """

    weights: np.ndarray
    loss: float
    gradient: np.ndarray
    size: float
    lowest: float
    largest: float
    norm: float
    zero: float
    step: np.ndarray
    unstable: float
    values: np.ndarray
    vectors: np.ndarray

    @property
    def is_whole(self) -> bool:
        """Whether all eigenvalues are known."""
        return len(self.values) == len(self.weights)

    @property
    def grad_norm(self) -> float:
        return float(np.linalg.norm(self.gradient))

    @property
    def is_stationary(self) -> bool:
        """Whether the slope is rounding, and there is no such point further on."""
        at_rest = self.grad_norm <= STATIONARY * self.norm * self.size
        return at_rest and float(np.linalg.norm(self.step)) <= _NEXT * self.size

    @property
    def zeros(self) -> int | None:
        """How many eigenvalues are zero; `None` if not all are known."""
        if not self.is_whole:
            return None
        return int(np.sum(np.abs(self.values) <= self.zero))

    def in_units_of_weights(self, scale: np.ndarray) -> "CriticalPoint":
        """The same point of w = scale∘u, where it was one of u.

        The lowest eigenvalue becomes the lowest curvature along the same directions, of
        which the eigenvalues of ∇²L would show nothing but the rounding of the largest.
        """
        if np.all(scale == 1):
            return self
        directions = self.vectors / scale[:, None]
        largest = np.linalg.eigvalsh((directions * self.values) @ directions.T)[-1]
        lengths = np.sum((scale[:, None] * self.vectors) ** 2, axis=0)
        return self._replace(
            weights=scale * self.weights,
            gradient=self.gradient / scale,
            lowest=float(np.min(self.values / lengths)),
            largest=float(largest),
            zero=self.zero / float(np.max(lengths)),
            step=scale * self.step,
        )

    def unstable_length(self, moved: np.ndarray) -> float:
        """The length of a displacement's part along the negative curvature known."""
        downward = self.vectors[:, self.values < -self.zero]
        return float(np.linalg.norm(downward.T @ moved))


Analyzer = Callable[[np.ndarray], CriticalPoint]


def zero_curvature(
    gradient: np.ndarray, norm: float, size: float, resolved: float
) -> float:
    """The largest absolute curvature that cannot be told from zero.

    `resolved` is what that is by rounding or the like, relative to `norm`.
    """
    return max(resolved * norm, _TILT_FACTOR * float(np.linalg.norm(gradient)) / size)
