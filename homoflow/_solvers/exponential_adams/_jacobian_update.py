"""What the J of exponential Adams learns from a step: directions that are stiff."""

from collections.abc import Callable
from functools import partial

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from ..._jax._masked_vmap import of_those
from ._history import End, Past, Trial
from ._low_rank import LowRank, learned, new_direction, of_rows

#: The most directions of J by default, and the most numbers that they take up together
#: (but for the first few): products with them should cost less than a gradient.
MOST_DIRECTIONS, FEW_DIRECTIONS, MOST_NUMBERS = 64, 8, 2**21
#: J learns where what it leaves changes by more than this during a step, h·‖ΔN‖/‖Δw‖:
#: Adams methods become unstable between 2 (order 1) and 0.2 (order 12).
STIFFNESS = 0.5
#: Rates below this per step are not worth a direction.
LEAST_RATE = 0.1
#: Where J has learned in so many steps on end, and steps have grown by so much since the
#: last time, many directions are stiff: then so many more are asked for at once. A
#: curvature, which tells of all of them, is asked for when steps have grown.
STREAK, GROWN, QUESTIONS = 8, 2.0, 16
#: A difference of slopes below this many units of rounding says nothing about J.
NOISE = 10.0


def most_directions(size: int) -> int:
    """The rank of J, for so many weights, where nobody says otherwise."""
    return min(max(FEW_DIRECTIONS, MOST_NUMBERS // size), MOST_DIRECTIONS)


def rows_for(rank: int) -> int:
    """How many rows J's basis has, so that it need not be turned in every step."""
    if rank == 0:
        return 0
    return rank + (QUESTIONS + 2 if _may_ask(rank) else max(2, rank // 4))


def has_room(rank: int, count: int, size: int) -> bool:
    """Whether a curvature's `count` rows are few enough, and fit into J's basis."""
    rows = rows_for(rank)
    return count <= 2 * rows and min(count, size) + 2 <= rows


def taught(
    past: Past,
    after: Past,
    end: End,
    trial: Trial,
    learns: Bool[Array, ""],
    rank: int,
    field: Callable[[Float[Array, " size"]], Float[Array, " size"]],
    curvature: Callable[[Float[Array, " size"]], Float[Array, "k size"]] | None,
) -> Past:
    """`after` a step, before its `end` is added, with what J, if it `learns`, learns from
    the two slopes there.

    And, now and then, from more questions to the field, or from a `curvature`.
    """
    if rank == 0:
        return after
    h, inner = after.steps[0], (after.inner_states, after.inner_slopes)
    streak = jnp.where(learns, past.streak + 1, 0)
    asks = learns & (h > GROWN * past.asked_at)
    if curvature is None:
        asks &= (streak >= STREAK) & _may_ask(rank)
    lesson = eqxi.unvmap_max(jnp.where(learns, 1, 0) + jnp.where(asks, 1, 0))
    # Of a batch all that learn take the same lesson.
    asks = learns & (lesson == 2)
    now = *end, trial.slope, trial.correction
    j, (state, slope, before, correction) = lax.stop_gradient((after.j, now))
    length = jnp.linalg.norm(correction)
    length = jnp.where(length > 0, length, 1)
    steps, changes = correction[None] / length, (slope - before)[None] / length

    def as_it_is() -> tuple[LowRank, list[Array]]:
        return j, list(inner)

    def by_secants(steps: Array, changes: Array) -> tuple[LowRank, list[Array]]:
        least = lax.stop_gradient(LEAST_RATE / h)
        learn = of_those(partial(learned, rank=rank))
        new, turn = learn(learns, j, steps, changes, least)
        return new, list(map(turn.turned, after.seen(end), inner))

    def by_curvature() -> tuple[LowRank, list[Array]]:
        assert curvature is not None
        rows = lax.stop_gradient(curvature(state))
        new = of_those(partial(of_rows, room=j.rows))(learns, rows)
        return new, [new.coordinates(values) for values in after.seen(end)]

    def by_asking() -> tuple[LowRank, list[Array]]:
        return by_secants(*_asked(field, j, state, slope, steps, changes))

    def if_wanted(lesson: Callable[[], PyTree]) -> Callable[[], PyTree]:
        return lambda: jax.tree.map(
            lambda new, old: jnp.where(learns, new, old), lesson(), as_it_is()
        )

    branches = [as_it_is, if_wanted(lambda: by_secants(steps, changes))]
    if curvature is not None:
        branches.append(if_wanted(by_curvature))
    elif _may_ask(rank):
        branches.append(if_wanted(by_asking))
    j, (inner_states, inner_slopes) = lax.switch(lesson, branches)
    return after._replace(
        j=j,
        inner_states=inner_states,
        inner_slopes=inner_slopes,
        streak=jnp.where(asks, STREAK // 2, streak),
        asked_at=jnp.where(asks, h, past.asked_at),
        asked=past.asked + asks.astype(past.asked.dtype),
    )


def _may_ask(rank: int) -> bool:
    return rank >= 3 * QUESTIONS


def stiffness_left(past: Past, after: Past, end: End, trial: Trial) -> Float[Array, ""]:
    """h·‖ΔN‖/‖Δw‖ between the two slopes at a step's end: of what J leaves.

    0 where ΔN is rounding.
    """
    (state, slope), h = end, after.steps[0]
    change = slope - trial.slope
    inner = after.inner_slopes[0] - trial.slope_inner
    unexplained = inner - past.j.rates * trial.correction_inner
    outside = jnp.maximum(jnp.sum(change**2) - jnp.sum(inner**2), 0)
    rest = jnp.sqrt(outside + jnp.sum(unexplained**2))
    length = jnp.linalg.norm(trial.correction)
    steepest = jnp.max(jnp.abs(past.j.rates), initial=0) + rest / length
    noise = steepest * jnp.linalg.norm(state) + jnp.linalg.norm(slope)
    is_clear = rest > NOISE * jnp.finfo(state.dtype).eps * noise
    return lax.stop_gradient(jnp.where(is_clear, h * rest / length, 0))


def _asked(field, j: LowRank, state, slope, steps, changes):
    """How the slope changes along more directions, each from the last one's answer.

    So that a tridiagonal matrix is found, as by Lanczos.
    """
    dtype = state.dtype
    size = jnp.linalg.norm(state)
    length = jnp.sqrt(jnp.finfo(dtype).eps).astype(dtype) * jnp.where(size > 0, size, 1)
    room = jnp.zeros((QUESTIONS, state.size), dtype)
    new = jnp.concatenate([new_direction(steps[0], j.basis)[None], room])
    changes = jnp.concatenate([changes, room])

    def ask(i, known):
        new, changes = known
        step = new_direction(changes[i], j.basis, new)
        change = (field(state + length * step) - slope) / length
        return new.at[i + 1].set(step), changes.at[i + 1].set(change)

    new, changes = lax.fori_loop(0, QUESTIONS, ask, (new, changes))
    return lax.stop_gradient((new.at[0].set(steps[0]), changes))
