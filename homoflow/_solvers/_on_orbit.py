"""A wrapper that keeps a solver's laws, by rescalings that leave the function alone."""

from typing import NamedTuple

import diffrax as dfx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._orbits import Orbit, Rescaling


class Remembered(NamedTuple):
    """What is remembered from step to step.

    - `inner`: the wrapped solver's own memory.
    - `targets`: the laws at the start.
    - `removed`: by how much they had drifted whenever they were restored, summed up.
    """

    inner: PyTree
    targets: tuple[Array, ...]
    removed: tuple[Array, ...]


class OnOrbit(dfx.AbstractWrappedSolver):
    """Any one-step solver of gradient flow, with drift of the laws undone after steps.

    After a step the weights are moved along the orbit of `orbit`'s rescalings to where
    the laws have their initial values: the function and the loss stay what they are, to
    rounding, so that nothing but the drift is removed. What is interpolated between
    steps is as the wrapped solver has it. The state of the solve is what `orbit` takes for
    weights.

    It is for fields −∇L with L constant along the orbit. There the slope that a
    first-same-as-last Runge–Kutta method keeps goes along by g⁻ᵀ, at no evaluation. A
    solver that remembers more is refused, unless it says how that transforms by a method
    `transported(memory, y, weights, slopes)`, with the linear maps for what is like the
    state `y` and for what is like its gradients.

    - `beyond`: while no law has drifted by more than this, relative to ‖w‖², steps are
        left alone; 0 for rounding.
    - `until`: steps that end there, or later, are projected whatever the drift.
    """

    solver: dfx.AbstractSolver  # pyright: ignore[reportIncompatibleVariableOverride]
    orbit: Orbit
    beyond: Float[Array, ""] | float = 0.0
    until: Float[Array, ""] | float = jnp.inf

    @property
    def term_structure(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.term_structure

    @property
    def term_compatible_contr_kwargs(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.term_compatible_contr_kwargs

    # Diffrax looks for these where it is told by `isinstance` that they are there.

    @property
    def scan_kind(self):
        return self.solver.scan_kind  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def root_finder(self):
        return self.solver.root_finder  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def root_find_max_steps(self):
        return self.solver.root_find_max_steps  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.interpolation_cls

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms, t0, t1, y0, args) -> Remembered:
        inner = self.solver.init(terms, t0, t1, y0, args)
        if not (_is_slope_of(self.solver, inner, y0) or _says_how(self.solver, inner)):
            raise ValueError(
                f"{type(self.solver).__name__} remembers more of past steps than a slope: "
                "after a projection its memory would be of another point. It would need "
                "a method `transported`."
            )
        targets = self.orbit.values(y0)
        return Remembered(inner, targets, jax.tree.map(jnp.zeros_like, targets))

    def step(self, terms, t0, t1, y0, args, solver_state: Remembered, made_jump):
        inner, targets, removed = solver_state
        y1, error, dense, inner, result = self.solver.step(
            terms, t0, t1, y0, args, inner, made_jump
        )
        beyond = jnp.where(t1 < self.until, self.beyond, 0)
        rescaling = self.orbit.restoring(y1, targets, beyond)
        if inner is not None:
            # A long memory is a lot to go through where nothing is to be done.
            inner = lax.cond(
                eqxi.unvmap_all(rescaling.is_one),
                lambda: inner,
                lambda: self._transported(inner, y1, rescaling),
            )
        removed = tuple(
            jnp.where(rescaling.is_one, old, old + new)
            for old, new in zip(removed, rescaling.miss, strict=True)
        )
        state = Remembered(inner, targets, removed)
        return rescaling.restored, error, dense, state, result

    def _transported(self, inner: PyTree, y1: PyTree, rescaling: Rescaling) -> PyTree:
        if _says_how(self.solver, inner):
            return self.solver.transported(  # pyright: ignore[reportAttributeAccessIssue]
                inner, y1, rescaling.weights, rescaling.slopes
            )
        return inner[0], rescaling.slopes(inner[1])


def _says_how(solver: dfx.AbstractSolver, inner: PyTree) -> bool:
    return inner is not None and hasattr(solver, "transported")


def _is_slope_of(solver: dfx.AbstractSolver, inner: PyTree, y0: PyTree) -> bool:
    """Whether a solver's memory is nothing, or a Runge–Kutta method's last slope."""
    if inner is None:
        return True
    if not isinstance(solver, dfx.AbstractRungeKutta):
        return False
    _, slope = inner
    return jax.tree.structure(slope) == jax.tree.structure(y0)
