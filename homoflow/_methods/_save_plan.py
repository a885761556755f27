"""What is recorded of a solve: while it runs, or of its states afterwards."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._vector_field import Equation

#: Up to so many numbers the states at all times are kept.
MOST_KEPT = 2**20


class Recorded(NamedTuple):
    """What was recorded, and the solve's end.

    - `reached`: the time of the end; `last`: the state there as the solver left it;
        `final`: with its laws restored.
    """

    seen: Any
    final: Float[Array, " size"]
    last: Float[Array, " size"]
    reached: Float[Array, ""]


class Recording(NamedTuple):
    """What Diffrax is to save, and how its solution is read."""

    saveat: dfx.SaveAt
    read: Callable[[dfx.Solution], Recorded]


def recording(
    equation: Equation,
    ts: Float[Array, " times"],
    t1: Float[Array, ""],
    adjoint: dfx.AbstractAdjoint,
    *,
    has_memory: bool,
) -> Recording:
    """Of what the equation records, at `ts`.

    Under vmap a solve that records as it goes does so for all seeds whenever one of them
    has come to a time: it costs a multiple of what is done after it, for as many states
    as there are times. Where these are a lot to keep, only what is recorded of them is.
    """

    args = equation.args

    def seen_and_restored(at: tuple[Array, Array]) -> tuple[Any, Array]:
        t, state = at
        state = equation.restored(state, args)
        return equation.record(t, state, args), state

    def of_states(states: Float[Array, "times size"]) -> tuple[Any, Array]:
        # Derivatives go through one gradient after the other: its parts need not be kept.
        one = jax.checkpoint(seen_and_restored, prevent_cse=False)
        return lax.map(one, (ts, states))

    def along(solution: dfx.Solution) -> Recorded:
        seen, last, reached = _saved(solution)
        return Recorded(seen, equation.restored(last, args), last, reached)

    def afterwards(solution: dfx.Solution) -> Recorded:
        states, last, reached = _saved(solution)
        # The end is mostly one of the times: its laws need not be restored twice.
        is_last = ts[-1] == reached
        states = states.at[-1].set(jnp.where(is_last, last, states[-1]))
        seen, restored = of_states(states)
        final = lax.cond(
            is_last, lambda: restored[-1], lambda: equation.restored(last, args)
        )
        return Recorded(seen, final, last, reached)

    def of_backsolve(solution: dfx.Solution) -> Recorded:
        assert solution.ys is not None
        assert solution.ts is not None
        last = solution.ys[-1]
        return Recorded(of_states(solution.ys[:-1])[0], last, last, solution.ts[-1])

    if isinstance(adjoint, dfx.BacksolveAdjoint):
        # It can differentiate through saved states only.
        with_end = jnp.append(ts, t1)
        return Recording(dfx.SaveAt(ts=with_end), of_backsolve)
    kept = ts.size * equation.start.size <= MOST_KEPT
    at_times = (
        dfx.SubSaveAt(ts=ts)
        if kept
        else dfx.SubSaveAt(ts=ts, fn=lambda t, v, args: seen_and_restored((t, v))[0])
    )
    subs = {"final": dfx.SubSaveAt(t1=True), "ts": at_times}
    saveat = dfx.SaveAt(subs=subs, solver_state=has_memory)
    return Recording(saveat, afterwards if kept else along)


def _saved(solution: dfx.Solution) -> tuple[Any, Array, Array]:
    """What was saved at the times, the last state and its time."""
    assert solution.ys is not None
    assert solution.ts is not None
    return solution.ys["ts"], solution.ys["final"][0], solution.ts["final"][0]
