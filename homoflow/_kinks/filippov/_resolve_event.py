"""Resolve an event: find the mode in which the flow goes on, and its velocity."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._system import System
from ._event_point import EventPoint
from ._iterate import Iterate, iterate
from ._sliding_field import Groups

#: Iterations at one point, in which base slopes are fitted to the mode.
_MAX_ITERATIONS = 6
#: Searches at one point for another solution, and the one that comes back to the first.
_MAX_ATTEMPTS, _RETURN = 8, 9
#: Velocities are equal if they differ by less, relative to the jumps that part them.
_SAME_VELOCITY = 1e-6


class _Solution(NamedTuple):
    """What must be known of the solution while another one is looked for.

    - `base`, `state`: its base sides and the states of leaders, to come back to it.
    - `nonconvex`: leaders of groups that might as well go to the other side.
    - `jump`: the largest of their widths.
    - `number`: of iterations so far.
    - `is_settled`: whether it is one: else that it is computed again does not make it one.
    """

    base: Int[Array, " slots"]
    state: Int[Array, " slots"]
    sense: Int[Array, " slots"]
    leader: Int[Array, " slots"]
    nonconvex: Bool[Array, " slots"]
    velocity: Float[Array, " weights"]
    jump: Float[Array, ""]
    number: Int[Array, ""]
    is_settled: Bool[Array, ""]

    @staticmethod
    def create(event: EventPoint, found: Iterate) -> "_Solution":
        nonconvex, groups, mode = found.marks.nonconvex, found.groups, found.mode
        suspects = nonconvex[groups.leader] & event.pairs.is_used
        width = jnp.where(suspects, jnp.abs(mode.width), 0)
        return _Solution(
            base=found.base,
            state=mode.state,
            sense=groups.sense,
            leader=groups.leader,
            nonconvex=nonconvex,
            velocity=found.field.velocity,
            jump=jnp.max(width, initial=0),
            number=found.number,
            is_settled=found.mode.is_settled & ~found.next.is_needed,
        )

    def sides(self, state: Int[Array, " slots"]) -> Int[Array, " slots"]:
        """The sides of all pairs from the states of leaders."""
        return (state[self.leader] * self.sense).astype(jnp.int32)

    def differs(self, event: EventPoint, other: Iterate) -> Bool[Array, " slots"]:
        """Which pairs are on other sides in another solution, if it is one."""
        suspects = self.nonconvex[self.leader] & event.pairs.is_used
        apart = other.field.velocity - self.velocity
        differs = jnp.sqrt(apart @ apart) > _SAME_VELOCITY * self.jump
        is_solution = other.mode.is_settled & ~other.next.is_needed
        differs_in_side = self.sides(self.state) != other.sides(event)
        return suspects & differs_in_side & differs & is_solution


class _Course(NamedTuple):
    """Where the search goes on: what the next iteration starts from.

    Attempt 0 is the search for the solution, further ones are for another solution, and
    in attempt `_RETURN` the solution is computed again.
    """

    base: Int[Array, " slots"]
    start: Int[Array, " slots"]
    number: Int[Array, ""]
    nonunique: Bool[Array, " slots"]
    solution: _Solution
    attempt: Int[Array, ""]
    is_done: Bool[Array, ""]


def resolve(system: System, event: EventPoint) -> Iterate:
    """The mode at a point, from iterations until base slopes and mode fit each other.

    They do not at once if members of a group have base slopes on different sides, or if
    a pair changes side below another active pair, whose row it changes by that.

    If pairs at concave kinks might as well go on to the other side, the search is repeated
    from there. This only tells whether the solution is unique: the first one is taken.
    """

    def advance_search(s: tuple[Iterate, _Course]) -> tuple[Iterate, _Course]:
        latest, course = s
        latest = iterate(system, event, latest)
        is_unfinished = latest.next.is_needed & (latest.number < _MAX_ITERATIONS)
        # XLA copies all that comes out of a branch: this is little.
        course = lax.cond(
            event.is_event & ~is_unfinished,
            lambda: _end_attempt(event, course, latest),
            lambda: course._replace(
                base=latest.next.base,
                start=latest.next.start,
                number=latest.number,
                is_done=~event.is_event,
            ),
        )
        return _set_out(latest, course), course

    blank = Iterate.blank(event)
    course = _Course(
        base=blank.base,
        start=blank.next.start,
        number=blank.number,
        nonunique=blank.marks.nonunique,
        solution=_Solution.create(event, blank),
        attempt=jnp.asarray(0),
        is_done=jnp.asarray(False),
    )
    found, _ = lax.while_loop(lambda s: ~s[1].is_done, advance_search, (blank, course))
    return found


def _set_out(latest: Iterate, course: _Course) -> Iterate:
    """The latest iterate, set up for the next one, or to be the solution."""
    is_settled = latest.mode.is_settled & course.solution.is_settled
    return latest._replace(
        number=course.number,
        mode=latest.mode._replace(is_settled=is_settled),
        next=latest.next._replace(base=course.base, start=course.start),
        marks=latest.marks._replace(nonunique=course.nonunique),
    )


def _end_attempt(event: EventPoint, course: _Course, latest: Iterate) -> _Course:
    """The course after an attempt, set up for the next one, from other sides.

    First all nonconvex groups start on their other sides, then one at a time.
    """
    attempt, is_first = course.attempt, course.attempt == 0
    solution = jax.tree.map(
        lambda new, old: jnp.where(is_first, new, old),
        _Solution.create(event, latest),
        course.solution,
    )
    differs = solution.differs(event, latest) & ~is_first
    nonunique = course.nonunique | differs
    total = solution.number + jnp.where(is_first, 0, latest.number - 1)
    nonconvex = solution.nonconvex
    groups = Groups(solution.leader, solution.sense, nonconvex)
    arrivals = groups.sum(event.arrives.astype(latest.field.velocity.dtype))
    # A cumulative sum, which XLA turns into many small kernels.
    rank = np.tri(nonconvex.size, dtype=np.float32) @ nonconvex.astype(jnp.float32)
    rank = rank.astype(attempt.dtype)
    has_more = is_first | ((attempt <= rank[-1]) & (rank[-1] > 1))
    goes_on = has_more & (attempt < _MAX_ATTEMPTS) & ~jnp.any(nonunique)
    goes_on = goes_on & jnp.any(nonconvex & (arrivals > 0))
    is_flipped = nonconvex & (is_first | (rank == attempt)) & goes_on
    start = jnp.where(is_flipped, -solution.state, solution.state)
    base = jnp.where(
        event.pairs.is_used & goes_on,
        groups.base_side(solution.sides(start)),
        solution.base,
    )
    is_done = (is_first & ~goes_on) | (attempt == _RETURN)
    return _Course(
        base=base,
        start=start,
        number=jnp.where(is_done, total, 1),
        nonunique=nonunique,
        solution=solution._replace(number=total),
        attempt=jnp.where(goes_on, attempt + 1, _RETURN),
        is_done=is_done,
    )
