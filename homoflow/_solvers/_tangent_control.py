"""Step sizes that keep a tangent of the flow accurate too, for derivatives."""

import dataclasses
from typing import ClassVar, final

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from ._base import as_flow_solver
from ._forwarding import AbstractForwardingSolver

#: No entry grows by more in a step that is accepted.
_MAX_GROWTH = 1e6


@final
class TangentControl(AbstractForwardingSolver):
    """An explicit Runge–Kutta method whose steps resolve a tangent u beside the state v.

    The derivative of a run is that of its steps, their sizes held fixed. On a stiff flow
    the control of the step size goes to the limit of stability and keeps the state near
    the flow there, by making steps smaller whenever they begin to depart from it. Nothing
    does so for the derivative: it is multiplied by the same unstable steps, and can be
    wrong in its first digit where the state is right to eight. So u, a random tangent
    (du/dt = ∂f/∂v·u), is carried along, and the error that is controlled is the larger
    one of v's and of u's: as sensitivities are controlled in the ODE solver CVODES
    (Hindmarsh et al. 2005, §3.2).

    u costs one product with the Jacobian in each stage, and is itself not differentiated.
    """

    solver: dfx.AbstractSolver  # pyright: ignore[reportIncompatibleVariableOverride]
    rtol: Float[Array, ""] | None = None
    atol: Float[Array, ""] | None = None

    scales_errors: ClassVar[bool] = True

    @property
    def stepper(self) -> dfx.AbstractSolver:
        return self.solver

    def with_tolerances(self, rtol, atol) -> "TangentControl":
        return dataclasses.replace(self, rtol=rtol, atol=atol)

    def with_curvature(self, curvature) -> "TangentControl":
        del curvature
        return self

    def make_controller(self, rtol, atol, *, dtmin, force_dtmin):
        one = jnp.ones_like(rtol)
        return as_flow_solver(self.solver).make_controller(
            jnp.zeros_like(one), one, dtmin=dtmin, force_dtmin=force_dtmin
        )

    def init(self, terms, t0, t1, y0, args):
        tangent = jax.random.normal(jax.random.key(0), y0.shape, y0.dtype)
        pair = y0, tangent
        inner = self.solver.init(
            _with_tangent(terms, self._far(y0)), t0, t1, pair, args
        )
        return inner, tangent

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        inner, tangent = solver_state
        (y1, tangent1), errors, dense, inner, result = self.solver.step(
            _with_tangent(terms, self._far(y0)),
            *(t0, t1, (y0, tangent), args, inner, made_jump),
        )
        # The length of the step, which may depend on `t1`, moves the tangent too.
        tangent1 = lax.stop_gradient(tangent1)
        if inner is not None:
            is_first, (slope, of_tangent) = inner
            inner = is_first, (slope, lax.stop_gradient(of_tangent))
        error = jnp.full_like(y0, self._scaled_error(y0, y1, tangent, tangent1, errors))
        dense = {name: value[0] for name, value in dense.items()}
        return y1, error, dense, (inner, tangent1), result

    def _scaled_error(self, y0, y1, tangent, tangent1, errors) -> Float[Array, ""]:
        """The larger one of both root mean squares, in units of their tolerances.

        A tangent is as large as it happens to be: its tolerance is relative to its norm.
        """
        assert self.rtol is not None
        assert self.atol is not None
        of_state, of_tangent = lax.stop_gradient(errors)
        sizes = jnp.maximum(jnp.abs(y0), jnp.abs(y1))
        state = _rms(of_state / (self.atol + self.rtol * sizes))
        size = jnp.maximum(_rms(tangent), _rms(tangent1))
        relative = _rms(of_tangent) / (self.rtol * jnp.where(size > 0, size, 1))
        return lax.stop_gradient(jnp.maximum(state, relative))

    def _far(self, y0) -> Float[Array, ""]:
        """How large no stage of a step that is accepted can be."""
        assert self.rtol is not None
        assert self.atol is not None
        scale = jnp.maximum(jnp.max(jnp.abs(y0)), self.atol / self.rtol)
        return lax.stop_gradient(_MAX_GROWTH * scale)

    def can_project(self, solver_state, y0):
        inner, tangent = solver_state
        return as_flow_solver(self.solver).can_project(inner, (y0, tangent))

    def step_with_projection(
        self, project, terms, t0, t1, y0, args, solver_state, made_jump
    ):
        y1, error, dense, (inner, tangent), result = self.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        rescaling = project(y1)
        if inner is not None:
            is_first, (slope, of_tangent) = inner
            inner = is_first, (rescaling.apply_to_gradient(slope), of_tangent)
        state = inner, tangent
        return rescaling.projected, error, dense, state, result, rescaling


def _with_tangent(terms: PyTree, far: Float[Array, ""]) -> dfx.ODETerm:
    """The terms' equation for v, and its linearization for u.

    A step with a stage farther than `far` is rejected, by a slope of u that is NaN. That
    of v is 0 there, and nothing is computed that may overflow: a rejected step adds
    zero times its numbers to the derivative, which must not be infinite.
    """

    def slopes(t, pair, args):
        v, u = pair
        is_far = ~(jnp.max(jnp.abs(v)) <= far)
        v = jnp.where(is_far, 0, v)
        field = lambda v: terms.vf(lax.stop_gradient(t), v, _fixed(args))  # noqa: E731
        _, of_tangent = jax.jvp(field, (lax.stop_gradient(v),), (lax.stop_gradient(u),))
        of_state = jnp.where(is_far, 0, terms.vf(t, v, args))
        return of_state, jnp.where(is_far, jnp.nan, of_tangent)

    return dfx.ODETerm(slopes)


def _fixed(args: PyTree) -> PyTree:
    numbers, rest = eqx.partition(args, eqx.is_inexact_array)
    return eqx.combine(lax.stop_gradient(numbers), rest)


def _rms(v: Array) -> Float[Array, ""]:
    return jnp.sqrt(jnp.mean(v**2))
