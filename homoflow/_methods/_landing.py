"""Steps that end on given times, and not a rounding before them."""

from collections.abc import Callable
from typing import Any, final

import diffrax as dfx
import jax.numpy as jnp
from jaxtyping import Array, Float

#: A step is made longer by so much of itself where that takes it to a time.
_LONGER = 0.01


@final
class LandingController(dfx.AbstractAdaptiveStepSizeController):
    """Another controller's steps, ending on the times of `clip`.

    Diffrax's clipping alone may leave a rest of a rounding: steps of 0.06 get to 0.42, and
    the time was 7·0.06. The next step is that rest, and one ten times as long is still
    too short for the clock, which is an error.
    """

    clip: dfx.ClipStepSizeController

    def __init__(self, clip: dfx.ClipStepSizeController) -> None:
        self.clip = clip

    @property
    def rtol(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.clip.rtol

    @property
    def atol(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.clip.atol

    @property
    def norm(self) -> Callable:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.clip.norm

    def wrap(self, direction: Any) -> "LandingController":
        return LandingController(self.clip.wrap(direction))

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order) -> Any:
        next_t1, state = self.clip.init(terms, t0, t1, y0, dt0, args, func, error_order)
        return _landed(t0, next_t1, state), state

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ) -> Any:
        keep_step, next_t0, next_t1, made_jump, state, result = (
            self.clip.adapt_step_size(
                t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
            )
        )
        next_t1 = _landed(next_t0, next_t1, state)
        return keep_step, next_t0, next_t1, made_jump, state, result


def _landed(start: Any, end: Any, state: Any) -> Float[Array, ""]:
    """The end of a step, or the next time if that is hardly later."""
    index, times = state.step_info
    # Of the last time on there is none to land on.
    time = times[jnp.minimum(index, len(times) - 1)]
    is_near = (end < time) & (time - end <= _LONGER * (end - start))
    return jnp.where(is_near, time, end)
