"""Solvers made for gradient flow, as Diffrax solvers."""

from ._adams import ExponentialAdams as ExponentialAdams
from ._gauss_legendre import GaussLegendre as GaussLegendre
from ._on_orbit import OnOrbit as OnOrbit, Remembered as Remembered
from ._rosenbrock import Rodas5P as Rodas5P
from ._tolerances import AbstractTolerantSolver as AbstractTolerantSolver
