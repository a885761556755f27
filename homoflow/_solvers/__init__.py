"""Solvers made for gradient flow, as Diffrax solvers."""

from ._base import (
    AbstractFlowSolver as AbstractFlowSolver,
    as_flow_solver as as_flow_solver,
)
from ._gauss_legendre import GaussLegendre as GaussLegendre
from ._projected import (
    ProjectedSolver as ProjectedSolver,
    ProjectedState as ProjectedState,
)
from ._rodas5p import Rodas5P as Rodas5P
from ._tangent_control import TangentControl as TangentControl
from .exponential_adams._solver import ExponentialAdams as ExponentialAdams
