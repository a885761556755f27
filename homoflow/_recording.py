"""What is recorded of a solve: while it runs, or of its states afterwards."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._equation import Equation

#: Up to so many numbers the states at all times are kept.
MOST_KEPT = 2**20


class Recording(NamedTuple):
    """What Diffrax is to save, and how its solution is read.

    `read` returns what was recorded, the final state, and the time that belongs to it.
    """

    saveat: dfx.SaveAt
    read: Callable[[dfx.Solution], tuple[Any, Array, Array]]


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

    def of_states(states: Float[Array, "times size"]) -> Any:
        # Derivatives go through one gradient after the other: its parts need not be kept.
        one = jax.checkpoint(
            lambda at: equation.record(*at, equation.args), prevent_cse=False
        )
        return lax.map(one, (ts, states))

    def along(solution: dfx.Solution):
        assert solution.ys is not None
        assert solution.ts is not None
        return solution.ys["ts"], solution.ys["final"][0], solution.ts["final"][0]

    def afterwards(solution: dfx.Solution):
        states, final, reached = along(solution)
        return of_states(states), final, reached

    def of_backsolve(solution: dfx.Solution):
        assert solution.ys is not None
        assert solution.ts is not None
        return of_states(solution.ys[:-1]), solution.ys[-1], solution.ts[-1]

    if isinstance(adjoint, dfx.BacksolveAdjoint):
        # It can differentiate through saved states only.
        with_end = jnp.append(ts, t1)
        return Recording(dfx.SaveAt(ts=with_end), of_backsolve)
    kept = ts.size * equation.start.size <= MOST_KEPT
    at_times = (
        dfx.SubSaveAt(ts=ts) if kept else dfx.SubSaveAt(ts=ts, fn=equation.record)
    )
    subs = {"final": dfx.SubSaveAt(t1=True), "ts": at_times}
    saveat = dfx.SaveAt(subs=subs, solver_state=has_memory)
    return Recording(saveat, afterwards if kept else along)
