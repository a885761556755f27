"""Solvers made for gradient flow, as Diffrax solvers."""

from ._on_orbit import OnOrbit as OnOrbit
from ._rosenbrock import Rodas5P as Rodas5P
