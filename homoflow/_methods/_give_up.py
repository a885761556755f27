"""A step size control that sees early when a solver will not get there."""

from typing import Any, NamedTuple, final

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

#: Steps over which progress is measured.
_WINDOW = 32
#: Steps that get longer by more than this factor from one window to the next are on their
#: way to be long enough.
_GROWTH = 1.3


class _Progress(NamedTuple):
    """How far the last steps came: in the window under way since `since`, and before."""

    inner: Any
    num_steps: Int[Array, ""]
    since: Float[Array, ""]
    before: Float[Array, ""]


@final
class GiveUpEarly(dfx.AbstractStepSizeController):
    """Another step size control, that ends the solve where it has no prospect.

    It does where steps have ceased to get longer, and at their length more than
    `max_steps` of them are left to `t1`: an explicit solver that is held up by stability
    is given up after some hundred steps, and not after all that it is allowed. The
    solve then ends as one that has taken the most steps.
    """

    controller: dfx.AbstractStepSizeController
    t1: Float[Array, ""]
    max_steps: int = eqx.field(static=True)

    def wrap(self, direction):
        controller = self.controller.wrap(direction)
        return GiveUpEarly(controller, self.t1, self.max_steps)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        first, inner = self.controller.init(
            terms, t0, t1, y0, dt0, args, func, error_order
        )
        start = jnp.asarray(t0, self.t1.dtype)
        return first, _Progress(inner, jnp.asarray(0), start, jnp.zeros_like(start))

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        state = controller_state
        keep, next_t0, next_t1, made_jump, inner, result = (
            self.controller.adapt_step_size(
                t0, t1, y0, y1_candidate, args, y_error, error_order, state.inner
            )
        )
        count = state.num_steps + 1
        is_full = count % _WINDOW == 0
        came = jnp.asarray(next_t0, self.t1.dtype) - state.since
        left = (self.t1 - next_t0) * _WINDOW
        is_steady = (state.before > 0) & (came <= _GROWTH * state.before)
        is_hopeless = is_full & is_steady & (left > came * (self.max_steps - count))
        ended = dfx.RESULTS.where(
            is_hopeless, dfx.RESULTS.max_steps_reached, dfx.RESULTS.successful
        )
        result = dfx.RESULTS.where(result == dfx.RESULTS.successful, ended, result)
        progress = _Progress(
            inner,
            count,
            jnp.where(is_full, next_t0, state.since),
            jnp.where(is_full, came, state.before),
        )
        return keep, next_t0, next_t1, made_jump, progress, result
