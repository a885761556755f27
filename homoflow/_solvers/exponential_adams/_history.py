"""What exponential Adams keeps from step to step, and what a step is made of."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._divided_differences import NewtonForm
from ._low_rank import LowRank


class History(NamedTuple):
    """What is kept from step to step, newest first.

    - `states`, `slopes`: w and f at the last `num_known` steps; zeros beyond.
    - `step_sizes`: the lengths between them.
    - `state_coordinates`, `slope_coordinates`: their coordinates in J's directions (of the
        states, up to a shift that all have in common).
    - `order`: that of the next step.
    - `update_streak`: how many steps in a row have updated J.
    - `probe_step_size`: the step size when J was last updated by more than the slopes of a
        step; `num_probings`: how often that was done.
    """

    states: Float[Array, "points size"]
    slopes: Float[Array, "points size"]
    step_sizes: Float[Array, " orders"]
    state_coordinates: Float[Array, "points rows"]
    slope_coordinates: Float[Array, "points rows"]
    num_known: Int[Array, ""]
    order: Int[Array, ""]
    jacobian: LowRank
    update_streak: Int[Array, ""]
    probe_step_size: Float[Array, ""]
    num_probings: Int[Array, ""]

    def advance(
        self, h: Float[Array, ""], attempt: "Attempt", end: "StepEnd"
    ) -> "History":
        """With one step more, but for the order, and for `states` and `slopes`: they
        become `states_and_slopes(end)`."""
        moved = attempt.prediction_coordinates + attempt.correction_coordinates
        end_slope = self.jacobian.coordinates(end.slope[None])[0]
        return self._replace(
            step_sizes=_prepend(h, self.step_sizes),
            state_coordinates=_prepend(
                self.state_coordinates[0] + moved, self.state_coordinates
            ),
            slope_coordinates=_prepend(end_slope, self.slope_coordinates),
            num_known=jnp.minimum(self.num_known + 1, self.slopes.shape[0]),
        )

    def states_and_slopes(self, end: "StepEnd") -> tuple[Array, Array]:
        """`states` and `slopes` with those of an end before them.

        They are long: where a projection moves them they are not to be copied twice.
        """
        return _prepend(end.state, self.states), _prepend(end.slope, self.slopes)


class StepEnd(NamedTuple):
    """w and f at the end of a step."""

    state: Float[Array, " size"]
    slope: Float[Array, " size"]


class StepCoefficients(NamedTuple):
    """What a step is made of.

    - `phi`: ∫₀¹ e^{(1−s)h·rate} p_j(s) ds for each rate of J and, last, for 0.
    - `nonlinear_coordinates`: N at past steps in J's directions, with N = f there for the
        latest.
    - `differences`: those of past values that the predictor takes.
    """

    h: Float[Array, ""]
    form: NewtonForm
    phi: Float[Array, "degrees rows+1"]
    nonlinear_coordinates: Float[Array, "points rows"]
    differences: Float[Array, "points points"]


class Attempt(NamedTuple):
    """The corrected end of a step, accepted or not.

    - `errors`: at the orders below, at and above the step's, in units of the tolerance.
    - `slope`: that at the predicted end.
    - `prediction_coordinates`, `correction_coordinates`: what predictor and corrector add
        to the state, in J's directions.
    """

    correction: Float[Array, " size"]
    errors: Float[Array, "3"]
    slope: Float[Array, " size"]
    slope_coordinates: Float[Array, " rows"]
    prediction_coordinates: Float[Array, " rows"]
    correction_coordinates: Float[Array, " rows"]


def _prepend(value: Array, values: Array) -> Array:
    return jnp.concatenate([value[None], values[:-1]])
