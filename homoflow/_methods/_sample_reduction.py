"""A few samples in place of many, where model and loss make them the same."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._jax._compilation import fast_compile_jit
from .._jax._precision import full_matmul_precision
from .._jax._structural_cache import cached_by_structure
from .._jaxpr import Degree, degree_in
from .._problem._data import sample_shape, shape_of
from .._problem._losses import Risk, is_squared
from .._problem._problem import Problem
from .._problem._smoothness import kinks_of
from ._task import Task

#: How many times as many samples there have to be for the factorization to pay.
_WORTH = 1.25


def reduce_samples(task: Task) -> Task:
    """The task with the same L(w) on at most n + k + 1 samples, for n inputs, k outputs.

    Where f_w is affine in x, L = (1/m) Σ ½‖f_w(x_i) − y_i‖² is half the squared norm of
    [1 X Y]·M(w)/√m for a matrix M(w). So the rows of [1 X Y] = QR may be exchanged for
    those of R, or of any ER with EᵀE = I; E is chosen such that there is a column of
    ones again. QR loses no accuracy where the Gram matrix of the data would lose half of
    the digits. Where nothing can be gained the task stays as it is.
    """
    if task.dynamics.uses_samples or task.sample_reduction is not None:
        return task
    problem = task.problem
    degree = _degree(problem)
    if degree not in (Degree.LINEAR, Degree.AFFINE):
        return task
    x, y = problem.data
    assert isinstance(problem.objective, Risk)
    few = _few_samples(x, y, degree is Degree.AFFINE, problem.objective.is_mean)
    note = (
        f"{x.shape[0]:,} samples as {few[0].shape[0]:,}: the model is {degree.name.lower()}"
        " in its input and the loss is squared"
    )
    smaller = eqx.tree_at(lambda p: p.data, problem, few)
    return dataclasses.replace(task, problem=smaller, sample_reduction=note)


@cached_by_structure()
def _degree(problem: Problem) -> Degree:
    """What is proved of the model in its input; `UNKNOWN` if that is of no use."""
    objective = problem.objective
    if not is_squared(objective):
        return Degree.UNKNOWN
    assert isinstance(objective, Risk)
    x, y = problem.data
    if not (eqx.is_array(x) and x.dtype == problem.dtype):
        return Degree.UNKNOWN
    samples = x.shape[0]
    if samples < _WORTH * ((x.size + y.size) // samples + 1):
        return Degree.UNKNOWN
    # At kinks in the weights, samples are what methods look at one by one.
    if kinks_of(problem) or shape_of(problem.model, sample_shape(x)).dtype != x.dtype:
        return Degree.UNKNOWN
    arrays, rest = eqx.partition(problem.model, eqx.is_array)

    def prediction(x, arrays):
        return eqx.combine(arrays, rest)(x)

    degree = degree_in(prediction, sample_shape(x), arrays)
    if degree is Degree.AFFINE and not objective.is_mean:
        # A sum over samples gives each the weight 1, where those of R have others.
        return Degree.UNKNOWN
    return degree if degree in (Degree.LINEAR, Degree.AFFINE) else Degree.UNKNOWN


@fast_compile_jit
@full_matmul_precision()
def _few_samples(
    x: Float[Array, "m ..."], y: Array, is_affine: bool, is_mean: bool
) -> tuple[Float[Array, "few ..."], Float[Array, "few ..."]]:
    """Samples over which a linear model has the same mean (or sum) of squared errors."""
    samples = x.shape[0]
    columns = [x.reshape(samples, -1), y.reshape(samples, -1).astype(x.dtype)]
    if is_affine:
        columns.insert(0, jnp.ones((samples, 1), x.dtype))
    rows = _triangle(jnp.concatenate(columns, axis=1))
    few = rows.shape[0]
    if is_mean:
        rows = rows * jnp.sqrt(jnp.asarray(few / samples, x.dtype))
    if is_affine:
        rows = _spread(rows)[:, 1:]
    inputs = rows[:, : x[0].size].reshape(few, *x.shape[1:])
    return inputs, rows[:, x[0].size :].reshape(few, *y.shape[1:])


def _spread(rows: Float[Array, "few n"]) -> Float[Array, "few n"]:
    """The rows after a reflection that turns a first column (±√few, 0, …, 0) into ones."""
    few = rows.shape[0]
    sign = jax.lax.stop_gradient(jnp.sign(rows[0, 0]))
    rows = rows.at[0].multiply(sign)
    ones = jnp.full(few, 1 / jnp.sqrt(jnp.asarray(few, rows.dtype)))
    normal = ones.at[0].add(-1)
    size = jnp.sum(normal**2)
    # Of one row alone there is nothing to spread.
    scale = jnp.where(size > 0, 2 / jnp.where(size > 0, size, 1), 0)
    spread = rows - scale * jnp.outer(normal, normal @ rows)
    return spread.at[:, 0].set(1)


@jax.custom_jvp
def _triangle(a: Float[Array, "m n"]) -> Float[Array, "few n"]:
    """R of a = QR, up to a rotation of its rows.

    What it is used for only sees RᵀR = aᵀa. So dR = Qᵀda will do for its derivative,
    d(RᵀR) = Rᵀ(Qᵀda) + (…)ᵀ, though it is not triangular: it also holds where columns of
    the data depend on one another, where R itself has no derivative.
    """
    return jnp.linalg.qr(a, mode="r")


@_triangle.defjvp
def _triangle_derivative(primals, tangents):
    (a,), (da,) = primals, tangents
    q, r = _orthonormal(a)
    return r, q.T @ da


@jax.custom_jvp
def _orthonormal(a: Float[Array, "m n"]) -> tuple[Array, Array]:
    """Q and R, with derivatives that go with those of `_triangle`: QR = a remains."""
    q, r = jnp.linalg.qr(a)
    return q, r


@_orthonormal.defjvp
def _orthonormal_derivative(primals, tangents):
    (a,), (da,) = primals, tangents
    q, r = _orthonormal(a)
    dr = q.T @ da
    across = da - q @ dr
    dq = jax.scipy.linalg.solve_triangular(r, across.T, trans=1).T
    return (q, r), (dq, dr)
