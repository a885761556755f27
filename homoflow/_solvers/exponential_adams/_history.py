"""What exponential Adams keeps from step to step, and what a step is made of."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._divided_differences import NewtonForm
from ._low_rank import LowRank


class Past(NamedTuple):
    """What is kept from step to step, newest first.

    - `states`, `slopes`: w and f at the last `known` steps; zeros beyond.
    - `steps`: the lengths between them.
    - `inner_states`, `inner_slopes`: their coordinates in J's directions (of the states,
        up to a shift that all have in common).
    - `order`: that of the next step.
    - `streak`: in how many steps on end J has learned.
    - `asked_at`: the step size at which J asked last; `asked`: how often it has.
    """

    states: Float[Array, "points size"]
    slopes: Float[Array, "points size"]
    steps: Float[Array, " orders"]
    inner_states: Float[Array, "points rows"]
    inner_slopes: Float[Array, "points rows"]
    known: Int[Array, ""]
    order: Int[Array, ""]
    j: LowRank
    streak: Int[Array, ""]
    asked_at: Float[Array, ""]
    asked: Int[Array, ""]

    def after(self, h: Float[Array, ""], trial: "Trial", end: "End") -> "Past":
        """With one step more, but for the order, and for `states` and `slopes`: they
        become `seen(end)`."""
        moved = trial.moved_inner + trial.correction_inner
        inner_slope = self.j.coordinates(end.slope[None])[0]
        return self._replace(
            steps=_newest(h, self.steps),
            inner_states=_newest(self.inner_states[0] + moved, self.inner_states),
            inner_slopes=_newest(inner_slope, self.inner_slopes),
            known=jnp.minimum(self.known + 1, self.slopes.shape[0]),
        )

    def seen(self, end: "End") -> tuple[Array, Array]:
        """`states` and `slopes` with those of an end before them.

        They are long: where they are moved once they are not to be moved twice.
        """
        return _newest(end.state, self.states), _newest(end.slope, self.slopes)


class End(NamedTuple):
    """w and f at the end of a step."""

    state: Float[Array, " size"]
    slope: Float[Array, " size"]


class Now(NamedTuple):
    """What a step is made of.

    - `gamma`: ∫₀¹ e^{(1−s)h·rate} p_j(s) ds for each rate of J and, last, for 0.
    - `inner`: N at past steps in J's directions, with N = f there for the latest.
    - `used`: the differences of values that the predictor takes.
    """

    h: Float[Array, ""]
    form: NewtonForm
    gamma: Float[Array, "degrees rows+1"]
    inner: Float[Array, "points rows"]
    used: Float[Array, "points points"]


class Trial(NamedTuple):
    """The corrected end of a step.

    - `errors`: at the orders below, at and above the step's, in units of the tolerance.
    - `moved_inner`, `correction_inner`: prediction and correction in J's directions.
    """

    correction: Float[Array, " size"]
    errors: Float[Array, "3"]
    slope: Float[Array, " size"]
    slope_inner: Float[Array, " rows"]
    moved_inner: Float[Array, " rows"]
    correction_inner: Float[Array, " rows"]


def _newest(value: Array, values: Array) -> Array:
    return jnp.concatenate([value[None], values[:-1]])
