"""Motion along the edge of stability from its start to its end, mode by mode."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from ..._dynamics.edge._edge import Work
from ..._solvers._chebyshev import (
    change_of_length,
    chebyshev_step,
    estimate_error,
    longest_step,
    num_stages,
)
from ._setting import Setting
from ._walk import (
    Before,
    Bracket,
    Candidate,
    Counts,
    Ending,
    Phase,
    State,
    Walk,
    between,
)

#: The most stages of a step.
_MAX_STAGES = 150
#: By how much the Jacobian's spectrum may exceed what is known of it at a step's start.
_MARGIN = 1.15
#: Steps while eigenvalues part, in units of 1/threshold.
_SMALL_STEP = 0.5
#: Eigenvalues that are further from the threshold than this were not brought back to it.
_MAX_EXCESS = 1e-6
#: Steps shorter than this part of 1/threshold are none.
_SHORTEST = 1e-8


class Walker(NamedTuple):
    """Motion along the edge in one setting."""

    setting: Setting

    def walk(self, w: Array, vectors: Array, num_sums: int) -> Walk:
        """From the weights `w`, of whose leading eigenvectors `vectors` is a guess."""

        def is_under_way(walk: Walk) -> Array:
            taken = walk.counts.steps + walk.counts.rejected
            has_failed = jnp.any(jnp.stack(walk.ending))
            is_early = (walk.state.t < self.setting.end) | (walk.phase == Phase.record)
            return is_early & ~has_failed & (taken < self.setting.max_steps)

        return lax.while_loop(
            is_under_way, self._turn, self._begin(w, vectors, num_sums)
        )

    def _begin(self, w: Array, vectors: Array, num_sums: int) -> Walk:
        """Before anything is known: the first turn enters the mode without constraint."""
        zero, none, no = jnp.zeros((), w.dtype), jnp.asarray(0), jnp.asarray(False)
        sums = jnp.zeros(num_sums, w.dtype)
        state = State(
            zero - 1,
            w,
            sums,
            jnp.concatenate([jnp.zeros_like(w), sums]),
            self.setting.edge.unknown_motion(w, vectors),
            none,
            zero,
            zero,
        )
        blank = jax.eval_shape(self.setting.record, state)
        records = jax.tree.map(
            lambda s: jnp.zeros((self.setting.times.size, *s.shape), s.dtype), blank
        )
        return Walk(
            Before.at(state),
            state,
            state,
            state,
            Bracket(zero, zero, zero, zero, none, none),
            jnp.asarray(int(Phase.enter)),
            jnp.asarray(int(Phase.step)),
            1 / self.setting.edge.threshold,
            zero,
            zero,
            none,
            records,
            Ending(no, no, no, no),
            Counts(none, none, none, none),
            Work.none(),
        )

    # The eigenvalue search and the Runge–Kutta stages are the greater part of the program,
    # and each stands in it once: a turn prepares one point, looks at it, and draws its
    # conclusions, by phases.

    def _turn(self, walk: Walk) -> Walk:
        prepare = (
            self._step_ahead,
            self._look_between,
            self._look_between,
            self._weigh,
            self._weigh,
            self._stay,
        )
        candidate, work = lax.switch(walk.phase, prepare, walk)
        w, motion, work = self.setting.edge.settle(
            candidate.w, candidate.vectors, candidate.num, candidate.num_wanted, work
        )
        num = jnp.where(walk.is_width_due(), candidate.num, 0)
        shift, work = self.setting.edge.shift(w, motion, num, work)
        new = self.setting.state(candidate, w, motion, shift)
        conclude = (
            self._judge_step,
            self._narrow,
            self._record,
            self._enter_or_part,
            self._go_on_parting,
            self._enter,
        )
        return lax.switch(
            walk.phase, conclude, walk._replace(work=work), candidate, new
        )

    # What a turn looks at.

    def _point(
        self, walk: Walk, w: Array, sums: Array, t: Array, num: Array, **changes: Any
    ) -> Candidate:
        motion = walk.state.motion
        point = Candidate(
            t,
            w,
            sums,
            motion.spectrum.vectors,
            num,
            num + 1,
            motion.velocity,
            motion.oscillation,
            jnp.asarray(False),
            jnp.zeros_like(t),
        )
        return point._replace(**changes)

    def _stay(self, walk: Walk) -> tuple[Candidate, Work]:
        state = walk.state
        t = jnp.maximum(state.t, 0)
        return self._point(walk, state.w, state.sums, t, state.num), walk.work

    def _step_ahead(self, walk: Walk) -> tuple[Candidate, Work]:
        state, edge = walk.state, self.setting.edge
        size = state.w.size
        known = jnp.maximum(state.motion.spectrum.values[0], 0)
        sharpest = jnp.where(state.num > 0, edge.threshold, known)
        radius = _MARGIN * edge.fastest(sharpest)
        radius = jnp.maximum(radius, 1e-3 * edge.threshold)
        left = self.setting.end - state.t
        longest = jnp.minimum(longest_step(radius, _MAX_STAGES), left)
        length = jnp.minimum(walk.length, longest)

        course = walk.course()

        def velocity(y: Array, work: Work) -> tuple[Array, Work]:
            motion, work = edge.glide(y[:size], course, y[-1], state.num, work)
            return jnp.append(self.setting.slope(motion), 1), work

        # The time since the start goes along, as one more unknown.
        end, work = chebyshev_step(
            velocity,
            jnp.concatenate([state.w, state.sums, jnp.zeros(1, state.w.dtype)]),
            jnp.append(state.slope, 1),
            length,
            num_stages(length, radius, _MAX_STAGES),
            walk.work,
        )
        critical = course.vectors(length)
        t = jnp.where(length < left, state.t + length, self.setting.end)
        point = self._point(
            walk,
            end[:size],
            end[size:-1],
            t,
            state.num,
            vectors=state.motion.spectrum.vectors.at[: edge.max_critical].set(critical),
            length=length,
            # The end before it is moved to the set.
            velocity=end[:size],
        )
        return point, work

    def _look_between(self, walk: Walk) -> tuple[Candidate, Work]:
        """A point of the step, by cubic Hermite interpolation."""
        a, b = walk.state, walk.end
        at = self.setting.times[
            jnp.minimum(walk.num_recorded, self.setting.times.size - 1)
        ]
        span = jnp.where(b.t > a.t, b.t - a.t, 1)
        is_record = walk.phase == Phase.record
        part = jnp.where(is_record, (at - a.t) / span, walk.bracket.guess())
        w, sums = between(a, b, part)
        is_parting = is_record & self._is_parting(walk)
        num = jnp.where(is_parting, 0, a.num)
        t = a.t + part * (b.t - a.t)
        vectors = b.motion.spectrum.vectors
        point = self._point(walk, w, sums, t, num, vectors=vectors)
        return point, walk.work

    def _is_parting(self, walk: Walk) -> Bool[Array, ""]:
        return (walk.after == Phase.part) | (walk.after == Phase.enter)

    def _weigh(self, walk: Walk) -> tuple[Candidate, Work]:
        """The multipliers that keep all close eigenvalues at the threshold or below.

        To decide on a mode, close ones are those at the threshold. While eigenvalues part
        they are more, each with its gap, and a small step is taken after which none
        exceeds the threshold, to first order [Moreau's catching-up scheme].
        """
        state, edge, motion = walk.state, self.setting.edge, walk.state.motion
        moves = walk.phase == Phase.part
        gap = jnp.where(moves, self.setting.watched, 2 * self.setting.joins)
        near = jnp.minimum(self.setting.near(motion, gap), edge.max_critical)
        left = self.setting.end - state.t
        length = jnp.minimum(_SMALL_STEP / edge.fastest(edge.threshold), left)
        found, velocity, work = edge.weigh(
            state.w,
            motion.pull,
            motion.spectrum,
            near,
            jnp.where(moves, 1 / length, 0),
            walk.work,
        )
        rates = self.setting.rates(
            motion._replace(velocity=velocity, oscillation=found)
        )
        step = jnp.where(moves, length, 0)
        rank = self.setting.rank(found)
        is_parting = moves | ((rank > 0) & (rank < near))
        t = jnp.where(moves & (length >= left), self.setting.end, state.t + step)
        point = self._point(
            walk,
            state.w + step * velocity,
            state.sums + step * rates,
            t,
            jnp.where(is_parting, 0, rank),
            num_wanted=near + 1,
            velocity=velocity,
            oscillation=found,
            is_parting=is_parting,
        )
        return point, work

    # What follows from it.

    def _proceed(self, walk: Walk, goal: State, after: Phase | Array) -> Walk:
        """Record what lies on the way to `goal`, then go on from there."""
        index = walk.num_recorded
        at = self.setting.times[jnp.minimum(index, self.setting.times.size - 1)]
        is_due = (index < self.setting.times.size) & (at <= goal.t)
        after = jnp.asarray(after, walk.phase.dtype)
        phase = jnp.where(is_due, int(Phase.record), after).astype(walk.phase.dtype)
        state = jax.tree.map(lambda a, b: jnp.where(is_due, a, b), walk.state, goal)
        before = jax.tree.map(
            lambda a, b: jnp.where(is_due, a, b), walk.before, Before.at(walk.state)
        )
        largest = jnp.maximum(walk.largest_shift, jnp.abs(goal.shift))
        return walk._replace(
            before=before,
            state=state,
            goal=goal,
            phase=phase,
            after=after,
            largest_shift=largest,
        )

    def _judge_step(self, walk: Walk, candidate: Candidate, new: State) -> Walk:
        """Take the step if it is accurate, or up to its event; else try a shorter one."""
        state, edge, counts = walk.state, self.setting.edge, walk.counts
        size = new.w.size
        error = estimate_error(
            state.w,
            candidate.velocity,
            state.slope[:size],
            new.slope[:size],
            candidate.length,
        )
        error = jnp.linalg.norm(error) / (self.setting.rtol * jnp.linalg.norm(state.w))
        is_finite = jnp.all(jnp.isfinite(new.w))
        is_back = edge.excess(new.motion.spectrum, state.num) < _MAX_EXCESS
        is_good = (error <= 1) & is_back & is_finite
        length = candidate.length * change_of_length(error, is_good)
        is_stuck = ~is_good & (length < _SHORTEST / edge.threshold)
        walk = walk._replace(
            length=length,
            end=new,
            counts=counts._replace(
                steps=counts.steps + is_good.astype(int),
                rejected=counts.rejected + (~is_good).astype(int),
            ),
            ending=walk.ending._replace(
                is_stuck=is_stuck & is_finite, is_nonfinite=is_stuck & ~is_finite
            ),
        )
        zero = jnp.zeros_like(length)
        # The start counts as before the event, whatever rounding says.
        below = jnp.minimum(state.event, -0.1 * jnp.abs(new.event))
        none = jnp.asarray(0)
        bracket = Bracket(zero, zero + 1, below, new.event, none, none)
        has_event = is_good & (new.event > 0)
        meeting = walk._replace(
            goal=new,
            bracket=bracket,
            phase=jnp.full_like(walk.phase, int(Phase.locate)),
        )
        going = self._proceed(walk, new, Phase.step)
        walk = jax.tree.map(lambda a, b: jnp.where(is_good, a, b), going, walk)
        return jax.tree.map(lambda a, b: jnp.where(has_event, a, b), meeting, walk)

    def _narrow(self, walk: Walk, candidate: Candidate, new: State) -> Walk:
        del candidate
        bracket = walk.bracket.narrowed(walk.bracket.guess(), new.event)
        goal = jax.tree.map(lambda a, b: jnp.where(new.event > 0, a, b), new, walk.goal)
        counts = walk.counts
        going = walk._replace(bracket=bracket, goal=goal)
        found = self._proceed(going, goal, Phase.decide)
        found = found._replace(counts=counts._replace(events=counts.events + 1))
        return jax.tree.map(
            lambda a, b: jnp.where(bracket.is_narrow, a, b), found, going
        )

    def _record(self, walk: Walk, candidate: Candidate, new: State) -> Walk:
        del candidate
        parting = new._replace(motion=walk.end.motion, num=walk.end.num)
        is_parting = self._is_parting(walk)
        at = jax.tree.map(lambda a, b: jnp.where(is_parting, a, b), parting, new)
        kept = self.setting.record(at)
        index = walk.num_recorded
        records = jax.tree.map(lambda a, v: a.at[index].set(v), walk.records, kept)
        largest = jnp.maximum(walk.largest_shift, jnp.abs(at.shift))
        walk = walk._replace(
            records=records, num_recorded=index + 1, largest_shift=largest
        )
        return self._proceed(walk, walk.goal, walk.after)

    def _enter_or_part(self, walk: Walk, candidate: Candidate, new: State) -> Walk:
        """Begin the mode that was decided on, unless eigenvalues have to part first."""
        motion = new.motion._replace(oscillation=candidate.oscillation)
        parting = new._replace(motion=motion)
        is_parting = candidate.is_parting
        state = jax.tree.map(lambda a, b: jnp.where(is_parting, a, b), parting, new)
        phase = jnp.where(is_parting, int(Phase.part), int(Phase.step))
        is_crowded = (
            self.setting.near(walk.state.motion, 2 * self.setting.joins)
            > self.setting.edge.max_critical
        )
        is_onset = (walk.state.num == 0) & (new.num > 0)
        rise = jnp.where(is_onset, new.motion.rise, 0)
        return walk._replace(
            fastest_onset=jnp.maximum(walk.fastest_onset, rise),
            before=Before.at(state),
            state=state,
            phase=phase.astype(walk.phase.dtype),
            length=0.3 * walk.length,
            ending=walk.ending._replace(is_crowded=is_crowded),
        )

    def _go_on_parting(self, walk: Walk, candidate: Candidate, new: State) -> Walk:
        rank = self.setting.rank(candidate.oscillation)
        motion = new.motion._replace(
            velocity=candidate.velocity, oscillation=candidate.oscillation
        )
        slope = self.setting.slope(motion)
        new = new._replace(motion=motion, num=rank, slope=slope)
        gone = self.setting.near(motion, self.setting.gone)
        is_over = (rank == gone) | (rank == 0)
        after = jnp.where(is_over, int(Phase.enter), int(Phase.part))
        counts = walk.counts
        walk = walk._replace(
            state=walk.state._replace(slope=slope),
            end=new,
            length=2 * _SMALL_STEP / self.setting.edge.threshold,
            counts=counts._replace(
                steps=counts.steps + 1, small_steps=counts.small_steps + 1
            ),
        )
        return self._proceed(walk, new, after)

    def _enter(self, walk: Walk, candidate: Candidate, new: State) -> Walk:
        del candidate
        is_start = walk.state.t < 0
        ending = walk.ending._replace(
            is_infeasible=is_start & (new.event > 0),
            is_nonfinite=~jnp.all(jnp.isfinite(new.motion.gradient)),
        )
        walk = walk._replace(state=new, end=new, ending=ending)
        return self._proceed(walk, new, Phase.step)
