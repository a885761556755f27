"""What the J of exponential Adams learns from a step: directions that are stiff."""

from collections.abc import Callable

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ._adams_memory import Past, Trial
from ._low_rank import Lesson, LowRank, condensed, learned, new_direction

#: The most directions of J by default, and the most numbers that they take up together
#: (but for the first few): products with them should cost less than a gradient.
MOST_DIRECTIONS, FEW_DIRECTIONS, MOST_NUMBERS = 64, 8, 2**21
#: J learns where what it leaves changes by more than this during a step, h·‖ΔN‖/‖Δw‖:
#: Adams methods become unstable between 2 (order 1) and 0.2 (order 12).
STIFFNESS = 0.5
#: Rates below this per step are not worth a direction.
LEAST_RATE = 0.1
#: Where J has learned in so many steps on end, and steps have grown by so much since the
#: last time, many directions are stiff: then so many more are asked for at once.
STREAK, GROWN, QUESTIONS = 8, 2.0, 16
#: A difference of slopes below this many units of rounding says nothing about J.
NOISE = 10.0


def most_directions(size: int) -> int:
    """The rank of J, for so many weights, where nobody says otherwise."""
    return min(max(FEW_DIRECTIONS, MOST_NUMBERS // size), MOST_DIRECTIONS)


def rows_for(rank: int) -> int:
    """How many rows J's basis has, so that it need not be condensed in every step."""
    if rank == 0:
        return 0
    return rank + (_new(True) if _may_ask(rank) else max(_new(False), rank // 4))


def taught(
    past: Past,
    after: Past,
    trial: Trial,
    accepted: Bool[Array, ""],
    rank: int,
    field: Callable[[Float[Array, " size"]], Float[Array, " size"]],
) -> Past:
    """`after` a step, with what J learns from the two slopes at its end."""
    if rank == 0:
        return after
    learns = _learns(past, after, trial, accepted)
    streak = jnp.where(learns, past.streak + 1, 0)
    asks = learns & (streak >= STREAK) & (after.steps[0] > GROWN * past.asked_at)
    asks &= _may_ask(rank)
    lesson = eqxi.unvmap_max(jnp.where(learns, 1, 0) + jnp.where(asks, 1, 0))
    after = _with_room(after, learns, lesson, rank)
    still = lax.stop_gradient(
        (after.j, trial.correction, after.slopes[0] - trial.slope)
    )
    j, correction, change = still
    length = jnp.linalg.norm(correction)
    steps, changes = correction[None] / length, change[None] / length
    inner = after.inner_states, after.inner_slopes
    new = _new(_may_ask(rank))

    def nothing() -> tuple[Lesson, list[Array]]:
        added = jnp.zeros((new, correction.size), correction.dtype)
        return Lesson(j.vectors, j.rates, j.used, added), list(inner)

    def of(steps: Array, changes: Array) -> tuple[Lesson, list[Array]]:
        lesson, seen = learned(j, steps, changes, (after.states, after.slopes), inner)
        room = ((0, new - len(lesson.added)), (0, 0))
        lesson = lesson._replace(added=jnp.pad(lesson.added, room))
        return jax.tree.map(
            lambda a, b: jnp.where(learns, a, b), (lesson, seen), nothing()
        )

    def asked() -> tuple[Lesson, list[Array]]:
        at = lax.stop_gradient((after.states[0], after.slopes[0]))
        return of(*_asked(field, j, *at, steps, changes))

    branches = [nothing, lambda: of(steps, changes)]
    if _may_ask(rank):
        branches.append(asked)
    lesson, (inner_states, inner_slopes) = lax.switch(lesson, branches)
    return after._replace(
        j=_extended(j, lesson),
        inner_states=inner_states,
        inner_slopes=inner_slopes,
        streak=jnp.where(asks, STREAK // 2, streak),
        asked_at=jnp.where(asks, after.steps[0], past.asked_at),
        asked=past.asked + jnp.where(asks, QUESTIONS, 0),
    )


def _may_ask(rank: int) -> bool:
    return rank >= 3 * QUESTIONS


def _new(asks: bool) -> int:
    """How many directions a lesson adds."""
    return QUESTIONS + 2 if asks else 2


def _learns(
    past: Past, after: Past, trial: Trial, accepted: Bool[Array, ""]
) -> Bool[Array, ""]:
    """Whether J is to learn from the step's two slopes."""
    state, slope, h = after.states[0], after.slopes[0], after.steps[0]
    change = slope - trial.slope
    inner = after.inner_slopes[0] - trial.slope_inner
    unexplained = inner - past.j.rates * trial.correction_inner
    outside = jnp.maximum(jnp.sum(change**2) - jnp.sum(inner**2), 0)
    rest = jnp.sqrt(outside + jnp.sum(unexplained**2))
    length = jnp.linalg.norm(trial.correction)
    steepest = jnp.max(jnp.abs(past.j.rates)) + rest / length
    noise = steepest * jnp.linalg.norm(state) + jnp.linalg.norm(slope)
    is_clear = rest > NOISE * jnp.finfo(state.dtype).eps * noise
    learns = accepted & is_clear & (h * rest > STIFFNESS * length)
    return lax.stop_gradient(learns)


def _with_room(after: Past, learns: Array, lesson: Array, rank: int) -> Past:
    """With room in J's basis for what a lesson adds to it."""
    inner = after.inner_states, after.inner_slopes
    needed = jnp.where(lesson > 1, _new(True), _new(False))
    is_full = learns & (after.j.used + needed > after.j.rows)
    least = lax.stop_gradient(LEAST_RATE / after.steps[0])

    def with_less() -> tuple[LowRank, list[Array]]:
        new = condensed(after.j, rank, least, inner)
        return jax.tree.map(lambda a, b: jnp.where(is_full, a, b), new, as_it_is())

    def as_it_is() -> tuple[LowRank, list[Array]]:
        return after.j, list(inner)

    j, (states, slopes) = lax.cond(eqxi.unvmap_any(is_full), with_less, as_it_is)
    return after._replace(j=j, inner_states=states, inner_slopes=slopes)


def _extended(j: LowRank, lesson: Lesson) -> LowRank:
    # Element by element, and outside of what is done now and then: so that nothing of the
    # basis is copied more often than need be.
    number = jnp.arange(j.rows) - j.used
    is_new = (number >= 0) & (number < len(lesson.added))
    rows = lesson.added[jnp.clip(number, 0, len(lesson.added) - 1)]
    basis = jnp.where(is_new[:, None], rows, j.basis)
    return LowRank(basis, lesson.vectors, lesson.rates, lesson.used)


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
