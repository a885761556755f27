"""A wrapper that keeps a solver's laws, by rescalings that leave the function alone."""

from typing import ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from .._rescaling import Rescaling, RescalingGroup
from .._rescaling._gram import max_magnitude
from ._base import as_flow_solver
from ._forwarding import AbstractForwardingSolver

#: Where some drift may wait, laws are checked after so many steps: for square layers, to
#: evaluate them takes a part of a gradient that counts.
CHECK_EVERY = 4


class ProjectedState(NamedTuple):
    """What is kept from step to step.

    - `inner`: the wrapped solver's own state.
    - `targets`: the laws at the start.
    - `removed_drift`: by how much they had drifted when they were restored, summed up;
        where they are only watched, by how much they have drifted.
    - `largest_drift`: the largest between two checks, relative to ‖w‖². Of a law it is
        the error of a few steps.
    - `steps_since_check`: how many steps were taken since laws were last checked.
    """

    inner: PyTree
    targets: tuple[Array, ...]
    removed_drift: tuple[Array, ...]
    largest_drift: Float[Array, ""]
    steps_since_check: Int[Array, ""]


class ProjectedSolver(AbstractForwardingSolver):
    """Any one-step solver of gradient flow, with the laws restored after steps.

    After a step the weights are moved along the orbit of `orbit`'s rescalings to where
    the laws have their initial values: the function and the loss stay what they are, to
    rounding, so that nothing but the drift is removed. What is interpolated between
    steps is as the wrapped solver has it. The state of the solve is what `orbit` takes for
    weights.

    It is for fields −∇L with L constant along the orbit. There the slope that a
    first-same-as-last Runge–Kutta method keeps goes along by g⁻ᵀ, at no evaluation. A
    solver that remembers more is refused, unless it has its own `step_with_projection`
    (see `AbstractFlowSolver`): a `Rescaling` has the linear maps for what is like weights
    and for what is like gradients.

    - `max_drift`: while no law has drifted by more than this, relative to ‖w‖², steps are
        left alone. 0 for rounding; otherwise laws are checked every fourth step.
    - `restores`: if false, laws are only watched. The program is much smaller.
    """

    solver: dfx.AbstractSolver  # pyright: ignore[reportIncompatibleVariableOverride]
    orbit: RescalingGroup
    max_drift: Float[Array, ""] | float = 0.0
    restores: bool = eqx.field(static=True, default=True)

    uses_memory: ClassVar[bool] = True

    def cost(self, *, num_accepted, num_rejected, num_steps, solver_state, args):
        return as_flow_solver(self.solver).cost(
            num_accepted=num_accepted,
            num_rejected=num_rejected,
            num_steps=num_steps,
            solver_state=None if solver_state is None else solver_state.inner,
            args=args,
        )

    def init(self, terms, t0, t1, y0, args) -> ProjectedState:
        inner = self.solver.init(terms, t0, t1, y0, args)
        if not as_flow_solver(self.solver).can_project(inner, y0):
            raise ValueError(
                f"{type(self.solver).__name__} remembers more of past steps than a slope: "
                "after a projection its memory would be of another point. It would need "
                "a method `step_with_projection`."
            )
        targets = self.orbit.values(y0)
        zeros = jax.tree.map(jnp.zeros_like, targets)
        largest = jnp.zeros_like(self.orbit.size(y0))
        return ProjectedState(inner, targets, zeros, largest, jnp.zeros((), jnp.int32))

    def step(self, terms, t0, t1, y0, args, solver_state: ProjectedState, made_jump):
        if not self.restores:
            return self._watch(terms, t0, t1, y0, args, solver_state, made_jump)
        inner, targets, removed_drift, largest_drift, steps_since_check = solver_state
        is_due = jnp.asarray(self.max_drift == 0)
        is_due = eqxi.unvmap_any(is_due | (steps_since_check + 1 >= CHECK_EVERY))

        def project(y: PyTree) -> Rescaling:
            return lax.cond(
                is_due,
                lambda: self.orbit.project(y, targets, self.max_drift),
                lambda: self.orbit.identity(y, targets),
            )

        step = as_flow_solver(self.solver).step_with_projection
        y1, error, dense, inner, result, rescaling = step(
            project, terms, t0, t1, y0, args, inner, made_jump
        )
        removed_drift = tuple(
            jnp.where(rescaling.is_identity, old, old + new)
            for old, new in zip(removed_drift, rescaling.residual, strict=True)
        )
        drift = max_magnitude(rescaling.residual) / self.orbit.size(y1)
        drift = lax.stop_gradient(jnp.where(rescaling.is_identity, 0, drift))
        largest_drift = jnp.fmax(largest_drift, drift)
        steps_since_check = jnp.where(is_due, 0, steps_since_check + 1)
        state = ProjectedState(
            inner, targets, removed_drift, largest_drift, steps_since_check
        )
        return y1, error, dense, state, result

    def _watch(self, terms, t0, t1, y0, args, state: ProjectedState, made_jump):
        """A step as the wrapped solver takes it, and how far the laws have drifted."""
        y1, error, dense, inner, result = self.solver.step(
            terms, t0, t1, y0, args, state.inner, made_jump
        )
        is_due = eqxi.unvmap_any(state.steps_since_check + 1 >= CHECK_EVERY)
        before = state.removed_drift
        drift = lax.cond(
            is_due,
            lambda: jax.tree.map(jnp.subtract, self.orbit.values(y1), state.targets),
            lambda: before,
        )
        change = max_magnitude(jax.tree.map(jnp.subtract, drift, before))
        change = lax.stop_gradient(change / self.orbit.size(y1))
        watched = ProjectedState(
            inner,
            state.targets,
            drift,
            jnp.fmax(state.largest_drift, change),
            jnp.where(is_due, 0, state.steps_since_check + 1),
        )
        return y1, error, dense, watched, result
