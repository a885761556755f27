"""Updates of exponential Adams' J from what steps show: directions that are stiff."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..._jax._masked_vmap import masked_vmap
from ._history import Attempt, History, StepEnd
from ._low_rank import LowRank, from_rows, new_direction, secant_update

#: The most directions of J by default, and the most numbers that they take up together
#: (but for the first few): products with them should cost less than a gradient.
MAX_DIRECTIONS, FEW_DIRECTIONS, MAX_NUMBERS = 64, 8, 2**21
#: J is updated where what it leaves changes by more than this during a step,
#: h·‖ΔN‖/‖Δw‖: Adams methods become unstable between 2 (order 1) and 0.2 (order 12).
MIN_STIFFNESS = 0.5
#: Rates below this per step are not worth a direction.
MIN_RATE = 0.1
#: Where so many steps in a row have updated J, and steps have grown by so much since the
#: last probing, many directions are stiff: then the field is probed along so many more at
#: once. A curvature, which tells of all of them, is evaluated when steps have grown.
MIN_STREAK, MIN_GROWTH, NUM_PROBES = 8, 2.0, 16
#: A difference of slopes below this many units of rounding says nothing about J.
NOISE = 10.0

#: J, and the coordinates of past states and slopes in its directions.
_Updated = tuple[LowRank, list[Array]]


class UpdateSource(NamedTuple):
    """What J may be updated from, beside the two slopes of a step.

    - `rank`: the most directions of J.
    - `field`: the slope at a state, at the time of the step's end.
    - `curvature`: the rows of G, where −GᵀG is near the field's Jacobian, if there is one.
    """

    rank: int
    field: Callable[[Float[Array, " size"]], Float[Array, " size"]]
    curvature: Callable[[Float[Array, " size"]], Float[Array, "k size"]] | None

    @property
    def can_probe(self) -> bool:
        return self.curvature is None and _can_probe(self.rank)


def default_rank(size: int) -> int:
    """The rank of J, for so many weights, where nobody says otherwise."""
    return min(max(FEW_DIRECTIONS, MAX_NUMBERS // size), MAX_DIRECTIONS)


def num_rows(rank: int) -> int:
    """How many rows J's basis has, so that it need not be turned in every step."""
    if rank == 0:
        return 0
    return rank + (NUM_PROBES + 2 if _can_probe(rank) else max(2, rank // 4))


def has_room(rank: int, count: int, size: int) -> bool:
    """Whether a curvature's `count` rows are few enough, and fit into J's basis."""
    rows = num_rows(rank)
    return count <= 2 * rows and min(count, size) + 2 <= rows


def update_jacobian(
    before: History,
    after: History,
    end: StepEnd,
    attempt: Attempt,
    should_update: Bool[Array, ""],
    source: UpdateSource,
) -> History:
    """The history `after` a step, with J updated where it `should_update`.

    `end` is that of the step, which `after` does not hold yet. J is updated from the two
    slopes there, and now and then by probing the field along more directions, or from a
    curvature.
    """
    if source.rank == 0:
        return after
    h = after.step_sizes[0]
    streak = jnp.where(should_update, before.update_streak + 1, 0)
    should_probe = should_update & (h > MIN_GROWTH * before.probe_step_size)
    if source.curvature is None:
        should_probe &= (streak >= MIN_STREAK) & _can_probe(source.rank)
    # All elements of a batch that are updated are updated in the same way.
    update_kind = eqxi.unvmap_max(
        jnp.where(should_update, 1, 0) + jnp.where(should_probe, 1, 0)
    )
    should_probe = should_update & (update_kind == 2)
    update = _Update(
        lax.stop_gradient(after.jacobian), after, end, should_update, source
    )
    jacobian, coordinates = update.of_kind(update_kind, _secant(end, attempt))
    state_coordinates, slope_coordinates = coordinates
    return after._replace(
        jacobian=jacobian,
        state_coordinates=state_coordinates,
        slope_coordinates=slope_coordinates,
        update_streak=jnp.where(should_probe, MIN_STREAK // 2, streak),
        probe_step_size=jnp.where(should_probe, h, before.probe_step_size),
        num_probings=before.num_probings
        + should_probe.astype(before.num_probings.dtype),
    )


def remaining_stiffness(
    before: History, after: History, end: StepEnd, attempt: Attempt
) -> Float[Array, ""]:
    """h·‖ΔN‖/‖Δw‖ between the two slopes at a step's end: of what J leaves.

    0 where ΔN is rounding.
    """
    (state, slope), h, rates = end, after.step_sizes[0], before.jacobian.rates
    change = slope - attempt.slope
    inner = after.slope_coordinates[0] - attempt.slope_coordinates
    unexplained = inner - rates * attempt.correction_coordinates
    outside = jnp.maximum(jnp.sum(change**2) - jnp.sum(inner**2), 0)
    remainder = jnp.sqrt(outside + jnp.sum(unexplained**2))
    length = jnp.linalg.norm(attempt.correction)
    steepest = jnp.max(jnp.abs(rates), initial=0) + remainder / length
    noise = steepest * jnp.linalg.norm(state) + jnp.linalg.norm(slope)
    is_clear = remainder > NOISE * jnp.finfo(state.dtype).eps * noise
    return lax.stop_gradient(jnp.where(is_clear, h * remainder / length, 0))


class _Secant(NamedTuple):
    """The end of a step, and how the slope changes along a unit vector there."""

    state: Float[Array, " size"]
    slope: Float[Array, " size"]
    steps: Float[Array, "1 size"]
    changes: Float[Array, "1 size"]


def _secant(end: StepEnd, attempt: Attempt) -> _Secant:
    """From predicted to corrected end, without derivatives."""
    state, slope, predicted_slope, correction = lax.stop_gradient(
        (*end, attempt.slope, attempt.correction)
    )
    length = jnp.linalg.norm(correction)
    length = jnp.where(length > 0, length, 1)
    steps, changes = correction[None], (slope - predicted_slope)[None]
    return _Secant(state, slope, steps / length, changes / length)


@dataclasses.dataclass(frozen=True)
class _Update:
    """An update of `jacobian` for those elements of a batch that `should_update`."""

    jacobian: LowRank
    after: History
    end: StepEnd
    should_update: Bool[Array, ""]
    source: UpdateSource

    def of_kind(self, update_kind: Int[Array, ""], secant: _Secant) -> _Updated:
        """0: none. 1: from the secant. 2: from a curvature, or by probing."""
        branches = [
            self._none,
            self._masked(lambda: self._by_secants(secant.steps, secant.changes)),
        ]
        if self.source.curvature is not None:
            branches.append(self._masked(lambda: self._by_curvature(secant.state)))
        elif self.source.can_probe:
            branches.append(self._masked(lambda: self._by_probing(secant)))
        return lax.switch(update_kind, branches)

    def _none(self) -> _Updated:
        after = self.after
        return self.jacobian, [after.state_coordinates, after.slope_coordinates]

    def _masked(self, update: Callable[[], _Updated]) -> Callable[[], _Updated]:
        return lambda: jax.tree.map(
            lambda new, old: jnp.where(self.should_update, new, old),
            update(),
            self._none(),
        )

    def _by_secants(
        self, steps: Float[Array, "k size"], changes: Float[Array, "k size"]
    ) -> _Updated:
        min_rate = lax.stop_gradient(MIN_RATE / self.after.step_sizes[0])
        jacobian, coordinates = self._none()
        update = masked_vmap(partial(secant_update, rank=self.source.rank))
        new, turn = update(self.should_update, jacobian, steps, changes, min_rate)
        vectors = self.after.states_and_slopes(self.end)
        return new, list(map(turn.new_coordinates, vectors, coordinates))

    def _by_curvature(self, state: Float[Array, " size"]) -> _Updated:
        assert self.source.curvature is not None
        rows = lax.stop_gradient(self.source.curvature(state))
        update = masked_vmap(partial(from_rows, num_rows=self.jacobian.num_rows))
        new = update(self.should_update, rows)
        vectors = self.after.states_and_slopes(self.end)
        return new, [new.coordinates(values) for values in vectors]

    def _by_probing(self, secant: _Secant) -> _Updated:
        return self._by_secants(*_probe(self.source.field, self.jacobian, secant))


def _can_probe(rank: int) -> bool:
    return rank >= 3 * NUM_PROBES


def _probe(
    field: Callable[[Array], Array], jacobian: LowRank, secant: _Secant
) -> tuple[Float[Array, "k size"], Float[Array, "k size"]]:
    """How the slope changes along more directions, each from the last one's answer.

    So that a tridiagonal matrix is found, as by Lanczos.
    """
    state, slope, steps, changes = secant
    dtype = state.dtype
    size = jnp.linalg.norm(state)
    length = jnp.sqrt(jnp.finfo(dtype).eps).astype(dtype) * jnp.where(size > 0, size, 1)
    room = jnp.zeros((NUM_PROBES, state.size), dtype)
    first = new_direction(steps[0], jacobian.basis)
    directions = jnp.concatenate([first[None], room])
    changes = jnp.concatenate([changes, room])

    def probe_next(i, found):
        directions, changes = found
        direction = new_direction(changes[i], jacobian.basis, directions)
        change = (field(state + length * direction) - slope) / length
        return directions.at[i + 1].set(direction), changes.at[i + 1].set(change)

    directions, changes = lax.fori_loop(
        0, NUM_PROBES, probe_next, (directions, changes)
    )
    return lax.stop_gradient((directions.at[0].set(steps[0]), changes))
