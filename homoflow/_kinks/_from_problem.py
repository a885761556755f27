"""From a problem to the system that the exact flow follows."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from .._dynamics._base import Descent
from .._jax._precision import full_matmul_precision
from .._jax._structural_cache import cached_by_structure
from .._jaxpr import PiecewiseSmoothFunction, expose_kinks
from .._problem._losses import Risk
from .._problem._problem import Problem
from ._rows import WeightLayout
from ._system import System


def kinked_function(problem: Problem) -> PiecewiseSmoothFunction:
    """The model of a problem with its kinks exposed, from shapes alone."""
    return _expose(problem)[0]


def num_pairs(problem: Problem) -> int:
    """How many pairs of a sample and a kink the exact flow of a problem follows."""
    assert problem.num_samples is not None
    return problem.num_samples * kinked_function(problem).count


def as_system(
    problem: Problem, descent: Descent | None = None, t0: Array | None = None
) -> System:
    """The problem in the form that the exact flow needs.

    `descent`: what falls in place of the loss, and how fast; `t0`: when the flow begins.
    """
    function, constants = _expose(problem)
    weights, objective = problem.weights, problem.objective
    assert isinstance(objective, Risk)
    x, y = problem.data
    low, high = jax.vmap(lambda xi: function.slopes(weights, constants, xi))(x)
    prediction = eqx.filter_eval_shape(problem.model, _shape_of_sample(x))
    return System(
        function=function,
        loss_of_sample=_Hoisted.create(objective.loss, prediction, _shape_of_sample(y)),
        is_mean=objective.is_mean,
        constants=constants,
        x=x,
        y=y,
        low=low,
        high=high,
        layout=WeightLayout(function, weights),
        descent=None if descent is None else descent.from_time(t0),
    )


class _Hoisted(eqx.Module):
    """A function with the traced arrays of its closure as leaves.

    A rule for derivatives sees no others: what a user's function closes over would
    count as constant.
    """

    fn: Callable = eqx.field(static=True)
    captured: list[Array]

    @staticmethod
    def create(fn: Callable, *shapes: PyTree) -> "_Hoisted":
        # A module with traced leaves cannot be hashed, as this needs; a function can.
        converted, captured = jax.closure_convert(lambda *a: fn(*a), *shapes)
        return _Hoisted(converted if captured else fn, captured)

    def __call__(self, *arguments):
        return self.fn(*arguments, *self.captured)


def _expose(problem: Problem) -> tuple[PiecewiseSmoothFunction, PyTree]:
    """The model with its kinks exposed, and all arrays that are not trained.

    Those are the frozen ones and those that the model's functions close over.
    """
    parts = problem.weights, problem.frozen, problem.data
    arrays = eqx.filter(problem.frozen, eqx.is_array)
    # Matrix products are traced in the precision of the solver, whoever asks first.
    with full_matmul_precision():
        function = _expose_by_structure(*parts)
        if function is not None:
            return function, (arrays, [])
        function, captured = _trace(*parts)
        return function, (arrays, captured)


@cached_by_structure()
def _expose_by_structure(
    weights: PyTree, frozen: PyTree, data: PyTree
) -> PiecewiseSmoothFunction | None:
    """The model with its kinks exposed, or `None` if it holds any values.

    Tracers and arrays that the model's functions close over must not be remembered.
    """
    function, captured = _trace(weights, frozen, data)
    return None if captured or function.has_constants else function


def _trace(
    weights: PyTree, frozen: PyTree, data: PyTree
) -> tuple[PiecewiseSmoothFunction, list[Array]]:
    """The model with its kinks exposed, and the tracers that it closes over."""
    arrays, rest = eqx.partition(frozen, eqx.is_array)

    def predict(weights, arrays, x):
        return eqx.combine(weights, arrays, rest)(x)

    x = _shape_of_sample(data[0])
    hoisted = _Hoisted.create(predict, *jax.tree.map(_shape, (weights, arrays)), x)

    def predict_with(weights, constants, x):
        arrays, captured = constants
        return hoisted.fn(weights, arrays, x, *captured)

    constants = arrays, hoisted.captured
    return expose_kinks(predict_with, weights, constants, x), hoisted.captured


def _shape(a: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype)


def _shape_of_sample(samples: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), samples)
