"""What is known of a landscape at one point: slope, curvature, the way to rest."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

#: Curvatures below this, relative to the largest, are zero to rounding.
_ROUNDING = 1e-10
#: Off a stationary point flat directions have curvatures of about ‖∇L‖/‖w‖ of both signs
#: (along the orbit of a symmetry T, ∇²L·Tw = −Tᵀ∇L). Up to this many times that is zero.
_TILT = 10.0
#: ‖∇L‖ of a stationary point, relative to ‖∇²L‖·‖w‖.
STATIONARY = 1e-12
#: A step from one stationary point to another, relative to ‖w‖.
_NEXT = 1e-6


class View(NamedTuple):
    """A point, and what there is around it.

    - `size`: the length that weights are measured by.
    - `lowest`, `largest`: extreme eigenvalues of the Hessian, `norm` the largest absolute.
    - `zero`: eigenvalues of at most this absolute value count as zero.
    - `step`: the least one to where a quadratic model without its zero directions is
        stationary; `unstable` is the length of its part along negative curvature.
    - `values`, `vectors`: the whole spectrum, where the Hessian is dense.
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
    values: np.ndarray | None = None
    vectors: np.ndarray | None = None

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
        if self.values is None:
            return None
        return int(np.sum(np.abs(self.values) <= self.zero))

    def unstable_part(self, moved: np.ndarray) -> float:
        """The length of a displacement's part along known negative curvature."""
        if self.values is None or self.vectors is None:
            return float("nan")
        downward = self.vectors[:, self.values < -self.zero]
        return float(np.linalg.norm(downward.T @ moved))


Look = Callable[[np.ndarray], View]


def zero_curvature(gradient: np.ndarray, norm: float, size: float) -> float:
    """The largest absolute curvature that cannot be told from zero."""
    return max(_ROUNDING * norm, _TILT * float(np.linalg.norm(gradient)) / size)
