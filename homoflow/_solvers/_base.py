"""Solvers that are given the tolerances, rather than their step size controllers."""

from abc import abstractmethod
from typing import Any

import diffrax as dfx
from equinox import AbstractVar
from jaxtyping import Array, Float


class AbstractTolerantSolver(dfx.AbstractAdaptiveSolver):
    """A solver whose error estimate is in units of the tolerance.

    So that it can weigh errors itself: a multistep method chooses its order by them.
    """

    rtol: AbstractVar[Any]
    atol: AbstractVar[Any]

    @abstractmethod
    def at(
        self, rtol: Float[Array, ""], atol: Float[Array, ""]
    ) -> "AbstractTolerantSolver":
        """The same solver at these tolerances."""

    @abstractmethod
    def controller(
        self, *, dtmin: Float[Array, ""] | None = None, force_dtmin: bool = False
    ) -> dfx.AbstractStepSizeController:
        """The step size controller that reads its error estimates."""
