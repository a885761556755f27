"""What is recorded of a solve: while it runs, or of its states afterwards."""

from collections.abc import Callable
from typing import NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._observe._recorder import Recorder, Values
from .._observe._time_grid import TimeGrid
from ._vector_field import Equation

#: Up to so many numbers the states at all times are kept.
MAX_STORED = 2**20


class Records(NamedTuple):
    """What was recorded, and the solve's end.

    - `values`: of all observables; `saved`: the weights, if models are to be saved.
    - `reached`: the time of the end; `last`: the state there as the solver left it;
        `final`: with its laws restored.
    """

    values: Values
    saved: PyTree | None
    final: Float[Array, " size"]
    last: Float[Array, " size"]
    reached: Float[Array, ""]


class SavePlan(NamedTuple):
    """What Diffrax is to save, and how its solution is read."""

    saveat: dfx.SaveAt
    read: Callable[[dfx.Solution], Records]


def make_save_plan(
    equation: Equation,
    recorder: Recorder,
    span: TimeGrid,
    adjoint: dfx.AbstractAdjoint,
    *,
    save_models: bool,
    needs_solver_state: bool,
) -> SavePlan:
    """To record all observables at the times of `span`.

    Under vmap a solve that records as it goes does so for all seeds whenever one of them
    has come to a time: it costs a multiple of what is done after it, for as many states
    as there are times. Where these are a lot to keep, only what is recorded of them is.
    """
    ts, t0, t1 = span.times(), span.t0, span.t1
    if isinstance(adjoint, dfx.BacksolveAdjoint):
        # It can differentiate through saved states only.
        saveat = dfx.SaveAt(ts=jnp.append(ts, t1))
        return SavePlan(saveat, _read_backsolve(equation, ts, save_models))
    if ts.size * equation.start.size <= MAX_STORED:
        subs = {"states": dfx.SubSaveAt(ts=ts)}
        read = _read_states(equation, ts, t0, save_models)
    else:
        recorder.refuse_sequential(MAX_STORED)
        subs = _subs_along(equation, recorder, ts, save_models)
        read = _read_along(equation)
    subs["final"] = dfx.SubSaveAt(t1=True)
    return SavePlan(dfx.SaveAt(subs=subs, solver_state=needs_solver_state), read)


def _restore_states(
    equation: Equation, states: Float[Array, "times size"]
) -> Float[Array, "times size"]:
    """The states with their laws restored, in one small program for all of them."""
    if equation.orbit is None:
        return states
    restore = jax.checkpoint(
        lambda state: equation.restore_laws(state, equation.args), prevent_cse=False
    )
    return lax.map(restore, states)


def _observe_states(
    equation: Equation,
    ts: Float[Array, " times"],
    states: Float[Array, "times size"],
    save_models: bool,
) -> tuple[Values, PyTree | None]:
    """All observables of states that were kept, one after the other."""
    args = equation.args

    def observe_next(carries, inputs):
        index, t, state = inputs
        point, recorder = equation.point_at(t, state, args)
        values, carries = recorder.record_next(point, index, carries)
        return carries, (values, point.weights if save_models else None)

    # Derivatives go through one gradient after the other: its parts need not be kept.
    step = jax.checkpoint(observe_next, prevent_cse=False)
    inputs = jnp.arange(ts.size), ts, states
    _, (values, saved) = lax.scan(step, args[3], inputs)
    return equation.recorder.thin_out(values), saved


def _read_states(
    equation: Equation,
    ts: Float[Array, " times"],
    t0: Float[Array, ""],
    save_models: bool,
) -> Callable[[dfx.Solution], Records]:
    def read(solution: dfx.Solution) -> Records:
        states, last, reached = _saved(solution, "states")
        # Diffrax saves nothing, not even the start, until a step has succeeded.
        start = jnp.where(ts[0] == t0, equation.start, states[0])
        states = states.at[0].set(start)
        # Interpolated to its end, a step differs from that by rounding.
        end = jnp.where(ts[-1] == reached, last, states[-1])
        states = jnp.concatenate([states.at[-1].set(end), last[None]])
        restored = _restore_states(equation, states)
        values, saved = _observe_states(equation, ts, restored[:-1], save_models)
        return Records(values, saved, restored[-1], last, reached)

    return read


def _read_backsolve(
    equation: Equation, ts: Float[Array, " times"], save_models: bool
) -> Callable[[dfx.Solution], Records]:
    def read(solution: dfx.Solution) -> Records:
        assert solution.ys is not None
        assert solution.ts is not None
        states, last = solution.ys[:-1], solution.ys[-1]
        restored = _restore_states(equation, states)
        values, saved = _observe_states(equation, ts, restored, save_models)
        return Records(values, saved, last, last, solution.ts[-1])

    return read


def _subs_along(
    equation: Equation,
    recorder: Recorder,
    ts: Float[Array, " times"],
    save_models: bool,
) -> dict[str, dfx.SubSaveAt]:
    """What Diffrax records as it goes: observables with the same times together."""

    def observe(names: frozenset[str], has_weights: bool):
        def at(t, state, args):
            state = equation.restore_laws(state, args)
            point, recorder = equation.point_at(t, state, args)
            saved = point.weights if has_weights else None
            return recorder.record_apart(point, args[3], names), saved

        return at

    subs = {}
    for n in sorted(set(recorder.every.values())):
        names = frozenset(name for name, every in recorder.every.items() if every == n)
        function = observe(names, save_models and n == 1)
        subs[f"every {n}"] = dfx.SubSaveAt(ts=ts[::n], fn=function)
    return subs


def _read_along(equation: Equation) -> Callable[[dfx.Solution], Records]:
    def read(solution: dfx.Solution) -> Records:
        assert solution.ys is not None
        (_, saved), last, reached = _saved(solution, "every 1")
        values: Values = {}
        for key, recorded in solution.ys.items():
            if key != "final":
                values.update(recorded[0])
        final = equation.restore_laws(last, equation.args)
        return Records(values, saved, final, last, reached)

    return read


def _saved(solution: dfx.Solution, key: str) -> tuple[PyTree, Array, Array]:
    """What was saved at the times, the last state and its time."""
    assert solution.ys is not None
    assert solution.ts is not None
    return solution.ys[key], solution.ys["final"][0], solution.ts["final"][0]
