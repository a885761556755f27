"""Float32 problems followed in float64: for what float32 cannot tell apart."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._jax._dtypes import cast_floats
from .._jax._text import first_line
from .._jax._tracing import is_concrete_call
from .._observe._recorder import Recorder
from .._observe._time_grid import TimeGrid
from .._problem._problem import Problem
from .._results._trajectory import Trajectory


def solve_in_float64(
    solve: Callable[[Problem, Recorder, TimeGrid], Trajectory],
    problem: Problem,
    recorder: Recorder,
    grid: TimeGrid,
) -> Trajectory:
    """`solve` in float64 for the same numbers, its answer rounded to float32.

    Whether JAX has float64 switched on or not.
    """
    with jax.enable_x64(True):
        wide = widened((problem, recorder, grid))
        trajectory = _narrow(solve(*wide))

    def as_given(model: PyTree) -> PyTree:
        return eqx.combine(eqx.filter(model, problem.mask), problem.frozen)

    # What is not trained comes back in its own dtype.
    models = None if trajectory.models is None else as_given(trajectory.models)
    where = lambda t: (t.model, t.models)  # noqa: E731
    return eqx.tree_at(
        where, trajectory, (as_given(trajectory.model), models), is_leaf=_is_none
    )


def widened(tree: PyTree) -> PyTree:
    """The same numbers in float64, which has to be switched on."""
    return cast_floats(tree, jnp.float64)


def _is_none(leaf) -> bool:
    return leaf is None


def why_not_in_float64(problem: Problem) -> str | None:
    """What keeps a float32 problem from being followed in float64, or `None`."""
    if not (is_concrete_call(problem) or jax.config.read("jax_enable_x64")):
        return (
            "the sides of kinks are told apart in float64 only, which under jit and "
            "vmap has to be switched on: run `jax.config.update('jax_enable_x64', "
            "True)` before anything else (the weights may stay float32)"
        )
    with jax.enable_x64(True):
        wide = widened(problem)
        try:
            eqx.filter_eval_shape(wide.objective, wide.model, wide.data)
        except (TypeError, ValueError) as error:  # strict promotion raises either
            return f"the model cannot be evaluated in float64 ({first_line(error)})"
    return None


def _narrow(tree: PyTree) -> PyTree:
    """The arrays as they would be with float64 switched off."""

    def narrow_integers(leaf):
        is_wide = eqx.is_array(leaf) and leaf.dtype == jnp.int64
        return leaf.astype(jnp.int32) if is_wide else leaf

    return jax.tree.map(narrow_integers, cast_floats(tree, jnp.float32))
