"""A wrapper that keeps a solver's laws, by rescalings that leave the function alone."""

from typing import NamedTuple

import diffrax as dfx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from .._rescaling import Rescaling, RescalingGroup

#: Where some drift may wait, every so manieth step is looked at: for layers as wide as
#: long, their laws cost a part of a gradient that counts.
LOOKED_AT = 4


class Remembered(NamedTuple):
    """What is remembered from step to step.

    - `inner`: the wrapped solver's own memory.
    - `targets`: the laws at the start.
    - `removed`: by how much they had drifted whenever they were restored, summed up.
    - `passed`: how many steps have not been looked at since the last one that was.
    """

    inner: PyTree
    targets: tuple[Array, ...]
    removed: tuple[Array, ...]
    passed: Int[Array, ""]


class OnOrbit(dfx.AbstractWrappedSolver):
    """Any one-step solver of gradient flow, with drift of the laws undone after steps.

    After a step the weights are moved along the orbit of `orbit`'s rescalings to where
    the laws have their initial values: the function and the loss stay what they are, to
    rounding, so that nothing but the drift is removed. What is interpolated between
    steps is as the wrapped solver has it. The state of the solve is what `orbit` takes for
    weights.

    It is for fields −∇L with L constant along the orbit. There the slope that a
    first-same-as-last Runge–Kutta method keeps goes along by g⁻ᵀ, at no evaluation. A
    solver that remembers more is refused, unless it takes a step whose end is restored by
    itself: `restored_step(restoring, *arguments)`, the arguments and the result those of
    `step`, the result with the `Rescaling` that `restoring(state)` returned appended. That
    one has the linear maps for what is like weights and for what is like gradients.

    - `beyond`: while no law has drifted by more than this, relative to ‖w‖², steps are
        left alone; 0 for rounding, else every fourth step is looked at.
    """

    solver: dfx.AbstractSolver  # pyright: ignore[reportIncompatibleVariableOverride]
    orbit: RescalingGroup
    beyond: Float[Array, ""] | float = 0.0

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
        if not (_restores_itself(self.solver) or _is_slope_of(self.solver, inner, y0)):
            raise ValueError(
                f"{type(self.solver).__name__} remembers more of past steps than a slope: "
                "after a projection its memory would be of another point. It would need "
                "a method `restored_step`."
            )
        targets = self.orbit.values(y0)
        nothing = jax.tree.map(jnp.zeros_like, targets)
        return Remembered(inner, targets, nothing, jnp.zeros((), jnp.int32))

    def step(self, terms, t0, t1, y0, args, solver_state: Remembered, made_jump):
        inner, targets, removed, passed = solver_state
        given = terms, t0, t1, y0, args, inner, made_jump
        is_due = jnp.asarray(self.beyond == 0) | (passed + 1 >= LOOKED_AT)
        is_due = eqxi.unvmap_any(is_due)

        def restoring(y: PyTree) -> Rescaling:
            return lax.cond(
                is_due,
                lambda: self.orbit.project(y, targets, self.beyond),
                lambda: self.orbit.identity(y, targets),
            )

        if _restores_itself(self.solver):
            step = self.solver.restored_step  # pyright: ignore[reportAttributeAccessIssue]
            y1, error, dense, inner, result, rescaling = step(restoring, *given)
        else:
            y1, error, dense, inner, result = self.solver.step(*given)
            rescaling = restoring(y1)
            y1 = rescaling.projected
            if inner is not None:
                inner = inner[0], rescaling.apply_to_gradient(inner[1])
        removed = tuple(
            jnp.where(rescaling.is_identity, old, old + new)
            for old, new in zip(removed, rescaling.residual, strict=True)
        )
        passed = jnp.where(is_due, 0, passed + 1)
        state = Remembered(inner, targets, removed, passed)
        return y1, error, dense, state, result


def _restores_itself(solver: dfx.AbstractSolver) -> bool:
    return hasattr(solver, "restored_step")


def _is_slope_of(solver: dfx.AbstractSolver, inner: PyTree, y0: PyTree) -> bool:
    """Whether a solver's memory is nothing, or a Runge–Kutta method's last slope."""
    if inner is None:
        return True
    if not isinstance(solver, dfx.AbstractRungeKutta):
        return False
    _, slope = inner
    return jax.tree.structure(slope) == jax.tree.structure(y0)
