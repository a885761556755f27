"""Solvers made for gradient flow, as Diffrax solvers."""

from ._rosenbrock import Rodas5P as Rodas5P
